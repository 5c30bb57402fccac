//! What a medium may hold after a power cut.
//!
//! A change is *durable* at a moment if an fdatasync began after the change had ended, and has itself ended. A durable write (RWF_DSYNC)
//! is durable when it has ended, and with it what was in its sectors before. A change that has begun and is not durable is *open*: the
//! medium may have all of it, nothing, or any of its sectors. Changes that have not begun are not there. A state is the durable changes
//! and some choice of the open ones.

use std::collections::BTreeMap;

/// A change of the file, as [`FileChange`](crate::disk::observer::FileChange), with a copy of what was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::disk) enum Change {
    Write { offset: u64, data: Vec<u8>, durable: bool },
    Zero { offset: u64, length: u64 },
    Sync,
}

const SECTOR: u64 = 512;

/// A change, and when it began and ended; `u64::MAX` for one that has not ended.
#[derive(Clone, Debug)]
pub(in crate::disk) struct Recorded {
    pub(in crate::disk) change: Change,
    pub(in crate::disk) begin: u64,
    pub(in crate::disk) end: u64,
    pub(in crate::disk) thread: std::thread::ThreadId,
}

/// Bytes inside one sector: the file offset of the first, and the bytes.
type Piece = (u64, Vec<u8>);

impl Recorded {
    /// Its pieces, which a power cut parts.
    fn pieces(&self) -> Vec<Piece> {
        let (start, end) = match &self.change {
            Change::Write { offset, data, .. } => (*offset, offset + data.len() as u64),
            Change::Zero { offset, length } => (*offset, offset + length),
            Change::Sync => return Vec::new(),
        };
        let mut pieces = Vec::new();
        let mut at = start;
        while at < end {
            let next = (at - at % SECTOR + SECTOR).min(end);
            let bytes = match &self.change {
                Change::Write { data, .. } => {
                    data[(at - start) as usize..(next - start) as usize].to_vec()
                }
                _ => vec![0; (next - at) as usize],
            };
            pieces.push((at, bytes));
            at = next;
        }
        pieces
    }
}

impl Recorded {
    fn is_durable_write(&self) -> bool {
        matches!(self.change, Change::Write { durable: true, .. })
    }

    /// Whether this is a durable write, over at `moment`, that put something else into the sector at `at` after `earlier`.
    fn replaces(&self, earlier: &Self, at: u64, moment: u64) -> bool {
        let Change::Write { offset, data, durable: true } = &self.change else { return false };
        let is_later = self.begin > earlier.begin && self.end < moment;
        is_later && (*offset..offset + data.len() as u64).contains(&(at - at % SECTOR))
    }
}

/// The medium at a moment: the durable content, and the open changes in the order in which they began.
pub(in crate::disk) struct Moment<'a> {
    durable: &'a [u8],
    pub(in crate::disk) open: Vec<Vec<Piece>>,
}

/// Goes through a log from moment to moment.
pub(in crate::disk) struct Replay<'a> {
    changes: &'a [Recorded],
    content: Vec<u8>,
    applied: Vec<bool>,
}

impl<'a> Replay<'a> {
    /// `content`: the file before the first change.
    pub(in crate::disk) fn new(changes: &'a [Recorded], content: Vec<u8>) -> Self {
        Self { changes, content, applied: vec![false; changes.len()] }
    }

    /// The medium at `moment`; to be asked for in order.
    pub(in crate::disk) fn at(&mut self, moment: u64) -> Moment<'_> {
        let syncs = self.changes.iter().filter(|change| change.change == Change::Sync);
        let covered = syncs.filter(|sync| sync.end < moment).map(|sync| sync.begin).max();
        let covered = covered.unwrap_or(0);
        let mut open = Vec::new();
        for (change, applied) in self.changes.iter().zip(&mut self.applied) {
            if *applied || change.begin >= moment {
                continue;
            }
            *applied = change.end < covered || change.is_durable_write() && change.end < moment;
            let mut pieces = change.pieces();
            pieces.retain(|piece| {
                !self.changes.iter().any(|later| later.replaces(change, piece.0, moment))
            });
            if *applied {
                pieces.iter().for_each(|piece| put(&mut self.content, piece));
            } else if !pieces.is_empty() {
                open.push(pieces);
            }
        }
        Moment { durable: &self.content, open }
    }
}

fn put(content: &mut Vec<u8>, (offset, bytes): &Piece) {
    let at = *offset as usize;
    if content.len() < at + bytes.len() {
        content.resize(at + bytes.len(), 0);
    }
    content[at..at + bytes.len()].copy_from_slice(bytes);
}

pub(in crate::disk) struct State<'a> {
    durable: &'a [u8],
    /// Sectors that open changes have changed.
    changed: BTreeMap<u64, [u8; SECTOR as usize]>,
}

impl<'a> State<'a> {
    /// The state with those pieces of open changes for which `choose(change, piece of the change)` says so.
    pub(in crate::disk) fn new(
        moment: &'a Moment<'_>,
        mut choose: impl FnMut(usize, usize) -> bool,
    ) -> Self {
        let mut state = Self { durable: moment.durable, changed: BTreeMap::new() };
        for (change, pieces) in moment.open.iter().enumerate() {
            for (at, (offset, bytes)) in pieces.iter().enumerate() {
                if choose(change, at) {
                    let (sector, start) = (offset / SECTOR, (offset % SECTOR) as usize);
                    let content = state.changed.entry(sector).or_insert_with(|| {
                        let mut content = [0; SECTOR as usize];
                        copy(moment.durable, sector * SECTOR, &mut content);
                        content
                    });
                    content[start..start + bytes.len()].copy_from_slice(bytes);
                }
            }
        }
        state
    }

    /// Bytes of the file; zeroes past its end.
    pub(in crate::disk) fn read(&self, offset: u64, buffer: &mut [u8]) {
        buffer.fill(0);
        copy(self.durable, offset, buffer);
        let end = offset + buffer.len() as u64;
        for (sector, content) in self.changed.range(offset / SECTOR..end.div_ceil(SECTOR)) {
            let start = sector * SECTOR;
            let (from, to) = (start.max(offset), (start + SECTOR).min(end));
            buffer[(from - offset) as usize..(to - offset) as usize]
                .copy_from_slice(&content[(from - start) as usize..(to - start) as usize]);
        }
    }

    pub(in crate::disk) fn bytes(&self, offset: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.read(offset, &mut bytes);
        bytes
    }

    pub(in crate::disk) fn file(&self) -> Vec<u8> {
        let last = self.changed.keys().next_back().map_or(0, |sector| (sector + 1) * SECTOR);
        self.bytes(0, self.durable.len().max(last as usize))
    }
}

fn copy(content: &[u8], offset: u64, buffer: &mut [u8]) {
    let start = content.len().min(offset as usize);
    let there = &content[start..content.len().min(offset as usize + buffer.len())];
    buffer[..there.len()].copy_from_slice(there);
}
