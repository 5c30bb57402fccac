//! Writes guest RAM to a file, and reads or maps it from a file.
//!
//! Pages of zeroes are holes in the file. A page that was never touched is zero, and need not be read: [`PageMap`] tells. A touched page
//! is read, because it may be zero as well.
//!
//! A restore maps the pages of a file, or copies them. In a chain of files (`increments`), each page comes from the newest file that has
//! it.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use arch::boot::FileRange;
use arch::layout::PAGE_SIZE;
use rustix::fs::{SeekFrom, seek};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::SnapshotError;
use super::checksum::{BLOCK, block_checksum, is_zero};
use super::core_file::{CoreFile, RamSegment};
use super::page_map::PageMap;
use super::page_set::PageSet;
use crate::GuestMemory;
use crate::kernel_pages;
use crate::memory::into_io;

const PAGE: usize = PAGE_SIZE as usize;
/// Most parts of files that are mapped. Each is a mapping of the process, and Linux allows 65,530 of these (`vm.max_map_count`).
const MAPPINGS_MAX: usize = 16_384;

/// How far the writing of RAM is, in bytes.
#[derive(Debug, Default)]
pub(crate) struct RamProgress {
    pub(crate) total: AtomicU64,
    pub(crate) remaining: AtomicU64,
    /// Bytes written to the file.
    pub(crate) written: AtomicU64,
    /// Bytes that are holes in the file.
    pub(crate) zero: AtomicU64,
}

/// A save's view of RAM, while it is written to its offsets in a file.
pub(super) struct RamSave<'a> {
    pub(super) memory: &'a GuestMemory,
    pub(super) map: Option<&'a PageMap>,
    /// Only of an increment: the pages to write. The others are holes.
    pub(super) changed: Option<&'a PageSet>,
    pub(super) file: &'a File,
    pub(super) segments: &'a [RamSegment],
    pub(super) progress: &'a RamProgress,
    pub(super) cancel: &'a AtomicBool,
}

/// A block of RAM: where it is for the guest, and where in the file.
pub(super) struct Block {
    address: GuestAddress,
    offset: u64,
    pub(super) length: usize,
    /// Whether each of its pages may hold data.
    data: Vec<bool>,
}

/// What was written to the file for a block.
pub(super) struct Written {
    pub(super) bytes: u64,
    pub(super) checksum: u64,
}

impl RamSave<'_> {
    /// Writes all of RAM. Returns the checksum of each block.
    ///
    /// # Errors
    /// The host's error of a write, or `Interrupted` if the save was canceled.
    pub(super) fn write(&self) -> io::Result<Vec<u64>> {
        let mut checksums = Vec::new();
        let mut buffer = vec![0; BLOCK as usize];
        for block in self.blocks() {
            let written = block.write(self.memory, self.file, &mut buffer)?;
            self.count(&block, &written)?;
            checksums.push(written.checksum);
        }
        Ok(checksums)
    }

    /// The blocks of RAM in ascending order. The page map is read for each block when the iterator gets to it.
    pub(super) fn blocks(&self) -> impl Iterator<Item = Block> {
        let mut next_page = 0;
        self.memory.iter().zip(self.segments).flat_map(move |(region, segment)| {
            let (host, first_page) = (region.as_ptr() as u64, next_page);
            next_page += region.len() as usize / PAGE;
            (0..region.len()).step_by(BLOCK as usize).map(move |at| {
                let length = BLOCK.min(region.len() - at) as usize;
                let pages = length / PAGE;
                let first = first_page + at as usize / PAGE;
                let addresses = host + at..host + at + length as u64;
                let data = match (self.changed, self.map) {
                    (Some(set), _) => (first..first + pages).map(|at| set.contains(at)).collect(),
                    (None, Some(map)) => map.may_hold_data(&addresses),
                    (None, None) => vec![true; pages],
                };
                let address = GuestAddress(segment.address + at);
                Block { address, offset: segment.offset + at, length, data }
            })
        })
    }

    /// Counts a block that was written.
    ///
    /// # Errors
    /// The save is canceled.
    pub(super) fn count(&self, block: &Block, written: &Written) -> io::Result<()> {
        let length = block.length as u64;
        self.progress.written.fetch_add(written.bytes, Ordering::Relaxed);
        self.progress.zero.fetch_add(length.saturating_sub(written.bytes), Ordering::Relaxed);
        self.progress.remaining.fetch_sub(length, Ordering::Relaxed);
        self.check_cancel()
    }

    /// # Errors
    /// The save is canceled.
    pub(super) fn check_cancel(&self) -> io::Result<()> {
        match self.cancel.load(Ordering::Relaxed) {
            true => Err(io::Error::new(io::ErrorKind::Interrupted, "it was canceled")),
            false => Ok(()),
        }
    }
}

