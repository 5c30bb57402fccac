//! The engines as a queue worker sees them, over real files.

mod devices;
mod faults;
mod model;
mod qcow2;
pub(super) mod rig;
mod scsi;
mod transfers;
