//! The debugger's breakpoints and watchpoints: their encoding for KVM, and which of them a debug exit is about.
//!
//! Each takes one of the four debug registers, the same one on every vCPU. While a debugger uses them, the guest's own debug registers
//! have no effect. If all four are in use, a software breakpoint becomes the instruction INT3 in guest memory, and KVM exits when a vCPU
//! executes it.
//!
//! A debug register is better than INT3: it works before the guest has loaded or mapped the code, it survives a reset, and it leaves
//! guest memory as it is. So a software breakpoint gives up its register only for a hardware breakpoint or a watchpoint.

use gdbstub::target::ext::breakpoints::WatchKind;
use kvm_bindings::{
    KVM_GUESTDBG_BLOCKIRQ, KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP, KVM_GUESTDBG_USE_HW_BP,
    KVM_GUESTDBG_USE_SW_BP, kvm_debug_exit_arch, kvm_guest_debug, kvm_guest_debug_arch,
};

/// The one-byte instruction INT3, which a software breakpoint writes to guest memory (SDM 2A, INT n).
pub(super) const INT3: u8 = 0xcc;
/// #BP, the exception that INT3 raises (SDM 3A §6.3.1).
const BREAKPOINT_EXCEPTION: u32 = 3;
/// DR6.BS: a single step (SDM 3B §17.2.3). Bits 0 to 3: the condition of that debug register was met.
const DR6_BS: u64 = 1 << 14;
/// The processor and KVM have four.
const DEBUG_REGISTERS: usize = 4;

/// An INT3 at a virtual address. `physical` is the guest-physical address to which that was translated when the INT3 was written.
pub(super) struct SoftwareBreakpoint {
    pub(super) address: u64,
    pub(super) physical: u64,
    /// The byte that INT3 has replaced.
    pub(super) original: u8,
}

/// What one debug register watches: R/W and LEN as in DR7 (SDM 3B §17.2.4).
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct HardwareBreakpoint {
    address: u64,
    access: u64,
    length: u64,
    /// The debugger asked for a software breakpoint.
    software: bool,
}

impl HardwareBreakpoint {
    pub(super) fn execution(address: u64) -> Self {
        Self { address, access: 0, length: 0, software: false }
    }

    /// A software breakpoint in a debug register.
    pub(super) fn software(address: u64) -> Self {
        Self { software: true, ..Self::execution(address) }
    }

    /// `None` if no debug register can watch that: reads alone, or a range other than 1, 2, 4 or 8 aligned bytes.
    pub(super) fn watch(address: u64, bytes: u64, kind: WatchKind) -> Option<Self> {
        let access = match kind {
            WatchKind::Write => 1,
            WatchKind::ReadWrite => 3,
            WatchKind::Read => return None,
        };
        let length = match bytes {
            1 => 0,
            2 => 1,
            4 => 3,
            8 => 2,
            _ => return None,
        };
        address.is_multiple_of(bytes).then_some(Self { address, access, length, software: false })
    }
}

/// What has stopped a vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Met {
    Software,
    Hardware,
    /// A watchpoint at this address.
    Watch(u64, WatchKind),
    Step,
    /// An instruction that KVM cannot emulate.
    NotEmulated,
    /// An INT3 of the guest's own code. The guest has to get its #BP.
    Foreign,
}

#[derive(Default)]
pub(super) struct Breakpoints {
    pub(super) software: Vec<SoftwareBreakpoint>,
    pub(super) hardware: Vec<HardwareBreakpoint>,
}

impl Breakpoints {
    /// Returns false if all debug registers are in use.
    pub(super) fn add_hardware(&mut self, wanted: HardwareBreakpoint) -> bool {
        let fits = self.hardware.len() < DEBUG_REGISTERS;
        if fits {
            self.hardware.push(wanted);
        }
        fits
    }

    /// If all debug registers are in use, frees one that a software breakpoint has. Returns the address of that breakpoint.
    pub(super) fn give_up_register(&mut self) -> Option<u64> {
        let place = self.hardware.iter().position(|known| known.software)?;
        (self.hardware.len() == DEBUG_REGISTERS).then(|| self.hardware.swap_remove(place).address)
    }

    /// Returns false if it was not set.
    pub(super) fn remove_hardware(&mut self, unwanted: HardwareBreakpoint) -> bool {
        let place = self.hardware.iter().position(|known| *known == unwanted);
        place.map(|place| self.hardware.remove(place)).is_some()
    }

    /// The argument of KVM_SET_GUEST_DEBUG for a vCPU. `steps`: it makes a single step. `blocks_interrupts`: KVM delivers no interrupt
    /// during the step, so that the step does not end in an interrupt handler.
    pub(super) fn guest_debug(&self, steps: bool, blocks_interrupts: bool) -> kvm_guest_debug {
        let mut control = 0;
        if !self.software.is_empty() {
            control |= KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_SW_BP;
        }
        if !self.hardware.is_empty() {
            control |= KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP;
        }
        if steps {
            control |= KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP;
            if blocks_interrupts {
                control |= KVM_GUESTDBG_BLOCKIRQ;
            }
        }
        let mut debugreg = [0; 8];
        for (number, breakpoint) in self.hardware.iter().enumerate() {
            debugreg[number] = breakpoint.address;
            // The global enable bit, and four bits from 16 up (SDM 3B §17.2.4).
            debugreg[7] |= 2 << (2 * number)
                | (breakpoint.access | breakpoint.length << 2) << (16 + 4 * number);
        }
        kvm_guest_debug { control, pad: 0, arch: kvm_guest_debug_arch { debugreg } }
    }

