//! The whole state of a vCPU as a value. It is read once when KVM has made the vCPU, and written back at a reset, because KVM has no call
//! that resets a vCPU. A save and a restore use it, too.
//!
//! A capability: the builder has it read (`machine::reset`). A guest boots without.
//!
//! The value has everything that the guest, or KVM for the guest, may change (`api.rst`, section 4; QEMU saves the same). The vCPU must
//! be outside the guest; any thread may call. [`VcpuState::write`] says why the parts have their order.

use arch::cpu::changeable_msrs::{IA32_TSC, changeable};
use kvm_bindings::{
    KVM_STATE_NESTED_FORMAT_SVM, KVM_STATE_NESTED_GIF_SET, Msrs, kvm_debugregs, kvm_lapic_state,
    kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Cap, Kvm, KvmNestedStateBuffer, VcpuFd};
use serde::{Deserialize, Serialize};

use super::setup::{Vcpu, write_msrs};
use crate::error::Error;

/// A vCPU's registers, model-specific registers, FPU, local APIC, pending events, and its start-up state.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct VcpuState {
    pub(crate) regs: kvm_regs,
    pub(crate) sregs: kvm_sregs,
    xsave: Box<kvm_xsave>,
    xcrs: kvm_xcrs,
    debug_registers: kvm_debugregs,
    pub(crate) lapic: kvm_lapic_state,
    events: kvm_vcpu_events,
    mp_state: kvm_mp_state,
    /// The MSRs that a guest can change and this KVM supports, in the order in which they are written.
    pub(crate) msrs: Vec<kvm_msr_entry>,
    /// `None` if the guest may not run guests of its own, or KVM does not support that.
    nested: Option<Box<KvmNestedStateBuffer>>,
}

impl VcpuState {
    /// Reads the state of a vCPU that has not run yet. `nested`: the guest may run guests of its own.
    ///
    /// # Errors
    /// When KVM refuses a part of it.
    pub(crate) fn at_power_on(vcpu: &mut Vcpu, kvm: &Kvm, nested: bool) -> Result<Self, Error> {
        let listed = kvm.get_msr_index_list().map_err(Error::kvm("list the MSRs"))?;
        vcpu.changeable_msrs = changeable(listed.as_slice());
        vcpu.has_nested_state = nested && kvm.check_extension(Cap::NestedState);
        let mut state = Self::read(vcpu)?;
        // Those of the list that the vCPU has.
        vcpu.changeable_msrs = state.msrs.iter().map(|msr| msr.index).collect();
        // The TSC has already advanced since power-on. If 0 is written on every vCPU, KVM keeps the TSCs equal
        // (`kvm_synchronize_tsc`).
        let tsc = state.msrs.iter_mut().filter(|msr| msr.index == IA32_TSC);
        tsc.for_each(|msr| msr.data = 0);
        Ok(state)
    }

    /// Reads the present state of a vCPU.
    ///
    /// # Errors
    /// When KVM refuses a part of it.
    pub(crate) fn read(vcpu: &Vcpu) -> Result<Self, Error> {
        let fd = &vcpu.fd;
        let failed = || Error::kvm("read a vCPU's state");
        // This first, because it makes KVM carry out a pending INIT or SIPI, which changes the registers.
        let mp_state = fd.get_mp_state().map_err(failed())?;
        let nested = if vcpu.has_nested_state {
            let mut state = Box::new(KvmNestedStateBuffer::empty());
            fd.nested_state(&mut state).map_err(failed())?;
            Some(state)
        } else {
            None
        };
        Ok(Self {
            regs: fd.get_regs().map_err(failed())?,
            sregs: fd.get_sregs().map_err(failed())?,
            xsave: Box::new(fd.get_xsave().map_err(failed())?),
            xcrs: fd.get_xcrs().map_err(failed())?,
            debug_registers: fd.get_debug_regs().map_err(failed())?,
            msrs: read_msrs(fd, &vcpu.changeable_msrs)?,
            lapic: fd.get_lapic().map_err(failed())?,
            events: fd.get_vcpu_events().map_err(failed())?,
            mp_state,
            nested,
        })
    }

