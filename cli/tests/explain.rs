//! `--explain` prints the machine that a run with the same options makes, and leaves nothing behind.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use std::fs;

use minivmm_tests::files::{Listing, sparse};
use minivmm_tests::guest::Program;
use minivmm_tests::session::Session;
use minivmm_tests::xml::elements;
use minivmm_tests::{BOUND, image, kvm_is_usable, minivmm, small_guest, unexpected_lines};
use tempfile::tempdir;

/// The lines below the heading that begins with `heading`.
fn section<'a>(text: &'a str, heading: &str) -> Vec<&'a str> {
    let lines = text.lines().skip_while(|line| !line.starts_with(heading)).skip(1);
    let section: Vec<_> = lines.take_while(|line| line.starts_with("  ")).map(str::trim).collect();
    assert!(!section.is_empty(), "{heading}: {text}");
    section
}

/// The words behind `name` in a section.
fn value<'a>(section: &[&'a str], name: &str) -> &'a str {
    let found = section.iter().find_map(|line| line.strip_prefix(name));
    found.unwrap_or_else(|| panic!("{name}: {section:?}")).trim()
}

#[test]
fn a_machine_is_printed_and_leaves_no_trace() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    sparse(&directory.path().join("disk.img"), 1 << 20);
    fs::write(directory.path().join("log"), "of the last run").unwrap();
    // A guest that ran would end with a status of its own.
    let mut command = small_guest(directory.path(), Program::Exit);
    command.args(["--debug-exit", "--cpus", "2", "--explain", "--qmp", "unix:control"]);
    command.args(["--disk", "disk.img,readonly=on,num-queues=2", "--console", "file:log"]);
    command.args(["--dump-on-panic", "dump"]);
    let before = Listing::of(directory.path());
    let ended = Session::start(&mut command).wait(BOUND).must_be(0);
    assert_eq!(before, Listing::of(directory.path()));
    assert!(unexpected_lines(&ended.errors).is_empty(), "{ended}");
    let text = String::from_utf8(ended.output).unwrap();

    let summary = "Machine: 32768 KiB of memory, vCPUs: 2, disks: 1, tables: ACPI\n";
    assert!(text.starts_with(summary), "{text}");
    let map = section(&text, "Memory map");
    assert_eq!(map.first(), Some(&"0x000000000000-0x00000009fbff  RAM"));
    assert_eq!(map.last(), Some(&"0x000000100000-0x000001ffffff  RAM"));
    let content = section(&text, "Content of memory");
    for name in ["GDT", "PVH start info", "command line", "ACPI tables", "kernel"] {
        assert!(content.iter().any(|line| line.ends_with(name)), "{name}: {content:?}");
    }
    let registers = section(&text, "Registers of vCPU 0");
    assert_eq!(value(&registers, "rbx"), "0x2000");
    assert_eq!(value(&registers, "cr0"), "0x11 (32-bit, no paging)");
    assert!(value(&section(&text, "I/O ports"), "0x00f4").contains("debug exit"));
    let disk = section(&text, "Disk vda");
    assert_eq!(value(&disk, "image"), "disk.img, raw, read-only");
    assert_eq!(value(&disk, "registers"), "0xd0000000, interrupt 16");
    assert!(value(&disk, "features").starts_with("SIZE_MAX SEG_MAX GEOMETRY RO BLK_SIZE"));
    assert_eq!(value(&disk, "queues of at most").split(' ').count(), 2);
    assert!(value(&disk, "configuration space").starts_with("capacity=2048 "));
    let threads = section(&text, "Threads");
    for thread in ["minivmm", "vcpu-0", "vcpu-1", "disk-vda-0", "console"] {
        assert!(threads.iter().any(|line| line.starts_with(thread)), "{thread}: {threads:?}");
    }
    let descriptors = section(&text, "Descriptors");
    assert!(descriptors.iter().any(|line| line.contains("/disk.img: ")), "{descriptors:?}");
    assert!(descriptors.contains(&"log: a run opens it"), "{descriptors:?}");
    assert!(descriptors.contains(&"dump: a run opens it"), "{descriptors:?}");
    assert!(descriptors.contains(&"control: a run binds it"), "{descriptors:?}");
    let calls = section(&text, "System calls");
    assert!(value(&calls, "vcpu").contains("ioctl (KVM_RUN, "), "{calls:?}");
    assert!(!value(&calls, "main").contains("openat"), "{calls:?}");
}

