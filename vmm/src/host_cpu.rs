//! What the host's processor can do, as its kernel tells in /proc/cpuinfo.
//!
//! A capability: KVM works without it. `cli` warns of a processor without hardware virtualization, and the builder copies the
//! kernel where the host is itself a guest.

use std::fs;
use std::io::{BufRead, BufReader};

/// A warning when KVM is there but the processor has no hardware virtualization: that KVM interprets every guest
/// instruction and delivers no interrupts, so that Linux does not boot on it.
pub fn missing_hardware_support() -> Option<&'static str> {
    let flags = Flags::read()?;
    if flags.has_virtualization() {
        return None;
    }
    Some(
        "this CPU does not support hardware virtualization (no vmx or svm flag): small guests run, Linux does not \
         boot; use the lab instead (`make run`, or `make lab CMD=...`)",
    )
}

/// Whether this host is itself a guest, whose own guests exit through both hypervisors.
pub(crate) fn is_nested() -> bool {
    Flags::read().is_some_and(|flags| flags.has_virtualization() && flags.contain("hypervisor"))
}

/// The processor's features, as the host's kernel names them.
struct Flags(String);

impl Flags {
    fn read() -> Option<Self> {
        // One processor's are enough, and the first to come.
        let cpuinfo = BufReader::new(fs::File::open("/proc/cpuinfo").ok()?);
        cpuinfo.lines().map_while(Result::ok).find(|line| line.starts_with("flags")).map(Self)
    }

    fn contain(&self, flag: &str) -> bool {
        self.0.split_whitespace().any(|word| word == flag)
    }

    fn has_virtualization(&self) -> bool {
        self.contain("vmx") || self.contain("svm")
    }
}
