//! The vCPU's loop: enter the guest, handle the exit, enter again.
//!
//! An access to a port or to MMIO goes to the bus, and the loop goes on. If the vCPU cannot run any further, the loop ends with a
//! [`VmEvent`], and `machine::reports` decides whether the machine ends.
//!
//! A disk's requests cause no exit to this loop: a notification is a write to an ioeventfd, and the disk's thread injects the interrupt.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use kvm_bindings::KVM_INTERNAL_ERROR_EMULATION;
use kvm_ioctls::VcpuExit;

use super::exits::Reason;
use super::setup::Vcpu;
use crate::error::{Error, VcpuError};
use crate::events::VmEvent;

/// How many KVM_RUNs in a row may return EAGAIN before this counts as a shortage of tasks on the host. A vCPU that the guest starts
/// causes one or two; 16 take no noticeable time.
const MAX_REFUSALS: u32 = 16;
/// The time between tries after these.
const REFUSAL_INTERVAL: Duration = Duration::from_millis(20);

/// How a KVM_RUN ended.
enum Ran {
    /// With an exit, which has been handled.
    Exited,
    /// Without one: by a signal, or because KVM refused to run.
    Interrupted,
}

impl Vcpu {
    /// Runs until `leave` is set and the thread is kicked. Returns `false` if the vCPU cannot run any further. Then the main loop has
    /// got an event with the reason.
    pub(super) fn run(&mut self, leave: &AtomicBool) -> bool {
        // Tells a guest with KVM's clock that it has been paused, so that its watchdogs do not report a lockup
        // (`api.rst` 4.70 KVM_KVMCLOCK_CTRL). Fails with EINVAL if the guest does not use that clock.
        let _ = self.fd.kvmclock_ctrl();
        if !std::mem::replace(&mut self.has_run, true) && self.index == 0 {
            tracing::info!(target: "boot", "first KVM_RUN");
        }
        // `leave` is set before the kick is sent. A kick that came before this thread could handle it is noticed here.
        if leave.load(Ordering::Acquire) {
            self.fd.set_kvm_immediate_exit(1);
        }
        loop {
            match self.run_once(leave) {
                // The only place to leave: a KVM_RUN that returns EINTR has first completed the device access of the last exit.
                Ok(Ran::Interrupted) if leave.load(Ordering::Acquire) => return true,
                Ok(Ran::Exited | Ran::Interrupted) => {}
                Err(event) => {
                    self.events.send(event);
                    return false;
                }
            }
        }
    }

    /// Calls KVM_RUN once, and handles its exit. Returns an event if the vCPU cannot run any further.
    fn run_once(&mut self, leave: &AtomicBool) -> Result<Ran, VmEvent> {
        if let Some(unfinished) = self.unfinished.take() {
            self.unfinished = unfinished.wait_unless(|| leave.load(Ordering::Acquire));
            if self.unfinished.is_some() {
                // The next KVM_RUN then only completes the write in the vCPU's registers, and does not enter the guest.
                self.fd.set_kvm_immediate_exit(1);
            }
        }
        match self.fd.run() {
            Ok(VcpuExit::MmioRead(address, data)) => {
                self.mmio.read(address, data);
                self.exits.count(Reason::MmioRead, address, data);
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                self.exits.count(Reason::MmioWrite, address, data);
                self.unfinished = self.mmio.write(address, data);
            }
            Ok(VcpuExit::IoIn(port, data)) => {
                let data = std::ptr::from_mut(data);
                self.port_io(Reason::PortRead, port, data);
            }
            Ok(VcpuExit::IoOut(port, data)) => {
                let data = std::ptr::from_ref(data).cast_mut();
                self.port_io(Reason::PortWrite, port, data);
            }
            // KVM handles a halt itself, and these exits need nothing but another KVM_RUN.
            Ok(VcpuExit::Hlt | VcpuExit::IrqWindowOpen) => self.exits.count(Reason::Other, 0, &[]),
            // No device access is pending in KVM. This vCPU waits here until the machine has stopped.
            Ok(VcpuExit::Debug(_) | VcpuExit::InternalError) if self.debugged => {
                self.events.send(VmEvent::Debug);
                while !leave.load(Ordering::Acquire) {
                    std::thread::park();
                }
                return Ok(self.interrupted());
            }
            Ok(VcpuExit::Intr) => return Ok(self.interrupted()),
            Ok(VcpuExit::Shutdown) => return Err(VmEvent::TripleFault),
            Ok(VcpuExit::FailEntry(reason, _)) => return self.fail(VcpuError::Entry(reason)),
            Ok(VcpuExit::InternalError) => return self.internal_error(),
            Ok(other) => {
                let exit = VcpuError::Exit(format!("{other:?}"));
                return self.fail(exit);
            }
            Err(error) => match error.errno() {
                libc::EINTR => return Ok(self.interrupted()),
                libc::EAGAIN => return Ok(self.wait_for_task()),
                _ => return self.fail(VcpuError::Run(error.into())),
            },
        }
        self.refusals = 0;
        Ok(Ran::Exited)
    }

