//! Hosts that fail.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::thread;

use super::refusals::refuse;
use super::rig::{self, DEPTH, Request, Rig, WRITE, directories, every_way};
use crate::disk::host_file::{FileKind, HostFile};
use crate::disk::{
    CacheMode, DetectZeroes, Disk, DiskError, OpenOptions, OpenReason, Operation, open,
};
use crate::log_limit::tests::Log;

/// The image is cut short behind our back: reads past its end fail, and the rest goes on.
#[test]
fn a_shrunk_image_gives_errors() {
    for directory in directories() {
        let path = directory.path().join("image");
        std::fs::write(&path, vec![1; 65536]).unwrap();
        for (name, disk) in every_way(&path, DetectZeroes::Off) {
            std::fs::write(&path, vec![1; 65536]).unwrap();
            let mut rig = Rig::new(disk);
            let file = std::fs::File::options().write(true).open(&path).unwrap();
            file.set_len(16384).unwrap();
            assert_eq!(
                rig.error(Request::plain(Operation::Read, 32768, 0, 512)),
                DiskError::Host(libc::EIO),
                "{name}"
            );
            // It starts before the end and runs past it.
            assert_eq!(
                rig.error(Request::plain(Operation::Read, 8192, 0, 16384)),
                DiskError::Host(libc::EIO),
                "{name}"
            );
            rig.ok(Request::plain(Operation::Read, 8192, 0, 8192));
            assert_eq!(rig.get(0, 8192), [1; 8192]);
            // A write brings the place back.
            rig.ok(Request::plain(WRITE, 32768, 0, 4096));
        }
    }
}

/// Runs this very test again, alone in a process with `variable` set, by way of `command`; or says that it cannot.
fn again(test: &str, variable: &str, value: &Path, mut command: Command) {
    let output =
        rig::run(command.arg(std::env::current_exe().unwrap()).arg(test).env(variable, value));
    match output {
        Ok(output) if output.status.success() => {
            assert!(String::from_utf8_lossy(&output.stdout).contains("1 passed"), "{output:?}");
        }
        Ok(output) if output.status.code() == Some(101) => {
            panic!("{}", String::from_utf8_lossy(&output.stdout))
        }
        other => eprintln!("not tested here: {other:?}"),
    }
}