impl Block {
    /// Reads those pages that may hold data into `buffer`, which has the size of a block, and writes those that are not zero. Allocates
    /// nothing: a child process calls it (`background_save`).
    pub(super) fn write(
        &self,
        memory: &GuestMemory,
        file: &File,
        buffer: &mut [u8],
    ) -> io::Result<Written> {
        let nothing = Written { bytes: 0, checksum: 0 };
        let Some(buffer) = buffer.get_mut(..self.length) else { return Ok(nothing) };
        if !self.data.contains(&true) {
            return Ok(nothing);
        }
        let mut end = 0;
        for run in runs(self.data.iter().copied()) {
            let bytes = run.start * PAGE..run.end * PAGE;
            buffer[end..bytes.start].fill(0);
            end = bytes.end;
            let from = GuestAddress(self.address.0 + bytes.start as u64);
            memory.read_slice(&mut buffer[bytes], from).map_err(into_io)?;
        }
        buffer[end..].fill(0);
        let mut bytes = 0;
        for run in runs(buffer.chunks(PAGE).map(|page| !is_zero(page))) {
            let used = &buffer[run.start * PAGE..run.end * PAGE];
            file.write_all_at(used, self.offset + (run.start * PAGE) as u64)?;
            bytes += used.len() as u64;
        }
        Ok(Written { bytes, checksum: if bytes == 0 { 0 } else { block_checksum(buffer) } })
    }
}

/// The ranges of consecutive indices at which `set` is true.
fn runs(set: impl Iterator<Item = bool>) -> impl Iterator<Item = Range<usize>> {
    let mut set = set.enumerate();
    std::iter::from_fn(move || {
        let (start, _) = set.find(|(_, set)| *set)?;
        let mut end = start + 1;
        while let Some((_, true)) = set.next() {
            end += 1;
        }
        Some(start..end)
    })
}