    /// Puts the vCPU into this state.
    ///
    /// # Errors
    /// When KVM refuses a part of it.
    #[expect(unsafe_code, reason = "KVM reads as much extended state as the vCPU has")]
    pub(crate) fn write(&self, fd: &VcpuFd) -> Result<(), Error> {
        let failed = || Error::kvm("write a vCPU's state");
        // This read makes KVM carry out a pending INIT or SIPI now. Otherwise that would happen after the registers are written.
        fd.get_mp_state().map_err(failed())?;
        // If the new state is outside of a nested guest, nested mode is left before the registers are written, so that they are
        // L1's. If it is in a nested guest, nested mode is entered after EFER is written, because KVM checks it against EFER.
        let (idle, busy) = match &self.nested {
            Some(state) if is_idle(state) => (Some(state), None),
            busy => (None, busy.as_ref()),
        };
        let set_nested =
            |state: &KvmNestedStateBuffer| fd.set_nested_state(state).map_err(failed());
        idle.map_or(Ok(()), |state| set_nested(state))?;
        fd.set_sregs(&self.sregs).map_err(failed())?;
        busy.map_or(Ok(()), |state| set_nested(state))?;
        fd.set_regs(&self.regs).map_err(failed())?;
        // SAFETY: a vCPU has more state than fits `kvm_xsave` only once its process has asked for dynamic features
        // (`arch_prctl(ARCH_REQ_XCOMP_GUEST_PERM)`), which this one never does.
        unsafe { fd.set_xsave(&self.xsave) }.map_err(failed())?;
        // A CPU without XSAVE has no XCRs, and KVM refuses to set them.
        if self.xcrs.nr_xcrs > 0 {
            fd.set_xcrs(&self.xcrs).map_err(failed())?;
        }
        // After the special registers: their APIC base says whether this state is in x2APIC format.
        fd.set_lapic(&self.lapic).map_err(failed())?;
        self.write_changed_msrs(fd)?;
        fd.set_mp_state(self.mp_state).map_err(failed())?;
        fd.set_vcpu_events(&self.events).map_err(failed())?;
        fd.set_debug_regs(&self.debug_registers).map_err(failed())
    }

    /// Writes only the MSRs whose value differs from the present one. KVM refuses read-only MSRs, and these never differ.
    fn write_changed_msrs(&self, fd: &VcpuFd) -> Result<(), Error> {
        let indices: Vec<_> = self.msrs.iter().map(|msr| msr.index).collect();
        let now = read_msrs(fd, &indices)?;
        let is_new = |msr: &&kvm_msr_entry| {
            now.iter().any(|now| now.index == msr.index && now.data != msr.data)
        };
        write_msrs(fd, &self.msrs.iter().filter(is_new).copied().collect::<Vec<_>>())
    }
}

/// Whether the vCPU is not in a nested guest, and not about to enter or leave one. With SVM that is so when GIF is set (APM 2
/// 15.17).
fn is_idle(state: &KvmNestedStateBuffer) -> bool {
    let has_svm = u32::from(state.format) == KVM_STATE_NESTED_FORMAT_SVM;
    u32::from(state.flags) == if has_svm { KVM_STATE_NESTED_GIF_SET } else { 0 }
}

pub(crate) fn read_msrs(fd: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, Error> {
    let mut found = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let wanted: Vec<_> =
            rest.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
        let mut msrs = Msrs::from_entries(&wanted).map_err(|_| Error::TooMany("MSRs"))?;
        let read = fd.get_msrs(&mut msrs).map_err(Error::kvm("read the MSRs"))?;
        found.extend(msrs.as_slice().iter().take(read));
        // KVM stops at the first MSR that the vCPU does not have: go on after that one.
        rest = rest.get(read + 1..).unwrap_or_default();
    }
    Ok(found)
}
