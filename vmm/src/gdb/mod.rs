//! `--gdb`: a debugger's connection to the guest, in GDB's Remote Serial Protocol. The chapter is `vmm/docs/step-through-a-boot.md`.
//!
//! A capability: the builder plugs [`Gdb`] into the main loop as one of its sources, and nothing else imports it. The protocol is the
//! gdbstub crate's. [`listener`] takes the client, [`packets`] checks their sums, [`server`] moves its bytes and starts and stops the machine, [`target`] is
//! what the protocol acts on, with [`registers`] and [`breakpoints`].
//!
//! A debugger sees vCPUs as threads: vCPU 0 is thread 1. Its addresses are the guest's virtual ones, by the page tables of the
//! vCPU. While it looks, the machine stands still as for QMP's `stop`, in the state `debug`: no vCPU is in the guest and no
//! disk has anything with the host.
//!
//! The core knows only this much: a vCPU whose KVM_RUN returns with KVM_EXIT_DEBUG waits for the machine to stop, which the event
//! [`VmEvent::Debug`](crate::events::VmEvent::Debug) asks for; and a vCPU that is `held` stays out of the guest when the machine goes on. That
//! is what a debugger needs to let one vCPU step over a breakpoint while no other can miss it.

mod breakpoints;
mod listener;
mod packets;
mod registers;
mod server;
mod target;
#[cfg(test)]
mod tests;

pub(crate) use server::Gdb;
