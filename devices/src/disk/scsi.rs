//! SCSI commands to a host device, by the SG_IO ioctl (scsi/sg.h, version 3 of its header).

#![expect(unsafe_code, reason = "ioctl(2) with pointers to the command, its sense buffer and guest memory")]

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::ptr;
use std::sync::OnceLock;

use rustix::io::Errno;
use rustix::ioctl::{Getter, Opcode, Updater, ioctl};
use rustix::thread::{CapabilitySet, capabilities, set_capabilities};

use super::DiskError;
use super::buffers::IoBuffers;

const SG_GET_VERSION_NUM: Opcode = 0x2282;
const SG_IO: Opcode = 0x2285;
/// The first version of the sg interface with SG_IO.
const SG_VERSION: i32 = 30_000;

/// Longest command in bytes: what Linux hands to a device.
pub const CDB_MAX: usize = 32;
/// Bytes of sense that a reply has room for.
pub const SENSE_MAX: usize = 96;
/// How long the device may take, in milliseconds: as long as Linux gives a disk for its reads and writes.
const TIMEOUT: u32 = 30_000;
/// CHECK CONDITION: the device explains itself in the sense data (SAM-5 §5.3.1).
const CHECK_CONDITION: u8 = 2;

/// Which way a command's data goes; the values are sg_io_hdr's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum ScsiDirection {
    /// No data.
    None = -1,
    /// Guest memory to device.
    ToDevice = -2,
    /// Device to guest memory.
    FromDevice = -3,
}

/// A SCSI command, and in the end its reply. What it says is the device's business, and the host kernel's.
#[derive(Debug)]
pub struct ScsiCommand {
    cdb: [u8; CDB_MAX],
    length: u8,
    direction: ScsiDirection,
    /// Stays empty when the host refused the command.
    reply: OnceLock<ScsiReply>,
}

/// What became of a command: the fields of sg_io_hdr with the same names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScsiReply {
    /// SCSI status.
    pub status: u8,
    /// Message byte of parallel SCSI.
    pub msg_status: u8,
    /// How the host adapter fared.
    pub host_status: u16,
    /// How its driver fared.
    pub driver_status: u16,
    /// Bytes of data that were not moved.
    pub residual: u32,
    /// Sense data, zeroes behind it.
    pub sense: [u8; SENSE_MAX],
    /// Bytes of sense data.
    pub sense_length: u8,
}

impl ScsiCommand {
    /// The command in `cdb`. `None`: longer than any.
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

    /// What became of it, once it is finished. `None`: the host refused it.
    pub fn reply(&self) -> Option<&ScsiReply> {
        self.reply.get()
    }

    /// For engines: the command is finished. Only the first reply counts.
    pub fn set_reply(&self, reply: ScsiReply) {
        let _ = self.reply.set(reply);
    }

    /// Sends the command to `device` and waits for the reply, which may be that it failed.
    ///
    /// # Errors
    /// When the host refuses the command, as its filter does with whatever does more than read and, on a device open for
    /// writing, write.
    pub(super) fn execute(&self, device: impl AsFd, data: &IoBuffers) -> Result<(), DiskError> {
        let (pending, length) = (data.pending(), u32::try_from(data.len()).map_err(|_| Errno::INVAL));
        let length = length.map_err(io::Error::from)?;
        // SG_IO takes one list of buffers, and no second one for the rest.
        if pending.iter().map(|iovec| iovec.iov_len as u64).sum::<u64>() != u64::from(length) {
            return Err(DiskError::Host(libc::EINVAL));
        }
        submit_to_the_hosts_filter()?;
        let mut sense = [0; SENSE_MAX];
        let mut header = SgIoHeader {
            interface_id: i32::from(b'S'),
            direction: self.direction as i32,
            cdb_length: self.length,
            sense_max: SENSE_MAX as u8,
            iovec_count: pending.len() as u16,
            data_length: length,
            data: pending.as_ptr().cast(),
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
        // `sense`, and moves `data_length` bytes from or to the iovecs, which are valid by the invariant of `IoBuffers`. It
        // returns when the device is done with all of that.
        unsafe { ioctl(device, Updater::<SG_IO, SgIoHeader>::new(&mut header)) }.map_err(io::Error::from)?;
        // Some drivers lose the status and keep the sense.
        let status = if header.sense_length > 0 && header.status == 0 { CHECK_CONDITION } else { header.status };
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

/// `struct sg_io_hdr`.
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
    /// Milliseconds.
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
    /// Milliseconds.
    duration: u32,
    info: u32,
}

const _: () = assert!(size_of::<SgIoHeader>() == 88);

/// Linux filters what those may send who can open the device but lack CAP_SYS_RAWIO: commands that read, and commands that
/// write where the device is open for writing; no firmware, no reservations, no modes (scsi_cmd_allowed in
/// drivers/scsi/scsi_ioctl.c). A guest gets no more than that from a root user either, or a read-only disk would be none: so
/// the calling thread does without the capability from now on.
fn submit_to_the_hosts_filter() -> Result<(), DiskError> {
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

/// Whether `device` is a SCSI disk, all of it. Partitions and device-mapper volumes hand SCSI commands down to the disk below,
/// where a command reaches what is not theirs.
pub(super) fn is_scsi_disk(device: &File) -> bool {
    let Ok(status) = rustix::fs::fstat(device) else { return false };
    let (major, minor) = (rustix::fs::major(status.st_rdev), rustix::fs::minor(status.st_rdev));
    // Of these only a whole disk has a `device`.
    let bus = fs::canonicalize(Path::new(&format!("/sys/dev/block/{major}:{minor}/device/subsystem")));
    // SAFETY: SG_GET_VERSION_NUM stores one 32-bit integer.
    let version = || unsafe { ioctl(device, Getter::<SG_GET_VERSION_NUM, i32>::new()) };
    bus.is_ok_and(|bus| bus.ends_with("bus/scsi")) && version().is_ok_and(|version| version >= SG_VERSION)
}
