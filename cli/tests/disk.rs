//! A guest of our own drives the virtio-blk device: notify, ioeventfd, request, used ring, on any /dev/kvm.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use std::fs;
use std::path::Path;
use std::process::Command;

use minivmm_tests::guest::{self, DISK_SECTORS, Program, words};
use minivmm_tests::qmp;
use minivmm_tests::session::Session;
use minivmm_tests::{BOUND, kvm_is_usable, skip, small_guest, unexpected_lines};
use serde_json::json;
use tempfile::tempdir;

/// What `Program::Disk` expects to find in sector 3, and what it writes to sector 7.
const GIVEN: u32 = 0x5a00_0000;
const WRITTEN: u32 = 0xc300_0000;

/// The image before, and what it has to be afterwards.
fn before() -> Vec<u8> {
    let mut image = vec![0x77; DISK_SECTORS as usize * 512];
    image[3 * 512..][..512].copy_from_slice(&words(GIVEN, 128));
    image
}

fn after() -> Vec<u8> {
    let mut image = before();
    image[7 * 512..][..512].copy_from_slice(&words(WRITTEN, 128));
    image
}

/// Runs the guest; an exit status other than success is the number of a step in `guest.s`.
#[track_caller]
fn run(directory: &Path, disk: &str, serial: &str) {
    // The guest notices no difference between registers that are mapped and registers that trap.
    for registers in [&[][..], &["--trap-registers"]] {
        fs::write(directory.join("disk.img"), before()).unwrap();
        let mut command = small_guest(directory, Program::Disk);
        let ended = Session::start(command.args(["--debug-exit", "--disk", disk]).args(registers));
        let ended = ended.wait(BOUND).must_be(guest::SUCCESS);
        assert_eq!(
            String::from_utf8_lossy(&ended.output),
            format!("{serial}\n"),
            "{disk} {registers:?}"
        );
        assert!(unexpected_lines(&ended.errors).is_empty(), "{ended}");
    }
}

#[test]
fn reads_writes_flushes_and_errors() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let image = directory.path().join("disk.img");
    for options in [
        "",
        ",aio=threads",
        ",aio=io_uring",
        ",cache=writethrough",
        ",cache=unsafe",
        ",num-queues=4",
        ",queue-size=8",
        ",discard=ignore",
        ",detect-zeroes=unmap",
        ",locking=off",
    ] {
        fs::write(&image, before()).unwrap();
        run(
            directory.path(),
            &format!("disk.img,serial=the-serial-number{options}"),
            "the-serial-number",
        );
        assert!(fs::read(&image).unwrap() == after(), "{options}: the image has other content");
    }
}

#[test]
fn a_serial_number_of_twenty_bytes_has_no_terminator_and_more_is_refused() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    fs::write(directory.path().join("disk.img"), before()).unwrap();
    run(directory.path(), "disk.img,serial=12345678901234567890", "12345678901234567890");
}

#[test]
fn an_image_with_an_odd_end_keeps_it() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let image = directory.path().join("disk.img");
    fs::write(&image, [before(), b"odd end".to_vec()].concat()).unwrap();
    let ended = Session::start(small_guest(directory.path(), Program::Disk).args([
        "--debug-exit",
        "--disk",
        "disk.img",
    ]))
    .wait(BOUND)
    .must_be(guest::SUCCESS);
    let says = unexpected_lines(&ended.errors).join("\n");
    for part in ["disk.img", "32775 bytes", "64 sectors", "7 bytes"] {
        assert!(says.contains(part), "does not say {part:?}: {says}");
    }
    assert!(fs::read(&image).unwrap() == [after(), b"odd end".to_vec()].concat());
}

/// An image without data has no tables for its end: there is nothing to give back, and nothing to warn of.
#[test]
fn an_empty_qcow2_shrinks_without_a_word() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let create = ["create", "-q", "-f", "qcow2", "disk.img", "2G"];
    let made = Command::new("qemu-img").args(create).current_dir(directory.path()).status();
    if !made.is_ok_and(|status| status.success()) {
        return skip("no qemu-img here (Debian: qemu-utils)");
    }
    let options = ["--disk", "disk.img,format=qcow2"];
    let (session, mut qmp) = qmp::start(directory.path(), Program::Spin, &options);
    let size = json!({ "device": "vda", "size": 1 << 20 });
    qmp.execute("block_resize", size).unwrap();
    qmp.query("quit");
    let ended = session.wait(BOUND).must_be(0);
    assert!(unexpected_lines(&ended.errors).is_empty(), "{ended}");
}

/// `query-block` names each image of a chain inside the one that builds on it, as QEMU does. `qemu-img info` says the same of each.
#[test]
fn clients_see_the_backing_chain() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let qemu_img = |arguments: &[&str]| {
        let output =
            Command::new("qemu-img").args(arguments).current_dir(directory.path()).output();
        let output = output.inspect(|output| assert!(output.status.success(), "{output:?}"));
        output.map(|output| output.stdout)
    };
    let Ok(_) = qemu_img(&["create", "-q", "base.raw", "8M"]) else {
        return skip("no qemu-img here (Debian: qemu-utils)");
    };
    for (name, below, format) in [("mid", "base.raw", "raw"), ("top", "mid", "qcow2")] {
        qemu_img(&["create", "-q", "-f", "qcow2", "-b", below, "-F", format, name]).unwrap();
    }
    let disks = [
        "top",
        "top,id=temporary,snapshot=on,locking=off",
        "base.raw,format=raw,readonly=on,locking=off",
    ];
    let disks = disks.map(|disk| match disk.strip_prefix("top") {
        Some(keys) => format!("top,format=qcow2,backing=on{keys}"),
        None => disk.to_owned(),
    });
    let options: Vec<_> = disks.iter().flat_map(|disk| ["--disk", disk]).collect();
    let (session, mut control) = qmp::start(directory.path(), Program::Spin, &options);
    let disks = control.query("query-block");
    let inserted = |disk: usize| &disks[disk]["inserted"];
    let info = qemu_img(&["info", "--output=json", "--backing-chain", "-U", "top"]).unwrap();
    let info: Vec<serde_json::Value> = serde_json::from_slice(&info).unwrap();
    assert_eq!((info.len(), &inserted(0)["backing_file_depth"]), (3, &json!(2)));
    let mut image = &inserted(0)["image"];
    for of_qemu in &info {
        for key in [
            "filename",
            "format",
            "virtual-size",
            "actual-size",
            "dirty-flag",
            "backing-filename",
            "full-backing-filename",
            "backing-filename-format",
        ] {
            assert_eq!(image.get(key), of_qemu.get(key), "{key} of {image} and {of_qemu}");
        }
        image = image.get("backing-image").unwrap_or(&serde_json::Value::Null);
    }
    assert_eq!(inserted(0)["backing_file"], "mid");
    // As in QEMU, the overlay is an image more.
    assert_eq!(
        (&inserted(1)["backing_file_depth"], &inserted(1)["backing_file"]),
        (&json!(3), &json!("top"))
    );
    assert_eq!(inserted(1)["image"]["backing-image"]["backing-image"]["filename"], "mid");
    assert_eq!(
        (&inserted(2)["backing_file_depth"], inserted(2).get("backing_file")),
        (&json!(0), None)
    );
    control.query("quit");
    session.wait(BOUND).must_be(0);
}
