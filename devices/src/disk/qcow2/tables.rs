//! What keeps a qcow2 image sound in its file, so that a process that is killed leaves clusters unused at worst.
//!
//! A cluster has to be counted in the file before anything in the file refers to it: whoever opens the image next takes one
//! that is not counted for free, and gives it away a second time. imago 0.2.6 keeps tables in memory and writes them back
//! in the right order, with two gaps, which this closes:
//! - It writes the tables one after the other. A cluster that another thread takes meanwhile may be referred to by a table
//!   written later, while its count was written before. So these two never happen at the same time.
//! - A new table is referred to in the file at once, and counted at the next flush. So that follows at once, after
//!   the rest of the write that made the table. This is short, and rare: a table maps 512 MiB with clusters of 64 KiB. But it
//!   maps 32 KiB with clusters of 512 bytes, so such an image may still suffer when it grows under direct I/O.

use std::io;
use std::ops::Range;

use imago::Mapping;

use super::Layer;
use crate::disk::SECTOR;

/// Which tables of an image may be new. Whoever holds it is alone in taking clusters.
pub(super) struct Tables {
    /// Bytes of the disk that one table of the second level maps, and bytes of the file that one table of counts covers at
    /// least (QEMU's docs/interop/qcow2.txt: both are one cluster, of entries of 8 bytes).
    stretch: u64,
    /// A bit for each stretch of the disk: its table is there, and counted.
    mapped: Vec<u64>,
    /// Stretches of the file, from its start, that have a table of counts which is counted itself.
    counted: u64,
}

impl Tables {
    /// Of an image of which nothing is known but the size of its clusters, or `None`: they may be as small as any.
    pub(super) fn new(cluster: Option<u64>) -> Self {
        let cluster = cluster.unwrap_or(SECTOR);
        Self { stretch: cluster * cluster / 8, mapped: Vec::new(), counted: 0 }
    }

    /// `range` of the disk was written to, with success or not: what is new in `top` because of that is counted in the file
    /// afterwards.
    pub(super) fn settle(&mut self, top: &Layer, range: Range<u64>) -> io::Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        let mut new = false;
        for stretch in range.start / self.stretch..=(range.end - 1) / self.stretch {
            let (word, bit) = ((stretch / 64) as usize, 1 << (stretch % 64));
            if self.mapped.len() <= word {
                self.mapped.resize(word + 1, 0);
            }
            new |= self.mapped[word] & bit == 0;
            self.mapped[word] |= bit;
        }
        // The file grows at its end, so the ends of what was written tell.
        for at in [range.start, range.end - 1] {
            if let (Mapping::Raw { writable: true, offset, .. }, _) = top.get_mapping(at, 1)?
                && offset / self.stretch >= self.counted
            {
                self.counted = offset / self.stretch + 1;
                new = true;
            }
        }
        if new { top.flush() } else { Ok(()) }
    }
}

/// Whether `top` has clusters of its own for all of `range`: writing there changes no table.
pub(super) fn in_place(top: &Layer, range: &Range<u64>) -> io::Result<bool> {
    let mut at = range.start;
    while at < range.end {
        match top.get_mapping(at, range.end - at)? {
            (Mapping::Raw { writable: true, .. }, length @ 1..) => at += length,
            _ => return Ok(false),
        }
    }
    Ok(true)
}
