//! Ends that come from outside while Linux works.

use std::process::Command;

use minivmm_tests::linux::{BOOT_BOUND, CLOUD, Guest};
use rustix::process::Signal;

/// SIGTERM while the guest writes: what it had synced is there, and the journal makes the rest whole.
#[test]
fn a_signal_under_write_load_leaves_a_sound_file_system() {
    let script = r#"
set -e
mke2fs -q -t ext4 /dev/vdb
mount -t ext4 /dev/vdb /mnt
for n in 1 2 3 4 5; do echo "file $n" >/mnt/file-$n; done
sync
fact synced
while :; do
    for n in 1 2 3 4 5 6 7 8; do head -c 1000000 /dev/urandom >/mnt/load-$n; rm -f /mnt/load-$n; done
    fact round
done
"#;
    let guest =
        Guest::new(CLOUD, script).with("--cpus 2").with_tools().with_disk("disk", 64 << 20, "");
    let session = guest.start();
    session.expect("fact: synced", BOOT_BOUND);
    session.expect("fact: round", BOOT_BOUND);
    session.expect("fact: round", BOOT_BOUND);
    session.signal(Signal::TERM);
    let ended = session.wait(BOOT_BOUND).must_be(0);
    assert_eq!(ended.errors, "");

    let image = guest.path("disk");
    let replay =
        Command::new("e2fsck").args(["-p"]).arg(&image).output().expect("e2fsck is installed");
    // 1: corrected, which is the journal's replay.
    assert!(
        matches!(replay.status.code(), Some(0 | 1)),
        "{}",
        String::from_utf8_lossy(&replay.stdout)
    );
    minivmm_tests::linux::assert_clean(&image);
    for n in 1..=5 {
        let file = Command::new("debugfs")
            .args(["-R", &format!("cat /file-{n}")])
            .arg(&image)
            .output()
            .unwrap();
        assert_eq!(String::from_utf8_lossy(&file.stdout), format!("file {n}\n"));
    }
}

/// The terminal's user presses Ctrl-A x in the middle of a boot.
#[test]
fn the_clock_ends_a_guest_that_does_not() {
    let guest = Guest::new(CLOUD, "fact started\nsleep 10000").with("--timeout 40s");
    let report = guest.run(124);
    assert_eq!(report.ended.errors.lines().count(), 1, "{}", report.ended);
}
