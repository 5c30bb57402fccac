//! A vCPU of a saved machine: its state, its CPUID leaves and the offset of its TSC.
//!
//! The TSC is restored as an offset from the host's TSC (`KVM_VCPU_TSC_OFFSET`, Documentation/virt/kvm/devices/vcpu.rst), and not by its
//! MSR. KVM before Linux 6.7 takes a write of the MSR in a VM's first second for an attempt to synchronize the vCPUs, and ignores the
//! value: time would go back.

use kvm_bindings::{
    KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, kvm_cpuid_entry2, kvm_device_attr, kvm_msr_entry,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

use crate::error::Error;
use crate::vcpu::{Vcpu, VcpuState, read_msrs};

ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);

const IA32_TSC: u32 = arch::cpu::changeable_msrs::IA32_TSC;
const IA32_TSC_DEADLINE: u32 = 0x6e0;
/// KVM's own MSRs (Documentation/virt/kvm/x86/msr.rst). Some write guest memory when they are set.
const KVM_MSRS: std::ops::Range<u32> = 0x4b56_4d00..0x4b56_4e00;
/// Turns asynchronous page faults on. KVM then delivers by the vector in `..06`, so that comes first.
const KVM_ASYNC_PF_EN: u32 = 0x4b56_4d02;
/// The local APIC's timer register (SDM 3A §11.5.4): its mode in bits 18:17, 2 for a deadline, and the mask in bit 16.
const LVT_TIMER: usize = 0x320;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SavedVcpu {
    pub(super) cpuid: Vec<kvm_cpuid_entry2>,
    /// 0 if KVM does not know it.
    pub(super) tsc_khz: u32,
    tsc: u64,
    /// `None` if KVM does not support the attribute. Then the MSR is written.
    tsc_offset: Option<u64>,
    pub(super) state: VcpuState,
}

/// By how much the TSC offset of each vCPU has to grow in a restored machine. `None`: KVM does not support offsets.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct TscShift(Option<u64>);

impl SavedVcpu {
    /// Reads a vCPU that stands still.
    pub(super) fn read(vcpu: &mut Vcpu) -> Result<Self, Error> {
        let fd = &vcpu.fd;
        let cpuid = vcpu.cpuid.clone();
        let mut state = VcpuState::read(vcpu)?;
        let tsc = state.msrs.iter().find(|msr| msr.index == IA32_TSC).map_or(0, |msr| msr.data);
        let tsc_offset = tsc_offset(fd);
        if tsc_offset.is_some() {
            state.msrs.retain(|msr| msr.index != IA32_TSC);
        }
        rearm(&mut state.msrs, &state.lapic.regs, tsc);
        sort(&mut state.msrs);
        Ok(Self { cpuid, tsc_khz: fd.get_tsc_khz().unwrap_or(0), tsc, tsc_offset, state })
    }

    /// Computes by how much the offsets have to grow, so that for the guest `passed` nanoseconds have passed since the save. Called for
    /// the first vCPU.
    pub(super) fn shift(&self, vcpu: &mut Vcpu, passed: u64) -> Result<TscShift, Error> {
        let (Some(saved), Some(offset)) = (self.tsc_offset, tsc_offset(&vcpu.fd)) else {
            return Ok(TscShift(None));
        };
        let now = read_msrs(&vcpu.fd, &[IA32_TSC])?.first().map_or(0, |msr| msr.data);
        let ticks = u128::from(passed) * u128::from(self.tsc_khz) / 1_000_000;
        let wanted = self.tsc.wrapping_add(ticks as u64);
        // The host's TSC, scaled to the guest's frequency.
        let host = now.wrapping_sub(offset);
        Ok(TscShift(Some(wanted.wrapping_sub(host).wrapping_sub(saved))))
    }

    /// Writes the state into a new vCPU, which has the saved CPUID leaves. Guest memory and KVM's clock have been restored before,
    /// because some MSRs act on them.
    pub(super) fn write(&self, vcpu: &mut Vcpu, TscShift(shift): TscShift) -> Result<(), Error> {
        if let (Some(shift), Some(offset)) = (shift, self.tsc_offset) {
            // Before the deadline MSR, which KVM compares with the TSC.
            set_tsc_offset(&vcpu.fd, offset.wrapping_add(shift))?;
        }
        self.state.write(&vcpu.fd)
    }
}

