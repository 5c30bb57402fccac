//! The lab itself: what its CPU must not offer, and its clock. `resources/lab` gives the reasons.

use minivmm_tests::skip;

/// A line of /proc/cpuinfo, `None` outside the lab.
fn cpuinfo(key: &str) -> Option<String> {
    if std::env::var_os("MINIVMM_LAB").is_none() {
        skip("this CPU runs guests without the lab");
        return None;
    }
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap();
    let value = text.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        (name.trim() == key).then(|| value.trim().to_owned())
    });
    Some(value.unwrap_or_else(|| panic!("no {key} in /proc/cpuinfo:\n{text}")))
}

#[test]
fn its_cpu_has_nothing_that_loses_guests() {
    let Some(flags) = cpuinfo("flags") else { return };
    let flags: Vec<_> = flags.split(' ').collect();
    for needed in ["svm", "npt"] {
        assert!(flags.contains(&needed), "no {needed} in {flags:?}");
    }
    for harmful in ["cx16", "xsave", "avx", "avx2", "fma", "f16c"] {
        assert!(!flags.contains(&harmful), "{harmful} in {flags:?}");
    }
    assert_eq!(std::thread::available_parallelism().unwrap().get(), 1, "processors");
}

/// The lab's kernel counts time with the frequency that the host's kernel has found, and does not measure its own.
#[test]
fn its_clock_has_the_frequency_of_the_hosts() {
    let Some(bogomips) = cpuinfo("bogomips") else { return };
    let command_line = std::fs::read_to_string("/proc/cmdline").unwrap();
    let Some(host) =
        command_line.split_whitespace().find_map(|word| word.strip_prefix("tsc_early_khz="))
    else {
        return skip("the host's TSC has no constant frequency");
    };
    let host: f64 = host.parse().unwrap();
    // Two per microsecond.
    let lab = bogomips.parse::<f64>().unwrap() * 500.0;
    assert!((lab / host - 1.0).abs() < 0.01, "the lab counts {lab} kHz, the host {host} kHz");
}
