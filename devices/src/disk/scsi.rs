//! SCSI commands to a disk of the host (`scsi=on`), by the SG_IO ioctl (scsi/sg.h, version 3 of its header).
//!
//! A capability. `block/scsi.rs` makes a [`ScsiCommand`] from a guest's request, and an engine carries it to a pool thread as a
//! [`DeviceCommand`]. `open.rs` asks [`is_scsi_disk`] whether the device may be addressed at all. minivmm does not interpret a command:
//! the host kernel's filter decides whether the device gets it.

#![expect(
    unsafe_code,
    reason = "ioctl(2) with pointers to the command, its sense buffer and guest memory"
)]

use std::fs::{self, File};
use std::io;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::ptr;
use std::sync::OnceLock;

use rustix::io::Errno;
use rustix::ioctl::{Getter, Opcode, Updater, ioctl};
use rustix::thread::{CapabilitySet, capabilities, set_capabilities};

use super::{DeviceCommand, DiskError};

const SG_GET_VERSION_NUM: Opcode = 0x2282;
const SG_IO: Opcode = 0x2285;
/// The first version of the sg interface with SG_IO.
const SG_VERSION: i32 = 30_000;

/// Longest command in bytes: what Linux hands to a device.
pub const CDB_MAX: usize = 32;
/// Bytes of sense that a reply has room for.
pub const SENSE_MAX: usize = 96;
/// How long the device may take, in milliseconds: the time that Linux allows a disk for reads and writes.
const TIMEOUT: u32 = 30_000;
/// CHECK CONDITION: the sense data says what is wrong (SAM-5 §5.3.1).
const CHECK_CONDITION: u8 = 2;

/// The direction of a command's data, with sg_io_hdr's values. The guest's buffers decide it; there are no bidirectional
/// commands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum ScsiDirection {
    /// The command moves no data, such as TEST UNIT READY.
    None = -1,
    /// Guest memory to device, such as WRITE. A read-only disk refuses these.
    ToDevice = -2,
    /// Device to guest memory, such as READ or INQUIRY.
    FromDevice = -3,
}

/// A SCSI command and, when it is finished, its reply. The command is not interpreted.
#[derive(Debug)]
pub struct ScsiCommand {
    cdb: [u8; CDB_MAX],
    length: u8,
    direction: ScsiDirection,
    reply: OnceLock<ScsiReply>,
}

/// The reply to a command, with the fields of sg_io_hdr: SCSI status and message byte, the host adapter's and its driver's report, the
/// bytes that were not moved, and the sense data, which explains an error. Behind `sense_length` bytes of it there are zeroes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the fields of scsi/sg.h, explained together above")]
pub struct ScsiReply {
    pub status: u8,
    pub msg_status: u8,
    pub host_status: u16,
    pub driver_status: u16,
    pub residual: u32,
    pub sense: [u8; SENSE_MAX],
    pub sense_length: u8,
}

impl ScsiCommand {
    /// A command for `submit_scsi`. `None`: `cdb` is longer than Linux hands to any device.
    pub fn new(cdb: &[u8], direction: ScsiDirection) -> Option<Self> {
        let mut bytes = [0; CDB_MAX];
        bytes.get_mut(..cdb.len())?.copy_from_slice(cdb);
        Some(Self { cdb: bytes, length: cdb.len() as u8, direction, reply: OnceLock::new() })
    }

    /// The command's bytes.
    pub fn cdb(&self) -> &[u8] {
        &self.cdb[..usize::from(self.length)]
    }

    /// Which way its data goes.
    pub fn direction(&self) -> ScsiDirection {
        self.direction
    }

    /// The device's reply, once the command is finished. `None` until then, and if the host refused the command.
    pub fn reply(&self) -> Option<&ScsiReply> {
        self.reply.get()
    }

    /// Finishes the command. Only the first reply counts. For engines of tests; others call `execute`.
    pub fn set_reply(&self, reply: ScsiReply) {
        let _ = self.reply.set(reply);
    }
}

