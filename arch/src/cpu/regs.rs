//! The first vCPU's general, system and floating-point registers at its first instruction.

use kvm_bindings::{kvm_fpu, kvm_regs, kvm_sregs};

use super::{gdt, paging};
use crate::boot::{Entry, Protocol};

// SDM 3A §2.5.
const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
// SDM 3A §2.2.1.
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Always set (SDM 1 §3.4.3). All else clear: interrupts off, direction up.
const RFLAGS_RESERVED: u64 = 1 << 1;

/// The registers that start `entry`. `sregs` are what KVM gave the vCPU; what a boot protocol does not speak of (the
/// APIC base, pending interrupts) stays as it is.
pub fn boot(entry: &Entry, sregs: kvm_sregs) -> (kvm_regs, kvm_sregs) {
    let mut regs = kvm_regs { rip: entry.ip.0, rflags: RFLAGS_RESERVED, ..Default::default() };
    let data = gdt::DATA;
    let mut sregs = kvm_sregs {
        ds: data,
        es: data,
        fs: data,
        gs: data,
        ss: data,
        tr: gdt::TSS,
        gdt: gdt::register(),
        // No interrupt table: until the guest has its own, a fault ends in a triple fault, which the monitor sees.
        idt: Default::default(),
        ..sregs
    };
    match entry.protocol {
        // Documentation/x86/boot.rst, "64-bit Boot Protocol".
        Protocol::Linux64 => {
            regs.rsi = entry.start.0;
            sregs.cs = gdt::CODE64;
            sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
            sregs.cr3 = paging::CR3;
            sregs.cr4 = CR4_PAE;
            sregs.efer = EFER_LME | EFER_LMA;
        }
        // Xen's docs/misc/pvh.pandoc: 32-bit protected mode without paging, flat segments.
        Protocol::Pvh => {
            regs.rbx = entry.start.0;
            sregs.cs = gdt::CODE32;
            sregs.cr0 = CR0_PE | CR0_ET;
            sregs.cr3 = 0;
            sregs.cr4 = 0;
            sregs.efer = 0;
        }
    }
    (regs, sregs)
}

/// The floating-point unit as `FNINIT` leaves it (SDM 1 §8.1.5), with SSE exceptions masked (§10.2.3).
pub fn fpu() -> kvm_fpu {
    kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::GuestAddress;

    fn reset() -> kvm_sregs {
        kvm_sregs {
            apic_base: 0xfee0_0900,
            cr0: 0x6000_0010,
            cr3: 7,
            cr4: 9,
            efer: 11,
            ..Default::default()
        }
    }

    #[test]
    fn the_64_bit_entry_runs_in_long_mode() {
        let entry = Entry {
            protocol: Protocol::Linux64,
            ip: GuestAddress(0x100_0200),
            start: crate::layout::ZERO_PAGE,
        };
        let (regs, sregs) = boot(&entry, reset());
        assert_eq!((regs.rip, regs.rsi, regs.rflags), (0x100_0200, 0x7000, 2));
        assert_eq!((sregs.cr0, sregs.cr4, sregs.efer), (0x8000_0011, 0x20, 0x500));
        assert_eq!(sregs.cr3, crate::layout::PAGE_TABLES.0);
        assert_eq!((sregs.cs.l, sregs.cs.db, sregs.cs.selector), (1, 0, 0x10));
        assert_eq!((sregs.ss.selector, sregs.ds.limit), (0x18, u32::MAX));
        assert_eq!(sregs.apic_base, 0xfee0_0900);
    }

    #[test]
    fn the_pvh_entry_runs_unpaged_in_protected_mode() {
        let entry = Entry {
            protocol: Protocol::Pvh,
            ip: GuestAddress(0x100_0000),
            start: GuestAddress(0x2000),
        };
        let (regs, sregs) = boot(&entry, reset());
        assert_eq!((regs.rip, regs.rbx, regs.rsi, regs.rflags), (0x100_0000, 0x2000, 0, 2));
        assert_eq!((sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer), (0x11, 0, 0, 0));
        assert_eq!((sregs.cs.l, sregs.cs.db, sregs.cs.limit, sregs.cs.base), (0, 1, u32::MAX, 0));
        assert_eq!((sregs.tr.limit, sregs.tr.base, sregs.tr.type_), (0x67, 0, 0xb));
        assert_eq!(sregs.apic_base, 0xfee0_0900);
    }

    #[test]
    fn the_fpu_masks_every_exception() {
        assert_eq!((fpu().fcw & 0x3f, fpu().mxcsr & 0x1f80), (0x3f, 0x1f80));
    }
}
