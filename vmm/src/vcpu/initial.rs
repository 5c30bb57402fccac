//! A vCPU's state as KVM made it, to go back to at a reset: KVM has no call for that.

use arch::cpu;
use kvm_bindings::{
    Msrs, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
    kvm_xsave,
};
use kvm_ioctls::{Cap, Kvm, KvmNestedStateBuffer, VcpuFd};

use crate::error::Error;

/// Everything that the guest, or KVM for it, may change in a vCPU (`api.rst`, section 4; what QEMU puts back, too).
pub(super) struct InitialState {
    regs: kvm_regs,
    pub(super) sregs: kvm_sregs,
    xsave: Box<kvm_xsave>,
    xcrs: kvm_xcrs,
    debug_registers: kvm_debugregs,
    pub(super) lapic: kvm_lapic_state,
    events: kvm_vcpu_events,
    mp_state: kvm_mp_state,
    /// Those that this KVM has.
    msrs: Vec<kvm_msr_entry>,
    /// Where guests may have guests of their own.
    nested: Option<Box<KvmNestedStateBuffer>>,
}

impl InitialState {
    /// Reads the state of a vCPU that has its CPUID and nothing else yet.
    ///
    /// # Errors
    /// When KVM does not tell.
    pub(super) fn of(kvm: &Kvm, fd: &VcpuFd) -> Result<Self, Error> {
        let failed = || Error::kvm("read a vCPU's state");
        let nested = if kvm.check_extension(Cap::NestedState) {
            let mut state = Box::new(KvmNestedStateBuffer::empty());
            fd.nested_state(&mut state).map_err(failed())?;
            Some(state)
        } else {
            None
        };
        let listed = kvm.get_msr_index_list().map_err(failed())?;
        let mut msrs = read_msrs(fd, &cpu::msrs::changeable(listed.as_slice()))?;
        // The one that goes on by itself. Written as 0 on every vCPU they stay in step (KVM's `kvm_synchronize_tsc`).
        msrs.iter_mut().filter(|msr| msr.index == cpu::msrs::IA32_TSC).for_each(|msr| msr.data = 0);
        Ok(Self {
            regs: fd.get_regs().map_err(failed())?,
            sregs: fd.get_sregs().map_err(failed())?,
            xsave: Box::new(fd.get_xsave().map_err(failed())?),
            xcrs: fd.get_xcrs().map_err(failed())?,
            debug_registers: fd.get_debug_regs().map_err(failed())?,
            lapic: fd.get_lapic().map_err(failed())?,
            events: fd.get_vcpu_events().map_err(failed())?,
            mp_state: fd.get_mp_state().map_err(failed())?,
            msrs,
            nested,
        })
    }

    /// Puts the state back, on the vCPU's own thread and outside the guest.
    ///
    /// # Errors
    /// When KVM refuses a part of it.
    #[expect(unsafe_code, reason = "KVM reads as much extended state as the vCPU has")]
    pub(super) fn restore(&self, fd: &VcpuFd) -> Result<(), Error> {
        let failed = || Error::kvm("reset a vCPU");
        // Asking makes KVM act on an INIT or SIPI that has yet to arrive, which would otherwise outlive this reset.
        fd.get_mp_state().map_err(failed())?;
        // First out of a guest's guest: the registers below are not its.
        if let Some(state) = &self.nested {
            fd.set_nested_state(state).map_err(failed())?;
        }
        fd.set_sregs(&self.sregs).map_err(failed())?;
        fd.set_regs(&self.regs).map_err(failed())?;
        // SAFETY: a vCPU has more state than fits `kvm_xsave` only once its process has asked for dynamic features
        // (`arch_prctl(ARCH_REQ_XCOMP_GUEST_PERM)`), which this one never does.
        unsafe { fd.set_xsave(&self.xsave) }.map_err(failed())?;
        // Without XSAVE there are none, and KVM takes none.
        if self.xcrs.nr_xcrs > 0 {
            fd.set_xcrs(&self.xcrs).map_err(failed())?;
        }
        // After the special registers: whether the APIC is in x2APIC mode says how its registers are read.
        fd.set_lapic(&self.lapic).map_err(failed())?;
        self.restore_msrs(fd)?;
        fd.set_mp_state(self.mp_state).map_err(failed())?;
        fd.set_vcpu_events(&self.events).map_err(failed())?;
        fd.set_debug_regs(&self.debug_registers).map_err(failed())
    }

    /// Only those that changed: some cannot be written, and those do not change.
    fn restore_msrs(&self, fd: &VcpuFd) -> Result<(), Error> {
        let indices: Vec<_> = self.msrs.iter().map(|msr| msr.index).collect();
        let now = read_msrs(fd, &indices)?;
        let is_new = |msr: &&kvm_msr_entry| now.iter().any(|now| now.index == msr.index && now.data != msr.data);
        write_msrs(fd, &self.msrs.iter().filter(is_new).copied().collect::<Vec<_>>())
    }
}

/// Sets the MSRs in this order.
///
/// # Errors
/// When KVM refuses one.
pub(super) fn write_msrs(fd: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<(), Error> {
    let msrs = Msrs::from_entries(entries).map_err(|_| Error::KvmLacks("room for our MSRs"))?;
    let set = fd.set_msrs(&msrs).map_err(Error::kvm("set the MSRs"))?;
    match entries.get(set) {
        None => Ok(()),
        Some(refused) => Err(Error::Stopped(format!("KVM refuses a value for MSR {:#x}", refused.index))),
    }
}

/// The values of those MSRs that this vCPU has.
fn read_msrs(fd: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, Error> {
    let mut found = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let wanted: Vec<_> = rest.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
        let mut msrs = Msrs::from_entries(&wanted).map_err(|_| Error::KvmLacks("room for its own MSRs"))?;
        let read = fd.get_msrs(&mut msrs).map_err(Error::kvm("read the MSRs"))?;
        found.extend(msrs.as_slice().iter().take(read));
        // It stopped at one that the vCPU does not have.
        rest = rest.get(read + 1..).unwrap_or_default();
    }
    Ok(found)
}