    /// KVM_RUN returned EAGAIN. On a vCPU that the guest starts, this happens once or twice, and before that whenever the guest sends it
    /// an interrupt. Since Linux 6.13 the first KVM_RUN also starts a helper task of KVM, and returns EAGAIN until the host allows that
    /// task. The first vCPU needs no start, so there this is the reason, and is reported once. After a few tries, this waits before each
    /// further one. No device access is pending, so the vCPU may be paused.
    fn wait_for_task(&mut self) -> Ran {
        self.refusals += 1;
        if self.index == 0 && self.refusals == MAX_REFUSALS + 1 {
            tracing::warn!(
                "KVM cannot run the guest, because the host allows no further task (KVM_RUN: EAGAIN); raise the limit \
                 on tasks (`ulimit -u`, or the cgroup's pids.max): the guest goes on then"
            );
        }
        if self.refusals > MAX_REFUSALS {
            // A kick ends the wait early.
            std::thread::park_timeout(REFUSAL_INTERVAL);
        }
        Ran::Interrupted
    }

    fn interrupted(&mut self) -> Ran {
        self.exits.count(Reason::Other, 0, &[]);
        self.fd.set_kvm_immediate_exit(0);
        Ran::Interrupted
    }

    /// Handles a port I/O exit. A string instruction (`rep outsb`) arrives as many operands in one exit. kvm-ioctls does not pass on
    /// their size, so it is read from the kvm_run page (`api.rst`, 5 "The kvm_run structure").
    #[expect(unsafe_code, reason = "the exit's data lie in the kvm_run mapping")]
    fn port_io(&mut self, reason: Reason, port: u16, data: *mut [u8]) {
        // SAFETY: the last exit was KVM_EXIT_IO, so `io` is the live member of the union.
        let io = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.io };
        // SAFETY: `data` came from that exit and points into the kvm_run mapping of `self.fd`, past the structure itself;
        // nothing else refers to it until the next KVM_RUN.
        let data = unsafe { &mut *data };
        for operand in data.chunks_mut(usize::from(io.size).max(1)) {
            match reason {
                Reason::PortWrite => self.unfinished = self.port_io.write(port.into(), operand),
                _ => self.port_io.read(u64::from(port), operand),
            }
        }
        self.exits.count(reason, port.into(), data);
    }

    #[expect(unsafe_code, reason = "the exit's details lie in a union of the kvm_run mapping")]
    fn internal_error(&mut self) -> Result<Ran, VmEvent> {
        // SAFETY: the last exit was KVM_EXIT_INTERNAL_ERROR, so `internal` is the live member of the union.
        let suberror = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.internal.suberror };
        let code = self.fd.get_sregs().map(|sregs| sregs.cs.base).unwrap_or_default();
        let rip = code.wrapping_add(self.fd.get_regs().map(|regs| regs.rip).unwrap_or_default());
        self.fail(match suberror {
            KVM_INTERNAL_ERROR_EMULATION => VcpuError::Emulation { rip },
            suberror => VcpuError::Internal { suberror, rip },
        })
    }

    fn fail(&self, source: VcpuError) -> Result<Ran, VmEvent> {
        Err(VmEvent::Failed(Error::Vcpu { index: self.index, source }))
    }
}
