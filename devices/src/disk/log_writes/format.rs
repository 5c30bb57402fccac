//! The bytes of a log of writes: dm-log-writes' version 1 (Linux, drivers/md/dm-log-writes.c), all of it little-endian.
//!
//! A superblock of one sector comes first, then the entries. An entry is one sector, followed by the data if it is a write. All
//! sectors are 512 bytes here.
//!
//! | superblock | | entry | |
//! |---|---|---|---|
//! | 0 | u64: the magic number | 0 | u64: the first sector that was changed |
//! | 8 | u64: the version | 8 | u64: how many sectors; the data of a write is as long |
//! | 16 | u64: the number of entries | 16 | u64: flags |
//! | 24 | u32: bytes of a sector | 24 | u64: bytes of a mark's text, else 0 |
//! | | | 32 | a mark's text |
//!
//! dm-log-writes leaves the rest of an entry's sector zero, and readers such as xfstests' replay-log skip it. minivmm writes
//! there, from byte 256 on, what the order of entries does not say:
//!
//! | byte | |
//! |---|---|
//! | 256 | 8 bytes: [`ORDER_MAGIC`] |
//! | 264 | u64: how many entries the log had when the request was submitted |
//! | 272 | u64: of a flush, how many it had when the flush had succeeded |
//!
//! The first entry of a log by minivmm is a mark with the text [`COMPLETE`], or [`INCOMPLETE`] if the log ends early.

/// The first eight bytes of a log.
pub const MAGIC: u64 = 0x006a_7366_7773_6872;
/// The version that is written and read.
pub const VERSION: u64 = 1;
/// Bytes of a sector, of the superblock, and of an entry without its data.
pub const SECTOR_BYTES: usize = 512;
/// Announces the order of submission in an entry.
pub const ORDER_MAGIC: [u8; 8] = *b"mvmorder";
/// The text of the first mark: every change up to the last entry is there.
pub const COMPLETE: &str = "minivmm: complete";
/// The text of the first mark: the host's file took no more, and later changes are missing.
pub const INCOMPLETE: &str = "minivmm: incomplete";

/// Flag: what completed before this entry is durable.
pub const FLUSH: u64 = 1 << 0;
/// Flag: a write that was durable when it completed (forced unit access).
pub const FUA: u64 = 1 << 1;
/// Flag: the content of the sectors is no longer needed; no data follows.
pub const DISCARD: u64 = 1 << 2;
/// Flag: a text for readers; nothing was changed.
pub const MARK: u64 = 1 << 3;

const MARK_TEXT: usize = 32;
const ORDER: usize = 256;

/// A sector of the log: the superblock, or an entry without its data.
pub type LogSector = [u8; SECTOR_BYTES];

/// An entry without its data.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Entry {
    /// The first sector that was changed.
    pub sector: u64,
    /// How many sectors were changed.
    pub sectors: u64,
    /// What happened to them: [`FLUSH`] and the others.
    pub flags: u64,
    /// A mark's text; as much as there is room for.
    pub text: String,
    /// How many entries the log had when the request was submitted, if the log says so.
    pub submitted: Option<u64>,
    /// Of a flush: how many it had when the flush had succeeded, if the log says so.
    pub flushed: Option<u64>,
}

impl Entry {
    /// Whether data follows.
    pub fn has_data(&self) -> bool {
        self.flags & (DISCARD | MARK) == 0 && self.sectors > 0
    }

    /// The entry as a sector of the log.
    pub fn encode(&self) -> LogSector {
        let mut bytes = [0; SECTOR_BYTES];
        let text = &self.text.as_bytes()[..self.text.len().min(ORDER - MARK_TEXT - 1)];
        put(&mut bytes, 0, self.sector);
        put(&mut bytes, 8, self.sectors);
        put(&mut bytes, 16, self.flags);
        put(&mut bytes, 24, text.len() as u64);
        bytes[MARK_TEXT..MARK_TEXT + text.len()].copy_from_slice(text);
        if let Some(submitted) = self.submitted {
            bytes[ORDER..ORDER + 8].copy_from_slice(&ORDER_MAGIC);
            put(&mut bytes, ORDER + 8, submitted);
            put(&mut bytes, ORDER + 16, self.flushed.unwrap_or(0));
        }
        bytes
    }

    /// The entry that a sector of a log holds.
    pub fn decode(bytes: &LogSector) -> Self {
        let has_order = bytes[ORDER..ORDER + 8] == ORDER_MAGIC;
        let order = |at| Some(get(bytes, at)).filter(|_| has_order);
        let flags = get(bytes, 16);
        let length = match flags & MARK {
            0 => 0,
            _ => get(bytes, 24).min((SECTOR_BYTES - MARK_TEXT) as u64) as usize,
        };
        let text = &bytes[MARK_TEXT..MARK_TEXT + length];
        Self {
            sector: get(bytes, 0),
            sectors: get(bytes, 8),
            flags,
            text: String::from_utf8_lossy(text).trim_end_matches('\0').to_owned(),
            submitted: order(ORDER + 8),
            flushed: order(ORDER + 16).filter(|_| flags & FLUSH != 0),
        }
    }
}

/// A superblock that announces `entries`.
pub fn superblock(entries: u64) -> LogSector {
    let mut bytes = [0; SECTOR_BYTES];
    put(&mut bytes, 0, MAGIC);
    put(&mut bytes, 8, VERSION);
    put(&mut bytes, 16, entries);
    bytes[24..28].copy_from_slice(&(SECTOR_BYTES as u32).to_le_bytes());
    bytes
}

/// What a superblock says: the version, the number of entries and the bytes of a sector. `None`: it is none.
pub fn read_superblock(bytes: &LogSector) -> Option<(u64, u64, u32)> {
    let sector = u32::from_le_bytes([bytes[24], bytes[25], bytes[26], bytes[27]]);
    (get(bytes, 0) == MAGIC).then(|| (get(bytes, 8), get(bytes, 16), sector))
}

fn put(bytes: &mut LogSector, at: usize, value: u64) {
    bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

fn get(bytes: &LogSector, at: usize) -> u64 {
    bytes[at..].first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes))
}
