//! A stock Debian: its own kernel, initrd and root disk, as debootstrap leaves them.

use std::process::Command;

use minivmm_tests::linux::{BOOT_BOUND, artefact, assert_clean};
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
    let mut command = minivmm([
        "--memory",
        "1G",
        "--cpus",
        "2",
        "--cmdline",
        "quiet",
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
