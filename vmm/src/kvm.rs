//! Opens /dev/kvm, says why it cannot be used, and makes an empty VM.
//!
//! The builder calls each of these functions once. With `--incoming defer`, `control::deferred` makes the empty VM while it waits for a
//! client. vCPUs, interrupt lines and the machine's clock use the VM's file descriptor directly.

use std::io;
use std::sync::Arc;

use arch::layout;
use kvm_bindings::{
    CpuId, KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES, KVM_PIT_SPEAKER_DUMMY, kvm_pit_config,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VmFd};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::GuestMemory;
use crate::error::Error;

/// The extensions of KVM that minivmm requires, with their names for an error message (`Documentation/virt/kvm/api.rst`, "Extension").
const REQUIRED: [(Cap, &str); 5] = [
    (Cap::Irqchip, "an in-kernel interrupt controller (KVM_CAP_IRQCHIP)"),
    (Cap::Ioeventfd, "ioeventfd (KVM_CAP_IOEVENTFD)"),
    (Cap::UserMemory, "user memory slots (KVM_CAP_USER_MEMORY)"),
    (Cap::ImmediateExit, "immediate exit (KVM_CAP_IMMEDIATE_EXIT)"),
    (Cap::ExtCpuid, "extended CPUID (KVM_CAP_EXT_CPUID)"),
];

/// What every machine begins with, whatever its configuration.
pub(crate) struct EmptyVm {
    pub(crate) kvm: Kvm,
    /// No memory, no interrupt controllers.
    pub(crate) vm: Arc<VmFd>,
    /// The CPUID leaves that KVM supports on this host.
    pub(crate) cpuid: CpuId,
}

impl EmptyVm {
    /// Opens /dev/kvm, makes the VM and reads the leaves.
    ///
    /// # Errors
    /// No /dev/kvm, no permission, an old KVM, or KVM refuses.
    pub(crate) fn new() -> Result<Self, Error> {
        let kvm = open()?;
        let vm = Arc::new(create_vm(&kvm)?);
        let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES);
        Ok(Self { cpuid: cpuid.map_err(Error::kvm("read the supported CPUID"))?, vm, kvm })
    }
}

/// Opens /dev/kvm and checks that it can do the work.
fn open() -> Result<Kvm, Error> {
    let kvm = Kvm::new().map_err(|error| Error::NoKvm(error.into()))?;
    match kvm.get_api_version() {
        version if version == KVM_API_VERSION as i32 => {}
        // The call failed: /dev/kvm is another device.
        ..0 => return Err(Error::NoKvm(io::Error::last_os_error())),
        _ => return Err(Error::KvmLacks("API version 12")),
    }
    for (capability, name) in REQUIRED {
        match kvm.check_extension_int(capability) {
            1.. => {}
            0 => return Err(Error::KvmLacks(name)),
            // The call failed: a seccomp filter refuses it.
            _ => return Err(Error::NoKvm(io::Error::last_os_error())),
        }
    }
    Ok(kvm)
}

fn create_vm(kvm: &Kvm) -> Result<VmFd, Error> {
    let vm = loop {
        match kvm.create_vm() {
            // A pending signal, or task work of io_uring, interrupts the registration of KVM's MMU notifier
            // (`mm_take_all_locks`).
            Err(error) if error.errno() == libc::EINTR => {}
            result => break result.map_err(Error::kvm("create a VM"))?,
        }
    };
    // While a guest is in real mode, KVM on Intel needs three pages for a TSS and one for an identity map, at addresses without guest
    // memory (`api.rst` 4.36 KVM_SET_TSS_ADDR, 4.40 KVM_SET_IDENTITY_MAP_ADDR). AMD ignores them.
    vm.set_identity_map_address(layout::KVM_IDENTITY_MAP.0)
        .map_err(Error::kvm("place the identity map"))?;
    vm.set_tss_address(layout::KVM_TSS.0 as usize)
        .map_err(Error::kvm("place the task state segment"))?;
    Ok(vm)
}

/// Makes the interrupt controllers of `vm`: two PICs, an IOAPIC with 24 pins, and a LAPIC for each later vCPU. Also makes the PIT, which
/// kernels without ACPI require.
///
/// # Errors
/// When KVM refuses.
pub(crate) fn create_irq_chips(vm: &VmFd) -> Result<(), Error> {
    vm.create_irq_chip().map_err(Error::kvm("create the interrupt controllers"))?;
    // KVM also emulates the speaker port (0x61). Otherwise a guest that polls it would exit to user space again and again.
    let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
    vm.create_pit2(pit).map_err(Error::kvm("create the interval timer"))
}

/// Puts each region of guest RAM into a memory slot, numbered from 0. Called before [`create_irq_chips`]: when a VM has interrupt
/// controllers, KVM waits milliseconds at each change of its memory map (for an SRCU grace period).
///
/// # Errors
/// When KVM refuses.
#[expect(unsafe_code, reason = "a memory slot hands host memory to KVM")]
pub(crate) fn register_memory(vm: &VmFd, memory: &GuestMemory) -> Result<(), Error> {
    for (slot, region) in (0..).zip(memory.iter()) {
        let slot = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the range is a whole mapping of guest memory, which `Machine` keeps until the VM's file descriptors are closed.
        unsafe { vm.set_user_memory_region(slot) }.map_err(Error::kvm("register guest memory"))?;
    }
    Ok(())
}
