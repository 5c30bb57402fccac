//! SCSI commands (`scsi=on`) in virtio-blk's legacy framing: header, command, data, sense, trailer, status (virtio 1.2
//! §5.2.6.3).
//!
//! F_SCSI is never offered: it is a bit of the legacy interface (§5.2.3.1), and the transport has only the modern one, with
//! VERSION_1, where QEMU withdraws the bit. So `scsi=on` is the word that counts: the operator gives it for a
//! driver that sends such requests unasked, and with it they are served.

use std::sync::Arc;

use super::chain::{total, write_at};
use super::request::{Action, Parser, Rules};
use super::slots::Slot;
use super::worker::Worker;
use crate::GuestMemory;
use crate::disk::{CDB_MAX, GuestRange, SENSE_MAX, ScsiCommand, ScsiDirection};
use crate::virtio::spec::blk;

const _: () = assert!(SENSE_MAX == blk::SCSI_SENSE_SIZE);

/// Most bytes of data. Hosts take far less; with sense, trailer and status it still fits the used length.
const DATA_MAX: u64 = 1 << 30;
/// What the trailer's `errors` says of a command that was not carried out: anything but 0, and 255 in the classic device.
const NOT_DONE: u32 = 255;

/// A command on its way, and where its reply goes.
#[derive(Debug)]
pub(super) struct Packet {
    command: Arc<ScsiCommand>,
    /// Bytes of data.
    length: u32,
    sense: Vec<GuestRange>,
    trailer: Vec<GuestRange>,
}

impl Parser {
    /// Makes a packet of the chain behind the header: the next device-readable buffer is the command, of its length (here
    /// buffers do count, §5.2.6.3), and what is left of either kind is the data.
    ///
    /// # Errors
    /// The status, and the bytes written to the trailer if there is one.
    pub(super) fn scsi(&mut self, memory: &GuestMemory, rules: &Rules) -> Result<Action, (u8, u32)> {
        let trailer = self.chain.take_tail(blk::SCSI_TRAILER_SIZE as u64).unwrap_or_default();
        let refused = |code| (code, put_trailer(memory, &trailer, [NOT_DONE, 0, 0, 0]));
        if !rules.scsi {
            return Err(refused(blk::S_UNSUPP));
        }
        // A packet that lacks a part.
        let sense = self.chain.take_tail(blk::SCSI_SENSE_SIZE as u64).ok_or_else(|| refused(blk::S_IOERR))?;
        let command = self.chain.readable().first().ok_or_else(|| refused(blk::S_IOERR))?.length as usize;
        let mut cdb = [0; CDB_MAX];
        let cdb = cdb.get_mut(..command).ok_or_else(|| refused(blk::S_UNSUPP))?;
        self.chain.read_bytes(memory, cdb).ok_or_else(|| refused(blk::S_IOERR))?;
        let (direction, length) = match (total(self.chain.readable()), total(self.chain.writable())) {
            (0, 0) => (ScsiDirection::None, 0),
            (length, 0) => (ScsiDirection::ToDevice, length),
            (0, length) => (ScsiDirection::FromDevice, length),
            // As in the classic device, no command goes both ways.
            _ => return Err(refused(blk::S_UNSUPP)),
        };
        let command = ScsiCommand::new(cdb, direction).filter(|_| length <= DATA_MAX);
        let command = Arc::new(command.ok_or_else(|| refused(blk::S_UNSUPP))?);
        self.packet = Some(Packet { command, length: length as u32, sense, trailer });
        Ok(Action::Scsi)
    }
}

impl Packet {
    /// Writes sense and trailer. Returns the status, and the bytes of the chain that the device has written.
    fn answer(&self, memory: &GuestMemory) -> (u8, u32) {
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
        let sense = write_at(memory, &self.sense, 0, &reply.sense) as u32;
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
    write_at(memory, place, 0, &bytes) as u32
}

impl Worker {
    /// Hands the packet parsed last to the engine.
    pub(super) fn start_scsi(&mut self, mut slot: Slot) {
        let Some(packet) = self.parser.packet.take() else { unreachable!("the parser has just made a packet") };
        let command = Arc::clone(&packet.command);
        slot.scsi = Some(Box::new(packet));
        let tag = self.slots.insert(slot);
        self.engine.submit_scsi(tag, command, self.parser.data(&Action::Scsi));
    }

    /// A command came back. Its failures are the driver's to judge, not the error policy's: `errors` tells.
    pub(super) fn answer_scsi(&mut self, mut slot: Slot) {
        let Some(packet) = &slot.scsi else { unreachable!("a SCSI request has its packet") };
        let (code, written) = packet.answer(self.memory());
        slot.written = written;
        self.answer(slot, code);
    }
}
