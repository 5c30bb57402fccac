//! What single transfers do, and what the host file looks like afterwards.

use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use vm_memory::GuestAddress;

use super::rig::{DEPTH, MEMORY_SIZE, Request, Rig, WRITE, directories, every_way};
use crate::disk::{
    Aio, DetectZeroes, DiscardMode, DiskError, GuestRange, OpenOptions, Operation, open,
};

const SIZE: u64 = 1 << 20;

fn full_image(directory: &Path) -> std::path::PathBuf {
    let path = directory.join("image");
    std::fs::write(&path, vec![0x5a; SIZE as usize]).unwrap();
    path
}

fn allocated(path: &Path) -> u64 {
    path.metadata().unwrap().blocks() * 512
}

#[test]
fn the_first_sector_is_read_with_any_cache_mode() {
    for directory in directories() {
        let path = full_image(directory.path());
        let mut image = vec![0x5a; SIZE as usize];
        image[..512].fill(7);
        std::fs::write(&path, image).unwrap();
        for (name, disk) in every_way(&path, DetectZeroes::Off) {
            assert_eq!(disk.first_sector(), Some([7; 512]), "{name}");
        }
    }
}

#[test]
fn discard_gives_blocks_back_and_zeroes_keep_them() {
    for directory in directories() {
        for (name, disk) in every_way(&full_image(directory.path()), DetectZeroes::Off) {
            let path = full_image(directory.path());
            let mut rig = Rig::new(disk);
            assert!(rig.disk.info().block_limits.discard_granularity > 0, "{name}");
            let full = allocated(&path);
            rig.ok(Request::bare(
                Operation::WriteZeroes { unmap: false, durable: false },
                0,
                SIZE / 2,
            ));
            assert!(
                allocated(&path) >= full,
                "{name}: write-zeroes without unmap must keep its blocks"
            );
            rig.ok(Request::bare(
                Operation::WriteZeroes { unmap: true, durable: true },
                0,
                SIZE / 4,
            ));
            assert!(
                allocated(&path) <= full - SIZE / 4,
                "{name}: write-zeroes with unmap should give blocks back"
            );
            rig.ok(Request::bare(Operation::Discard, SIZE / 4, SIZE / 4));
            assert!(allocated(&path) <= full - SIZE / 2, "{name}: discard should give blocks back");
            assert_eq!(path.metadata().unwrap().len(), SIZE, "{name}");
            let data = std::fs::read(&path).unwrap();
            assert!(data[..(SIZE / 2) as usize].iter().all(|byte| *byte == 0), "{name}");
            assert!(data[(SIZE / 2) as usize..].iter().all(|byte| *byte == 0x5a), "{name}");
        }
    }
}

#[test]
fn discard_ignore_changes_nothing() {
    for directory in directories() {
        let path = full_image(directory.path());
        let options = OpenOptions { discard: DiscardMode::Ignore, ..OpenOptions::new(&path) };
        let mut rig = Rig::new(open(&options).unwrap());
        let full = allocated(&path);
        assert_eq!(rig.disk.info().block_limits.discard_granularity, 0);
        rig.ok(Request::bare(Operation::Discard, 0, SIZE));
        assert!(std::fs::read(&path).unwrap().iter().all(|byte| *byte == 0x5a));
        rig.ok(Request::bare(Operation::WriteZeroes { unmap: true, durable: false }, 0, SIZE));
        assert!(std::fs::read(&path).unwrap().iter().all(|byte| *byte == 0));
        assert!(allocated(&path) >= full);
    }
}

#[test]
fn detected_zeroes_take_no_space() {
    for directory in directories() {
        for (detect_zeroes, sparse) in
            [(DetectZeroes::Off, false), (DetectZeroes::On, false), (DetectZeroes::Unmap, true)]
        {
            let path = full_image(directory.path());
            let full = allocated(&path);
            let options = OpenOptions { detect_zeroes, locking: false, ..OpenOptions::new(&path) };
            let mut rig = Rig::new(open(&options).unwrap());
            rig.ok(Request::plain(WRITE, 0, 0, 65536));
            assert_eq!(allocated(&path) < full, sparse, "{detect_zeroes}");
            // One byte that is not zero makes all the difference.
            rig.put(65535, &[1]);
            rig.ok(Request::plain(WRITE, 65536, 0, 65536));
            let data = std::fs::read(&path).unwrap();
            assert_eq!((data[0], data[65535], data[131071], data[131072]), (0, 0, 1, 0x5a));
        }
    }
}

