//! `--overcommit cpu-pm=on`: an idle vCPU stays in the guest, for vCPUs that have their host CPUs to themselves.
//!
//! A capability: without it, a vCPU's HLT ends in KVM, which gives the CPU to other work and has to be woken by the next interrupt.
//! The builder calls [`keep_idle_in_guest`] before the first vCPU is made, which is when KVM takes it, and passes [`hints`] on to the
//! CPUID leaves. The CPU sleeps in the guest's own HLT then, and to the host it is busy all the time.

use std::io;

use kvm_bindings::{
    KVM_CAP_X86_DISABLE_EXITS, KVM_X86_DISABLE_EXITS_HLT, KVM_X86_DISABLE_EXITS_PAUSE,
    kvm_enable_cap,
};
use kvm_ioctls::{Kvm, VmFd};

use crate::config::VmConfig;
use crate::error::Error;

/// `KVM_HINTS_REALTIME`: no vCPU is ever without a CPU for long, so that spinning is better than sleeping.
const HINT_REALTIME: u32 = 1 << 0;

/// What the guest is told in EDX of KVM's feature leaf. That its vCPUs run without a break is so only if they have host CPUs of
/// their own; QEMU has `kvm-hint-dedicated=on` for it.
pub(crate) fn hints(config: &VmConfig) -> u32 {
    if config.cpu_pm && !config.vcpu_affinity.is_empty() { HINT_REALTIME } else { 0 }
}

/// Lets HLT and PAUSE of all vCPUs to come run without exits, if `config` asks for it.
///
/// # Errors
/// This KVM does not do it, or refuses.
pub(crate) fn keep_idle_in_guest(config: &VmConfig, kvm: &Kvm, vm: &VmFd) -> Result<(), Error> {
    if !config.cpu_pm {
        return Ok(());
    }
    let offered = kvm.check_extension_raw(KVM_CAP_X86_DISABLE_EXITS.into());
    let mut capability = kvm_enable_cap { cap: KVM_CAP_X86_DISABLE_EXITS, ..Default::default() };
    capability.args[0] = exits_to_disable(offered)?.into();
    vm.enable_cap(&capability).map_err(Error::kvm("let HLT run without exits"))
}

/// Of the exits that KVM offers to disable. Without HLT's there is no use in it. On a CPU whose threads may see each other's
/// data, KVM offers PAUSE's alone.
fn exits_to_disable(offered: i32) -> Result<u32, Error> {
    let offered = u32::try_from(offered).unwrap_or(0);
    if offered & KVM_X86_DISABLE_EXITS_HLT == 0 {
        return Err(Error::Argument {
            option: "--overcommit",
            value: "cpu-pm=on".to_owned(),
            source: io::Error::other(
                "this host's KVM does not let a guest's HLT run without exits (KVM_CAP_X86_DISABLE_EXITS); leave the option out",
            ),
        });
    }
    Ok(offered & (KVM_X86_DISABLE_EXITS_HLT | KVM_X86_DISABLE_EXITS_PAUSE))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_kvm_offers_is_disabled_of_hlt_and_pause() {
        assert_eq!(exits_to_disable(0xf).unwrap(), 6);
        assert_eq!(exits_to_disable(2).unwrap(), 2);
    }

    #[test]
    fn a_kvm_that_offers_no_hlt_without_exits_is_named() {
        for offered in [-1, 0, 4] {
            let error = exits_to_disable(offered).unwrap_err();
            assert!(error.is_usage());
            assert_eq!(
                crate::WithCauses(&error).to_string(),
                "--overcommit cpu-pm=on: this host's KVM does not let a guest's HLT run without exits \
                 (KVM_CAP_X86_DISABLE_EXITS); leave the option out"
            );
        }
    }
}
