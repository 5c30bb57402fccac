//! Whether a vCPU can ever run again by itself. `halt_watch` asks the machine, which asks here at a standstill: while a vCPU is in
//! KVM_RUN, a read of its state would wait.

use std::mem::MaybeUninit;
use std::os::unix::thread::JoinHandleExt;
use std::time::Duration;

use kvm_bindings::{KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_UNINITIALIZED};

use super::setup::Vcpu;
use super::thread::VcpuThread;
use crate::error::Error;

/// RFLAGS.IF: interrupts are enabled (SDM 1, 3.4.3.3).
const RFLAGS_IF: u64 = 1 << 9;

impl Vcpu {
    /// Whether only a reset or another vCPU can make this one run: it is halted with interrupts disabled, or waits for its first INIT and
    /// SIPI. (No device of this machine sends a non-maskable interrupt.)
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

impl VcpuThread {
    /// How long the thread has used a CPU, in the guest and outside. `None` if the host does not say.
    #[expect(unsafe_code, reason = "the clock of a thread has no safe wrapper")]
    pub(crate) fn cpu_time(&self) -> Option<Duration> {
        let (mut clock, mut time) = (0, MaybeUninit::<libc::timespec>::zeroed());
        // SAFETY: the thread has not been joined, so its pthread_t is valid; both calls get valid pointers, and all-zero bytes
        // are a valid timespec.
        let time = unsafe {
            let got = libc::pthread_getcpuclockid(self.thread.as_pthread_t(), &raw mut clock) == 0
                && libc::clock_gettime(clock, time.as_mut_ptr()) == 0;
            got.then(|| time.assume_init())
        }?;
        Some(Duration::new(time.tv_sec.try_into().ok()?, time.tv_nsec.try_into().ok()?))
    }
}
