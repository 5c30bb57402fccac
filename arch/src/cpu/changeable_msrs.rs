//! The MSRs that a reset has to put back, and that a save has to read.
//!
//! A capability: `vmm/src/vcpu/state.rs` asks for them.

use std::ops::{Range, RangeInclusive};

use super::msrs::IA32_MTRR_DEF_TYPE;

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

#[cfg(test)]
mod tests {
    #[test]
    fn what_a_reset_puts_back() {
        let changeable = super::changeable(&[super::IA32_TSC, 0x4000_0020, 0x4b56_4d01]);
        assert_eq!(changeable[..2], [0x10, 0x4b56_4d01]);
        assert_eq!(changeable[2..].len(), 16 + 11 + 1);
        assert!(changeable.contains(&0x2ff) && !changeable.contains(&0x4000_0020));
    }
}
