//! From a chain to a checked request (virtio 1.2 §5.2.6), or to the status that refuses it.
//!
//! Header, segments and status are found by byte position, never by descriptor. Every field is read once, into a local
//! value, and checked there: the driver may change its memory at any time.

use vm_memory::GuestAddress;

use super::chain::{Chain, total};
use super::config::{MAX_SEGMENT_SECTORS, MAX_SEGMENTS};
use super::scsi::Packet;
use super::stats::Kind;
use crate::GuestMemory;
use crate::disk::{GuestRange, Operation};
use crate::virtio::spec::blk::{self, Segment};

/// What requests are checked against; constant during one pass over the ring.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rules {
    /// The negotiated features.
    pub(super) features: u64,
    /// Size of the disk in bytes.
    pub(super) capacity: u64,
    /// Logical block size in bytes.
    pub(super) block_size: u64,
    /// Largest data buffer in bytes, when the driver agreed to one.
    pub(super) size_max: u32,
    /// Writes are refused.
    pub(super) read_only: bool,
    /// Writes are durable before they complete.
    pub(super) write_through: bool,
    /// SCSI commands are served.
    pub(super) scsi: bool,
}

/// A request that passed every check.
#[derive(Clone, Copy, Debug)]
pub(super) struct Request {
    pub(super) kind: Kind,
    /// Where its status byte goes.
    pub(super) status: GuestAddress,
    pub(super) action: Action,
}

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// Move `length` bytes between the disk at `offset` and [`Parser::data`].
    Transfer { operation: Operation, offset: u64, length: u64 },
    /// Make completed writes durable.
    Flush,
    /// Carry out [`Parser::pieces`].
    Pieces,
    /// Write the disk's name into [`Parser::data`].
    GetId,
    /// Write how worn the disk is into [`Parser::data`].
    GetLifetime,
    /// Send [`Parser::packet`] to the host device.
    Scsi,
}

/// One stretch of the disk in a discard, write-zeroes or secure-erase request, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) operation: Operation,
    pub(super) offset: u64,
    pub(super) length: u64,
}

/// Why a chain did not become a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// The status `code` goes to `address`, after `written` bytes of data.
    Status { kind: Kind, address: GuestAddress, code: u8, written: u32 },
    /// No writable byte: there is nowhere to put a status.
    Unanswerable,
}

/// Turns chains into requests; reused, so that parsing allocates nothing once its lists have grown.
#[derive(Default)]
pub(super) struct Parser {
    /// The chain at hand, walked by the caller and consumed by `parse`.
    pub(super) chain: Chain,
    /// The stretches of the discard, write-zeroes or secure-erase request parsed last.
    pub(super) pieces: Vec<Piece>,
    /// The SCSI command parsed last.
    pub(super) packet: Option<Packet>,
}

impl Parser {
    /// The data ranges of the request parsed last: where a write comes from, or where a read or a name goes; for a SCSI
    /// command either.
    pub(super) fn data(&self, action: &Action) -> &[GuestRange] {
        match action {
            Action::Transfer { operation: Operation::Write { .. }, .. } => self.chain.readable(),
            Action::Scsi if !self.chain.readable().is_empty() => self.chain.readable(),
            _ => self.chain.writable(),
        }
    }

    /// Checks the chain and makes a request of it.
    pub(super) fn parse(&mut self, memory: &GuestMemory, rules: &Rules) -> Result<Request, Refusal> {
        let status = self.chain.take_last_writable().ok_or(Refusal::Unanswerable)?;
        let Some(header) = self.chain.read::<[u8; blk::HEADER_SIZE]>(memory) else {
            return Err(Refusal::Status { kind: Kind::Other, address: status, code: blk::S_IOERR, written: 0 });
        };
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
        let sector = u64::from_le_bytes(sector);
        let (kind, action) = match u32::from_le_bytes([t0, t1, t2, t3]) {
            blk::T_IN => (Kind::Read, self.transfer(Operation::Read, sector, rules)),
            blk::T_OUT => {
                let operation = Operation::Write { durable: rules.write_through };
                (Kind::Write, self.transfer(operation, sector, rules))
            }
            blk::T_FLUSH => (Kind::Flush, Ok(Action::Flush)),
            blk::T_GET_ID => (Kind::Other, Ok(Action::GetId)),
            blk::T_DISCARD => (Kind::Discard, self.segments(memory, Kind::Discard, rules)),
            blk::T_WRITE_ZEROES => (Kind::WriteZeroes, self.segments(memory, Kind::WriteZeroes, rules)),
            blk::T_SECURE_ERASE => (Kind::SecureErase, self.segments(memory, Kind::SecureErase, rules)),
            blk::T_SCSI_CMD | blk::T_SCSI_CMD_OUT => match self.scsi(memory, rules) {
                Ok(action) => (Kind::Other, Ok(action)),
                Err((code, written)) => {
                    return Err(Refusal::Status { kind: Kind::Other, address: status, code, written });
                }
            },
            blk::T_GET_LIFETIME if rules.features & blk::F_LIFETIME != 0 => (Kind::Other, Ok(Action::GetLifetime)),
            // Zones too (§5.2.6.2): the feature is never offered.
            _ => (Kind::Other, Err(blk::S_UNSUPP)),
        };
        match action {
            Ok(action) => Ok(Request { kind, status, action }),
            Err(code) => Err(Refusal::Status { kind, address: status, code, written: 0 }),
        }
    }