#[test]
fn a_full_host_is_no_space() {
    let Some(directory) = std::env::var_os("FULL") else {
        let mut command = Command::new("unshare");
        command.args(["--map-root-user", "--mount", "sh", "-c"]);
        command
            .arg(r#"mount -t tmpfs -o size=256k small "$FULL" || exit 77; exec "$0" --exact "$1""#);
        let directory = tempfile::tempdir().unwrap();
        return again(
            "disk::tests::faults::a_full_host_is_no_space",
            "FULL",
            directory.path(),
            command,
        );
    };
    let path = Path::new(&directory).join("image");
    let stuffing = Path::new(&directory).join("stuffing");
    std::fs::File::create(&path).unwrap().set_len(1 << 20).unwrap();
    for (name, disk) in every_way(&path, DetectZeroes::Off) {
        let mut rig = Rig::new(disk);
        rig.ok(Request::bare(Operation::Discard, 0, 1 << 20));
        std::fs::write(&stuffing, vec![1; 128 << 10]).unwrap();
        rig.put(0, &vec![7; 256 << 10]);
        let write = Request::plain(WRITE, 4096, 0, 192 << 10);
        assert_eq!(rig.error(write.clone()), DiskError::NoSpace, "{name}");
        let durable = Request { operation: Operation::Write { durable: true }, ..write.clone() };
        assert_eq!(rig.error(durable), DiskError::NoSpace, "{name}");
        let zeroes =
            Request::bare(Operation::WriteZeroes { unmap: false, durable: false }, 0, 1 << 20);
        assert_eq!(rig.error(zeroes), DiskError::NoSpace, "{name}");
        // Reading, flushing and giving space back need none, and then there is some again.
        rig.ok(Request::plain(Operation::Read, 0, 0, 4096));
        rig.ok(Request::bare(Operation::Flush, 0, 0));
        rig.ok(Request::bare(Operation::Discard, 0, 1 << 20));
        std::fs::remove_file(&stuffing).unwrap();
        rig.put(0, &vec![7; 256 << 10]);
        rig.ok(write);
        rig.ok(Request::plain(Operation::Read, 4096, 1 << 20, 192 << 10));
        assert_eq!(rig.get(1 << 20, 192 << 10), vec![7; 192 << 10], "{name}");
    }
}

/// Threads serve the disk then, which is said once.
#[test]
fn a_host_without_io_uring() {
    if std::env::var_os("FORBIDDEN").is_none() {
        let mut command = Command::new("sh");
        command.args(["-c", r#"exec "$0" --exact "$1""#]);
        return again(
            "disk::tests::faults::a_host_without_io_uring",
            "FORBIDDEN",
            Path::new("1"),
            command,
        );
    }
    refuse(libc::SYS_io_uring_setup, libc::EPERM);
    let log = Log::default();
    let _logging = tracing::subscriber::set_default(log.clone());
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image");
    std::fs::write(&path, vec![1; 65536]).unwrap();
    for (name, disk) in every_way(&path, DetectZeroes::Off) {
        let mut rig = Rig::new(disk);
        rig.ok(Request::plain(WRITE, 0, 8192, 4096));
        rig.ok(Request::bare(Operation::Flush, 0, 0));
        rig.ok(Request::plain(Operation::Read, 4096, 0, 4096));
        assert_eq!(rig.get(0, 4096), [1; 4096], "{name}");
    }
    let lines = log.lines();
    let about_io_uring: Vec<_> = lines.iter().filter(|line| line.contains("io_uring")).collect();
    assert_eq!(about_io_uring.len(), 1, "{lines:?}");
    assert!(
        about_io_uring[0].starts_with("WARN") && about_io_uring[0].contains("disks use threads"),
        "{lines:?}"
    );
}

/// The host lost data that it had promised to write: no later flush may claim otherwise.
#[test]
fn after_a_failed_flush_no_flush_succeeds() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image");
    std::fs::write(&path, vec![1; 4096]).unwrap();
    for &aio in crate::disk::Aio::ALL {
        let options = OpenOptions { aio, ..OpenOptions::new(&path) };
        let file = std::fs::File::options().read(true).write(true).open(&path).unwrap();
        let file = HostFile::new(file, FileKind::Regular, None);
        assert!(file.check_flushed(Err(std::io::Error::from_raw_os_error(libc::EIO))).is_err());
        let mut rig = Rig::new(rig::raw_disk(file, &options));
        for _ in 0..2 {
            assert_eq!(
                rig.error(Request::bare(Operation::Flush, 0, 0)),
                DiskError::Host(libc::EIO)
            );
        }
        rig.ok(Request::plain(Operation::Read, 0, 0, 512));
    }
}

/// Against the contract, an engine goes to another thread with transfers in flight. It cannot wait for them there, but
/// nothing hangs, and what they write to stays mapped.
#[test]
fn an_engine_dropped_by_another_thread() {
    for directory in directories() {
        let path = directory.path().join("image");
        std::fs::write(&path, vec![1; 1 << 20]).unwrap();
        let disk = match open(&OpenOptions { cache: CacheMode::None, ..OpenOptions::new(&path) }) {
            Err(error) if matches!(error.objection(), Some(OpenReason::NoDirect)) => continue,
            result => result.unwrap(),
        };
        let requests: Vec<_> = (0..DEPTH.into())
            .map(|i| Request::plain(Operation::Read, i * 4096, i * 4096, 4096))
            .collect();
        let rig = thread::spawn(move || {
            let mut rig = Rig::new(disk);
            rig.submit(&requests);
            rig
        });
        drop(rig.join().unwrap());
    }
}

/// A whole disk, and an engine of it, may be created by one thread and used by another.
#[test]
fn an_engine_moves_to_its_thread() {
    for directory in directories() {
        let path = directory.path().join("image");
        std::fs::write(&path, vec![1; 65536]).unwrap();
        for (_, disk) in every_way(&path, DetectZeroes::Off) {
            let mut rig = Rig::new(disk as Arc<dyn Disk>);
            let rig = thread::spawn(move || {
                rig.ok(Request::plain(Operation::Read, 0, 0, 4096));
                rig.ok(Request::bare(Operation::Flush, 0, 0));
                rig
            });
            drop(rig.join().unwrap());
        }
    }
}
