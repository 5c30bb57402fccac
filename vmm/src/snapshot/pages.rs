//! Guest RAM: which pages hold data, how they get into a file, and how they come back.
//!
//! A page that was never touched is zero, and a hole in the file. The kernel's page map (Documentation/admin-guide/mm/pagemap.rst)
//! tells which are: neither present nor swapped out. That is not so where a *file* is mapped, such as the guest's kernel or the
//! snapshot that it was restored from: a page of those that was not touched has the file's content. So every page of a file
//! mapping counts as data, and every page that counts is looked at: those that are zero are holes, too.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use arch::boot::FileRange;
use arch::layout::PAGE_SIZE;
use rustix::fs::{SeekFrom, seek};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::SnapshotError;
use super::checksum::{BLOCK, block_checksum, is_zero};
use super::core_file::RamSegment;
use crate::GuestMemory;
use crate::kernel_pages;
use crate::memory::into_io;

const PAGE: usize = PAGE_SIZE as usize;
/// Bits of a page map's entry: the page is present, or swapped out.
const IN_USE: u64 = 0b11 << 62;
/// Parts of a file that are mapped at most: each is a mapping of the process, of which Linux allows 65,530 (`vm.max_map_count`).
const MAPPINGS_MAX: usize = 16_384;

/// How far the writing of RAM is, in bytes.
#[derive(Debug, Default)]
pub(crate) struct RamProgress {
    pub(crate) total: AtomicU64,
    pub(crate) remaining: AtomicU64,
    /// Written to the file.
    pub(crate) written: AtomicU64,
    /// Holes.
    pub(crate) zero: AtomicU64,
}

/// `/proc/self/maps` and `/proc/self/pagemap`, for all saves of this process.
static PROC_FILES: OnceLock<io::Result<(File, File)>> = OnceLock::new();

/// Opens what the host tells about this process's pages. A confined process could not: this comes before.
pub(crate) fn open_page_map() {
    let open = |name| File::open(format!("/proc/self/{name}"));
    PROC_FILES.get_or_init(|| Ok((open("maps")?, open("pagemap")?)));
}

/// This process's page map, and its file mappings as they are while the machine stands still.
pub(super) struct PageMap {
    entries: &'static File,
    files: Vec<Range<u64>>,
}

impl PageMap {
    /// `None`: the host does not tell, and all pages have to be looked at.
    pub(super) fn read() -> Option<Self> {
        let (maps, entries) = PROC_FILES.get()?.as_ref().ok()?;
        let mut text = Vec::new();
        let mut chunk = [0; 4096];
        loop {
            match maps.read_at(&mut chunk, text.len() as u64).ok()? {
                0 => break,
                count => text.extend_from_slice(&chunk[..count]),
            }
        }
        Some(Self { entries, files: file_mappings(std::str::from_utf8(&text).ok()?)? })
    }

    /// Whether each of `pages` pages from the host address `start` on may hold data.
    fn may_hold_data(&self, start: u64, pages: usize) -> Vec<bool> {
        let mut entries = vec![0; pages * 8];
        if self.entries.read_exact_at(&mut entries, start / PAGE_SIZE * 8).is_err() {
            return vec![true; pages];
        }
        let (entries, _) = entries.as_chunks::<8>();
        let mut data: Vec<_> =
            entries.iter().map(|entry| is_in_use(u64::from_le_bytes(*entry))).collect();
        let end = start + pages as u64 * PAGE_SIZE;
        for file in self.files.iter().filter(|file| file.start < end && start < file.end) {
            let from = (file.start.max(start) - start) / PAGE_SIZE;
            let to = (file.end.min(end) - start).div_ceil(PAGE_SIZE);
            data[from as usize..to as usize].fill(true);
        }
        data
    }
}

/// Whether a page map's entry is of a page that the process has, in memory or in swap.
fn is_in_use(entry: u64) -> bool {
    entry & IN_USE != 0
}

/// The host addresses where files are mapped, from the text of /proc/PID/maps: `start-end mode offset device inode path`.
fn file_mappings(maps: &str) -> Option<Vec<Range<u64>>> {
    let mapping = |line: &str| {
        let mut words = line.split_ascii_whitespace();
        let (start, end) = words.next()?.split_once('-')?;
        let address = |text| u64::from_str_radix(text, 16).ok();
        let is_file = words.nth(3)? != "0";
        Some((is_file, address(start)?..address(end)?))
    };
    let mappings = maps.lines().map(mapping).collect::<Option<Vec<_>>>()?;
    Some(mappings.into_iter().filter_map(|(is_file, range)| is_file.then_some(range)).collect())
}

/// RAM that is being written to its places in a file.
pub(super) struct RamSave<'a> {
    pub(super) memory: &'a GuestMemory,
    pub(super) map: Option<&'a PageMap>,
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

/// What a block has in the file.
pub(super) struct Written {
    pub(super) bytes: u64,
    pub(super) checksum: u64,
}

