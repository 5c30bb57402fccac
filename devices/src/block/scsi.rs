//! SCSI commands (`scsi=on`) in virtio-blk's legacy framing: header, command, data, sense, trailer, status (virtio 1.2 §5.2.6.3). A
//! capability: the core knows it as [`RequestTypes`], which `device` plugs in.
//!
//! F_SCSI is never offered: it is a bit of the legacy interface (§5.2.3.1), and QEMU withdraws it with VERSION_1, too. So the option
//! alone decides: the operator sets `scsi=on` for a driver that sends commands without the feature. Without the option they are refused,
//! with a trailer that says so.

use std::sync::Arc;

use super::request::{Action, CommandRequest, Details, RequestTypes, Unsuitable};
use super::stats::Kind;
use crate::disk::{CDB_MAX, DiskError, Engine, SENSE_MAX, ScsiCommand, ScsiDirection};
use crate::virtio::queue::{ChainBuffers, total, write_into};
use crate::virtio::spec::blk;
use crate::{GuestMemory, GuestRange};

const _: () = assert!(SENSE_MAX == blk::SCSI_SENSE_SIZE);

/// Most bytes of data. Hosts take far less; with sense, trailer and status it still fits the used length.
const DATA_MAX: u64 = 1 << 30;
/// What the trailer's `errors` says of a command that was not carried out: anything but 0, and 255 in the classic device.
const NOT_DONE: u32 = 255;

pub(super) struct ScsiCommands {
    pub(super) enabled: bool,
}

/// A command on its way, and where its reply goes.
struct Packet {
    command: Arc<ScsiCommand>,
    length: u32,
    sense: Vec<GuestRange>,
    trailer: Vec<GuestRange>,
}

impl RequestTypes for ScsiCommands {
    /// The next device-readable buffer is the command, of its length (here buffers do count, §5.2.6.3), and what is left of
    /// either kind is the data.
    fn parse(
        &self,
        request_type: u32,
        buffers: &mut ChainBuffers,
        memory: &GuestMemory,
        details: &mut Details,
    ) -> Option<(Kind, Result<Action, Unsuitable>)> {
        if !matches!(request_type, blk::T_SCSI_CMD | blk::T_SCSI_CMD_OUT) {
            return None;
        }
        let trailer = buffers.take_tail(blk::SCSI_TRAILER_SIZE as u64).unwrap_or_default();
        let packet = if self.enabled {
            Packet::parse(buffers, memory, trailer)
        } else {
            Err((blk::S_UNSUPP, trailer))
        };
        let action = packet.map(|packet| {
            details.command = Some(Box::new(packet));
            Action::Command
        });
        let refused = |(code, trailer): (u8, Vec<_>)| {
            (code, put_trailer(memory, &trailer, [NOT_DONE, 0, 0, 0]))
        };
        Some((Kind::Other, action.map_err(refused)))
    }
}

impl Packet {
    /// Makes a packet of what lies between header and trailer.
    fn parse(
        buffers: &mut ChainBuffers,
        memory: &GuestMemory,
        trailer: Vec<GuestRange>,
    ) -> Result<Self, (u8, Vec<GuestRange>)> {
        let mut cdb = [0; CDB_MAX];
        let mut parts = || {
            // A packet that lacks a part.
            let sense = buffers.take_tail(blk::SCSI_SENSE_SIZE as u64).ok_or(blk::S_IOERR)?;
            let length = buffers.readable().first().ok_or(blk::S_IOERR)?.length as usize;
            let cdb = cdb.get_mut(..length).ok_or(blk::S_UNSUPP)?;
            buffers.read_bytes(memory, cdb).ok_or(blk::S_IOERR)?;
            let (direction, length) = match (total(buffers.readable()), total(buffers.writable())) {
                (0, 0) => (ScsiDirection::None, 0),
                (length, 0) => (ScsiDirection::ToDevice, length),
                (0, length) => (ScsiDirection::FromDevice, length),
                // As in the classic device, no command goes both ways.
                _ => return Err(blk::S_UNSUPP),
            };
            let command = ScsiCommand::new(cdb, direction).filter(|_| length <= DATA_MAX);
            Ok((Arc::new(command.ok_or(blk::S_UNSUPP)?), length as u32, sense))
        };
        match parts() {
            Ok((command, length, sense)) => Ok(Self { command, length, sense, trailer }),
            Err(code) => Err((code, trailer)),
        }
    }
}

impl CommandRequest for Packet {
    fn submit(&self, tag: u32, buffers: &ChainBuffers, engine: &mut dyn Engine) {
        let data = match buffers.readable() {
            [] => buffers.writable(),
            readable => readable,
        };
        engine.submit_scsi(tag, Arc::clone(&self.command) as _, data);
    }

    fn reply(&self, memory: &GuestMemory, result: Result<(), DiskError>) -> (u8, u32) {
        if let Err(error) = result {
            tracing::debug!(%error, "the host refused a SCSI command");
        }
        let Some(reply) = self.command.reply() else {
            return (blk::S_UNSUPP, put_trailer(memory, &self.trailer, [NOT_DONE, 0, 0, 0]));
        };
        let errors = u32::from(reply.status)
            | u32::from(reply.msg_status) << 8
            | u32::from(reply.host_status) << 16
            | u32::from(reply.driver_status) << 24;
        let received = match self.command.direction() {
            ScsiDirection::FromDevice => self.length.saturating_sub(reply.residual),
            _ => 0,
        };
        let sense = write_into(memory, &self.sense, &reply.sense) as u32;
        let trailer = [errors, self.length, reply.sense_length.into(), reply.residual];
        (blk::S_OK, received + sense + put_trailer(memory, &self.trailer, trailer))
    }
}

/// Writes `errors`, `data_len`, `sense_len` and `residual`. Returns the bytes written.
fn put_trailer(memory: &GuestMemory, place: &[GuestRange], fields: [u32; 4]) -> u32 {
    let mut bytes = [0; blk::SCSI_TRAILER_SIZE];
    for (to, field) in bytes.chunks_exact_mut(4).zip(fields) {
        to.copy_from_slice(&field.to_le_bytes());
    }
    write_into(memory, place, &bytes) as u32
}
