//! SCSI disks of the host: the kernel's scsi_debug, where this user may load it (the lab).

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vm_memory::GuestAddress;

use super::rig::{self, Rig};
use crate::disk::{
    CacheMode, DiskError, Format, GuestRange, OpenOptions, OpenReason, ScsiCommand, ScsiDirection,
    ScsiReply, open,
};

const TEST_UNIT_READY: [u8; 6] = [0; 6];
const INQUIRY: [u8; 6] = [0x12, 0, 0, 0, 36, 0];
const READ_CAPACITY: [u8; 10] = [0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0];
/// Eight blocks at block 3.
const READ: [u8; 10] = [0x28, 0, 0, 0, 0, 3, 0, 0, 8, 0];
const WRITE: [u8; 10] = [0x2a, 0, 0, 0, 0, 3, 0, 0, 8, 0];
/// Block 2^32 - 1.
const READ_BEYOND: [u8; 10] = [0x28, 0, 0xff, 0xff, 0xff, 0xff, 0, 0, 1, 0];
/// New firmware: nothing that the host's filter lets pass.
const WRITE_BUFFER: [u8; 10] = [0x3b, 5, 0, 0, 0, 0, 0, 0, 0, 0];

/// The disk that scsi_debug makes, 8 MiB with one partition, for as long as it lives.
struct ScsiDebug(PathBuf);

impl ScsiDebug {
    fn new() -> Option<Self> {
        let loaded = |name: &str| {
            let options = ["dev_size_mb=8", "num_parts=1"];
            let parameters: &[&str] = if name == "scsi_debug" { &options } else { &[] };
            rig::run(Command::new("modprobe").arg(name).args(parameters))
                .is_ok_and(|output| output.status.success())
        };
        // A scsi_debug that is there already belongs to another program.
        let taken = Path::new("/sys/module/scsi_debug").exists();
        if taken || !loaded("sd_mod") || !loaded("scsi_debug") {
            // Past libtest's capture: `.ci/run` counts these lines (see `skip` in tests/src/lib.rs).
            let _ = std::io::stderr()
                .write_all(b"\nskipped: a SCSI disk: cannot load scsi_debug here\n");
            return None;
        }
        // The disk comes when the kernel has scanned the bus, and the partition when it has read the table.
        let bound = Instant::now() + Duration::from_secs(60);
        while Instant::now() < bound {
            let found = std::fs::read_dir("/sys/block")
                .unwrap()
                .map(|entry| entry.unwrap().path())
                .find(|path| {
                    std::fs::read_to_string(path.join("device/model"))
                        .is_ok_and(|model| model.trim() == "scsi_debug")
                });
            if let Some(path) = found.map(|path| Path::new("/dev").join(path.file_name().unwrap()))
                && Self::partition_of(&path).exists()
            {
                return Some(Self(path));
            }
            std::thread::yield_now();
        }
        panic!("scsi_debug made no disk");
    }

    fn partition_of(path: &Path) -> PathBuf {
        PathBuf::from(format!("{}1", path.display()))
    }

    fn options(&self) -> OpenOptions {
        OpenOptions { scsi: true, ..OpenOptions::new(&self.0) }
    }
}

impl Drop for ScsiDebug {
    fn drop(&mut self) {
        let _ = rig::run(Command::new("modprobe").args(["-r", "scsi_debug"]));
    }
}

fn command(
    rig: &mut Rig,
    cdb: &[u8],
    direction: ScsiDirection,
    data: &[GuestRange],
) -> Result<ScsiReply, DiskError> {
    let command = Arc::new(ScsiCommand::new(cdb, direction).unwrap());
    rig.engine.submit_scsi(0, command.clone(), data);
    rig.engine.commit();
    let mut done = Vec::new();
    rig.engine.wait_for_all(&mut done);
    done.pop().unwrap().result.map(|()| *command.reply().unwrap())
}

fn range(address: u64, length: u32) -> GuestRange {
    GuestRange { address: GuestAddress(address), length }
}

fn done(reply: Result<ScsiReply, DiskError>) -> ScsiReply {
    let reply = reply.unwrap();
    assert_eq!(
        (reply.status, reply.host_status, reply.driver_status, reply.sense_length),
        (0, 0, 0, 0),
        "{reply:?}"
    );
    reply
}

