//! The features of the host's processors, from /proc/cpuinfo, and whether there are several.
//!
//! A capability: KVM works without it. `cli` warns if there is no hardware virtualization. The builder copies the kernel if the host is
//! itself a guest, and tells disks' workers how long they may poll.

use std::fs;
use std::io::{BufRead, BufReader};
use std::sync::LazyLock;
use std::time::Duration;

/// A warning, if KVM is there but the processor has no hardware virtualization: that KVM interprets every instruction and delivers no
/// interrupts, so Linux does not boot on it.
pub fn missing_hardware_support() -> Option<&'static str> {
    let flags = FLAGS.as_ref()?;
    if flags.has_virtualization() {
        return None;
    }
    Some(
        "this CPU does not support hardware virtualization (no vmx or svm flag): small guests run, Linux does not \
         boot; use the lab instead (`make run`, or `make lab CMD=...`)",
    )
}

/// Whether this host is itself a guest and runs guests by hardware virtualization: then their exits go through both hypervisors.
pub(crate) fn is_nested() -> bool {
    FLAGS.as_ref().is_some_and(|flags| flags.has_virtualization() && flags.contain("hypervisor"))
}

/// The longest that a worker polls for the guest's next request, however much interrupts cost. If no request comes, 20 ms of a
/// CPU are lost.
const MAX_POLLING: Duration = Duration::from_millis(20);

/// How long a disk's worker may poll before it sleeps. On a host with one CPU it must not poll: the guest needs the CPU.
pub(crate) fn polling_window() -> Duration {
    if *PROCESSORS == 1 { Duration::ZERO } else { MAX_POLLING }
}

/// Reads the host's files now, so that the other functions need not.
pub(crate) fn read_early() {
    let _ = (is_nested(), polling_window());
}

/// Number of processors that this process may use.
static PROCESSORS: LazyLock<usize> =
    LazyLock::new(|| std::thread::available_parallelism().map_or(1, usize::from));

/// The processor's features, as the host's kernel names them.
struct Flags(String);

/// The file is read once, because on a host with many CPUs that takes milliseconds.
static FLAGS: LazyLock<Option<Flags>> = LazyLock::new(Flags::read);

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
