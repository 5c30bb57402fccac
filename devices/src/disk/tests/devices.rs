//! Host block devices: loop devices, where this user may make some.

use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::model::{self, Discarded, SECTORS};
use super::rig::{self, Request, Rig, WRITE, every_way};
use crate::disk::{DetectZeroes, DiskError, OpenOptions, OpenReason, Operation, SECTOR, open};

const SIZE: u64 = SECTORS * SECTOR;

/// A loop device over a file, for as long as it lives.
struct Loop(PathBuf);

impl Loop {
    fn new(file: &Path, sector: u32) -> Option<Self> {
        let options = ["--find", "--show", "--direct-io=off", "--sector-size", &sector.to_string()];
        let output = rig::run(Command::new("losetup").args(options).arg(file));
        match output {
            Ok(output) if output.status.success() => {
                Some(Self(String::from_utf8(output.stdout).unwrap().trim().into()))
            }
            other => {
                eprintln!("no loop device here, not tested: {other:?}");
                None
            }
        }
    }

    /// The file has another size now.
    fn resized(&self) {
        let output = rig::run(Command::new("losetup").arg("--set-capacity").arg(&self.0)).unwrap();
        assert!(output.status.success(), "{output:?}");
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = rig::run(Command::new("losetup").arg("--detach").arg(&self.0));
    }
}

#[test]
fn a_block_device_is_a_disk() {
    for sector in [512, 4096] {
        let file = tempfile::NamedTempFile::new().unwrap();
        let content = || (0..SIZE).map(|i| (i / 13) as u8).collect::<Vec<_>>();
        std::fs::write(file.path(), content()).unwrap();
        let Some(device) = Loop::new(file.path(), sector) else { return };
        for (name, disk) in every_way(&device.0, DetectZeroes::Unmap) {
            eprintln!("{name}");
            let limits = disk.info().block_limits;
            assert_eq!((disk.capacity(), limits.logical_block_size), (SIZE, sector));
            assert!(limits.discard_granularity >= sector && limits.physical_block_size >= sector);
            // Below the device's own sectors the guest's are read, modified and written.
            let image = || std::fs::read(&device.0).unwrap();
            model::run(
                4,
                Discarded::ZeroOrOld,
                image,
                || disk.clone(),
                |model| assert!(image() == model),
            );
            let mut rig = Rig::new(disk);
            assert_eq!(
                rig.error(Request::bare(Operation::SecureErase, 0, 4096)),
                DiskError::Unsupported
            );
        }
    }
}

/// Ranges go while the host's cache holds what the guest has just written there, claimed or not.
#[test]
fn what_is_not_yet_on_the_device_can_be_discarded() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(4 << 20).unwrap();
    let Some(device) = Loop::new(file.path(), 4096) else { return };
    let length = 256 << 10;
    for locking in [true, false] {
        let mut rig =
            Rig::new(open(&OpenOptions { locking, ..OpenOptions::new(&device.0) }).unwrap());
        rig.put(0, &vec![7; length]);
        for round in 0..20 {
            let zeroes = |unmap| Operation::WriteZeroes { unmap, durable: false };
            for operation in [Operation::Discard, zeroes(true), zeroes(false)] {
                rig.ok(Request::plain(WRITE, 0, 0, length as u32));
                rig.ok(Request::bare(operation, 0, length as u64));
                rig.ok(Request::plain(Operation::Read, 0, 1 << 20, length as u32));
                assert_eq!(
                    rig.get(1 << 20, length),
                    vec![0; length],
                    "{operation:?}, round {round}"
                );
            }
        }
    }
}

#[test]
fn a_block_device_is_resized_by_its_owner() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(SIZE).unwrap();
    let Some(device) = Loop::new(file.path(), 512) else { return };
    let disk = open(&OpenOptions::new(&device.0)).unwrap();
    assert_eq!(disk.resize(2 * SIZE).unwrap_err().kind(), std::io::ErrorKind::Unsupported);
    assert_eq!(disk.capacity(), SIZE);
    file.as_file().set_len(2 * SIZE).unwrap();
    device.resized();
    assert_eq!(disk.capacity(), SIZE);
    disk.resize(2 * SIZE).unwrap();
    assert_eq!(disk.capacity(), 2 * SIZE);
    file.as_file().set_len(SIZE).unwrap();
    device.resized();
    assert_eq!(disk.refresh_capacity().unwrap(), SIZE);
}

#[test]
fn a_device_that_the_host_uses_is_refused() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(SIZE).unwrap();
    let Some(device) = Loop::new(file.path(), 512) else { return };
    let turn = rig::without_forks();
    // What a mount does.
    let exclusive = rustix::fs::OFlags::EXCL.bits() as i32;
    let claim =
        std::fs::File::options().read(true).custom_flags(exclusive).open(&device.0).unwrap();
    let options = OpenOptions::new(&device.0);
    assert!(matches!(open(&options).err().unwrap().objection(), Some(OpenReason::Mounted)));
    assert!(open(&OpenOptions { read_only: true, ..options.clone() }).is_ok());
    assert!(open(&OpenOptions { locking: false, ..options.clone() }).is_ok());
    drop(claim);
    let _disk = open(&options).unwrap();
    assert!(matches!(open(&options).err().unwrap().objection(), Some(OpenReason::Locked)));
    // The loop device is detached by a child.
    drop(turn);
}
