//! The engines as a queue worker sees them, over real files.

mod damaged;
mod devices;
mod faults;
mod fuzz;
mod injected_faults;
mod log_writes;
mod model;
mod powercut;
mod qcow2;
mod refusals;
pub(super) mod rig;
mod scsi;
mod transfers;
