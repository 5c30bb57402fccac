//! The vCPU's loop: enter the guest, serve the exit, enter again.
//!
//! Once a disk's driver is up, its requests do not come this way: notify is an ioeventfd, and completion
//! an interrupt that the disk's thread injects.

use std::sync::atomic::{AtomicBool, Ordering};

use kvm_bindings::{KVM_EXIT_IO_OUT, KVM_INTERNAL_ERROR_EMULATION};
use kvm_ioctls::VcpuExit;

use super::setup::Vcpu;
use crate::events::VmEvent;

/// Why the loop ended.
enum Stop {
    /// The guest can run no further: a triple fault.
    TripleFault,
    /// KVM or the host failed; the text says how.
    Failed(String),
}

/// Why KVM_RUN returned.
enum Ran {
    /// For an exit, which has been served.
    Exited,
    /// For a signal.
    Interrupted,
}

impl Vcpu {
    /// Runs until `attention` is set and the thread kicked (`true`), or the guest can run no further, which is reported to
    /// the main thread.
    pub(super) fn run(&mut self, attention: &AtomicBool) -> bool {
        // Tells a guest with KVM's clock that it stood still, so that its watchdogs do not take that for a lockup
        // (`api.rst` 4.70 KVM_KVMCLOCK_CTRL). A guest without that clock: EINVAL.
        let _ = self.fd.kvmclock_ctrl();
        if let Some(timing) = self.timing.take() {
            timing.over("first KVM_RUN");
            timing.report();
        }
        loop {
            match self.run_once() {
                Ok(Ran::Exited) => {}
                // Only here: a KVM_RUN that returns EINTR has first completed the access that the last exit was for.
                Ok(Ran::Interrupted) if attention.load(Ordering::Acquire) => return true,
                Ok(Ran::Interrupted) => {}
                Err(reason) => {
                    self.events.send(match reason {
                        Stop::TripleFault => VmEvent::TripleFault,
                        Stop::Failed(why) => VmEvent::Failed(format!("vCPU {}: {why}", self.index)),
                    });
                    return false;
                }
            }
        }
    }

    /// Enters the guest once and serves its exit.
    fn run_once(&mut self) -> Result<Ran, Stop> {
        match self.fd.run() {
            Ok(VcpuExit::MmioRead(address, data)) => {
                self.exits.mmio_reads.count();
                self.mmio.read(address, data);
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                self.exits.mmio_writes.count();
                self.mmio.write(address, data);
            }
            Ok(VcpuExit::IoIn(port, data)) => {
                self.exits.port_reads.count();
                let data = std::ptr::from_mut(data);
                self.port_io(port, data);
            }
            Ok(VcpuExit::IoOut(port, data)) => {
                self.exits.port_writes.count();
                let data = std::ptr::from_ref(data).cast_mut();
                self.port_io(port, data);
            }
            // Without an interrupt to wait for a halted vCPU stays in KVM; it comes here only to be told to go on.
            Ok(VcpuExit::Hlt | VcpuExit::IrqWindowOpen) => self.exits.other.count(),
            Ok(VcpuExit::Intr) => return Ok(self.interrupted()),
            Ok(VcpuExit::Shutdown) => return Err(Stop::TripleFault),
            Ok(VcpuExit::FailEntry(reason, _)) => {
                return Err(Stop::Failed(format!("the processor refuses to enter the guest, reason {reason:#x}")));
            }
            Ok(VcpuExit::InternalError) => return Err(Stop::Failed(self.internal_error())),
            Ok(other) => return Err(Stop::Failed(format!("unexpected exit {other:?}"))),
            Err(error) => match error.errno() {
                libc::EINTR => return Ok(self.interrupted()),
                libc::EAGAIN => {}
                _ => return Err(Stop::Failed(format!("KVM_RUN: {error}"))),
            },
        }
        Ok(Ran::Exited)
    }

    /// `immediate_exit` has done its work.
    fn interrupted(&mut self) -> Ran {
        self.exits.other.count();
        self.fd.set_kvm_immediate_exit(0);
        Ran::Interrupted
    }

    /// A port I/O exit. String instructions (`rep outsb`) arrive as many operands in one exit, whose size kvm-ioctls does
    /// not pass on, so it is read from the kvm_run page (`api.rst`, 5 "The kvm_run structure").
    #[expect(unsafe_code, reason = "the exit's data lie in the kvm_run mapping")]
    fn port_io(&mut self, port: u16, data: *mut [u8]) {
        // SAFETY: the last exit was KVM_EXIT_IO, so `io` is the live member of the union.
        let io = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.io };
        // SAFETY: `data` came from that exit and points into the kvm_run mapping of `self.fd`, past the structure itself;
        // nothing else refers to it until the next KVM_RUN.
        let data = unsafe { &mut *data };
        for operand in data.chunks_mut(usize::from(io.size).max(1)) {
            if u32::from(io.direction) == KVM_EXIT_IO_OUT {
                self.port_io.write(u64::from(port), operand);
            } else {
                self.port_io.read(u64::from(port), operand);
            }
        }
    }

    #[expect(unsafe_code, reason = "the exit's details lie in a union of the kvm_run mapping")]
    fn internal_error(&mut self) -> String {
        // SAFETY: the last exit was KVM_EXIT_INTERNAL_ERROR, so `internal` is the live member of the union.
        let suberror = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.internal.suberror };
        let rip = self.fd.get_regs().map(|regs| format!("{:#x}", regs.rip)).unwrap_or_else(|_| "?".to_owned());
        match suberror {
            KVM_INTERNAL_ERROR_EMULATION => format!("KVM cannot emulate the instruction at {rip}"),
            other => format!("KVM internal error {other} at {rip}"),
        }
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        tracing::debug!(vcpu = self.index, exits = %self.exits, "exits to user space");
    }
}
