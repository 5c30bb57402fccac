//! The virtual machine monitor: KVM, threads, wiring, and the life of a machine from configuration to exit.
//!
//! Two walks lead through it. *A kernel boots*: [`builder`] makes a paused machine in numbered steps, `vcpu::setup` applies
//! the register images of `arch`, `vcpu::run` serves exits. *A guest write reaches the file*: `attach` registered the
//! queue's notification and the completion's interrupt with KVM; the rest of that walk is in `devices::block`.

mod affinity;
mod attach;
pub mod builder;
mod chips;
mod config;
mod console;
mod control;
mod error;
mod event_loop;
mod events;
mod firmware;
mod kvm;
mod listener;
mod machine;
mod memory;
mod signals;
mod timing;
mod vcpu;
mod vm;

#[doc = include_str!("../docs/a-kernel-boots.md")]
pub mod a_kernel_boots {}

#[doc = include_str!("../docs/control.md")]
pub mod control_of_a_running_machine {}

pub use builder::build;
pub use config::{ConsoleConfig, DiskConfig, VmConfig};
pub use error::Error;
pub use event_loop::Outcome;
pub use kvm::missing_hardware_support;
pub use signals::Signals;
pub use timing::{BootTiming, Moment};
pub use vm::Vm;

use devices::GuestMemory;