/// Makes an armed timer whose deadline has passed expire at once after a restore. Its deadline reads as 0, although its interrupt may not
/// have been delivered yet. A second interrupt does no harm.
fn rearm(msrs: &mut [kvm_msr_entry], lapic: &[std::ffi::c_char], tsc: u64) {
    let byte = |at: usize| lapic.get(LVT_TIMER + at).map_or(0, |byte| *byte as u8);
    let armed = byte(2) & 0b111 == 0b100;
    let deadline = msrs.iter_mut().find(|msr| msr.index == IA32_TSC_DEADLINE && msr.data == 0);
    if let Some(deadline) = deadline
        && armed
    {
        deadline.data = tsc;
    }
}

/// Sorts MSRs into the order in which they are written: KVM's own after the others, and the deadline last. KVM silently ignores a
/// deadline that is written before the timer's mode (in the local APIC) or before the TSC.
fn sort(msrs: &mut [kvm_msr_entry]) {
    msrs.sort_by_key(|msr| match msr.index {
        IA32_TSC_DEADLINE => 3,
        KVM_ASYNC_PF_EN => 2,
        index if KVM_MSRS.contains(&index) => 1,
        _ => 0,
    });
}

fn attribute(value: &mut u64) -> kvm_device_attr {
    kvm_device_attr {
        flags: 0,
        group: KVM_VCPU_TSC_CTRL,
        attr: u64::from(KVM_VCPU_TSC_OFFSET),
        addr: std::ptr::from_mut(value) as u64,
    }
}

/// The guest's TSC minus the host's. `None`: KVM does not support the attribute (before Linux 5.16).
#[expect(unsafe_code, reason = "kvm-ioctls reads no attributes of a vCPU")]
fn tsc_offset(fd: &VcpuFd) -> Option<u64> {
    let mut value = 0;
    let attribute = attribute(&mut value);
    // SAFETY: KVM writes 8 bytes to the address in the attribute, which is `value`'s.
    let result = unsafe { ioctl_with_ref(fd, KVM_GET_DEVICE_ATTR(), &attribute) };
    (result == 0).then_some(value)
}

#[expect(unsafe_code, reason = "kvm-ioctls sets no attributes of an x86 vCPU")]
fn set_tsc_offset(fd: &VcpuFd, offset: u64) -> Result<(), Error> {
    let mut value = offset;
    let attribute = attribute(&mut value);
    // SAFETY: KVM reads 8 bytes at the address in the attribute, which is `value`'s.
    match unsafe { ioctl_with_ref(fd, KVM_SET_DEVICE_ATTR(), &attribute) } {
        0 => Ok(()),
        _ => Err(Error::kvm("set a vCPU's TSC offset")(kvm_ioctls::Error::last())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn msrs(entries: &[(u32, u64)]) -> Vec<kvm_msr_entry> {
        let entry = |&(index, data)| kvm_msr_entry { index, data, ..Default::default() };
        entries.iter().map(entry).collect()
    }

    #[test]
    fn the_deadline_is_written_last_and_kvms_msrs_before_it() {
        let mut list =
            msrs(&[(0x6e0, 1), (0x4b56_4d02, 1), (0x10, 1), (0x4b56_4d06, 1), (0x174, 1)]);
        sort(&mut list);
        let order: Vec<_> = list.iter().map(|msr| msr.index).collect();
        assert_eq!(order, [0x10, 0x174, 0x4b56_4d06, 0x4b56_4d02, 0x6e0]);
    }

    #[test]
    fn a_passed_deadline_of_an_armed_timer_is_now() {
        let mut lapic = [0; 1024];
        for (mode, mask, expected) in [(4, 0, 77), (4, 1, 0), (0, 0, 0), (2, 0, 0)] {
            lapic[LVT_TIMER + 2] = mode | mask;
            let mut list = msrs(&[(0x6e0, 0)]);
            rearm(&mut list, &lapic, 77);
            assert_eq!(list[0].data, expected);
            let mut armed = msrs(&[(0x6e0, 5)]);
            rearm(&mut armed, &lapic, 77);
            assert_eq!(armed[0].data, 5, "a deadline to come stays");
        }
    }
}
