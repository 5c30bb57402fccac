//! The host's page map of this process: which pages hold data, and which have changed (Documentation/admin-guide/mm/pagemap.rst).
//!
//! Pages of RAM that may hold data, which a save writes, are present or swapped out, or belong to a file mapping (the guest's kernel, or
//! a saved machine). A page of a file that was never touched is not present, but has the file's content.
//!
//! For an increment, a page that is still mapped from the base is as in that file until the guest, io_uring or read(2) writes to it. The
//! write makes it anonymous. It counts as changed even if it is zero now, because the base may have other content there.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;

use arch::layout::PAGE_SIZE;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::checksum::BLOCK;
use super::page_set::PageSet;
use crate::GuestMemory;

/// Two bits of a page map's entry: the page is present (63), or swapped out (62).
const IN_USE: u64 = 0b11 << 62;
/// Bit of a page map's entry: the page belongs to a file (or is shared anonymous memory).
const OF_FILE: u64 = 1 << 61;

/// `/proc/self/maps` and `/proc/self/pagemap`, for all saves of this process.
static PROC_FILES: OnceLock<io::Result<(File, File)>> = OnceLock::new();

/// Opens the page map and the list of mappings. Called before the process is confined, after which it could not open them.
pub(crate) fn open_page_map() {
    let open = |name| File::open(format!("/proc/self/{name}"));
    PROC_FILES.get_or_init(|| Ok((open("maps")?, open("pagemap")?)));
}

/// A part of a file in this process's memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct FileMapping {
    addresses: Range<u64>,
    offset: u64,
    /// The device as in /proc/PID/maps. Some file systems report another one by stat(2).
    device: String,
    inode: u64,
}

/// This process's page map, and its file mappings as they are while the machine stands still.
pub(super) struct PageMap {
    entries: &'static File,
    pub(super) files: Vec<FileMapping>,
}

impl PageMap {
    /// `None`: the host does not show them. Then every page counts as data.
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

    /// The page map's entries for these host addresses.
    fn entries(&self, addresses: &Range<u64>) -> io::Result<Vec<u64>> {
        let pages = (addresses.end - addresses.start) / PAGE_SIZE;
        let mut entries = vec![0; pages as usize * 8];
        self.entries.read_exact_at(&mut entries, addresses.start / PAGE_SIZE * 8)?;
        let (entries, _) = entries.as_chunks::<8>();
        Ok(entries.iter().map(|entry| u64::from_le_bytes(*entry)).collect())
    }

    /// Whether each page at these host addresses may hold data.
    pub(super) fn may_hold_data(&self, addresses: &Range<u64>) -> Vec<bool> {
        let Ok(entries) = self.entries(addresses) else {
            return vec![true; ((addresses.end - addresses.start) / PAGE_SIZE) as usize];
        };
        let mut data: Vec<_> = entries.into_iter().map(is_in_use).collect();
        for pages in overlaps(&self.files, addresses) {
            data[pages].fill(true);
        }
        data
    }

    /// The pages of `memory` that may have changed since a restore, when it had the mappings `files` and was new otherwise.
    ///
    /// # Errors
    /// The host does not show the page map.
    pub(super) fn changed(
        &self,
        memory: &GuestMemory,
        files: &[FileMapping],
    ) -> io::Result<PageSet> {
        let unchanged = common_parts(files, &self.files);
        let mut set = PageSet::default();
        for region in memory.iter() {
            let host = region.as_ptr() as u64;
            for at in (0..region.len()).step_by(BLOCK as usize) {
                let addresses = host + at..host + region.len().min(at + BLOCK);
                let entries = self.entries(&addresses)?;
                let mut changed: Vec<_> = entries.iter().copied().map(is_in_use).collect();
                // Where a file was mapped then or is mapped now, and not the same one: a reset has replaced it.
                for pages in overlaps(files, &addresses).chain(overlaps(&self.files, &addresses)) {
                    changed[pages].fill(true);
                }
                for page in overlaps(&unchanged, &addresses).flatten() {
                    changed[page] = is_anonymous(entries[page]);
                }
                changed.into_iter().for_each(|changed| set.push(changed));
            }
        }
        Ok(set)
    }
}

/// Whether the page of this entry is present or swapped out.
fn is_in_use(entry: u64) -> bool {
    entry & IN_USE != 0
}

/// Whether the page of this entry, in a private mapping of a file, is a copy that the process has made by a write.
fn is_anonymous(entry: u64) -> bool {
    is_in_use(entry) && entry & OF_FILE == 0
}

