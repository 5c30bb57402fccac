//! A vCPU. It is made from the register images of `arch::cpu` ([`setup`]), runs on a thread of its own ([`run`], [`thread`]), and is a
//! value while it stands still ([`state`]).

mod exits;
mod halt;
mod run;
mod setup;
mod state;
mod thread;

pub(crate) use setup::{Vcpu, VcpuSetup, VcpuStart};
pub(crate) use state::{VcpuState, read_msrs};
pub(crate) use thread::{VcpuThread, install_kick_handler};