impl RamSave<'_> {
    /// Writes all of RAM. Returns the checksum of each block.
    ///
    /// # Errors
    /// What the host says to a write, or `Interrupted` once the save is canceled.
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

    /// All of RAM in its order. Each block is looked at when it is asked for.
    pub(super) fn blocks(&self) -> impl Iterator<Item = Block> {
        self.memory.iter().zip(self.segments).flat_map(move |(region, segment)| {
            let host = region.as_ptr() as u64;
            (0..region.len()).step_by(BLOCK as usize).map(move |at| {
                let length = BLOCK.min(region.len() - at) as usize;
                let pages = length / PAGE;
                let map = self.map.map(|map| map.may_hold_data(host + at, pages));
                Block {
                    address: GuestAddress(segment.address + at),
                    offset: segment.offset + at,
                    length,
                    data: map.unwrap_or_else(|| vec![true; pages]),
                }
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
        match self.cancel.load(Ordering::Relaxed) {
            true => Err(io::Error::new(io::ErrorKind::Interrupted, "it was canceled")),
            false => Ok(()),
        }
    }
}

impl Block {
    /// Reads those pages that may hold data into `buffer`, which has the size of a block, and writes those that are not zero. Allocates
    /// nothing: a child process calls it (`held_memory`).
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

/// The ranges of indices that are set.
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
            // Nothing but a hole is left.
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

/// Maps what has data in the leased `file` into RAM, which is new. Pages are shared with all others that map the file until the
/// guest writes to them. Returns the mapped parts; `None`: there are too many, or not all of RAM can be mapped.
///
/// Holes stay anonymous memory: to read a hole of a file in tmpfs would allocate its pages there.
///
/// # Errors
/// The host refuses.
pub(super) fn map(
    memory: &GuestMemory,
    file: &File,
    segments: &[RamSegment],
) -> io::Result<Option<Vec<FileRange>>> {
    let mut ranges = Vec::new();
    for segment in segments {
        ranges.extend(extents(file, segment)?);
    }
    if ranges.len() > MAPPINGS_MAX {
        return Ok(None);
    }
    for range in &ranges {
        if kernel_pages::map(memory, file, range)? != range.length {
            return Ok(None);
        }
    }
    Ok(Some(ranges))
}

/// Copies what has data in `file` into RAM, all of which is zero, and checks it.
///
/// # Errors
/// The host cannot read it, or a block differs from its checksum; RAM has some of the data then.
pub(super) fn read(
    memory: Option<&GuestMemory>,
    file: &File,
    segments: &[RamSegment],
    checksums: &[u64],
) -> Result<(), SnapshotError> {
    let mut checksums = checksums.iter();
    let mut buffer = vec![0; BLOCK as usize];
    for segment in segments {
        let extents = extents(file, segment)?;
        let mut next = extents.iter().peekable();
        for at in (0..segment.length).step_by(BLOCK as usize) {
            let length = BLOCK.min(segment.length - at);
            let (start, end) = (segment.offset + at, segment.offset + at + length);
            while next.next_if(|extent| extent.offset + extent.length <= start).is_some() {}
            let block = &mut buffer[..length as usize];
            let has_data = next.peek().is_some_and(|extent| extent.offset < end);
            if has_data {
                file.read_exact_at(block, start)?;
            }
            let found = if has_data { block_checksum(block) } else { 0 };
            if checksums.next() != Some(&found) {
                return Err(SnapshotError::Damaged("memory differs from its checksum"));
            }
            let Some(memory) = memory.filter(|_| has_data) else { continue };
            for run in runs(block.chunks(PAGE).map(|page| !is_zero(page))) {
                let bytes = run.start * PAGE..run.end * PAGE;
                let to = GuestAddress(segment.address + at + bytes.start as u64);
                memory.write_slice(&block[bytes], to).map_err(into_io)?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_mappings_are_those_with_an_inode() {
        let maps = "5000-6000 r-xp 00000000 08:01 1234 /usr/bin/minivmm\n\
                    7000-9000 rw-p 00000000 00:00 0 \n\
                    9000-a000 rw-p 00001000 08:01 99 /a path with spaces\n";
        assert_eq!(file_mappings(maps), Some(vec![0x5000..0x6000, 0x9000..0xa000]));
        assert_eq!(file_mappings("nonsense"), None);
    }

    #[test]
    fn pages_in_swap_hold_data() {
        // In memory; in swap, where the low bits say in which place; untouched, with the bits that say other things.
        assert!(is_in_use(1 << 63 | 0x1234) && is_in_use(1 << 62 | 0x7f));
        assert!(!is_in_use(0) && !is_in_use(0x3fff << 48));
    }

    #[test]
    fn runs_are_whole() {
        let of = |set: &[bool]| runs(set.iter().copied()).collect::<Vec<_>>();
        assert_eq!(of(&[true, true, false, true]), [0..2, 3..4]);
        assert!(of(&[false]).is_empty());
    }
}