/// More pieces than one system call takes: small ones, and such as direct I/O takes as they are.
#[test]
fn thousands_of_pieces() {
    for (count, piece) in [(3072_u64, 16_u32), (1536, 512)] {
        let (length, gap) = (count * u64::from(piece), 2 * u64::from(piece));
        // Every other piece of guest memory, so that no two are neighbors.
        let ranges: Vec<_> = (0..count)
            .map(|i| GuestRange { address: GuestAddress(i * gap), length: piece })
            .collect();
        let pattern = |i: u64| vec![(i % 251) as u8; piece as usize];
        for directory in directories() {
            for (name, disk) in every_way(&full_image(directory.path()), DetectZeroes::Off) {
                let path = full_image(directory.path());
                let mut rig = Rig::new(disk);
                (0..count).for_each(|i| rig.put(i * gap, &pattern(i)));
                rig.ok(Request { operation: WRITE, offset: 8192, length, ranges: ranges.clone() });
                let expected: Vec<u8> = (0..count).flat_map(pattern).collect();
                assert!(
                    std::fs::read(&path).unwrap()[8192..][..length as usize] == expected,
                    "{name}"
                );

                rig.put(0, &vec![0; (count * gap) as usize]);
                rig.ok(Request {
                    operation: Operation::Read,
                    offset: 8192,
                    length,
                    ranges: ranges.clone(),
                });
                for i in 0..count {
                    let memory = rig.get(i * gap, gap as usize);
                    assert!(memory[..piece as usize] == pattern(i), "{name}");
                    assert!(
                        memory[piece as usize..].iter().all(|byte| *byte == 0),
                        "{name}: beside its piece"
                    );
                }
            }
        }
    }
}

#[test]
fn senseless_transfers_fail_and_harm_nothing() {
    for directory in directories() {
        for (name, disk) in every_way(&full_image(directory.path()), DetectZeroes::Off) {
            let mut rig = Rig::new(disk);
            let end = MEMORY_SIZE as u64;
            let range =
                |address, length| vec![GuestRange { address: GuestAddress(address), length }];
            let read = |offset, length, ranges| Request {
                operation: Operation::Read,
                offset,
                length,
                ranges,
            };
            let table = [
                (read(0, 1024, range(end - 512, 1024)), DiskError::OutOfRange),
                (read(0, 512, range(u64::MAX - 100, 512)), DiskError::OutOfRange),
                (read(SIZE, 512, range(0, 512)), DiskError::OutOfRange),
                (read(u64::MAX - 511, 512, range(0, 512)), DiskError::OutOfRange),
                (read(0, u64::MAX - 511, range(0, 512)), DiskError::OutOfRange),
                (read(100, 512, range(0, 512)), DiskError::Host(libc::EINVAL)),
                (read(0, 512, range(0, 1024)), DiskError::Host(libc::EINVAL)),
                (read(0, 512, Vec::new()), DiskError::Host(libc::EINVAL)),
                (Request::bare(Operation::Discard, SIZE - 512, 1024), DiskError::OutOfRange),
                (
                    Request::bare(Operation::WriteZeroes { unmap: true, durable: true }, SIZE, 512),
                    DiskError::OutOfRange,
                ),
                (Request::bare(Operation::SecureErase, 0, 512), DiskError::Unsupported),
            ];
            for (request, error) in table {
                assert_eq!(rig.error(request.clone()), error, "{name}: {request:?}");
            }
            rig.ok(read(SIZE - 512, 512, range(0, 512)));
            rig.ok(read(SIZE, 0, Vec::new()));
            assert_eq!(rig.get(0, 512), [0x5a; 512]);
        }
    }
}

