//! Whether this host's CPU can go on with a guest that was saved on another one.
//!
//! A guest reads CPUID when it boots, and uses the features that it finds. If one is missing after a restore, it gets an illegal
//! instruction some time later. So the restore is refused, and the error names the feature. More features do no harm: the guest keeps its
//! CPUID leaves.

use arch::cpu::cpuid;
use kvm_bindings::kvm_cpuid_entry2;
use kvm_ioctls::Cap;

use super::SnapshotError;
use super::vcpu::SavedVcpu;
use crate::error::Error;
use crate::kvm::EmptyVm;

/// Largest difference in the frequency of the TSC. Crystals of one model differ by less. It is KVM's default, too
/// (`tsc_tolerance_ppm`).
const TSC_TOLERANCE_PPM: u64 = 250;

/// The CPUID registers whose bits are features: function, index, and which of EAX, EBX, ECX, EDX (SDM 2A `CPUID`, APM 3 appendix E,
/// Documentation/virt/kvm/x86/cpuid.rst).
const FEATURES: [(u32, u32, &[usize]); 8] = [
    (0x1, 0, &[2, 3]),
    (0x7, 0, &[1, 2, 3]),
    (0x7, 1, &[0]),
    (0xd, 0, &[0]),
    (0xd, 1, &[0]),
    (0x8000_0001, 0, &[2, 3]),
    (0x8000_0008, 0, &[1]),
    (0x4000_0001, 0, &[0]),
];
const NAMES: [&str; 4] = ["EAX", "EBX", "ECX", "EDX"];

/// Compares each saved vCPU's CPUID with the one that this host would give a new vCPU.
pub(super) fn check(empty_vm: &EmptyVm, vcpus: &[SavedVcpu], nested: bool) -> Result<(), Error> {
    let EmptyVm { kvm, cpuid: supported, .. } = empty_vm;
    let count = u32::try_from(vcpus.len()).unwrap_or(u32::MAX);
    for (id, saved) in (0..count).zip(vcpus) {
        let vcpu = cpuid::Vcpu {
            id,
            count,
            tsc_khz: Some(saved.tsc_khz),
            tsc_deadline: kvm.check_extension(Cap::TscDeadlineTimer),
            hints: 0,
            nested,
        };
        let present = cpuid::for_vcpu(supported.as_slice(), &vcpu);
        let missing = missing(&saved.cpuid, &present);
        if !missing.is_empty() {
            return Err(Error::incoming(SnapshotError::Cpu(missing.join(", "))));
        }
    }
    Ok(())
}

/// Checks that a guest whose TSC had `saved` kHz can go on with `present` kHz.
pub(super) fn check_tsc(saved: u32, present: u32) -> Result<(), SnapshotError> {
    let tolerance = u64::from(saved) * TSC_TOLERANCE_PPM / 1_000_000;
    let known = saved != 0 && present != 0;
    if known && u64::from(saved.abs_diff(present)) > tolerance {
        return Err(SnapshotError::Tsc { saved, present });
    }
    Ok(())
}

fn registers(leaves: &[kvm_cpuid_entry2], function: u32, index: u32) -> Option<[u32; 4]> {
    let leaf = leaves.iter().find(|leaf| leaf.function == function && leaf.index == index)?;
    Some([leaf.eax, leaf.ebx, leaf.ecx, leaf.edx])
}

fn missing(saved: &[kvm_cpuid_entry2], present: &[kvm_cpuid_entry2]) -> Vec<String> {
    let mut names = Vec::new();
    let vendor = |leaves| registers(leaves, 0, 0).map(|[_, rest @ ..]| rest);
    if vendor(saved) != vendor(present) {
        names.push("another vendor's CPU".to_owned());
    }
    for (function, index, which) in FEATURES {
        let Some(saved) = registers(saved, function, index) else { continue };
        let present = registers(present, function, index).unwrap_or_default();
        for &register in which {
            let lost = saved[register] & !present[register];
            if lost != 0 {
                names.push(format!("CPUID {function:#x}.{index} {} {lost:#x}", NAMES[register]));
            }
        }
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32, ebx: u32, ecx: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, index, ebx, ecx, ..Default::default() }
    }

    #[test]
    fn what_is_missing_is_named_and_what_is_new_is_not() {
        let saved = [leaf(0, 0, 7, 7), leaf(1, 0, 0, 0b110), leaf(7, 0, 1 << 16, 0)];
        let less = [leaf(0, 0, 7, 7), leaf(1, 0, 0, 0b1010), leaf(7, 0, 0, 0)];
        assert_eq!(missing(&saved, &less), ["CPUID 0x1.0 ECX 0x4", "CPUID 0x7.0 EBX 0x10000"]);
        assert!(missing(&saved, &saved).is_empty());
        let other = [leaf(0, 0, 8, 8), saved[1], saved[2]];
        assert_eq!(missing(&saved, &other), ["another vendor's CPU"]);
    }

    #[test]
    fn frequencies_may_differ_by_the_tolerance_of_crystals() {
        assert!(check_tsc(2_000_000, 2_000_500).is_ok());
        assert!(check_tsc(2_000_000, 2_000_501).is_err());
        assert!(check_tsc(0, 2_000_000).is_ok() && check_tsc(2_000_000, 0).is_ok());
    }
}