#[test]
fn a_picture_names_every_region_and_thread_of_the_text() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    sparse(&directory.path().join("disk.img"), 1 << 20);
    sparse(&directory.path().join("other.img"), 1 << 20);
    let run = |explain: &str| {
        let mut command = small_guest(directory.path(), Program::Exit);
        command.args(["--cpus", "2", "--disk", "disk.img", "--disk", "other.img,aio=threads"]);
        let ended = Session::start(command.arg(explain)).wait(BOUND).must_be(0);
        String::from_utf8(ended.output).unwrap()
    };
    let text = run("--explain=text");
    let elements = elements(&run("--explain=svg"));
    let has = |name: &str, text: &str| {
        elements.iter().any(|element| element.name == name && element.text == text)
    };
    for heading in ["Memory map", "Registers of devices", "Content of memory"] {
        for region in section(&text, heading) {
            assert!(has("title", region), "{region}: {elements:?}");
            let (_, name) = region.split_once("  ").unwrap();
            assert!(has("text", name), "{name}: {elements:?}");
        }
    }
    let threads = section(&text, "Threads");
    assert!(threads.iter().any(|thread| thread.starts_with("disk-vdb-0 ")), "{threads:?}");
    // Of two runs, one may see a thread that has ended in the other.
    for thread in threads.into_iter().filter(|thread| !thread.ends_with("and ends")) {
        let (name, purpose) = thread.split_once(' ').unwrap();
        assert!(has("title", &format!("{name}: {}", purpose.trim())), "{name}: {elements:?}");
        assert!(has("text", name), "{name}: {elements:?}");
    }
}

#[test]
fn its_command_line_is_the_one_that_the_guest_gets() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    fs::write(directory.path().join("linux64"), image::linux64(Program::BootLinux64)).unwrap();
    let mut options = vec!["--kernel", "linux64", "--acpi", "off", "--cmdline", "quiet a=\"b c\""];
    let run = |options: &[&str]| {
        let mut command = minivmm(options);
        let ended = Session::start(command.current_dir(directory.path())).wait(BOUND).must_be(0);
        String::from_utf8(ended.output).unwrap()
    };
    let seen = run(&options);
    options.extend(["--explain", "--sandbox", "off"]);
    let explained = run(&options);
    assert_eq!(section(&explained, "Kernel command line"), [seen.lines().next().unwrap()]);
    assert_eq!(section(&explained, "System calls"), ["all: --sandbox off"]);
    let registers = section(&explained, "Registers of vCPU 0");
    assert_eq!(value(&registers, "rsi"), "0x7000");
    assert!(value(&registers, "cr0").ends_with("(64-bit, paging)"));
}

#[test]
fn the_script_of_a_command_is_a_disk_of_the_machine() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    sparse(&directory.path().join("disk.img"), 1 << 20);
    let mut command = small_guest(directory.path(), Program::Exit);
    command.args(["--disk", "disk.img", "--exec", "true", "--explain"]);
    let ended = Session::start(&mut command).wait(BOUND).must_be(0);
    let text = String::from_utf8(ended.output).unwrap();
    assert!(text.contains("disks: 2, "), "{text}");
    assert!(section(&text, "Kernel command line")[0].ends_with("-- /dev/vdb"), "{text}");
    assert!(section(&text, "I/O ports").contains(&"0x02f8                 ttyS1, interrupt 3"));
}
