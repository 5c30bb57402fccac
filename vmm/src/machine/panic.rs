//! A guest that panics: what the user is told, and a panic that is held for a dump.
//!
//! `Machine::vm_event` hands over each outcome that an event of a vCPU has.
//! `--dump-on-panic` (`snapshot::panic_dump`) sets [`Machine::hold_panic`], and ends the machine when the dump is over.

use arch::layout;
use vm_memory::Bytes;

use super::{Machine, MachineEvent, Outcome};
use crate::GuestMemory;
use crate::error::Error;

impl Machine {
    /// What a reset or a triple fault means, which is `unexpected` if the guest's kernel had not begun to restart. Linux triple faults
    /// on purpose for `reboot=t`.
    pub(super) fn restarted(&self, unexpected: Outcome) -> Outcome {
        match restart(&self.hardware.memory) {
            Restart::AfterPanic => Outcome::Panicked("it reset itself after a kernel panic"),
            Restart::NotBegun => unexpected,
            Restart::Reboot => Outcome::Reset,
        }
    }

    /// Ends the machine. If a dump is to be written first ([`Machine::hold_panic`]), a panic is only reported, and what the guest does
    /// afterwards is ignored; an error of the host still ends the machine.
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

/// How far a guest that resets the machine, or can run no further, had come with a restart of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Restart {
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