/// The parts of `segment` that have data in the file, in whole pages. A file system without holes has one.
fn extents(file: &File, segment: &RamSegment) -> io::Result<Vec<FileRange>> {
    let mut extents = Vec::new();
    let (mut at, end) = (segment.offset, segment.offset + segment.length);
    while at < end {
        let data = match seek(file, SeekFrom::Data(at)) {
            Ok(data) => data,
            // The rest of the file is a hole.
            Err(rustix::io::Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let start = data.max(at) & !(PAGE_SIZE - 1);
        if start >= end {
            break;
        }
        let hole = seek(file, SeekFrom::Hole(start))?;
        let stop = hole.next_multiple_of(PAGE_SIZE).min(end);
        if stop <= start {
            break;
        }
        let address = GuestAddress(segment.address + (start - segment.offset));
        extents.push(FileRange { offset: start, address, length: stop - start });
        at = stop;
    }
    Ok(extents)
}

/// For each file of a chain, newest first, the parts from which RAM comes: each page from the newest file that has it. `None`: there are
/// too many parts to map.
///
/// Holes are in no part, because a read of a hole in a mapped file in tmpfs allocates a page there.
///
/// # Errors
/// The host cannot tell where a file has data.
pub(super) fn parts<'a>(
    chain: impl Iterator<Item = &'a CoreFile>,
) -> io::Result<Option<Vec<Vec<FileRange>>>> {
    let (mut newer, mut count, mut parts) = (PageSet::default(), 0, Vec::new());
    for core in chain {
        let mut of_file = Vec::new();
        let mut first_page = 0;
        for segment in &core.segments {
            for extent in extents(&core.file, segment)? {
                if core.pages.is_none() && parts.is_empty() {
                    of_file.push(extent);
                    continue;
                }
                let start = (extent.address.0 - segment.address) as usize / PAGE + first_page;
                let pages = start..start + extent.length as usize / PAGE;
                for run in runs(pages.map(|page| core.has(page) && !newer.contains(page))) {
                    let (at, length) = (run.start * PAGE, run.len() * PAGE);
                    of_file.push(FileRange {
                        offset: extent.offset + at as u64,
                        address: GuestAddress(extent.address.0 + at as u64),
                        length: length as u64,
                    });
                }
            }
            if count + of_file.len() > MAPPINGS_MAX {
                return Ok(None);
            }
            first_page += segment.length as usize / PAGE;
        }
        count += of_file.len();
        parts.push(of_file);
        if let Some(pages) = &core.pages {
            newer.add(pages);
        }
    }
    Ok(Some(parts))
}

/// Maps these parts of the leased `file` into RAM, which is new. All processes that map the file share a page until the guest writes to
/// it. Returns whether all were mapped.
///
/// # Errors
/// The host refuses.
pub(super) fn map(memory: &GuestMemory, file: &File, parts: &[FileRange]) -> io::Result<bool> {
    for part in parts {
        if kernel_pages::map(memory, file, part)? != part.length {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Copies the data of a file into RAM, and compares it with the checksums. Pages in `newer`, which a newer file of the chain has, do not
/// change. All others are zero before.
///
/// # Errors
/// The host cannot read it, or a block differs from its checksum; RAM has some of the data then.
pub(super) fn read(
    memory: Option<&GuestMemory>,
    core: &CoreFile,
    newer: &PageSet,
) -> Result<(), SnapshotError> {
    let mut checksums = core.ram_checksums.iter();
    let mut buffer = vec![0; BLOCK as usize];
    let mut first_page = 0;
    for segment in &core.segments {
        let extents = extents(&core.file, segment)?;
        let mut next = extents.iter().peekable();
        for at in (0..segment.length).step_by(BLOCK as usize) {
            let length = BLOCK.min(segment.length - at);
            let (start, end) = (segment.offset + at, segment.offset + at + length);
            while next.next_if(|extent| extent.offset + extent.length <= start).is_some() {}
            let block = &mut buffer[..length as usize];
            let has_data = next.peek().is_some_and(|extent| extent.offset < end);
            if has_data {
                core.file.read_exact_at(block, start)?;
            }
            let found = if has_data { block_checksum(block) } else { 0 };
            if checksums.next() != Some(&found) {
                return Err(SnapshotError::Damaged("memory differs from its checksum"));
            }
            let Some(memory) = memory.filter(|_| has_data) else { continue };
            let pages = first_page + at as usize / PAGE..;
            let is_new = |page: usize| core.has(page) && !newer.contains(page);
            let data = block.chunks(PAGE).zip(pages);
            for run in runs(data.map(|(data, page)| !is_zero(data) && is_new(page))) {
                let bytes = run.start * PAGE..run.end * PAGE;
                let to = GuestAddress(segment.address + at + bytes.start as u64);
                memory.write_slice(&block[bytes], to).map_err(into_io)?;
            }
        }
        first_page += segment.length as usize / PAGE;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_whole() {
        let of = |set: &[bool]| runs(set.iter().copied()).collect::<Vec<_>>();
        assert_eq!(of(&[true, true, false, true]), [0..2, 3..4]);
        assert!(of(&[false]).is_empty());
    }
}
