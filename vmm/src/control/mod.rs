//! Control of a running machine over a Unix socket, in QEMU's Machine Protocol (QMP). The chapter is `vmm/docs/control.md`.
//!
//! This folder is a capability: the builder plugs [`ControlServer`] into the main loop as one of its sources, and nothing else
//! imports it. Beside the notes of saved machines, it alone knows JSON. Bytes become JSON objects in [`framing`] and [`json`], requests in [`protocol`], and
//! commands in [`commands`] (about disks: [`disk_commands`] and [`fault_commands`], traces: [`trace_commands`]), whose arguments [`arguments`] checks. [`client`] is one connection,
//! [`server`] all of them. [`migration`] saves the machine, and [`deferred`] waits for one to restore. [`event_messages`] makes
//! messages of the machine's events, [`event_limit`] holds back what a guest could flood clients with, and [`schema`] describes
//! everything.
//!
//! Nothing here blocks, and no client can make the buffers grow beyond their bounds. A command that takes long answers when it
//! is done ([`protocol::Answer::WhenDone`]); its client's next commands wait, other clients' do not.

mod arguments;
mod client;
mod commands;
mod deferred;
mod disk_commands;
mod event_limit;
mod event_messages;
mod fault_commands;
mod framing;
#[cfg(test)]
mod fuzz;
mod json;
mod metrics;
mod migration;
mod protocol;
mod schema;
mod server;
mod trace_commands;

pub(crate) use deferred::listen;
pub use deferred::{Awaited, wait};
pub(crate) use server::ControlServer;
