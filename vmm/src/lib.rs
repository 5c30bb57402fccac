//! The virtual machine monitor: KVM, threads, the wiring of devices, and a machine from its configuration to its exit status.
//!
//! [`builder`] makes two values that own all others. The `Machine` owns every resource of the VM. The [`EventLoop`] owns the machine and
//! everything that the main thread listens to. The builder plugs in capabilities, such as `control`, `snapshot`, `exec` and `affinity`
//! (`tests/tests/structure/main.rs` lists all). No core module imports them.
//!
//! Two walks lead through it. *A kernel boots*: [`builder`] makes a paused machine in numbered steps, `vcpu::setup` applies the register
//! images of `arch`, `vcpu::run` serves exits. *A guest write reaches the file*: `attach` has connected the disk to KVM; the rest of that
//! walk is in `devices::block`.

mod affinity;
mod attach;
mod binary_pages;
mod boot_image;
pub mod builder;
pub mod chapters;
mod chardev;
mod config;
mod console;
mod control;
mod disk_faults;
mod error;
mod event_loop;
mod events;
mod exec;
mod explain;
mod gdb;
mod halt_watch;
mod host_cpu;
mod hugepages;
mod irq_chips;
mod job_thread;
mod kernel_pages;
mod kvm;
mod listener;
mod machine;
mod memory;
mod output_files;
mod register_pages;
mod sandbox;
mod signals;
mod snapshot;
mod sources;
mod thread_memory;
mod timeout;
pub mod trace;
mod vcpu;
mod write_logs;

pub use builder::build;
pub use config::{ConsoleConfig, DiskConfig, GdbConfig, SandboxMode, VmConfig};
pub use control::{Awaited, wait as wait_for_incoming};
pub use error::{Error, VcpuError, WithCauses};
pub use event_loop::EventLoop;
pub use explain::{Explanation, Part, Region, Thread, explain};
pub use host_cpu::missing_hardware_support;
pub use machine::Outcome;
pub use sandbox::on_violation;
pub use signals::{Signals, reset_signals, with_default_signals};
pub use snapshot::{ClockMode, Incoming, IncomingConfig, MapMode, NewFile, check_new_increment};

use devices::{GuestMemory, lock};
