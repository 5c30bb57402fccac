//! `--overcommit cpu-pm=on`: an idle vCPU stays in the guest, as KVM's own count of halts shows.

use std::fs;
use std::process::Command;

use minivmm_tests::linux::{BOOT_BOUND, CLOUD, Guest};
use minivmm_tests::skip;

/// How often vCPUs of this process's VM have halted (Documentation/virt/kvm/api.rst, KVM_GET_STATS_FD).
fn halts(process: u32) -> Option<u64> {
    let machines = fs::read_dir("/sys/kernel/debug/kvm").ok()?.flatten();
    let is_ours = |name: &str| name.starts_with(&format!("{process}-"));
    let machine = machines.map(|entry| entry.path());
    let ours = machine
        .into_iter()
        .find(|path| path.file_name().and_then(|name| name.to_str()).is_some_and(is_ours))?;
    fs::read_to_string(ours.join("halt_exits")).ok()?.trim().parse().ok()
}

#[test]
fn an_idle_vcpu_stays_in_the_guest() {
    // Fails where it is mounted already, and for others than root.
    let _ = Command::new("mount").args(["-t", "debugfs", "debugfs", "/sys/kernel/debug"]).output();
    let mut counts = Vec::new();
    for options in ["", "--overcommit cpu-pm=on --vcpu-affinity 0"] {
        let script = "fact idle $(cat /sys/devices/system/cpu/cpuidle/current_driver)
                      sleep 1\nfact slept\nread -r line\n";
        let guest = Guest::new(CLOUD, script).with(options);
        let mut session = guest.start();
        if session.output.expect("fact: slept", BOOT_BOUND).is_err() {
            let ended = session.wait(BOOT_BOUND);
            assert!(ended.errors.contains("KVM_CAP_X86_DISABLE_EXITS"), "{ended}");
            return skip("this KVM keeps the exits of HLT");
        }
        counts.push(halts(session.id()));
        session.send("\n");
        let ended = session.wait(BOOT_BOUND).must_be(0);
        println!(
            "{options:?}: {:?} halts; {}",
            counts.last(),
            String::from_utf8_lossy(&ended.output)
        );
    }
    let [Some(without), Some(with)] = counts[..] else {
        return skip("no statistics of KVM in /sys/kernel/debug");
    };
    assert!(without > 0 && with == 0, "{without} halts, and {with} with the option");
}
