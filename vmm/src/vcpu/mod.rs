//! A vCPU: set up from register images, run on a thread of its own, stopped and reset through its handle.

mod exits;
mod handle;
mod initial;
mod run;
mod setup;

pub(crate) use handle::{VcpuHandle, prepare_kick_signal};
pub(crate) use setup::VcpuSetup;