impl DeviceCommand for ScsiCommand {
    /// The kernel's filter refuses all commands but those that read and, if the device is open for writing, those that write.
    unsafe fn execute(
        &self,
        device: BorrowedFd<'_>,
        data: &[libc::iovec],
    ) -> Result<(), DiskError> {
        let length = u32::try_from(data.iter().map(|iovec| iovec.iov_len).sum::<usize>())
            .map_err(|_| DiskError::Host(libc::EINVAL))?;
        drop_raw_io_capability()?;
        let mut sense = [0; SENSE_MAX];
        let mut header = SgIoHeader {
            interface_id: i32::from(b'S'),
            direction: self.direction as i32,
            cdb_length: self.length,
            sense_max: SENSE_MAX as u8,
            iovec_count: data.len() as u16,
            data_length: length,
            data: data.as_ptr().cast(),
            cdb: self.cdb.as_ptr(),
            sense: sense.as_mut_ptr(),
            timeout: TIMEOUT,
            flags: 0,
            pack_id: 0,
            user: ptr::null(),
            status: 0,
            masked_status: 0,
            msg_status: 0,
            sense_length: 0,
            host_status: 0,
            driver_status: 0,
            residual: 0,
            duration: 0,
            info: 0,
        };
        // SAFETY: SG_IO reads and writes one sg_io_hdr. It reads `cdb_length` bytes of `cdb`, writes up to `sense_max` bytes of
        // `sense`, and moves `data_length` bytes from or to the iovecs, which are valid as the caller says. It
        // returns when the device is done with all of that.
        unsafe { ioctl(device, Updater::<SG_IO, SgIoHeader>::new(&mut header)) }
            .map_err(io::Error::from)?;
        // Some drivers report sense data without the status that belongs to it.
        let status = if header.sense_length > 0 && header.status == 0 {
            CHECK_CONDITION
        } else {
            header.status
        };
        self.set_reply(ScsiReply {
            status,
            msg_status: header.msg_status,
            host_status: header.host_status,
            driver_status: header.driver_status,
            residual: u32::try_from(header.residual).unwrap_or(0),
            sense,
            sense_length: header.sense_length,
        });
        Ok(())
    }
}

#[repr(C)]
struct SgIoHeader {
    interface_id: i32,
    direction: i32,
    cdb_length: u8,
    sense_max: u8,
    iovec_count: u16,
    data_length: u32,
    data: *const libc::c_void,
    cdb: *const u8,
    sense: *mut u8,
    timeout: u32,
    flags: u32,
    pack_id: i32,
    user: *const libc::c_void,
    status: u8,
    masked_status: u8,
    msg_status: u8,
    sense_length: u8,
    host_status: u16,
    driver_status: u16,
    residual: i32,
    duration: u32,
    info: u32,
}

const _: () = assert!(size_of::<SgIoHeader>() == 88);

/// Drops CAP_SYS_RAWIO from the calling thread for good. Without it Linux allows only commands that read and, if the device is open for
/// writing, commands that write: no firmware, no reservations, no modes (scsi_cmd_allowed in drivers/scsi/scsi_ioctl.c). So root's guest
/// can do no more than another user's, and `readonly=on` holds.
fn drop_raw_io_capability() -> Result<(), DiskError> {
    let without = || {
        let mut sets = capabilities(None)?;
        if sets.effective.contains(CapabilitySet::SYS_RAWIO) {
            sets.effective.remove(CapabilitySet::SYS_RAWIO);
            set_capabilities(None, sets)?;
        }
        Ok(())
    };
    without().map_err(|error: Errno| io::Error::from(error).into())
}

/// Whether `device` is a whole SCSI disk. Partitions and device-mapper volumes pass SCSI commands to the disk below, where a
/// command would reach other data, too.
pub(super) fn is_scsi_disk(device: &File) -> bool {
    let Ok(status) = rustix::fs::fstat(device) else { return false };
    let (major, minor) = (rustix::fs::major(status.st_rdev), rustix::fs::minor(status.st_rdev));
    // Partitions and volumes have no `device` link.
    let bus =
        fs::canonicalize(Path::new(&format!("/sys/dev/block/{major}:{minor}/device/subsystem")));
    // SAFETY: SG_GET_VERSION_NUM stores one 32-bit integer.
    let version = || unsafe { ioctl(device, Getter::<SG_GET_VERSION_NUM, i32>::new()) };
    bus.is_ok_and(|bus| bus.ends_with("bus/scsi"))
        && version().is_ok_and(|version| version >= SG_VERSION)
}
