//! The boot processor's local APIC: where its two interrupt pins, LINT0 and LINT1, lead (SDM 3A §11.5.1). `vmm` reads the state
//! that KVM gave the vCPU, lets [`boot`] change these two entries of it, and sets it again.

use std::ffi::c_char;

use kvm_bindings::kvm_lapic_state;

// Register offsets (SDM 3A table 11-1).
const LVT_LINT0: usize = 0x350;
const LVT_LINT1: usize = 0x360;

/// Delivery mode (bits 10:8) and mask (bit 16) of a local vector table entry (SDM 3A figure 11-8).
const DELIVERY_MODE: u32 = 0x700;
const MODE_NMI: u32 = 0x400;
const MODE_EXTINT: u32 = 0x700;
const MASKED: u32 = 1 << 16;

/// `state` with LINT0 wired to the 8259 and LINT1 to NMI, as firmware leaves the boot processor (MP 1.4 §3.6.2.2). The pins of other
/// processors stay masked, as after a reset.
///
/// LINT0 is unmasked only when the guest uses the 8259 (`legacy_pic`), that is, without ACPI. Hardware-reduced ACPI tells the guest that
/// there is none, so the guest never programs it. But KVM still has one, with no input masked, on the GSIs of the IOAPIC. Through LINT0
/// the serial port's first interrupt would reach the guest a second time, with a vector that the guest has not set up. KVM itself resets
/// LINT0 to open (`KVM_X86_QUIRK_LINT0_REENABLED`). Linux 5.3 and later masks it (`setup_local_APIC` soft-disables the APIC), older
/// kernels do not.
#[must_use]
pub fn boot(mut state: kvm_lapic_state, legacy_pic: bool) -> kvm_lapic_state {
    let mask = if legacy_pic { 0 } else { MASKED };
    update(&mut state, LVT_LINT0, MODE_EXTINT | mask);
    update(&mut state, LVT_LINT1, MODE_NMI);
    state
}

/// Sets delivery mode and mask of the entry at `offset`, and nothing else.
fn update(state: &mut kvm_lapic_state, offset: usize, bits: u32) {
    let register = &mut state.regs[offset..offset + 4];
    let mut bytes = [0; 4];
    for (byte, value) in bytes.iter_mut().zip(&*register) {
        *byte = value.cast_unsigned();
    }
    let value = u32::from_le_bytes(bytes) & !(DELIVERY_MODE | MASKED) | bits;
    for (place, byte) in register.iter_mut().zip(value.to_le_bytes()) {
        *place = byte as c_char;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(state: &kvm_lapic_state, offset: usize) -> u32 {
        u32::from_le_bytes(std::array::from_fn(|n| state.regs[offset + n] as u8))
    }

    #[test]
    fn the_pins_are_wired_as_firmware_does() {
        let mut state = kvm_lapic_state::default();
        update(&mut state, LVT_LINT1, MASKED);
        state.regs[0x350] = 0x2a;
        let wired = boot(state, true);
        assert_eq!(entry(&wired, 0x350), 0x72a);
        assert_eq!(entry(&wired, 0x360), 0x400);
        let others =
            |state: &kvm_lapic_state| [&state.regs[..0x350], &state.regs[0x364..]].concat();
        assert_eq!(others(&wired), others(&state));
    }

    #[test]
    fn an_8259_that_is_never_programmed_is_masked() {
        assert_eq!(entry(&boot(kvm_lapic_state::default(), false), 0x350), 0x1_0700);
    }
}