    /// A read or a write. Without data it succeeds when its sector exists, as in QEMU.
    fn transfer(&self, operation: Operation, sector: u64, rules: &Rules) -> Result<Action, u8> {
        let write = matches!(operation, Operation::Write { .. });
        let data = if write { self.chain.readable() } else { self.chain.writable() };
        let length = total(data);
        let oversized = data.iter().any(|range| range.length > rules.size_max);
        // The used length has 32 bits and counts the status too.
        if write && rules.read_only || oversized || length >= u64::from(u32::MAX) {
            return Err(blk::S_IOERR);
        }
        let offset = stretch(sector, length, rules).ok_or(blk::S_IOERR)?;
        Ok(Action::Transfer { operation, offset, length })
    }

    /// A discard, write-zeroes or secure-erase request: nothing is done before all of its segments are checked.
    fn segments(&mut self, memory: &GuestMemory, kind: Kind, rules: &Rules) -> Result<Action, u8> {
        let (feature, known_flags) = match kind {
            Kind::Discard => (blk::F_DISCARD, 0),
            Kind::WriteZeroes => (blk::F_WRITE_ZEROES, blk::SEGMENT_UNMAP),
            _ => (blk::F_SECURE_ERASE, 0),
        };
        if rules.read_only {
            return Err(blk::S_IOERR);
        }
        if rules.features & feature == 0 {
            return Err(blk::S_UNSUPP);
        }
        let length = total(self.chain.readable());
        let count = length / Segment::SIZE as u64;
        if !length.is_multiple_of(Segment::SIZE as u64) || !(1..=u64::from(MAX_SEGMENTS)).contains(&count) {
            return Err(blk::S_IOERR);
        }
        self.pieces.clear();
        let mut sound = true;
        for _ in 0..count {
            let bytes = self.chain.read(memory).ok_or(blk::S_IOERR)?;
            let Segment { sector, sectors, flags } = Segment::from_le_bytes(&bytes);
            // §5.2.6.2: an unknown flag anywhere makes the whole request UNSUPP, whatever else is wrong with it.
            if flags & !known_flags != 0 {
                return Err(blk::S_UNSUPP);
            }
            let operation = match kind {
                Kind::Discard => Operation::Discard,
                Kind::WriteZeroes => {
                    Operation::WriteZeroes { unmap: flags & blk::SEGMENT_UNMAP != 0, durable: rules.write_through }
                }
                _ => Operation::SecureErase,
            };
            let length = u64::from(sectors) * blk::SECTOR_SIZE;
            match stretch(sector, length, rules) {
                Some(_) if sectors > MAX_SEGMENT_SECTORS => sound = false,
                Some(offset) if length > 0 => self.pieces.push(Piece { operation, offset, length }),
                Some(_) => {}
                None => sound = false,
            }
        }
        if sound { Ok(Action::Pieces) } else { Err(blk::S_IOERR) }
    }
}

/// Byte offset of `sector` when it and the `length` bytes from there are whole logical blocks of the disk.
fn stretch(sector: u64, length: u64, rules: &Rules) -> Option<u64> {
    let offset = sector.checked_mul(blk::SECTOR_SIZE)?;
    let end = offset.checked_add(length)?;
    let aligned = offset.is_multiple_of(rules.block_size) && length.is_multiple_of(rules.block_size);
    (aligned && end <= rules.capacity).then_some(offset)
}