    /// Whether a software breakpoint is an INT3 at this address.
    pub(super) fn is_int3(&self, address: u64) -> bool {
        self.software.iter().any(|breakpoint| breakpoint.address == address)
    }

    /// Why a vCPU left the guest with the debug exit `exit`. `None`: none of the debugger's breakpoints and steps is the cause.
    pub(super) fn met(&self, exit: &kvm_debug_exit_arch) -> Option<Met> {
        if exit.exception == BREAKPOINT_EXCEPTION {
            return Some(if self.is_int3(exit.pc) { Met::Software } else { Met::Foreign });
        }
        let met = self.hardware.iter().enumerate().find(|(number, _)| exit.dr6 & 1 << number != 0);
        match met {
            Some((_, HardwareBreakpoint { software: true, .. })) => Some(Met::Software),
            Some((_, HardwareBreakpoint { access: 0, .. })) => Some(Met::Hardware),
            Some((_, watch)) => {
                let kind = if watch.access == 1 { WatchKind::Write } else { WatchKind::ReadWrite };
                Some(Met::Watch(watch.address, kind))
            }
            None => (exit.dr6 & DR6_BS != 0).then_some(Met::Step),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exit(exception: u32, pc: u64, dr6: u64) -> kvm_debug_exit_arch {
        kvm_debug_exit_arch { exception, pad: 0, pc, dr6, dr7: 0 }
    }

    #[test]
    fn debug_registers_are_encoded_as_the_processor_wants_them() {
        let mut breakpoints = Breakpoints::default();
        assert_eq!(breakpoints.guest_debug(false, true).control, 0);
        assert!(breakpoints.add_hardware(HardwareBreakpoint::execution(0x1000)));
        let watch = |address, bytes, kind| HardwareBreakpoint::watch(address, bytes, kind);
        assert!(breakpoints.add_hardware(watch(0x2004, 4, WatchKind::Write).unwrap()));
        assert!(breakpoints.add_hardware(watch(0x3000, 8, WatchKind::ReadWrite).unwrap()));
        let debug = breakpoints.guest_debug(true, true);
        assert_eq!(debug.control, 1 | 2 | 1 << 17 | 1 << 20);
        assert_eq!(debug.arch.debugreg[..3], [0x1000, 0x2004, 0x3000]);
        // G0 to G2; then R/W and LEN: nothing for 0, 01 and 11 for 1, 11 and 10 for 2.
        assert_eq!(debug.arch.debugreg[7], 0b10_1010 | 0b1101 << 20 | 0b1011 << 24);
        assert_eq!(breakpoints.guest_debug(false, true).control, 1 | 1 << 17);
    }

    #[test]
    fn there_are_four_debug_registers() {
        let mut breakpoints = Breakpoints::default();
        for address in 0..4 {
            assert!(breakpoints.add_hardware(HardwareBreakpoint::execution(address)));
        }
        assert!(!breakpoints.add_hardware(HardwareBreakpoint::execution(4)));
        assert!(breakpoints.remove_hardware(HardwareBreakpoint::execution(1)));
        assert!(!breakpoints.remove_hardware(HardwareBreakpoint::execution(1)));
        assert!(breakpoints.add_hardware(HardwareBreakpoint::execution(4)));
    }

    #[test]
    fn a_software_breakpoint_makes_room() {
        let mut breakpoints = Breakpoints::default();
        assert!(breakpoints.add_hardware(HardwareBreakpoint::software(1)));
        assert_eq!(breakpoints.give_up_register(), None);
        for address in 2..5 {
            assert!(breakpoints.add_hardware(HardwareBreakpoint::execution(address)));
        }
        assert_eq!(breakpoints.met(&exit(1, 1, 1)), Some(Met::Software));
        assert_eq!(breakpoints.give_up_register(), Some(1));
        assert!(breakpoints.add_hardware(HardwareBreakpoint::execution(5)));
        assert_eq!(breakpoints.give_up_register(), None);
    }

    #[test]
    fn what_the_processor_cannot_watch_is_refused() {
        for (address, bytes, kind) in
            [(0, 4, WatchKind::Read), (2, 4, WatchKind::Write), (0, 3, WatchKind::Write)]
        {
            assert!(HardwareBreakpoint::watch(address, bytes, kind).is_none());
        }
        assert!(HardwareBreakpoint::watch(0, 0, WatchKind::Write).is_none());
    }

    #[test]
    fn an_exit_says_what_was_met() {
        let mut breakpoints = Breakpoints::default();
        breakpoints.software.push(SoftwareBreakpoint { address: 5, physical: 5, original: 0x90 });
        breakpoints.add_hardware(HardwareBreakpoint::execution(0x10));
        breakpoints.add_hardware(HardwareBreakpoint::watch(8, 8, WatchKind::Write).unwrap());
        assert_eq!(breakpoints.met(&exit(3, 5, 0)), Some(Met::Software));
        assert_eq!(breakpoints.met(&exit(3, 6, 0)), Some(Met::Foreign));
        assert_eq!(breakpoints.met(&exit(1, 0x10, 1)), Some(Met::Hardware));
        assert_eq!(breakpoints.met(&exit(1, 0, 2)), Some(Met::Watch(8, WatchKind::Write)));
        assert_eq!(breakpoints.met(&exit(1, 0, DR6_BS)), Some(Met::Step));
        assert_eq!(breakpoints.met(&exit(1, 0, 0)), None);
    }
}
