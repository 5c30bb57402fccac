//! Model-specific registers that do not start at what a kernel expects of firmware.

use kvm_bindings::kvm_msr_entry;

// SDM 4 §2.1, table 2-2.
const IA32_MISC_ENABLE: u32 = 0x1a0;
/// `REP MOVS` and `REP STOS` move more than a byte at a time.
const FAST_STRING: u64 = 1 << 0;
/// No branch-trace store, no precise event sampling: this machine has no performance counters.
const BTS_UNAVAILABLE: u64 = 1 << 11;
const PEBS_UNAVAILABLE: u64 = 1 << 12;

// SDM 3A §12.11.2.1.
pub(super) const IA32_MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_ENABLE: u64 = 1 << 11;
const WRITE_BACK: u64 = 6;

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
    fn memory_is_write_back_and_strings_are_fast() {
        let msrs = super::boot();
        let value = |index| msrs.iter().find(|msr| msr.index == index).map(|msr| msr.data);
        assert_eq!(value(0x2ff), Some(0x806));
        assert_eq!(value(0x1a0).map(|data| data & 1), Some(1));
    }
}
