//! The vCPU's loop: enter the guest, serve the exit, enter again.
//!
//! Once a disk's driver is up, its requests do not come this way: notify is an ioeventfd, and completion
//! an interrupt that the disk's thread injects.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use kvm_bindings::KVM_INTERNAL_ERROR_EMULATION;
use kvm_ioctls::VcpuExit;

use super::exits::Reason;
use super::setup::Vcpu;
use crate::error::{Error, VcpuError};
use crate::events::VmEvent;

enum Stop {
    /// The guest can run no further: a triple fault.
    TripleFault,
    Failed(VcpuError),
}

/// KVM_RUNs in a row that may return EAGAIN before the host counts as short of tasks. A vCPU that the guest starts
/// causes one or two, and 16 are over before a user would notice.
const REFUSALS_OF_A_START: u32 = 16;
/// Time between tries after these.
const REFUSAL_INTERVAL: Duration = Duration::from_millis(20);

enum Ran {
    /// For an exit, which has been served.
    Exited,
    Interrupted,
}

impl Vcpu {
    /// Runs until `leave` is set and the thread is kicked. Returns false if the guest can run no further, after reporting the
    /// reason to the main loop.
    pub(super) fn run(&mut self, leave: &AtomicBool) -> bool {
        // Tells a guest with KVM's clock that it stood still, so that its watchdogs do not take that for a lockup
        // (`api.rst` 4.70 KVM_KVMCLOCK_CTRL). A guest without that clock: EINVAL.
        let _ = self.fd.kvmclock_ctrl();
        if !std::mem::replace(&mut self.has_run, true) && self.index == 0 {
            tracing::info!(target: "boot", "first KVM_RUN");
        }
        // `leave` is set before the kick: one that came before this thread could be interrupted is seen here.
        if leave.load(Ordering::Acquire) {
            self.fd.set_kvm_immediate_exit(1);
        }
        loop {
            match self.run_once(leave) {
                Ok(Ran::Exited) => {}
                // Only here: a KVM_RUN that returns EINTR has first completed the access that the last exit was for.
                Ok(Ran::Interrupted) if leave.load(Ordering::Acquire) => return true,
                Ok(Ran::Interrupted) => {}
                Err(reason) => {
                    self.events.send(match reason {
                        Stop::TripleFault => VmEvent::TripleFault,
                        Stop::Failed(source) => {
                            VmEvent::Failed(Error::Vcpu { index: self.index, source })
                        }
                    });
                    return false;
                }
            }
        }
    }

    fn run_once(&mut self, leave: &AtomicBool) -> Result<Ran, Stop> {
        if let Some(unfinished) = self.unfinished.take() {
            self.unfinished = unfinished.wait_unless(|| leave.load(Ordering::Acquire));
            if self.unfinished.is_some() {
                // Completes the write in the vCPU's registers, and returns before the guest goes on.
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
            // Without an interrupt to wait for a halted vCPU stays in KVM; it comes here only to be told to go on.
            Ok(VcpuExit::Hlt | VcpuExit::IrqWindowOpen) => self.exits.count(Reason::Other, 0, &[]),
            // Nothing is pending in KVM. The machine stops, and with it this vCPU.
            Ok(VcpuExit::Debug(_) | VcpuExit::InternalError) if self.debugged => {
                self.events.send(VmEvent::Debug);
                while !leave.load(Ordering::Acquire) {
                    std::thread::park();
                }
                return Ok(self.interrupted());
            }
            Ok(VcpuExit::Intr) => return Ok(self.interrupted()),
            Ok(VcpuExit::Shutdown) => return Err(Stop::TripleFault),
            Ok(VcpuExit::FailEntry(reason, _)) => {
                return Err(Stop::Failed(VcpuError::Entry(reason)));
            }
            Ok(VcpuExit::InternalError) => return Err(Stop::Failed(self.internal_error())),
            Ok(other) => return Err(Stop::Failed(VcpuError::Exit(format!("{other:?}")))),
            Err(error) => match error.errno() {
                libc::EINTR => return Ok(self.interrupted()),
                libc::EAGAIN => return Ok(self.wait_for_task()),
                _ => return Err(Stop::Failed(VcpuError::Run(error.into()))),
            },
        }
        self.refusals = 0;
        Ok(Ran::Exited)
    }

    /// KVM_RUN returned EAGAIN. A vCPU that the guest starts does that once or twice, and one that it has not started whenever the guest
    /// sends it an interrupt. But a KVM that cannot start its helper task (Linux 6.13 and later, at the first KVM_RUN) does it
    /// until the host allows another task, for the first vCPU too, which needs no start: that is said once. All are tried again
    /// at intervals. Nothing is pending in the vCPU then, so that it may be paused.
    fn wait_for_task(&mut self) -> Ran {
        self.refusals += 1;
        if self.index == 0 && self.refusals == REFUSALS_OF_A_START + 1 {
            tracing::warn!(
                "KVM cannot run the guest, because the host allows no further task (KVM_RUN: EAGAIN); raise the limit \
                 on tasks (`ulimit -u`, or the cgroup's pids.max): the guest goes on then"
            );
        }
        if self.refusals > REFUSALS_OF_A_START {
            // The kick ends it early.
            std::thread::park_timeout(REFUSAL_INTERVAL);
        }
        Ran::Interrupted
    }

    fn interrupted(&mut self) -> Ran {
        self.exits.count(Reason::Other, 0, &[]);
        self.fd.set_kvm_immediate_exit(0);
        Ran::Interrupted
    }

    /// A port I/O exit. String instructions (`rep outsb`) arrive as many operands in one exit, whose size kvm-ioctls does
    /// not pass on, so it is read from the kvm_run page (`api.rst`, 5 "The kvm_run structure").
    #[expect(unsafe_code, reason = "the exit's data lie in the kvm_run mapping")]
    fn port_io(&mut self, reason: Reason, port: u16, data: *mut [u8]) {
        // SAFETY: the last exit was KVM_EXIT_IO, so `io` is the live member of the union.
        let io = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.io };
        // SAFETY: `data` came from that exit and points into the kvm_run mapping of `self.fd`, past the structure itself;
        // nothing else refers to it until the next KVM_RUN.
        let data = unsafe { &mut *data };
        for operand in data.chunks_mut(usize::from(io.size).max(1)) {
            if matches!(reason, Reason::PortWrite) {
                self.unfinished = self.port_io.write(port.into(), operand);
            } else {
                self.port_io.read(u64::from(port), operand);
            }
        }
        self.exits.count(reason, port.into(), data);
    }

    #[expect(unsafe_code, reason = "the exit's details lie in a union of the kvm_run mapping")]
    fn internal_error(&mut self) -> VcpuError {
        // SAFETY: the last exit was KVM_EXIT_INTERNAL_ERROR, so `internal` is the live member of the union.
        let suberror = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.internal.suberror };
        let rip = self.fd.get_regs().map(|regs| regs.rip).unwrap_or_default();
        match suberror {
            KVM_INTERNAL_ERROR_EMULATION => VcpuError::Emulation { rip },
            suberror => VcpuError::Internal { suberror, rip },
        }
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        tracing::debug!(vcpu = self.index, exits = %self.exits, "exits to user space");
    }
}