#[test]
fn a_read_only_disk_writes_nothing() {
    for directory in directories() {
        for &aio in Aio::ALL {
            let path = full_image(directory.path());
            let mut rig = Rig::new(
                open(&OpenOptions { read_only: true, aio, ..OpenOptions::new(&path) }).unwrap(),
            );
            assert!(rig.disk.info().read_only);
            let writes = [
                Request::plain(WRITE, 0, 0, 512),
                Request::bare(Operation::Discard, 0, 512),
                Request::bare(Operation::WriteZeroes { unmap: false, durable: false }, 0, 512),
                Request::bare(Operation::SecureErase, 0, 512),
            ];
            for request in writes {
                assert_eq!(rig.error(request), DiskError::Host(libc::EROFS));
            }
            rig.ok(Request::bare(Operation::Flush, 0, 0));
            rig.ok(Request::plain(Operation::Read, 0, 0, 512));
            assert_eq!(rig.get(0, 512), [0x5a; 512]);
            assert!(rig.disk.resize(4096).is_err());
            assert_eq!(path.metadata().unwrap().len(), SIZE);
        }
    }
}

#[test]
fn a_disk_grows_and_shrinks() {
    for directory in directories() {
        for (name, disk) in every_way(&full_image(directory.path()), DetectZeroes::Off) {
            let path = full_image(directory.path());
            assert_eq!(disk.refresh_capacity().unwrap(), SIZE, "{name}");
            let mut rig = Rig::new(disk);
            rig.disk.resize(2 * SIZE).unwrap();
            assert_eq!(
                (rig.disk.capacity(), path.metadata().unwrap().len()),
                (2 * SIZE, 2 * SIZE),
                "{name}"
            );
            rig.ok(Request::plain(WRITE, 2 * SIZE - 4096, 0, 4096));
            rig.disk.resize(4096).unwrap();
            assert_eq!(
                rig.error(Request::plain(WRITE, 4096, 0, 512)),
                DiskError::OutOfRange,
                "{name}"
            );
            assert_eq!(path.metadata().unwrap().len(), 4096, "{name}");
            for bad in [0, 100, 4097] {
                assert_eq!(
                    rig.disk.resize(bad).unwrap_err().kind(),
                    std::io::ErrorKind::InvalidInput,
                    "{name}"
                );
            }
            // A size that another program has given the file is noticed on request.
            std::fs::File::options().write(true).open(&path).unwrap().set_len(8192 + 77).unwrap();
            assert_eq!(rig.disk.refresh_capacity().unwrap(), 8192, "{name}");
            assert_eq!(rig.disk.capacity(), 8192, "{name}");
        }
    }
}

/// A write makes the file longer again. Here another program writes in the guest's place, as often as it can.
#[test]
fn a_disk_shrinks_while_a_write_beyond_its_end_is_on_its_way() {
    let directory = tempfile::tempdir().unwrap();
    let path = full_image(directory.path());
    let disk = open(&OpenOptions::new(&path)).unwrap();
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                file.write_all_at(&[1], SIZE - 1).unwrap();
            }
        });
        let shrunk: Vec<_> = (0..1000)
            .map(|_| disk.resize(4096).map(|()| disk.capacity()).map_err(|error| error.kind()))
            .collect();
        done.store(true, Ordering::Relaxed);
        assert!(shrunk.iter().all(|capacity| *capacity == Ok(4096)), "{shrunk:?}");
    });
}

/// What an engine took it finishes before it is gone, and it touches guest memory no more.
#[test]
fn dropping_an_engine_waits_for_its_transfers() {
    for directory in directories() {
        for (name, disk) in every_way(&full_image(directory.path()), DetectZeroes::Off) {
            let path = full_image(directory.path());
            let length = (SIZE / u64::from(DEPTH)) as u32;
            let mut rig = Rig::new(disk);
            rig.put(0, &vec![0x77; SIZE as usize]);
            let writes: Vec<_> = (0..u64::from(DEPTH))
                .map(|i| {
                    Request::plain(WRITE, i * u64::from(length), i * u64::from(length), length)
                })
                .collect();
            rig.submit(&writes);
            drop(rig);
            assert!(std::fs::read(&path).unwrap().iter().all(|byte| *byte == 0x77), "{name}");
        }
    }
}
