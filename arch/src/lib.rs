//! What an x86-64 machine looks like before its first instruction, as values.
//!
//! This crate computes and `vmm` applies. It opens no file, maps no memory and makes no KVM call, so all of it is tested without
//! `/dev/kvm`. A boot takes these steps, each of which needs only the values of the steps before it:
//!
//! 1. [`machine_layout::MachineLayout`] decides where RAM, the disks' register windows and their interrupts are.
//! 2. [`cmdline::build`] joins the default kernel command line and the user's words.
//! 3. [`boot::Kernel::parse`] checks the kernel's headers. [`boot::plan`] decides which bytes go to which address: of the kernel and the
//!    initrd, of the boot protocol's structures, and of the [`tables`] that describe the hardware.
//! 4. [`cpu`] turns the plan's [`boot::Entry`] into the register images of the first vCPU.

pub mod boot;
pub mod cmdline;
pub mod cpu;
pub mod layout;
pub mod machine_layout;
pub mod memory;
pub mod tables;

use vm_memory::GuestAddress;

/// Bytes that the guest finds at the guest-physical `address` before its first instruction: a table, a boot structure or the
/// command line. Error messages call it by its `name`.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the text above names the fields")]
pub struct Structure {
    pub name: &'static str,
    pub address: GuestAddress,
    pub bytes: Vec<u8>,
}
