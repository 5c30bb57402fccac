//! Fuzz targets: files that are no valid saved machines. One damages the file around the description, and one the description.

use std::fs::File;
use std::os::unix::fs::FileExt;

use rustix::fs::{MemfdFlags, memfd_create};

use super::checksum::checksum;
use super::core_file::{CoreFile, CoreLayout};
use super::description;
use super::page_set::PageSet;

fn file(head: &[u8], length: u64) -> File {
    let file: File = memfd_create(c"saved", MemfdFlags::CLOEXEC).unwrap().into();
    file.write_all_at(head, 0).unwrap();
    file.set_len(length).unwrap();
    file
}

fn assert_sound(core: &CoreFile, length: u64) {
    let mut end = 0;
    for segment in &core.segments {
        assert!(segment.length > 0 && segment.offset >= end, "{segment:?}");
        end = segment.offset + segment.length;
        assert!(end <= length);
    }
    let blocks: u64 = core.segments.iter().map(|segment| segment.length.div_ceil(2 << 20)).sum();
    assert_eq!(core.ram_checksums.len() as u64, blocks);
    assert!(core.machine.len() as u64 <= length);
    let pages = core.segments.iter().map(|segment| segment.length / 4096).sum::<u64>();
    if let Some(set) = &core.pages {
        assert!(set.bits().len() as u64 == pages.div_ceil(8) && set.count() <= pages);
    }
}

/// Corrects the file's checksum, so that the damaged parts that it covers are read.
fn seal(head: &mut [u8]) {
    if let Some(end) = head.len().checked_sub(8) {
        let sum = checksum(&head[..end]).to_le_bytes();
        head[end..].copy_from_slice(&sum);
    }
}

#[test]
fn core_files() {
    minivmm_fuzz::run("vmm/core_files", |input| {
        let ranges = [(0, 0x40_0000), (0x1_0000_0000, 0x1000), (0x2_0000_0000, 0x20_1000)];
        let ranges = &ranges[..1 + input.below(3) as usize];
        let machine = input.sized().to_vec();
        let total = ranges.iter().map(|(_, length)| length / 4096).sum::<u64>() as usize;
        // An input that begins with an odd number is the description of an increment. Older inputs in the corpus keep their meaning.
        let is_increment = machine.first().is_some_and(|first| first % 2 == 1);
        let mut set = PageSet::default();
        (0..total).for_each(|page| set.push(page % 5 == 0));
        let set = is_increment.then_some(&set);
        let layout = CoreLayout::new(&machine, &[Default::default()], ranges, set);
        let mut length = layout.file_length();
        let blocks =
            ranges.iter().map(|(_, length): &(u64, u64)| length.div_ceil(2 << 20)).sum::<u64>();
        let mut head = layout.head(&vec![7; blocks as usize]);
        let patches = input.below(8);
        for _ in 0..patches {
            let at = input.u16() as usize % head.len();
            let count = input.below(9) as usize;
            let patch = input.bytes(count);
            for (byte, patch) in head[at..].iter_mut().zip(patch) {
                *byte = *patch;
            }
        }
        if input.bool() {
            length = length.wrapping_add_signed(i64::from(input.u32() as i32)).min(1 << 32);
        }
        seal(&mut head);
        match CoreFile::read(file(&head, length)) {
            Ok(core) => assert_sound(&core, length),
            Err(error) => assert!(!error.to_string().contains('\n')),
        }
    });
}

/// A description that can be parsed is written as it was read, and only one that fits its file passes the check.
#[test]
fn descriptions() {
    minivmm_fuzz::run("vmm/descriptions", |input| {
        let mut text = include_bytes!("fixture-1.0.json").to_vec();
        while !input.is_empty() {
            let at = input.below(text.len() as u64) as usize;
            let gone = input.pick(&[0, 1, 1, 2, 4, 64]).min(text.len() - at);
            let count = input.below(24) as usize;
            text.splice(at..at + gone, input.bytes(count).iter().copied());
        }
        let Ok(saved) = description::parse(&text) else { return };
        let again = serde_json::to_vec(&saved).unwrap();
        let read = description::parse(&again).unwrap();
        assert_eq!(serde_json::to_vec(&read).unwrap(), again);
        saved.describe(0);
        let memory = (1 << 20) + (input.u64() & 0x1_ffff_f000);
        let layout = CoreLayout::new(&again, &[], &[(0, memory)], None);
        let length = layout.file_length();
        let blocks = memory.div_ceil(2 << 20) as usize;
        let core = CoreFile::read(file(&layout.head(&vec![0; blocks]), length)).unwrap();
        if description::check(&saved, &core).is_ok() {
            assert_eq!(core.segments.iter().map(|segment| segment.length).sum::<u64>(), memory);
        }
    });
}
