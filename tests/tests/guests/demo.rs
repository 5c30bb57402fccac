//! `make run`, as the README and the chapter "a kernel boots" promise it. The arguments are the Makefile's.

use std::process::Command;

use minivmm_tests::linux::{BOOT_BOUND, artefact, assert_clean};
use minivmm_tests::minivmm;
use minivmm_tests::session::Session;

#[test]
fn the_shell_shows_what_the_chapter_says() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("root.img");
    let copied = Command::new("cp")
        .arg("--sparse=always")
        .arg(artefact("demo.img"))
        .arg(&image)
        .status()
        .unwrap();
    assert!(copied.success());
    let mut command = minivmm(["--cmdline", "loglevel=3", "--disk", "root.img", "--kernel"]);
    command.arg(artefact("linux-cloud/vmlinux")).arg("--initrd").arg(artefact("initrd-cloud.cpio"));
    let mut session = Session::start(command.current_dir(directory.path()));

    let greeting = session.expect("guest:/root# ", BOOT_BOUND);
    assert!(
        greeting.contains("in minivmm, up after") && greeting.contains("/dev/vda"),
        "{greeting}"
    );
    session.send("dmesg | head -40\n");
    let messages = session.expect("guest:/root# ", BOOT_BOUND);
    for promised in [
        "BIOS-provided physical RAM map",
        "ACPI: RSDP",
        "ACPI: XSDT",
        "ACPI: FACP",
        "ACPI: DSDT",
        "ACPI: APIC",
    ] {
        assert!(messages.contains(promised), "no {promised:?} in:\n{messages}");
    }
    session.send("echo kept > /root/note; poweroff\n");
    session.wait(BOOT_BOUND).must_be(0);
    assert_clean(&image);
    let note = Command::new("debugfs").args(["-R", "cat /root/note"]).arg(&image).output().unwrap();
    assert_eq!(note.stdout, b"kept\n");
}
