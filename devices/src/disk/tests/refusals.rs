//! Hosts whose seccomp filter refuses a system call, or whose disk reports an error once.
//!
//! A filter belongs to the thread that installs it and to the threads that it starts, such as an engine's pool.

use std::path::Path;
use std::sync::Arc;
use std::thread;

use super::rig::{Request, Rig, WRITE, directories, every_way};
use crate::disk::temporary_file;
use crate::disk::{
    Aio, CacheMode, DetectZeroes, Disk, DiskError, Format, OpenOptions, OpenReason, Operation, open,
};
use crate::log_limit::tests::Log;

/// From here on `call` fails with `errno` in this thread and in those that it starts, without reaching the kernel.
pub(super) fn refuse(call: libc::c_long, errno: i32) {
    refuse_flags(call, None, errno);
}

/// As `refuse`, but only if the argument with that index has some of these bits.
#[expect(unsafe_code, reason = "prctl(2) with a seccomp filter")]
fn refuse_flags(call: libc::c_long, flags: Option<(u32, u32)>, errno: i32) {
    let statement = |code: u32, jt, jf, k| libc::sock_filter { code: code as u16, jt, jf, k };
    // The system call's number is the first word of `struct seccomp_data`; its arguments start at byte 16.
    let load = |offset| statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, offset);
    let test = |how: u32, k, skip| statement(libc::BPF_JMP | how | libc::BPF_K, 0, skip, k);
    let answer = |k| statement(libc::BPF_RET | libc::BPF_K, 0, 0, k);
    let mut filter = vec![load(0), test(libc::BPF_JEQ, call as u32, 1)];
    if let Some((index, bits)) = flags {
        filter[1].jf = 3;
        filter.extend([load(16 + 8 * index), test(libc::BPF_JSET, bits, 1)]);
    }
    filter
        .extend([answer(libc::SECCOMP_RET_ERRNO | errno as u32), answer(libc::SECCOMP_RET_ALLOW)]);
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: the program and its filter live through the call, which copies them.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        let mode = libc::SECCOMP_MODE_FILTER;
        assert_eq!(libc::prctl(libc::PR_SET_SECCOMP, mode, &raw const program), 0);
    }
}

/// Runs `test` on a thread of its own in which `call` fails with `errno`.
fn refusing(call: libc::c_long, errno: i32, test: impl FnOnce() + Send) {
    alone(|| {
        refuse(call, errno);
        test();
    });
}

