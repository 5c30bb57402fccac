//! The numbers of the ioctls that threads may make, computed as linux/kvm.h does from the size of each argument.

use kvm_bindings::{
    KVMIO, kvm_clock_data, kvm_cpuid2, kvm_debugregs, kvm_device_attr, kvm_fpu, kvm_guest_debug,
    kvm_irq_level, kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_msrs, kvm_nested_state,
    kvm_pit_state2, kvm_regs, kvm_sregs, kvm_translation, kvm_userspace_memory_region,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use vmm_sys_util::ioctl::{_IOC_NONE, _IOC_READ, _IOC_WRITE, ioctl_expr};

const fn kvm(direction: u32, number: u32, size: usize) -> u64 {
    ioctl_expr(direction, KVMIO, number, size as u32) as u64
}

const fn none(number: u32) -> u64 {
    kvm(_IOC_NONE, number, 0)
}

const fn get<T>(number: u32) -> u64 {
    kvm(_IOC_READ, number, size_of::<T>())
}

const fn set<T>(number: u32) -> u64 {
    kvm(_IOC_WRITE, number, size_of::<T>())
}

const fn exchange<T>(number: u32) -> u64 {
    kvm(_IOC_READ | _IOC_WRITE, number, size_of::<T>())
}

const KVM_RUN: u64 = none(0x80);
const KVM_KVMCLOCK_CTRL: u64 = none(0xad);
const KVM_GET_REGS: u64 = get::<kvm_regs>(0x81);
const KVM_GET_SREGS: u64 = get::<kvm_sregs>(0x83);
pub(super) const KVM_IRQ_LINE: u64 = set::<kvm_irq_level>(0x61);
pub(super) const KVM_SET_USER_MEMORY_REGION: u64 = set::<kvm_userspace_memory_region>(0x46);

/// KVM_CREATE_VM, which no thread may make.
#[cfg(test)]
pub(super) const KVM_CREATE_VM: u64 = none(0x01);

/// Of a vCPU's own thread.
pub(super) const VCPU: [u64; 5] =
    [KVM_RUN, KVM_KVMCLOCK_CTRL, KVM_IRQ_LINE, KVM_GET_REGS, KVM_GET_SREGS];

/// linux/fs.h, `BLKDISCARD` and `BLKSECDISCARD`.
pub(super) const DISCARD: [u64; 2] = [0x1277, 0x127d];

/// scsi/sg.h.
pub(super) const SG_IO: u64 = 0x2285;

/// linux/io_uring.h.
pub(super) const IORING_REGISTER_ENABLE_RINGS: u64 = 12;

/// The ioctls that a debugger needs in addition.
pub(super) const DEBUG: [u64; 2] = [
    set::<kvm_guest_debug>(0x9b),      // KVM_SET_GUEST_DEBUG
    exchange::<kvm_translation>(0x85), // KVM_TRANSLATE
];

/// The ioctls that read and write the state of a machine that stands still, and one that sockets and the terminal need.
pub(super) fn main() -> Vec<u64> {
    vec![
        KVM_IRQ_LINE,
        KVM_GET_REGS,
        set::<kvm_regs>(0x82),
        KVM_GET_SREGS,
        set::<kvm_sregs>(0x84),
        exchange::<kvm_msrs>(0x88),
        set::<kvm_msrs>(0x89),
        get::<kvm_fpu>(0x8c),
        set::<kvm_fpu>(0x8d),
        get::<kvm_lapic_state>(0x8e),
        set::<kvm_lapic_state>(0x8f),
        get::<kvm_mp_state>(0x98),
        set::<kvm_mp_state>(0x99),
        get::<kvm_vcpu_events>(0x9f),
        set::<kvm_vcpu_events>(0xa0),
        get::<kvm_debugregs>(0xa1),
        set::<kvm_debugregs>(0xa2),
        none(0xa3), // KVM_GET_TSC_KHZ
        get::<kvm_xsave>(0xa4),
        set::<kvm_xsave>(0xa5),
        get::<kvm_xcrs>(0xa6),
        set::<kvm_xcrs>(0xa7),
        get::<kvm_xsave>(0xcf), // KVM_GET_XSAVE2
        exchange::<kvm_nested_state>(0xbe),
        set::<kvm_nested_state>(0xbf),
        exchange::<kvm_irqchip>(0x62),
        get::<kvm_irqchip>(0x63), // KVM_SET_IRQCHIP, whose number says otherwise
        set::<kvm_clock_data>(0x7b),
        get::<kvm_clock_data>(0x7c),
        get::<kvm_pit_state2>(0x9f),
        set::<kvm_pit_state2>(0xa0),
        set::<kvm_device_attr>(0xe2), // KVM_GET_DEVICE_ATTR: a vCPU's time stamp counter
        exchange::<kvm_cpuid2>(0x91), // KVM_GET_CPUID2
        libc::FIONBIO,
    ]
}
