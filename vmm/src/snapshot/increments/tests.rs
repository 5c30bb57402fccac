//! Tests of chains of files, with guest memory but without a machine: which pages an increment has, and that a restore has all pages.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::AtomicBool;

use arch::layout::PAGE_SIZE;
use arch::machine_layout::{MachineLayout, MachineSpec};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::*;
use crate::memory;
use crate::snapshot::core_file::CoreLayout;
use crate::snapshot::pages::{RamProgress, RamSave};

pub(super) const PAGE: usize = PAGE_SIZE as usize;

/// Guest memory of that many pages.
pub(super) fn ram(pages: usize) -> GuestMemory {
    let bytes = (pages * PAGE) as u64;
    let spec = MachineSpec { memory: bytes, cpus: 1, serial: [true, false], acpi: true, disks: 0 };
    memory::map(&MachineLayout::new(spec), libc::MAP_NORESERVE).unwrap()
}

/// Saves to a sealed file, which can be mapped like a leased one. With `mapped`, the file is an increment with the changes since then.
pub(super) fn save(memory: &GuestMemory, mapped: Option<&[FileMapping]>) -> CoreFile {
    let map = PageMap::read();
    let changed = mapped.map(|mapped| map.as_ref().unwrap().changed(memory, mapped).unwrap());
    let ranges: Vec<_> =
        memory.iter().map(|region| (region.start_addr().0, region.len())).collect();
    let layout = CoreLayout::new(b"{}", &[], &ranges, changed.as_ref());
    let file: File =
        memfd_create("saved", MemfdFlags::ALLOW_SEALING | MemfdFlags::CLOEXEC).unwrap().into();
    file.set_len(layout.file_length()).unwrap();
    let checksums = RamSave {
        memory,
        map: map.as_ref(),
        changed: changed.as_ref(),
        file: &file,
        segments: &layout.segments,
        progress: &RamProgress::default(),
        cancel: &AtomicBool::new(false),
    };
    let checksums = checksums.write().unwrap();
    file.write_all_at(&layout.head(&checksums), 0).unwrap();
    fcntl_add_seals(&file, SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW).unwrap();
    CoreFile::read(file).unwrap()
}

/// The files of a chain, the newest first.
pub(super) fn chain(files: &[CoreFile]) -> Chain {
    let reopened = |core: &CoreFile| CoreFile::read(core.file.try_clone().unwrap()).unwrap();
    let mut files = files.iter().map(reopened);
    let top = files.next().unwrap();
    Chain {
        top,
        path: "none".into(),
        bases: files.map(|core| ("none".into(), core)).collect(),
        ids: Vec::new(),
    }
}

pub(super) fn content(memory: &GuestMemory, pages: usize) -> Vec<u8> {
    let mut content = vec![0; pages * PAGE];
    memory.read_slice(&mut content, GuestAddress(0)).unwrap();
    content
}

pub(super) fn write(memory: &GuestMemory, page: usize, byte: u8) {
    memory.write_slice(&[byte; PAGE], GuestAddress((page * PAGE) as u64)).unwrap();
}

/// A hole in an increment can stand for the base's page, so a page of zeroes has to be distinguished from it.
#[test]
fn a_page_that_became_zero_is_in_the_increment() {
    page_map::open_page_map();
    let memory = ram(4);
    (0..4).for_each(|page| write(&memory, page, 7));
    let base = save(&memory, None);
    assert_eq!(base.pages, None);
    let memory = ram(4);
    assert!(chain(std::slice::from_ref(&base)).map(&memory).unwrap().is_some());
    let mapped = PageMap::read().unwrap().files;
    write(&memory, 1, 0);
    write(&memory, 2, 9);
    // Only read.
    assert_eq!(content(&memory, 4)[3 * PAGE], 7);
    let increment = save(&memory, Some(&mapped));
    let has: Vec<_> = (0..4).filter(|page| increment.has(*page)).collect();
    assert_eq!(has, [1, 2]);
    let files = [increment, base];
    for is_mapped in [true, false] {
        let memory = ram(4);
        match is_mapped {
            true => assert!(chain(&files).map(&memory).unwrap().is_some()),
            false => chain(&files).copy(Some(&memory)).unwrap(),
        }
        let first_bytes: Vec<_> = content(&memory, 4).chunks(PAGE).map(|page| page[0]).collect();
        assert_eq!(first_bytes, [7, 0, 9, 7], "mapped: {is_mapped}");
    }
}

/// A reset gives the guest new pages, which the page map shows as not present. They are zero now, while the base has other content there.
#[test]
fn memory_that_a_reset_has_cleared_is_in_the_increment() {
    page_map::open_page_map();
    let memory = ram(3);
    write(&memory, 1, 7);
    let base = save(&memory, None);
    let memory = ram(3);
    assert!(chain(std::slice::from_ref(&base)).map(&memory).unwrap().is_some());
    let mapped = PageMap::read().unwrap().files;
    memory::clear(&memory).unwrap();
    let increment = save(&memory, Some(&mapped));
    assert_eq!((0..3).map(|page| increment.has(page)).collect::<Vec<_>>(), [false, true, false]);
}
