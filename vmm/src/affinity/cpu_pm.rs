//! `--overcommit cpu-pm=on`: the guest's HLT and PAUSE cause no exits, for vCPUs that have host CPUs of their own.
//!
//! Without it, HLT exits to KVM, which schedules other work, and the next interrupt has to wake the vCPU's thread. With it, the host CPU
//! executes the guest's HLT, and looks busy to the host all the time.
//!
//! The builder calls [`keep_idle_in_guest`] before it makes the first vCPU: KVM accepts the setting only then.

use std::io;

use kvm_bindings::{
    KVM_CAP_X86_DISABLE_EXITS, KVM_X86_DISABLE_EXITS_HLT, KVM_X86_DISABLE_EXITS_PAUSE,
    kvm_enable_cap,
};
use kvm_ioctls::{Kvm, VmFd};

use crate::config::VmConfig;
use crate::error::Error;

/// `KVM_HINTS_REALTIME`: a vCPU is never preempted for long, so a guest's locks should spin instead of sleep
/// (`Documentation/virt/kvm/x86/cpuid.rst`).
const HINT_REALTIME: u32 = 1 << 0;

/// KVM's hints, EDX of CPUID leaf 0x4000_0001. The hint is true only if the vCPUs have host CPUs of their own, so it needs
/// `--vcpu-affinity`. In QEMU it is `kvm-hint-dedicated=on`.
pub(crate) fn hints(config: &VmConfig) -> u32 {
    if config.cpu_pm && !config.vcpu_affinity.is_empty() { HINT_REALTIME } else { 0 }
}

/// If `config` asks for it, HLT and PAUSE cause no exits on the vCPUs that are made after this call.
///
/// # Errors
/// This KVM does not support it, or refuses it.
pub(crate) fn keep_idle_in_guest(config: &VmConfig, kvm: &Kvm, vm: &VmFd) -> Result<(), Error> {
    if !config.cpu_pm {
        return Ok(());
    }
    let offered = kvm.check_extension_raw(KVM_CAP_X86_DISABLE_EXITS.into());
    let mut capability = kvm_enable_cap { cap: KVM_CAP_X86_DISABLE_EXITS, ..Default::default() };
    capability.args[0] = exits_to_disable(offered)?.into();
    vm.enable_cap(&capability).map_err(Error::kvm("let HLT run without exits"))
}

/// The exits to disable, among those that KVM offers. HLT must be one of them. KVM offers only PAUSE on a CPU whose hyper-threads
/// influence each other's return predictions (`mitigate_smt_rsb` in `arch/x86/kvm/x86.c`).
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
