//! `--gdb`: a debugger's connection to the guest, in GDB's Remote Serial Protocol. The chapter is `vmm/docs/step-through-a-boot.md`.
//!
//! A capability: the builder plugs [`Gdb`] into the main loop as one of its sources, and nothing else imports it. The crate gdbstub
//! implements the protocol.
//!
//! | file | what it does |
//! |---|---|
//! | [`listener`] | accepts the debugger's connection |
//! | [`packets`] | finds packets in its bytes and checks their checksums |
//! | [`server`] | reads, writes, and starts and stops the machine |
//! | [`target`] | carries out requests of the protocol on vCPUs and guest memory |
//! | [`registers`], [`breakpoints`] | convert registers and breakpoints between GDB's and KVM's form |
//!
//! A debugger sees vCPUs as threads: vCPU 0 is thread 1. Its addresses are virtual, translated by the page tables of the vCPU. While the
//! guest is stopped for the debugger, the machine stands still as for QMP's `stop`, in the state `debug`.
//!
//! The core has two hooks for a debugger:
//!
//! - A vCPU whose KVM_RUN returns with KVM_EXIT_DEBUG sends the event [`VmEvent::Debug`](crate::events::VmEvent::Debug), and waits
//!   until the machine has stopped.
//! - A vCPU that is `held` stays out of the guest when the machine goes on. So one vCPU can step over a breakpoint that is removed for
//!   that time, and no other vCPU runs past it.

mod breakpoints;
mod listener;
mod packets;
mod registers;
mod server;
mod target;
#[cfg(test)]
mod tests;

pub(crate) use server::Gdb;