#[test]
fn commands_reach_a_scsi_disk_and_its_replies_come_back() {
    let Some(device) = ScsiDebug::new() else { return };
    let disk = open(&device.options()).unwrap();
    assert!(disk.info().scsi);
    let mut rig = Rig::new(disk);
    done(command(&mut rig, &TEST_UNIT_READY, ScsiDirection::None, &[]));

    // In two pieces, with room for more than there is.
    let pieces = [range(0x1000, 10), range(0x3000, 90)];
    let reply = done(command(&mut rig, &INQUIRY, ScsiDirection::FromDevice, &pieces));
    assert_eq!(reply.residual, 64);
    assert_eq!([rig.get(0x1008, 2), rig.get(0x3000, 6)].concat(), b"Linux   ");
    assert_eq!(rig.get(0x3006, 16), b"scsi_debug      ");

    done(command(&mut rig, &READ_CAPACITY, ScsiDirection::FromDevice, &[range(0x1000, 8)]));
    let blocks: u32 = (8 << 20) / 512;
    assert_eq!(rig.get(0x1000, 8), [(blocks - 1).to_be_bytes(), 512u32.to_be_bytes()].concat());

    let content: Vec<u8> = (0..4096).map(|i| (i / 7) as u8).collect();
    rig.put(0x1000, &content);
    let pieces = [range(0x1000, 512), range(0x1200, 3584)];
    assert_eq!(done(command(&mut rig, &WRITE, ScsiDirection::ToDevice, &pieces)).residual, 0);
    done(command(&mut rig, &READ, ScsiDirection::FromDevice, &[range(0x8000, 4096)]));
    assert!(rig.get(0x8000, 4096) == content);

    // An error of the device is a reply: CHECK CONDITION, ILLEGAL REQUEST, logical block address out of range.
    let reply =
        command(&mut rig, &READ_BEYOND, ScsiDirection::FromDevice, &[range(0x1000, 512)]).unwrap();
    assert_eq!((reply.status, reply.sense[2] & 0xf, reply.sense[12]), (2, 5, 0x21), "{reply:?}");
    assert!(
        reply.sense_length >= 18
            && reply.sense[usize::from(reply.sense_length)..].iter().all(|byte| *byte == 0)
    );

    // What the host's filter refuses, root or not, is none.
    assert_eq!(
        command(&mut rig, &WRITE_BUFFER, ScsiDirection::None, &[]),
        Err(DiskError::Host(libc::EPERM))
    );
    assert_eq!(
        command(&mut rig, &INQUIRY, ScsiDirection::FromDevice, &[range(u64::MAX - 4, 36)]),
        Err(DiskError::OutOfRange)
    );
    drop(rig);
    a_read_only_disk_takes_commands_that_read(&device);
    only_whole_scsi_disks_take_commands(&device);
}

fn a_read_only_disk_takes_commands_that_read(device: &ScsiDebug) {
    // Past the host's page cache: commands go past it too, so that it may hold what was on the disk before them.
    let direct =
        OpenOptions { cache: CacheMode::None, scsi: false, read_only: true, ..device.options() };
    let mut without_commands = Rig::new(open(&direct).unwrap());
    let mut content = || {
        let read = rig::Request::plain(crate::disk::Operation::Read, 3 * 512, 0x1000, 4096);
        without_commands.ok(read);
        without_commands.get(0x1000, 4096)
    };
    let before = content();
    let mut rig = Rig::new(open(&OpenOptions { read_only: true, ..device.options() }).unwrap());
    rig.put(0x1000, &[0xee; 4096]);
    let data = [range(0x1000, 4096)];
    assert_eq!(
        command(&mut rig, &WRITE, ScsiDirection::ToDevice, &data),
        Err(DiskError::Host(libc::EPERM))
    );
    done(command(&mut rig, &READ, ScsiDirection::FromDevice, &data));
    assert!(rig.get(0x1000, 4096) == before);
    assert!(content() == before);
    // Without the option it takes none.
    assert_eq!(
        command(&mut without_commands, &TEST_UNIT_READY, ScsiDirection::None, &[]),
        Err(DiskError::Unsupported)
    );
}

fn only_whole_scsi_disks_take_commands(device: &ScsiDebug) {
    let refused = |options: OpenOptions| {
        let error = open(&options).map(|_| ()).unwrap_err();
        assert!(matches!(error.objection(), Some(OpenReason::NotScsi)), "{error}");
    };
    refused(OpenOptions { path: ScsiDebug::partition_of(&device.0), ..device.options() });
    refused(OpenOptions { snapshot: true, ..device.options() });
    refused(OpenOptions { format: Some(Format::Qcow2), ..device.options() });
    open(&OpenOptions {
        path: ScsiDebug::partition_of(&device.0),
        scsi: false,
        ..device.options()
    })
    .unwrap();
}
