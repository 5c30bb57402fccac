//! A directory of files that are wrong in every way, and a run of minivmm that must change none of them.
#![allow(dead_code, reason = "each test uses its part")]

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

use devices::disk::log_writes::WriteLog;
use minivmm_tests::BOUND;
use minivmm_tests::files::{Listing, sparse};
use minivmm_tests::guest::Program;
use minivmm_tests::image::{
    BZ_CMDLINE_SIZE, BZ_INIT_SIZE, BZ_LOADFLAGS, BZ_VERSION, BZ_XLOADFLAGS, ELF_CLASS, ELF_LOAD,
    ELF_MACHINE, P_MEMSZ, P_PADDR, bzimage, linux64, pvh,
};
use minivmm_tests::session::{Ended, Session};
use rustix::fs::{CWD, FileType, Mode, mknodat};
use tempfile::TempDir;

/// Runs `command` in `directory`. Its complaint, if it does not exit with `status` after one line, or changes a file.
pub(crate) fn refused(
    directory: &Path,
    command: &mut Command,
    status: i32,
) -> Result<Ended, String> {
    let before = Listing::of(directory);
    let mut session = Session::start(command.current_dir(directory));
    session.close_input();
    let ended = session.wait(BOUND);
    let one_line = ended.errors.lines().count() == 1 && ended.errors.starts_with("minivmm: ");
    let wrong = [
        (ended.code() != status, "the exit status is wrong"),
        (!one_line, "it is not one line"),
        (!ended.output.is_empty(), "there is something on standard output"),
        (before != Listing::of(directory), "a file was created or changed"),
    ];
    let wrong: Vec<_> = wrong.into_iter().filter_map(|(is, what)| is.then_some(what)).collect();
    if wrong.is_empty() {
        return Ok(ended);
    }
    let errors: String = ended.errors.chars().take(1000).collect();
    Err(format!("{}; exit status {}: {}", wrong.join("; "), ended.code(), errors.trim_end()))
}

/// A directory with everything that can be wrong with a file.
pub(crate) fn files() -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    let write = |name: &str, content: &[u8]| fs::write(at(name), content).unwrap();
    let patched = |image: &[u8], offset: usize, bytes: &[u8]| {
        let mut image = image.to_vec();
        image[offset..offset + bytes.len()].copy_from_slice(bytes);
        image
    };

    write("echo.elf", &pvh(Program::Echo));
    // What is taken for good input ends at once.
    let elf = pvh(Program::PowerOff);
    write("good.elf", &elf);
    write("good.64", &linux64(Program::BootLinux64));
    write("empty", b"");
    write("text", b"#!/bin/sh\necho this is not a kernel\n");
    write("zeroes", &[0; 8192]);
    write("gzip", &[&b"\x1f\x8b\x08\0"[..], &[0; 4096]].concat());
    write("elf-40-bytes", &elf[..40]);
    write("elf-no-program-headers", &elf[..ELF_LOAD + 6]);
    write("elf-no-segment", &elf[..0x1000 + 8]);
    write("elf-32-bit", &patched(&elf, ELF_CLASS, &[1]));
    write("elf-aarch64", &patched(&elf, ELF_MACHINE, &[183]));
    write("elf-1G", &patched(&elf, ELF_LOAD + P_MEMSZ, &(1u64 << 30).to_le_bytes()));
    write("elf-in-hole", &patched(&elf, ELF_LOAD + P_PADDR, &0xd000_0000_u64.to_le_bytes()));
    write("elf-wraps", &patched(&elf, ELF_LOAD + P_PADDR, &(u64::MAX - 100).to_le_bytes()));
    write("elf-at-0", &patched(&elf, ELF_LOAD + P_PADDR, &0u64.to_le_bytes()));
    // Documentation/arch/arm64/booting.rst: the magic at 56, behind a branch that reads as "MZ".
    write("image-aarch64", &patched(&patched(&[0; 4096], 0, b"MZ"), 56, b"ARM\x64"));

    let bz = bzimage(Program::BootLinux64);
    write("good.bz", &bz);
    write("bz-short-cmdline", &patched(&bz, BZ_CMDLINE_SIZE, &20u32.to_le_bytes()));
    write("bz-400-bytes", &bz[..400]);
    write("bz-setup-only", &bz[..1024]);
    write("bz-old", &patched(&bz, BZ_VERSION, &0x0205_u16.to_le_bytes()));
    write("bz-low", &patched(&bz, BZ_LOADFLAGS, &[0]));
    write("bz-32-bit", &patched(&bz, BZ_XLOADFLAGS, &[0]));
    write("bz-1G", &patched(&bz, BZ_INIT_SIZE, &(1u32 << 30).to_le_bytes()));

    fs::create_dir(at("directory")).unwrap();
    mknodat(CWD, at("fifo"), FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    sparse(&at("2G"), 2 << 30);
    sparse(&at("good.img"), 1 << 20);
    symlink("good.img", at("link.img")).unwrap();
    symlink("loop", at("loop")).unwrap();
    fs::hard_link(at("good.elf"), at("hard.link")).unwrap();
    fs::hard_link(at("text"), at("text.link")).unwrap();
    write("qcow2-damaged", &[&b"QFI\xfb\0\0\0\x03"[..], &[0; 1016]].concat());
    write("100-bytes", &[0; 100]);
    WriteLog::new(at("good.log")).begin().unwrap();
    // Behind the magic (Linux, drivers/md/dm-log-writes.c, log_write_super).
    write("version-9.log", &patched(&fs::read(at("good.log")).unwrap(), 8, &[9]));
    let event = |number: u64, disk: &str, kind: &str, sector: u64| {
        format!(
            "{{\"time_us\":{number},\"event\":\"virtio_blk_handle_any\",\"disk\":\"{disk}\",\"req\":{number},\
             \"kind\":\"{kind}\",\"sector\":{sector},\"nsectors\":1}}\n"
        )
    };
    let both = event(1, "vda", "Read", 0) + &event(2, "vdb", "Write", 0);
    write("two-disks.json", both.as_bytes());
    write("reads.json", event(1, "vda", "Read", 4096).as_bytes());
    write("writes.json", event(1, "vda", "Write", 0).as_bytes());
    write("no-request.json", b"{\"time_us\":1,\"event\":\"irq_pulse\"}\n");
    write("unreadable", &elf);
    fs::set_permissions(at("unreadable"), Permissions::from_mode(0o000)).unwrap();
    directory
}
