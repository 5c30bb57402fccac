//! A panic of the guest: how it is told from a reboot, and how the machine waits for a dump before it ends.
//!
//! `Machine::vm_event` calls this file when an event of a vCPU may end the machine. `--dump-on-panic` (`snapshot::panic_dump`) sets
//! [`Machine::hold_panic`], and ends the machine when the dump is written.

use arch::layout;
use vm_memory::Bytes;

use super::{Machine, MachineEvent, Outcome};
use crate::GuestMemory;
use crate::error::Error;

impl Machine {
    /// The outcome of a reset or a triple fault: a panic or a reboot, as the warm-reset flag says, or `unexpected` if the guest's
    /// kernel had not begun to restart. (With `reboot=t` Linux restarts by a triple fault.)
    pub(super) fn restarted(&self, unexpected: Outcome) -> Outcome {
        match restart(&self.hardware.memory) {
            Restart::AfterPanic => Outcome::Panicked("it reset itself after a kernel panic"),
            Restart::NotBegun => unexpected,
            Restart::Reboot => Outcome::Reset,
        }
    }

    /// Ends the machine. But if a dump is to be written first ([`Machine::hold_panic`]), a panic is only reported. What the guest does
    /// afterwards is ignored, and an error of the host still ends the machine.
    pub(super) fn end_unless_held(&mut self, outcome: Result<Outcome, Error>) {
        match outcome {
            Ok(_) if self.panicked => {}
            Ok(Outcome::Panicked(how)) if self.hold_panic => {
                self.panicked = true;
                self.emit(MachineEvent::PanicHeld(how));
            }
            outcome => self.end(outcome),
        }
    }

    /// The usual reason for a panic at boot: the kernel has no driver for its root file system's disk.
    pub(super) fn warn_of_missing_drivers(&self) {
        let disks = self.hardware.disks.iter().filter(|disk| !disk.handle.has_driver());
        let names: Vec<_> = disks.map(|disk| disk.handle.name()).collect();
        if !names.is_empty() {
            tracing::warn!(
                "no driver in the guest has started {}: the kernel needs virtio_mmio and virtio_blk built in, or an \
                 initrd that loads them",
                names.join(", ")
            );
        }
    }
}

/// What the warm-reset flag says about a guest that has reset the machine or triple faulted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Restart {
    /// Its kernel had not begun to restart.
    NotBegun,
    Reboot,
    AfterPanic,
}

/// Reads the warm-reset flag, which Linux writes just before it resets the machine by any method: `arch::cmdline` explains its
/// values. A guest that is not Linux leaves it alone.
fn restart(memory: &GuestMemory) -> Restart {
    match memory.read_obj(layout::WARM_RESET_FLAG) {
        Ok(layout::WARM_RESET_MAGIC) => Restart::AfterPanic,
        Ok(layout::WARM_RESET_UNTOUCHED) | Err(_) => Restart::NotBegun,
        Ok(_) => Restart::Reboot,
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestAddress;

    use super::*;

    #[test]
    fn the_warm_reset_flag_tells_a_panic_from_a_restart() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 4096)]).unwrap();
        for (flag, expected) in [
            (layout::WARM_RESET_UNTOUCHED, Restart::NotBegun),
            (0, Restart::Reboot),
            (0x1234, Restart::AfterPanic),
        ] {
            memory.write_obj(flag, layout::WARM_RESET_FLAG).unwrap();
            assert_eq!(restart(&memory), expected);
        }
    }
}