/// The pages of `addresses` that lie in one of the `mappings`, as indices from the first page on. The mappings are in ascending order.
fn overlaps(
    mappings: &[FileMapping],
    addresses: &Range<u64>,
) -> impl Iterator<Item = Range<usize>> {
    let Range { start, end } = *addresses;
    let first = mappings.partition_point(|mapping| mapping.addresses.end <= start);
    let inside = mappings[first..].iter().map(|mapping| &mapping.addresses);
    inside.take_while(move |mapping| mapping.start < end).map(move |mapping| {
        let page = |address: u64| ((address - start) / PAGE_SIZE) as usize;
        page(mapping.start.max(start))..page(mapping.end.min(end))
    })
}

/// The address ranges at which both lists map the same part of the same file. Both are in ascending order.
fn common_parts(one: &[FileMapping], other: &[FileMapping]) -> Vec<FileMapping> {
    let mut common = Vec::new();
    let (mut ones, mut others) = (one.iter().peekable(), other.iter().peekable());
    while let (Some(a), Some(b)) = (ones.peek(), others.peek()) {
        let start = a.addresses.start.max(b.addresses.start);
        let end = a.addresses.end.min(b.addresses.end);
        let offset = |of: &FileMapping| of.offset.wrapping_add(start - of.addresses.start);
        let file = |of: &FileMapping| (of.device.clone(), of.inode);
        if start < end && offset(a) == offset(b) && file(a) == file(b) {
            common.push(FileMapping {
                addresses: start..end,
                offset: offset(a),
                device: a.device.clone(),
                inode: a.inode,
            });
        }
        let ends_first = if a.addresses.end <= b.addresses.end { &mut ones } else { &mut others };
        ends_first.next();
    }
    common
}

/// Parses the file mappings in the text of /proc/PID/maps. A line is `start-end mode offset device inode path`.
fn file_mappings(maps: &str) -> Option<Vec<FileMapping>> {
    let number = |text: &str| u64::from_str_radix(text, 16).ok();
    let mapping = |line: &str| {
        let mut words = line.split_ascii_whitespace();
        let (start, end) = words.next()?.split_once('-')?;
        let offset = number(words.nth(1)?)?;
        let (device, inode) = (words.next()?.to_owned(), words.next()?.parse().ok()?);
        Some(FileMapping { addresses: number(start)?..number(end)?, offset, device, inode })
    };
    let mappings = maps.lines().map(mapping).collect::<Option<Vec<_>>>()?;
    Some(mappings.into_iter().filter(|mapping| mapping.inode != 0).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Parts of one file: its inode, host addresses, and the offset of the first byte, in pages.
    fn mapping(inode: u64, pages: Range<u64>, offset: u64) -> FileMapping {
        let addresses = pages.start << 12..pages.end << 12;
        FileMapping { addresses, offset: offset << 12, device: "08:01".to_owned(), inode }
    }

    #[test]
    fn file_mappings_are_those_with_an_inode() {
        let maps = "5000-6000 r-xp 00000000 08:01 1234 /usr/bin/minivmm\n\
                    7000-9000 rw-p 00000000 00:00 0 \n\
                    9000-a000 rw-p 00001000 08:01 99 /a path with spaces\n";
        assert_eq!(file_mappings(maps), Some(vec![mapping(1234, 5..6, 0), mapping(99, 9..10, 1)]));
        assert_eq!(file_mappings("nonsense"), None);
    }

    #[test]
    fn what_is_mapped_from_elsewhere_is_not_in_common() {
        let before = [mapping(1, 10..20, 100), mapping(2, 20..30, 0), mapping(1, 40..50, 7)];
        // In the middle another page of the file; at the end another file.
        let now = [
            mapping(1, 8..12, 98),
            mapping(1, 12..13, 0),
            mapping(1, 13..20, 103),
            mapping(3, 20..30, 0),
            mapping(1, 45..60, 12),
        ];
        let expected = [mapping(1, 10..12, 100), mapping(1, 13..20, 103), mapping(1, 45..50, 12)];
        assert_eq!(common_parts(&before, &now), expected);
        assert_eq!(common_parts(&before, &before), before);
        let pages: Vec<_> = overlaps(&now, &(0xb000..0x15000)).collect();
        assert_eq!(pages, [0..1, 1..2, 2..9, 9..10]);
    }

    #[test]
    fn a_page_of_a_mapped_file_is_anonymous_once_it_was_written() {
        // Copied, and swapped out after that; the file's, and one that moves in memory.
        assert!(is_anonymous(1 << 63) && is_anonymous(1 << 62));
        assert!(!is_anonymous(0) && !is_anonymous(5 << 61) && !is_anonymous(3 << 61));
    }

    #[test]
    fn pages_in_swap_hold_data() {
        // In memory; in swap, where the low bits say in which place; untouched, with the bits that say other things.
        assert!(is_in_use(1 << 63 | 0x1234) && is_in_use(1 << 62 | 0x7f));
        assert!(!is_in_use(0) && !is_in_use(0x3fff << 48));
    }
}
