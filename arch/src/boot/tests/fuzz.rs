//! Any bytes as a kernel: what a plan promises to those who apply it.

use std::cell::Cell;

use minivmm_fuzz::Input;

use super::*;

/// A file with zeros behind its bytes, that counts what is read of it.
struct Sparse {
    bytes: Vec<u8>,
    size: u64,
    read: Cell<usize>,
}

impl ReadAt for Sparse {
    fn size(&self) -> io::Result<u64> {
        Ok(self.size)
    }

    fn read_at(&self, offset: u64, length: usize) -> io::Result<Vec<u8>> {
        let length = self.size.saturating_sub(offset).min(length as u64) as usize;
        self.read.set(self.read.get() + length);
        let rest = usize::try_from(offset).ok().and_then(|offset| self.bytes.get(offset..));
        let mut bytes = rest.unwrap_or_default().to_vec();
        bytes.resize(length, 0);
        Ok(bytes)
    }
}

/// Notes are read up to 64 KiB for each of 64 segments, headers only once.
const READ_MAX: usize = 64 * 0x1_0000 + 0x3000;

fn file(input: &mut Input<'_>) -> Sparse {
    let size = if input.bool() { Some(input.u64()) } else { None };
    let mut bytes = match input.below(4) {
        0 => Vec::new(),
        1 => bzimage(),
        2 => elf(&[code(), notes(pvh_note()), code(), Part(LOAD, 3 * MIB, vec![1; 9], 0x1000)]),
        _ => {
            let parts: Vec<_> = (0..input.below(70))
                .map(|_| {
                    let (kind, address) = (input.below(5) as u32, input.u64());
                    Part(kind, address, input.sized().to_vec(), input.u64())
                })
                .collect();
            elf(&parts)
        }
    };
    while !input.is_empty() {
        let offset = usize::from(input.u16());
        let patch = input.sized();
        bytes.resize(bytes.len().max(offset + patch.len()), 0);
        bytes[offset..offset + patch.len()].copy_from_slice(patch);
    }
    let size = size.unwrap_or(bytes.len() as u64);
    bytes.truncate(usize::try_from(size).unwrap_or(usize::MAX));
    Sparse { bytes, size, read: Cell::new(0) }
}

/// No two of the ranges have an address in common.
fn assert_disjoint(mut ranges: Vec<Range<u64>>) {
    ranges.retain(|range| !range.is_empty());
    ranges.sort_by_key(|range| range.start);
    let meeting = ranges.windows(2).find(|pair| pair[0].end > pair[1].start);
    assert_eq!(meeting, None);
}

fn check(plan: &Plan, kernel: &Kernel, memory: u64, size: u64) {
    let end = memory::low_end(&machine(memory).ram);
    let place = |range: &FileRange| range.address.0..range.address.0 + range.length;
    for range in &plan.kernel {
        assert!(range.offset.checked_add(range.length).is_some_and(|end| end <= size));
        assert!(range.address.0 >= MIB && place(range).end <= end, "{range:?}");
        assert!(place(range).start >= kernel.occupied.start);
        assert!(place(range).end <= kernel.occupied.end);
    }
    let initrd = plan.initrd.as_ref().map(place);
    if let Some(initrd) = &initrd {
        assert!(initrd.start.is_multiple_of(4096) && initrd.start >= MIB && initrd.end <= end);
        assert!(initrd.end <= kernel.initrd_limit);
    }
    assert_disjoint(plan.kernel.iter().map(place).chain(initrd.clone()).collect());
    assert_disjoint([kernel.occupied.clone()].into_iter().chain(initrd).collect());
    assert!((MIB..end).contains(&plan.entry.ip.0));
    let place = |structure: &Structure| {
        let start = structure.address.0;
        start..start + structure.bytes.len() as u64
    };
    assert!(plan.structures.iter().all(|structure| place(structure).end <= MIB));
    assert!(plan.structures.iter().any(|structure| structure.address == plan.entry.start));
    assert_disjoint(plan.structures.iter().map(place).collect());
}

#[test]
fn kernels() {
    minivmm_fuzz::run("arch/kernels", |input| {
        let initrd = if input.bool() { Some(input.u32().into()) } else { None };
        let file = file(input);
        let kernel = Kernel::parse(&file);
        assert!(file.read.get() <= READ_MAX, "{} bytes were read", file.read.get());
        let kernel = match kernel {
            Ok(kernel) => kernel,
            Err(error) => return assert!(!error.to_string().contains('\n')),
        };
        for memory in [32 * MIB, 64 * MIB, 3 << 30, 5 << 30] {
            if let Ok(plan) = plan(&machine(memory), &kernel, initrd, "console=ttyS0") {
                check(&plan, &kernel, memory, file.size);
            }
        }
    });
}
