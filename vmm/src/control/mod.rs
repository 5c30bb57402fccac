//! Control of a running machine over a Unix socket, in QEMU's Machine Protocol (QMP): the chapter is `vmm/docs/control.md`.
//!
//! [`framing`] cuts the byte stream into JSON objects, [`json`] reads them, [`protocol`] makes requests of them, [`client`] is one connection,
//! [`server`] all of them on the main loop, [`commands`] what they can ask of the machine ([`block`]: of its disks), [`schema`] how that is described
//! to them. Nothing here blocks, and no client can make the buffers grow beyond their bounds.

mod block;
mod client;
mod commands;
mod framing;
mod json;
mod metrics;
mod protocol;
mod schema;
mod server;

pub(crate) use commands::Operator;
pub(crate) use protocol::{Event, Source};
pub(crate) use server::Server;
