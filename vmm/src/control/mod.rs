//! Control of a running machine over a Unix socket, in QEMU's Machine Protocol (QMP). The chapter is `vmm/docs/control.md`.
//!
//! This folder is a capability: the builder plugs [`ControlServer`] into the main loop as one of its sources. Apart from the notes of
//! saved machines, only this folder knows JSON.
//!
//! | file | what it has |
//! |---|---|
//! | [`server`], [`client`] | the socket with its connections, and one connection |
//! | [`framing`], [`json`], [`protocol`] | bytes become JSON values, and JSON values requests |
//! | [`commands`], [`arguments`] | the table of commands, and the check of their arguments |
//! | [`disk_commands`], [`fault_commands`], [`trace_commands`], [`metrics`] | commands about disks, injected faults, traces and counters |
//! | [`migration`], [`deferred`] | commands that save the machine; the socket before there is a machine to restore |
//! | [`event_messages`], [`event_limit`] | the machine's events become messages; how many of them are sent |
//! | [`schema`] | the description of all this for `query-qmp-schema` |
//!
//! No function here blocks, and every buffer has a limit. A command that takes long is answered when its job is done
//! ([`protocol::Answer::WhenDone`]). Until then the next commands of its client wait, but not those of other clients.

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
