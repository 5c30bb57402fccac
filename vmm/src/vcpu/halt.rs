//! Whether a vCPU can ever run again by itself. The machine asks on behalf of `halt_watch`, during a standstill: KVM
//! makes a request for the state of a vCPU wait while that vCPU is in KVM_RUN.

use kvm_bindings::{KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_UNINITIALIZED};

use super::setup::Vcpu;
use crate::error::Error;

/// RFLAGS.IF: interrupts are enabled (SDM 1, 3.4.3.3).
const RFLAGS_IF: u64 = 1 << 9;

impl Vcpu {
    /// Whether only a reset, or another vCPU, can make this one run: it is halted with interrupts disabled, or waits for its
    /// first INIT and SIPI. A non-maskable interrupt would do, too, but no device of this machine sends one.
    ///
    /// # Errors
    /// When KVM does not give the state.
    pub(crate) fn is_halted_for_good(&mut self) -> Result<bool, Error> {
        let state = self.fd.get_mp_state().map_err(Error::kvm("read a vCPU's state"))?;
        let registers = self.fd.get_regs().map_err(Error::kvm("read a vCPU's registers"))?;
        Ok(match state.mp_state {
            KVM_MP_STATE_UNINITIALIZED | KVM_MP_STATE_INIT_RECEIVED => true,
            KVM_MP_STATE_HALTED => registers.rflags & RFLAGS_IF == 0,
            _ => false,
        })
    }
}
