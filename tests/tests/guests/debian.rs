//! A stock Debian: its own kernel, initrd and root disk, as debootstrap leaves them.
//!
//! systemd gives each device 90 seconds, the console among them, and the lab can need longer: there, hundreds of processes start on
//! an emulated CPU. So it waits longer here, and no other guest runs beside this one (`make test-guests`).

use std::fs;
use std::path::Path;
use std::process::Command;

use minivmm_tests::linux::{BOOT_BOUND, WORDS, artefact, assert_clean, content};
use minivmm_tests::minivmm;
use minivmm_tests::session::Session;

#[test]
fn it_boots_logs_in_and_powers_off() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("root.img");
    let copied = Command::new("cp")
        .arg("--sparse=always")
        .arg(artefact("debian/root.img"))
        .arg(&image)
        .status()
        .unwrap();
    assert!(copied.success());
    write(&image, "etc/systemd/system.conf.d/lab.conf", "[Manager]\nDefaultDeviceTimeoutSec=500\n");
    let mut command = minivmm([
        "--memory",
        "1G",
        "--cpus",
        "2",
        "--cmdline",
        WORDS,
        "--disk",
        "root.img",
        "--kernel",
    ]);
    command.arg(artefact("debian/vmlinuz")).arg("--initrd").arg(artefact("debian/initrd.img"));
    let mut session = Session::start(command.current_dir(directory.path()));
    session.expect("debian login: ", BOOT_BOUND);
    session.send("root\n");
    session.expect("Password: ", BOOT_BOUND);
    session.send("minivmm\n");
    session.expect("root@debian:~# ", BOOT_BOUND);
    session.send("findmnt -no SOURCE,FSTYPE /; systemctl is-system-running; systemd-detect-virt\n");
    let facts = session.expect("kvm", BOOT_BOUND);
    assert!(
        facts.contains("/dev/vda") && facts.contains("ext4") && facts.contains("running"),
        "{facts}"
    );
    session.send("poweroff\n");
    let ended = session.wait(BOOT_BOUND).must_be(0);
    assert_eq!(ended.errors, "");
    assert_clean(&image);
}

/// Writes a new file, in a new directory, into an ext4 image.
fn write(image: &Path, file: &str, text: &str) {
    let copy = image.with_extension("new");
    fs::write(&copy, text).unwrap();
    let directory = file.rsplit_once('/').unwrap().0;
    for request in [format!("mkdir {directory}"), format!("write {} {file}", copy.display())] {
        Command::new("debugfs").args(["-w", "-R", &request]).arg(image).output().unwrap();
    }
    assert_eq!(content(image, file), text);
}
