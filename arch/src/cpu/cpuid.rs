//! The CPUID leaves of each vCPU: those that KVM supports, with this machine's topology in place of the host's.
//!
//! The topology is one socket of `count` cores with one thread each; APIC ids equal the vCPU's number. The rest is as
//! `KVM_GET_SUPPORTED_CPUID` gives it (Documentation/virt/kvm/api.rst). It includes the paravirtual leaves, so the guest finds its clock
//! and calibrates nothing.

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// What the leaves depend on besides the host: the machine's properties, and which vCPU they are for.
#[derive(Clone, Copy, Debug)]
pub struct Vcpu {
    /// This vCPU's number, from 0. The APIC id is the same number.
    pub id: u32,
    /// How many there are: 1 to 255, since a local APIC id of 255 means everyone.
    pub count: u32,
    /// The guest's TSC frequency in kHz, when the host knows it (`KVM_GET_TSC_KHZ`) and keeps it constant.
    pub tsc_khz: Option<u32>,
    /// KVM's local APIC has the TSC-deadline timer (`KVM_CAP_TSC_DEADLINE_TIMER`), which the supported leaves do not
    /// say.
    pub tsc_deadline: bool,
    /// The guest may run guests of its own (VMX or SVM). Without, KVM refuses the instructions and the MSRs for that, too:
    /// it goes by these leaves.
    pub nested: bool,
    /// What the guest may rely on: bits of `KVM_HINTS_*` (Documentation/virt/kvm/x86/cpuid.rst).
    pub hints: u32,
}

/// Leaf 1 (SDM 2A `CPUID`, tables 3-10 and 3-11).
const ECX_VMX: u32 = 1 << 5;
const ECX_PDCM: u32 = 1 << 15;
const ECX_X2APIC: u32 = 1 << 21;
const ECX_TSC_DEADLINE: u32 = 1 << 24;
const ECX_HYPERVISOR: u32 = 1 << 31;
const EDX_HTT: u32 = 1 << 28;

/// Leaf 0x8000_0001 (APM 3 E.4.2): the package has several cores, and HTT does not mean threads.
const ECX_CMP_LEGACY: u32 = 1 << 1;
/// The same leaf: AMD's virtualization. Leaf 0x8000_000a has its details.
const ECX_SVM: u32 = 1 << 2;

/// Level types of leaves 0xb and 0x1f, in their place in ECX.
const LEVEL_THREAD: u32 = 1 << 8;
const LEVEL_CORE: u32 = 2 << 8;

/// Cache types of leaves 4 and 0x8000_001d, EAX bits 4:0, and the level, bits 7:5.
const CACHE_TYPE: u32 = 0x1f;
const CACHE_LEVEL_SHIFT: u32 = 5;

/// KVM's first paravirtual leaf, and the one for frequencies, which VMware defined.
const PARAVIRTUAL: u32 = 0x4000_0000;
const PARAVIRTUAL_FREQUENCY: u32 = 0x4000_0010;
/// KVM's local APIC timer counts nanoseconds (`APIC_BUS_CYCLE_NS`).
const APIC_BUS_KHZ: u32 = 1_000_000;

