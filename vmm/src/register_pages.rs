//! Lets the guest read a disk's registers, and acknowledge its interrupts, without an exit.
//!
//! A capability: the builder calls it, except with `--trap-registers` or on a KVM without read-only memory slots. Without it, these
//! accesses exit to the transport, with the same result.

use std::sync::Arc;

use devices::spawn::Spawn;
use devices::virtio::registers::RegisterPage;
use devices::virtio::spec::mmio::{INTERRUPT_ACK_OFFSET, INTERRUPT_USED_BUFFER};
use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VmFd};
use vm_memory::GuestAddress;

use crate::config::VmConfig;
use crate::error::Error;
use crate::lock;
use crate::machine::MachineDisk;

/// The memory slots of device registers come after those of RAM.
const FIRST_READ_ONLY_SLOT: u32 = 8;

/// Whether there are disks, the user wants this, and KVM can do it.
pub(crate) fn are_used(config: &VmConfig, kvm: &Kvm) -> bool {
    !config.disks.is_empty() && !config.trap_registers && kvm.check_extension(Cap::ReadonlyMem)
}

/// Tells KVM to turn the acknowledgement of used buffers into a write to an eventfd of the transport. That of a configuration change has
/// another value, and still exits.
///
/// # Errors
/// When KVM refuses.
pub(crate) fn acknowledge(vm: &VmFd, disks: &[MachineDisk]) -> Result<(), Error> {
    disks.iter().try_for_each(|disk| {
        let address = IoEventAddress::Mmio(disk.window.base.0 + INTERRUPT_ACK_OFFSET);
        let transport = lock(&disk.transport);
        vm.register_ioevent(transport.acknowledgements(), &address, INTERRUPT_USED_BUFFER)
            .map_err(Error::kvm("register an interrupt's acknowledgement"))
    })
}

/// Maps the page of each disk's registers into the guest. At each such change of its memory map KVM waits for milliseconds until no vCPU
/// can be using the old map. So a thread makes the changes while the guest runs. Until then the guest's reads exit, and get the same
/// values.
///
/// # Errors
/// When the host has no thread left.
pub(crate) fn map(vm: &Arc<VmFd>, disks: &[MachineDisk], spawn: &Spawn) -> Result<(), Error> {
    let page = |disk: &MachineDisk| (disk.window.base, Arc::clone(lock(&disk.transport).page()));
    let (vm, pages) = (Arc::clone(vm), disks.iter().map(page).collect::<Vec<_>>());
    let map = move || {
        for (index, (base, page)) in (0..).zip(pages) {
            if let Err(error) = register_read_only(&vm, index, base, page) {
                tracing::warn!(
                    "cannot map the disks' registers into the guest: {error}; the guest runs, with a VM exit for each read of a register",
                    error = crate::error::WithCauses(&error)
                );
                return;
            }
        }
    };
    spawn("registers".to_owned(), Box::new(map)).map_err(Error::host("start a thread"))?;
    Ok(())
}

/// Lets the guest read `page` at `address` without an exit. Its writes there still exit (`api.rst` 4.35, KVM_MEM_READONLY). Each page has
/// an `index` of its own.
///
/// # Errors
/// When KVM refuses.
#[expect(unsafe_code, reason = "a memory slot hands host memory to KVM")]
fn register_read_only(
    vm: &VmFd,
    index: u32,
    address: GuestAddress,
    page: Arc<RegisterPage>,
) -> Result<(), Error> {
    // Never freed: KVM keeps the address until the VM's last descriptor is closed.
    let page = Arc::into_raw(page);
    let slot = kvm_userspace_memory_region {
        slot: FIRST_READ_ONLY_SLOT + index,
        flags: KVM_MEM_READONLY,
        guest_phys_addr: address.0,
        memory_size: size_of::<RegisterPage>() as u64,
        userspace_addr: page as u64,
    };
    // SAFETY: the page is leaked, whole pages in size and alignment, and made of atomics, so that it may be read any time.
    unsafe { vm.set_user_memory_region(slot) }
        .map_err(Error::kvm("register a page of device registers"))
}