fn alone(test: impl FnOnce() + Send) {
    thread::scope(|scope| {
        scope.spawn(test).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
}

const SIZE: usize = 512 << 10;

/// Every operation succeeds and does what it says.
fn serves(name: &str, path: &Path, disk: Arc<dyn Disk>) {
    std::fs::write(path, vec![0x11; SIZE]).unwrap();
    let mut rig = Rig::new(disk);
    rig.put(0, &[0x22; 8192]);
    // One buffer, several buffers, and what direct I/O does not take as it is.
    rig.ok(Request::plain(WRITE, 0, 0, 4096));
    let durable = Operation::Write { durable: true };
    rig.ok(Request::plain(durable, 8192, 0, 4096));
    rig.ok(Request::plain(durable, 16384, 1, 512));
    let mut scattered = Request::plain(durable, 32768, 0, 512);
    scattered.length = 1024;
    scattered.ranges.extend(Request::plain(WRITE, 0, 4096, 512).ranges);
    rig.ok(scattered.clone());
    rig.ok(Request::bare(Operation::Flush, 0, 0));
    for unmap in [false, true] {
        let zeroes = Operation::WriteZeroes { unmap, durable: true };
        rig.ok(Request::bare(zeroes, 65536, 65536));
    }
    rig.ok(Request::bare(Operation::Discard, 262_144, 65536));
    scattered.operation = Operation::Read;
    scattered.ranges[0].address.0 = 65536;
    rig.ok(scattered);
    assert_eq!(rig.get(65536, 512), [0x22; 512], "{name}");
    rig.ok(Request::plain(Operation::Read, 16384, 131_072, 8192));
    assert_eq!(rig.get(131_072, 512), [0x22; 512], "{name}");
    assert_eq!(rig.get(131_072 + 512, 512), [0x11; 512], "{name}");
    drop(rig);
    let content = std::fs::read(path).unwrap();
    for (start, byte) in [(0, 0x22), (4096, 0x11), (8192, 0x22), (65536, 0), (131_072, 0x11)] {
        assert!(content[start..start + 4096].iter().all(|b| *b == byte), "{name}: {start}");
    }
}

#[test]
fn a_refused_system_call_never_reaches_the_guest() {
    let calls = [
        libc::SYS_statx,
        libc::SYS_fstatfs,
        libc::SYS_pread64,
        libc::SYS_preadv,
        libc::SYS_preadv2,
        libc::SYS_pwrite64,
        libc::SYS_pwritev,
        libc::SYS_pwritev2,
        libc::SYS_fdatasync,
        libc::SYS_fallocate,
        libc::SYS_io_uring_setup,
        libc::SYS_io_uring_enter,
        libc::SYS_io_uring_register,
        libc::SYS_clone3,
    ];
    // Whether there is an io_uring is asked once for a process.
    super::super::engine::uring::available();
    for directory in directories() {
        let path = directory.path().join("image");
        std::fs::write(&path, vec![0x11; SIZE]).unwrap();
        let is_direct = |ways: &[(String, Arc<dyn Disk>)]| {
            ways.iter().any(|(name, _)| name.contains("cache=none"))
        };
        let direct = is_direct(&every_way(&path, DetectZeroes::Off));
        for call in calls {
            for errno in [libc::EPERM, libc::ENOSYS, libc::EAGAIN] {
                refusing(call, errno, || {
                    let ways = every_way(&path, DetectZeroes::Off);
                    assert_eq!(is_direct(&ways), direct, "{call}: direct I/O");
                    for (name, disk) in ways {
                        serves(&format!("{name}: call {call}, errno {errno}"), &path, disk);
                    }
                });
            }
        }
    }
}

/// Linux reports a lost write once. Every later flush must fail, too, whatever lies between the guest and the file.
#[test]
fn after_a_failed_flush_no_flush_of_any_format_succeeds() {
    let directory = tempfile::tempdir().unwrap();
    for format in [Format::Raw, Format::Qcow2] {
        let path = directory.path().join(format.to_string());
        match format {
            Format::Raw => std::fs::write(&path, vec![1; 65536]).unwrap(),
            Format::Qcow2 => {
                let mut create = std::process::Command::new("qemu-img");
                create.args(["create", "-q", "-f", "qcow2"]).arg(&path).arg("1M");
                if !super::rig::run(&mut create).is_ok_and(|output| output.status.success()) {
                    eprintln!("no qemu-img (Debian: qemu-utils): qcow2 is not tested");
                    continue;
                }
            }
        }
        let options =
            OpenOptions { aio: Aio::Threads, format: Some(format), ..OpenOptions::new(&path) };
        let disk = open(&options).unwrap();
        refusing(libc::SYS_fdatasync, libc::EIO, || {
            let mut rig = Rig::new(Arc::clone(&disk));
            rig.ok(Request::plain(WRITE, 0, 0, 4096));
            let error = rig.error(Request::bare(Operation::Flush, 0, 0));
            assert_eq!(error, DiskError::Host(libc::EIO), "{format}");
        });
        // The host's disk works again, but what it has lost stays lost.
        let mut rig = Rig::new(disk);
        for _ in 0..3 {
            let error = rig.error(Request::bare(Operation::Flush, 0, 0));
            assert_eq!(error, DiskError::Host(libc::EIO), "{format}");
        }
        rig.ok(Request::plain(Operation::Read, 0, 0, 512));
    }
}

/// A durable write's error can be about other data that the page cache has lost, so no later flush may succeed.
#[test]
fn a_durable_write_that_fails_is_a_failed_flush() {
    let directory = &directories()[0];
    let path = directory.path().join("image");
    std::fs::write(&path, vec![1; 65536]).unwrap();
    let cache = CacheMode::Writethrough;
    let disk = open(&OpenOptions { cache, ..OpenOptions::new(&path) }).unwrap();
    refusing(libc::SYS_pwritev2, libc::EIO, || {
        let mut rig = Rig::new(Arc::clone(&disk));
        let write = Request::plain(Operation::Write { durable: true }, 0, 0, 4096);
        assert_eq!(rig.error(write), DiskError::Host(libc::EIO));
    });
    let mut rig = Rig::new(disk);
    assert_eq!(rig.error(Request::bare(Operation::Flush, 0, 0)), DiskError::Host(libc::EIO));
}

/// overlayfs before Linux 6.3, vfat and 9p have no O_TMPFILE; the overlay of `snapshot=on` needs some file there all the same.
#[test]
fn a_temporary_file_needs_neither_o_tmpfile_nor_tmpdir() {
    let directory = tempfile::tempdir().unwrap();
    let tmpdir = || Some(directory.path().as_os_str().to_owned());
    let works = |(chosen, file): (std::path::PathBuf, std::io::Result<std::fs::File>)| {
        let file = file.unwrap();
        rustix::io::pwrite(&file, b"data", 0).unwrap();
        assert_eq!(file.metadata().unwrap().len(), 4);
        assert_eq!(std::os::unix::fs::MetadataExt::nlink(&file.metadata().unwrap()), 0);
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0, "a file is left");
        chosen
    };
    assert_eq!(works(temporary_file::create(tmpdir())), directory.path());
    for unset in [None, Some("".into())] {
        assert_eq!(works(temporary_file::create(unset)), Path::new("/var/tmp"));
    }
    alone(|| {
        const TMPFILE: u32 = libc::O_TMPFILE as u32 & !(libc::O_DIRECTORY as u32);
        refuse_flags(libc::SYS_openat, Some((2, TMPFILE)), libc::EOPNOTSUPP);
        assert_eq!(works(temporary_file::create(tmpdir())), directory.path());
    });
    let nowhere = directory.path().join("missing");
    let (chosen, file) = temporary_file::create(Some(nowhere.clone().into()));
    assert_eq!((chosen, file.unwrap_err().kind()), (nowhere, std::io::ErrorKind::NotFound));
}

/// A host that is short of tasks or of io_uring is reported a few times, not for every queue of every disk.
#[test]
fn a_shortage_is_reported_at_a_limited_rate() {
    let directory = &directories()[0];
    let path = directory.path().join("image");
    std::fs::write(&path, vec![1; 65536]).unwrap();
    if !super::super::engine::uring::available() {
        eprintln!("no io_uring here: only threads are tested");
    }
    for (call, errno) in
        [(libc::SYS_io_uring_setup, libc::ENOMEM), (libc::SYS_clone3, libc::EAGAIN)]
    {
        let disk = open(&OpenOptions { locking: false, ..OpenOptions::new(&path) }).unwrap();
        refusing(call, errno, || {
            let log = Log::default();
            let _logging = log.listen();
            let start = std::time::Instant::now();
            for _ in 0..200 {
                let mut rig = Rig::new(Arc::clone(&disk));
                rig.ok(Request::bare(Operation::Discard, 0, 4096));
            }
            let lines = log.lines();
            let allowed = 2 + start.elapsed().as_secs() as usize;
            assert!(!lines.is_empty() && lines.len() <= allowed, "{lines:?}");
        });
    }
}

#[test]
fn detect_zeroes_unmap_needs_discards() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image");
    std::fs::write(&path, vec![1; 4096]).unwrap();
    let options = OpenOptions {
        detect_zeroes: DetectZeroes::Unmap,
        discard: crate::disk::DiscardMode::Ignore,
        ..OpenOptions::new(&path)
    };
    assert!(matches!(
        open(&options).err().unwrap().objection(),
        Some(OpenReason::UnmapWithoutDiscard)
    ));
}
