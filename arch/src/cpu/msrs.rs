//! Model-specific registers: those that do not start at what a kernel expects of firmware, and those that a reset has to
//! put back.

use std::ops::{Range, RangeInclusive};

use kvm_bindings::kvm_msr_entry;

// SDM 4 §2.1, table 2-2.
const IA32_MISC_ENABLE: u32 = 0x1a0;
/// `REP MOVS` and `REP STOS` move more than a byte at a time.
const FAST_STRING: u64 = 1 << 0;
/// No branch-trace store, no precise event sampling: this machine has no performance counters.
const BTS_UNAVAILABLE: u64 = 1 << 11;
const PEBS_UNAVAILABLE: u64 = 1 << 12;

// SDM 3A §12.11.2.1.
const IA32_MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_ENABLE: u64 = 1 << 11;
const WRITE_BACK: u64 = 6;

/// The time-stamp counter (SDM 3B §19.17).
pub const IA32_TSC: u32 = 0x10;

/// Hyper-V's (TLFS, appendix C). No guest here is offered them, and to look at them makes KVM set that machinery up.
const HYPER_V: Range<u32> = 0x4000_0000..0x4000_0200;

/// SDM 3A §12.11.2: base and mask of KVM's eight variable ranges, and the fixed ranges.
const MTRRS: [RangeInclusive<u32>; 4] =
    [0x200..=0x20f, 0x250..=0x250, 0x258..=0x259, 0x268..=0x26f];

/// The MSRs that a guest may change: of those `listed` by `KVM_GET_MSR_INDEX_LIST`, and the MTRRs, which it leaves out.
pub fn changeable(listed: &[u32]) -> Vec<u32> {
    let listed = listed.iter().copied().filter(|index| !HYPER_V.contains(index));
    listed.chain(MTRRS.into_iter().flatten()).chain([IA32_MTRR_DEF_TYPE]).collect()
}

/// What to set on each vCPU with `KVM_SET_MSRS`.
///
/// Firmware turns the MTRRs on; a kernel that finds them off also gives up the page attribute table (Linux before 6.7:
/// "MTRRs disabled, skipping PAT initialization").
pub fn boot() -> Vec<kvm_msr_entry> {
    let entry = |index, data| kvm_msr_entry { index, reserved: 0, data };
    vec![
        entry(IA32_MISC_ENABLE, FAST_STRING | BTS_UNAVAILABLE | PEBS_UNAVAILABLE),
        entry(IA32_MTRR_DEF_TYPE, MTRR_ENABLE | WRITE_BACK),
    ]
}

#[cfg(test)]
mod tests {
    #[test]
    fn what_a_reset_puts_back() {
        let changeable = super::changeable(&[super::IA32_TSC, 0x4000_0020, 0x4b56_4d01]);
        assert_eq!(changeable[..2], [0x10, 0x4b56_4d01]);
        assert_eq!(changeable[2..].len(), 16 + 11 + 1);
        assert!(changeable.contains(&0x2ff) && !changeable.contains(&0x4000_0020));
    }

    #[test]
    fn memory_is_write_back_and_strings_are_fast() {
        let msrs = super::boot();
        let value = |index| msrs.iter().find(|msr| msr.index == index).map(|msr| msr.data);
        assert_eq!(value(0x2ff), Some(0x806));
        assert_eq!(value(0x1a0).map(|data| data & 1), Some(1));
    }
}