/// The CPUID leaves for one vCPU, from those that KVM supports: what `KVM_SET_CPUID2` takes.
pub fn for_vcpu(supported: &[kvm_cpuid_entry2], vcpu: &Vcpu) -> Vec<kvm_cpuid_entry2> {
    let first = supported.iter().find(|leaf| leaf.function == 0);
    let (vendor, max_leaf) = first.map_or((Vendor::Other, 0), |leaf| (Vendor::of(leaf), leaf.eax));

    // Rebuilt below, whole: how many subleaves KVM gives of them varies.
    let rebuilt = [0xb, 0x1f, PARAVIRTUAL_FREQUENCY];
    let mut leaves: Vec<_> =
        supported.iter().filter(|leaf| !rebuilt.contains(&leaf.function)).copied().collect();
    for leaf in &mut leaves {
        adjust(leaf, vcpu, vendor);
    }
    for function in [0xb, 0x1f] {
        if function <= max_leaf {
            leaves.extend(extended_topology(function, vcpu));
        }
    }
    if let Some(khz) = vcpu.tsc_khz {
        if vendor == Vendor::Intel && vcpu.tsc_deadline && max_leaf >= 0x16 {
            frequency(&mut leaves, khz);
        }
        if let Some(base) = leaves.iter_mut().find(|leaf| leaf.function == PARAVIRTUAL) {
            base.eax = base.eax.max(PARAVIRTUAL_FREQUENCY);
            leaves.push(leaf(PARAVIRTUAL_FREQUENCY, [khz, APIC_BUS_KHZ, 0]));
        }
    }
    leaves
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Vendor {
    Intel,
    Amd,
    Other,
}

impl Vendor {
    /// Leaf 0 spells the vendor in EBX, EDX, ECX.
    fn of(leaf: &kvm_cpuid_entry2) -> Self {
        let name = [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes);
        match name.as_flattened() {
            b"GenuineIntel" => Self::Intel,
            b"AuthenticAMD" | b"HygonGenuine" => Self::Amd,
            _ => Self::Other,
        }
    }
}

/// The bits of an APIC id that tell `count` cores apart.
fn id_bits(count: u32) -> u32 {
    count.next_power_of_two().trailing_zeros()
}

fn adjust(leaf: &mut kvm_cpuid_entry2, vcpu: &Vcpu, vendor: Vendor) {
    let Vcpu { id, count, .. } = *vcpu;
    // APIC ids set aside for the cores; the fields that hold it hold 8 bits or it less one.
    let ids = 1 << id_bits(count);
    match leaf.function {
        0x1 => {
            leaf.ebx = leaf.ebx & 0xffff | u32::min(ids, 255) << 16 | id << 24;
            // The in-kernel local APIC has both, whatever the host's processor has.
            leaf.ecx |= ECX_HYPERVISOR | ECX_X2APIC;
            set(&mut leaf.ecx, ECX_TSC_DEADLINE, vcpu.tsc_deadline);
            set(&mut leaf.edx, EDX_HTT, count > 1);
            leaf.ecx &= !(ECX_PDCM | if vcpu.nested { 0 } else { ECX_VMX });
        }
        // Intel's caches: the first two levels are a core's own, the rest the socket's.
        0x4 if leaf.eax & CACHE_TYPE != 0 => {
            leaf.eax =
                leaf.eax & 0x3fff | (shared_by(leaf, ids) - 1) << 14 | u32::min(ids - 1, 63) << 26;
        }
        // Intel's performance counters: none. Each guest access to one costs an exit, and a kernel that finds them
        // runs its watchdog on them.
        0xa => (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (0, 0, 0, 0),
        0x4000_0001 => leaf.edx |= vcpu.hints,
        0x8000_0001 => {
            if vendor == Vendor::Amd {
                set(&mut leaf.ecx, ECX_CMP_LEGACY, count > 1);
            }
            leaf.ecx &= !if vcpu.nested { 0 } else { ECX_SVM };
        }
        0x8000_000a if !vcpu.nested => {
            (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (0, 0, 0, 0);
        }
        // APM 3 E.4.7: ApicIdSize and NC.
        0x8000_0008 if vendor == Vendor::Amd => {
            leaf.ecx = leaf.ecx & !0xf0ff | id_bits(count) << 12 | (count - 1);
        }
        // AMD's caches (APM 3 E.4.15), as leaf 4; cores that share, not ids.
        0x8000_001d if leaf.eax & CACHE_TYPE != 0 => {
            leaf.eax = leaf.eax & !(0xfff << 14) | (shared_by(leaf, count) - 1) << 14;
        }
        // APM 3 E.4.16: extended APIC id; core id and threads a core, less one; node and nodes, less one.
        0x8000_001e => (leaf.eax, leaf.ebx, leaf.ecx) = (id, id & 0xff, 0),
        _ => {}
    }
}

fn set(register: &mut u32, bit: u32, on: bool) {
    *register = if on { *register | bit } else { *register & !bit };
}

/// How many of the socket's `all` share the cache that `leaf` describes.
fn shared_by(leaf: &kvm_cpuid_entry2, all: u32) -> u32 {
    if leaf.eax >> CACHE_LEVEL_SHIFT & 0b111 <= 2 { 1 } else { all }
}

/// Leaves 0xb and 0x1f (SDM 2A `CPUID`): one thread a core, `count` cores, and an empty level that ends the list.
fn extended_topology(function: u32, vcpu: &Vcpu) -> [kvm_cpuid_entry2; 3] {
    let level = |index, kind, eax, ebx| kvm_cpuid_entry2 {
        function,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax,
        ebx,
        ecx: index | kind,
        edx: vcpu.id,
        ..Default::default()
    };
    [
        level(0, LEVEL_THREAD, 0, 1),
        level(1, LEVEL_CORE, id_bits(vcpu.count), vcpu.count),
        level(2, 0, 0, 0),
    ]
}

/// Leaves 0x15 and 0x16: a kernel without KVM's clock need not measure the TSC against the 8254.
///
/// The TSC is its own crystal: ratios to a real crystal's frequency lose precision in Linux's 32-bit arithmetic (`native_calibrate_tsc`).
/// Linux also takes the crystal for the clock of the local APIC's timer, which runs at [`APIC_BUS_KHZ`] here. So this is only for guests
/// whose timer is the TSC deadline.
fn frequency(leaves: &mut Vec<kvm_cpuid_entry2>, khz: u32) {
    // Divided above 4.29 GHz, where hertz leave 32 bits.
    let ratio = khz / (u32::MAX / 1000) + 1;
    let mhz = khz / 1000;
    leaves.retain(|leaf| !matches!(leaf.function, 0x15 | 0x16));
    leaves.push(leaf(0x15, [1, ratio, khz / ratio * 1000]));
    leaves.push(leaf(0x16, [mhz, mhz, 100]));
}

/// A leaf without subleaves.
fn leaf(function: u32, [eax, ebx, ecx]: [u32; 3]) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 { function, eax, ebx, ecx, ..Default::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Vcpu =
        Vcpu { id: 0, count: 1, tsc_khz: None, tsc_deadline: false, nested: false, hints: 0 };

    fn leaf(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
    }

    fn vendor(name: &[u8; 12], max_leaf: u32) -> kvm_cpuid_entry2 {
        let word = |at: usize| u32::from_le_bytes(name[at..at + 4].try_into().unwrap());
        leaf(0, 0, [max_leaf, word(0), word(8), word(4)])
    }

    fn intel() -> Vec<kvm_cpuid_entry2> {
        vec![
            vendor(b"GenuineIntel", 0x1f),
            leaf(1, 0, [0x806f8, 0xffff_0800, ECX_PDCM, 0x0f8b_fbff]),
            leaf(4, 0, [0xfc00_4121, 0x2c0_003f, 0x3f, 0]),
            leaf(4, 1, [0xfc00_4143, 0x3c0_003f, 0x7ff, 0]),
            leaf(4, 2, [0xfc1f_c163, 0x380_003f, 0x1bfff, 4]),
            leaf(4, 3, [0; 4]),
            leaf(0xa, 0, [0x0730_0802, 0, 0, 0x8604]),
            leaf(0xb, 0, [1, 2, 0x100, 77]),
            leaf(0x15, 0, [0; 4]),
            leaf(0x16, 0, [0; 4]),
            leaf(0x1f, 0, [0; 4]),
            leaf(PARAVIRTUAL, 0, [0x4000_0001, 0x4b4d_564b, 0x564b_4d56, 0x4d]),
            leaf(0x4000_0001, 0, [0x0100_7efb, 0, 0, 0]),
        ]
    }

    fn amd() -> Vec<kvm_cpuid_entry2> {
        vec![
            vendor(b"AuthenticAMD", 0x10),
            leaf(1, 0, [0x80_0f12, 0x0800, 0, 0x0f8b_fbff]),
            leaf(0x8000_0001, 0, [0x80_0f12, 0, 0x40_01f3, 0]),
            leaf(0x8000_0008, 0, [0x3028, 0x100_5000, 0x700f, 0]),
            leaf(0x8000_001d, 0, [0x4121, 0, 0, 0]),
            leaf(0x8000_001d, 3, [0x1_c163, 0, 0, 0]),
            leaf(0x8000_001d, 4, [0; 4]),
            leaf(0x8000_001e, 0, [9, 0x0104, 0x0303, 0]),
        ]
    }

    fn find(leaves: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        let mut found =
            leaves.iter().filter(|leaf| leaf.function == function && leaf.index == index);
        let first = found.next().unwrap_or_else(|| panic!("no leaf {function:#x}.{index}"));
        assert!(found.next().is_none(), "leaf {function:#x}.{index} twice");
        *first
    }

    #[test]
    fn leaf_1_names_the_vcpu() {
        for (id, count, ids) in [(0, 1, 1), (1, 2, 2), (2, 3, 4), (15, 16, 16), (254, 255, 255)] {
            let one = find(&for_vcpu(&intel(), &Vcpu { id, count, ..PLAIN }), 1, 0);
            assert_eq!(one.ebx, id << 24 | ids << 16 | 0x0800, "{id} of {count}");
            assert_eq!(one.edx & EDX_HTT != 0, count > 1);
            assert_eq!(one.ecx, ECX_HYPERVISOR | ECX_X2APIC);
        }
        let deadline = for_vcpu(&intel(), &Vcpu { tsc_deadline: true, ..PLAIN });
        assert_ne!(find(&deadline, 1, 0).ecx & ECX_TSC_DEADLINE, 0);
    }

    #[test]
    fn extended_topology_is_one_socket_of_single_threaded_cores() {
        for (id, count, bits) in [(0, 1, 0), (1, 2, 1), (4, 5, 3), (15, 16, 4), (254, 255, 8)] {
            let leaves = for_vcpu(&intel(), &Vcpu { id, count, ..PLAIN });
            for function in [0xb, 0x1f] {
                let [threads, cores, end] = [0, 1, 2].map(|index| find(&leaves, function, index));
                assert_eq!((threads.eax, threads.ebx, threads.ecx, threads.edx), (0, 1, 0x100, id));
                assert_eq!((cores.eax, cores.ebx, cores.ecx, cores.edx), (bits, count, 0x201, id));
                assert_eq!((end.eax, end.ebx, end.ecx, end.edx), (0, 0, 2, id));
                assert_eq!(cores.flags, KVM_CPUID_FLAG_SIGNIFCANT_INDEX);
                // The socket's number is what is left of the id.
                assert_eq!(id >> bits, 0);
            }
        }
    }

    #[test]
    fn leaves_that_the_processor_is_too_old_for_stay_absent() {
        let leaves = for_vcpu(
            &[vendor(b"GenuineIntel", 0xa)],
            &Vcpu { tsc_khz: Some(1), tsc_deadline: true, ..PLAIN },
        );
        assert!(leaves.iter().all(|leaf| leaf.function == 0));
        assert!(for_vcpu(&[], &PLAIN).is_empty());
    }

    #[test]
    fn intel_caches_are_shared_from_the_third_level_on() {
        let leaves = for_vcpu(&intel(), &Vcpu { id: 1, count: 5, ..PLAIN });
        for (index, sharing) in [(0, 1), (1, 1), (2, 8)] {
            let cache = find(&leaves, 4, index);
            assert_eq!(cache.eax >> 14 & 0xfff, sharing - 1, "cache {index}");
            assert_eq!(cache.eax >> 26, 7);
            assert_eq!(cache.eax & 0x3fff, find(&intel(), 4, index).eax & 0x3fff);
        }
        assert_eq!(find(&leaves, 4, 3).eax, 0);
        let many = for_vcpu(&intel(), &Vcpu { id: 254, count: 255, ..PLAIN });
        assert_eq!(find(&many, 4, 2).eax >> 14, 63 << 12 | 255);
    }

    #[test]
    fn amd_topology_counts_cores() {
        let leaves = for_vcpu(&amd(), &Vcpu { id: 3, count: 6, ..PLAIN });
        assert_eq!(find(&leaves, 0x8000_0008, 0).ecx, 3 << 12 | 5);
        assert_ne!(find(&leaves, 0x8000_0001, 0).ecx & ECX_CMP_LEGACY, 0);
        let cores = find(&leaves, 0x8000_001e, 0);
        assert_eq!((cores.eax, cores.ebx, cores.ecx), (3, 3, 0));
        assert_eq!(find(&leaves, 0x8000_001d, 0).eax, 0x121);
        assert_eq!(find(&leaves, 0x8000_001d, 3).eax, 0x163 | 5 << 14);
        assert_eq!(find(&leaves, 0x8000_001d, 4).eax, 0);
        assert_eq!(find(&leaves, 0xb, 1).ebx, 6);
        let single = for_vcpu(&amd(), &PLAIN);
        assert_eq!(find(&single, 0x8000_0001, 0).ecx & ECX_CMP_LEGACY, 0);
        assert_eq!(find(&single, 0x8000_0008, 0).ecx, 0);
    }

    #[test]
    fn a_known_tsc_frequency_is_told() {
        for (khz, ratio) in [(2_400_000, 1), (2_399_997, 1), (5_000_001, 2), (u32::MAX, 1001)] {
            let vcpu = Vcpu { tsc_khz: Some(khz), tsc_deadline: true, ..PLAIN };
            let leaves = for_vcpu(&intel(), &vcpu);
            let tsc = find(&leaves, 0x15, 0);
            // As Linux computes it.
            assert_eq!((tsc.ecx / 1000 * tsc.ebx / tsc.eax, tsc.ebx), (khz / ratio * ratio, ratio));
            assert_eq!(find(&leaves, 0x16, 0).eax, khz / 1000);
            assert_eq!(find(&leaves, PARAVIRTUAL, 0).eax, 0x4000_0010);
            let frequency = find(&leaves, 0x4000_0010, 0);
            assert_eq!((frequency.eax, frequency.ebx), (khz, 1_000_000));
        }
        let unknown = for_vcpu(&intel(), &Vcpu { tsc_deadline: true, ..PLAIN });
        assert_eq!(find(&unknown, 0x15, 0).eax, 0);
        assert_eq!(find(&unknown, PARAVIRTUAL, 0).eax, 0x4000_0001);
        assert!(unknown.iter().all(|leaf| leaf.function != 0x4000_0010));
        // The APIC timer would be taken to run at the TSC's pace.
        let no_deadline = for_vcpu(&intel(), &Vcpu { tsc_khz: Some(1), ..PLAIN });
        assert_eq!(find(&no_deadline, 0x15, 0).eax, 0);
    }

    #[test]
    fn virtualization_is_hidden_unless_nested() {
        let supported = [
            leaf(1, 0, [0, 0, ECX_VMX, 0]),
            leaf(0x8000_0001, 0, [0, 0, ECX_SVM, 0]),
            leaf(0x8000_000a, 0, [1, 0x8000, 0, 0x1bcff]),
        ];
        let hidden = for_vcpu(&supported, &PLAIN);
        assert_eq!(find(&hidden, 1, 0).ecx & ECX_VMX, 0);
        assert_eq!(find(&hidden, 0x8000_0001, 0).ecx & ECX_SVM, 0);
        let details = find(&hidden, 0x8000_000a, 0);
        assert_eq!((details.eax, details.ebx, details.ecx, details.edx), (0, 0, 0, 0));
        let offered = for_vcpu(&supported, &Vcpu { nested: true, ..PLAIN });
        assert_ne!(find(&offered, 1, 0).ecx & ECX_VMX, 0);
        assert_eq!(offered[1..], supported[1..]);
    }

    #[test]
    fn performance_counters_are_hidden_and_paravirtual_features_kept() {
        let leaves = for_vcpu(&intel(), &PLAIN);
        let counters = find(&leaves, 0xa, 0);
        assert_eq!((counters.eax, counters.ebx, counters.ecx, counters.edx), (0, 0, 0, 0));
        assert_eq!(find(&leaves, 0x4000_0001, 0), find(&intel(), 0x4000_0001, 0));
    }

    #[test]
    fn the_guest_is_told_what_it_may_rely_on() {
        let leaves = for_vcpu(&intel(), &Vcpu { hints: 1, ..PLAIN });
        let told = kvm_cpuid_entry2 { edx: 1, ..find(&intel(), 0x4000_0001, 0) };
        assert_eq!(find(&leaves, 0x4000_0001, 0), told);
    }
}
