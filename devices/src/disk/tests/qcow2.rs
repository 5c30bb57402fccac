//! qcow2 images and temporary overlays. QEMU's own tools judge what is written, where they are installed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;

use super::model::{self, Discarded, SECTORS};
use super::rig::{self, Request, Rig, WRITE, directories};
use crate::disk::{
    CacheMode, Disk, DiskError, Format, OpenOptions, OpenReason, Operation, SECTOR, open,
};

const SIZE: u64 = SECTORS * SECTOR;

pub(super) fn qcow2(path: &Path) -> OpenOptions {
    OpenOptions { format: Some(Format::Qcow2), ..OpenOptions::new(path) }
}

pub(super) fn qemu_img(arguments: &[&str]) -> Option<Output> {
    let output = rig::run(Command::new("qemu-img").args(arguments));
    if output.is_err() {
        eprintln!("qemu-img is not installed (Debian: qemu-utils): this part is not tested");
    }
    output.ok()
}

/// Runs qemu-img, which must succeed if it is there. Returns whether it is.
pub(super) fn qemu_img_ok(arguments: &[&str]) -> bool {
    let Some(output) = qemu_img(arguments) else { return false };
    assert!(output.status.success(), "qemu-img {arguments:?}: {output:?}");
    true
}

pub(super) fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Images of every make that our users have: the way to it, its options, and its content.
fn images(directory: &Path) -> Vec<(PathBuf, OpenOptions)> {
    let content = directory.join("content.raw");
    fs::write(&content, (0..SIZE).map(|i| (i / 13) as u8).collect::<Vec<_>>()).unwrap();
    let mut images = Vec::new();
    let mut add = |name: &str, made: &dyn Fn(&str) -> bool| {
        let path = directory.join(name);
        if made(text(&path)) {
            images.push((path.clone(), OpenOptions { backing: true, ..qcow2(&path) }));
        }
    };
    let convert = |options: &'static [&'static str]| {
        let content = content.clone();
        move |path: &str| {
            let arguments =
                [&["convert", "-f", "raw", "-O", "qcow2"], options, &[text(&content), path]]
                    .concat();
            qemu_img_ok(&arguments)
        }
    };
    add("v3", &convert(&[]));
    add("v2", &convert(&["-o", "compat=0.10"]));
    add("small-clusters", &convert(&["-o", "cluster_size=512"]));
    add("large-clusters", &convert(&["-o", "cluster_size=2M"]));
    add("compressed", &convert(&["-c"]));
    add("preallocated", &convert(&["-o", "preallocation=full"]));
    add("with-a-snapshot", &|path| {
        convert(&[])(path) && qemu_img_ok(&["snapshot", "-c", "before", path])
    });
    add("over-raw", &|path| {
        qemu_img_ok(&["create", "-f", "qcow2", "-b", "content.raw", "-F", "raw", path])
    });
    add("over-qcow2", &|path| {
        qemu_img_ok(&["create", "-f", "qcow2", "-b", "compressed", "-F", "qcow2", path])
    });
    images
}

#[test]
fn every_kind_of_qcow2_is_a_disk() {
    for directory in directories() {
        let content = || (0..SIZE).map(|i| (i / 13) as u8).collect::<Vec<_>>();
        for (path, options) in images(directory.path()) {
            let original = fs::read(&path).unwrap();
            for cache in [CacheMode::Writeback, CacheMode::None] {
                // Not locked: a child that another test starts may have a copy of the lock when qemu-img comes.
                let options = OpenOptions { cache, locking: false, ..options.clone() };
                match open(&options) {
                    Err(error) if matches!(error.objection(), Some(OpenReason::NoDirect)) => {
                        continue;
                    }
                    result => drop(result.unwrap()),
                }
                eprintln!("{path:?}, cache={cache}");
                let image = || {
                    fs::write(&path, &original).unwrap();
                    content()
                };
                model::run(
                    2,
                    Discarded::ZeroOrOld,
                    image,
                    || open(&options).unwrap(),
                    |model| {
                        let expected = directory.path().join("expected.raw");
                        fs::write(&expected, model).unwrap();
                        qemu_img_ok(&["check", "-f", "qcow2", text(&path)]);
                        qemu_img_ok(&[
                            "compare",
                            "-f",
                            "qcow2",
                            "-F",
                            "raw",
                            text(&path),
                            text(&expected),
                        ]);
                    },
                );
            }
            // Another image builds on it.
            fs::write(&path, &original).unwrap();
        }
        // What an image builds on is never written.
        assert!(fs::read(directory.path().join("content.raw")).unwrap() == content());
    }
}

#[test]
fn a_snapshot_leaves_the_image_alone() {
    for directory in directories() {
        let raw = directory.path().join("raw");
        fs::write(&raw, (0..SIZE + 100).map(|i| (i / 13) as u8).collect::<Vec<_>>()).unwrap();
        let mut all = images(directory.path());
        all.push((raw.clone(), OpenOptions::new(&raw)));
        for (path, options) in all {
            let before = fs::read(&path).unwrap();
            for cache in [CacheMode::None, CacheMode::Writeback] {
                let options = OpenOptions { snapshot: true, cache, ..options.clone() };
                if matches!(open(&options), Err(error) if matches!(error.objection(), Some(OpenReason::NoDirect)))
                {
                    continue;
                }
                let open = || -> Arc<dyn Disk> { open(&options).unwrap() };
                let content = || (0..SIZE).map(|i| (i / 13) as u8).collect::<Vec<_>>();
                model::run(1, Discarded::ZeroOrOld, content, open, |_| {
                    assert!(fs::read(&path).unwrap() == before, "{path:?} was written");
                });
                // Two machines may have snapshots of one image, beside others who read it.
                let (one, two) = (open(), open());
                let read_only = OpenOptions { snapshot: false, read_only: true, ..options.clone() };
                let three = crate::disk::open(&read_only).unwrap();
                let mut rig = Rig::new(one);
                rig.put(0, &[0xee; 512]);
                rig.ok(Request::plain(WRITE, 0, 0, 512));
                for other in [two, three] {
                    let mut rig = Rig::new(other);
                    rig.ok(Request::plain(Operation::Read, 0, 0, 512));
                    assert_eq!(rig.get(0, 512), content()[..512]);
                }
                rig.ok(Request::plain(Operation::Read, 0, 4096, 512));
                assert_eq!(rig.get(4096, 512), [0xee; 512]);
            }
        }
    }
}

/// Holes take direct I/O of any alignment, and data does not.
#[test]
fn direct_io_of_a_sparse_image_is_aligned() {
    for directory in directories() {
        let path = directory.path().join("sparse");
        fs::write(&path, vec![0x77; 1 << 20]).unwrap();
        let file = fs::File::options().write(true).open(&path).unwrap();
        let punch = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&file, punch, 0, 65536).unwrap();
        drop(file);
        let options =
            OpenOptions { snapshot: true, cache: CacheMode::None, ..OpenOptions::new(&path) };
        let mut rig = match open(&options) {
            Err(error) if matches!(error.objection(), Some(OpenReason::NoDirect)) => continue,
            result => Rig::new(result.unwrap()),
        };
        // Each leaves the rest of a cluster to be copied from the image.
        for n in 1..16 {
            rig.ok(Request::plain(WRITE, n * 65536 + n * 512, 0, 1024));
            rig.ok(Request::plain(Operation::Read, n * 65536, 4096, 65536));
            assert_eq!(rig.get(4096 + 512 * n, 1024), [0; 1024]);
            assert_eq!(rig.get(4096 + 512 * n + 1024, 512), [0x77; 512]);
        }
    }
}

#[test]
fn a_read_only_qcow2_writes_nothing() {
    let directory = tempfile::tempdir().unwrap();
    for (path, options) in images(directory.path()) {
        let before = fs::read(&path).unwrap();
        let mut rig = Rig::new(open(&OpenOptions { read_only: true, ..options }).unwrap());
        assert_eq!(rig.error(Request::plain(WRITE, 0, 0, 512)), DiskError::Host(libc::EROFS));
        rig.ok(Request::plain(Operation::Read, 0, 0, 65536));
        rig.ok(Request::bare(Operation::Flush, 0, 0));
        drop(rig);
        assert!(fs::read(&path).unwrap() == before, "{path:?}");
    }
}

#[test]
fn a_qcow2_grows_and_shrinks() {
    let directory = tempfile::tempdir().unwrap();
    for (path, options) in images(directory.path()) {
        let mut rig = Rig::new(open(&OpenOptions { locking: false, ..options }).unwrap());
        rig.disk.resize(2 * SIZE).unwrap();
        assert_eq!(rig.disk.capacity(), 2 * SIZE);
        rig.put(0, &[7; 512]);
        rig.ok(Request::plain(Operation::Read, SIZE, 0, 512));
        assert_eq!(rig.get(0, 512), [0; 512], "{path:?}: what is new reads as zeroes");
        rig.ok(Request::plain(WRITE, 2 * SIZE - 512, 0, 512));
        rig.disk.resize(SIZE / 2).unwrap();
        assert_eq!(rig.error(Request::plain(WRITE, SIZE / 2, 0, 512)), DiskError::OutOfRange);
        drop(rig);
        qemu_img_ok(&["check", "-f", "qcow2", text(&path)]);
    }
}

/// A copy of the file is what is left of the image when we are killed: clusters may be lost, but none is used and not counted.
#[test]
fn a_killed_process_leaves_a_sound_image() {
    let directory = tempfile::tempdir().unwrap();
    let (path, copy) = (directory.path().join("image"), directory.path().join("copy"));
    for options in ["compat=1.1", "compat=0.10", "cluster_size=4k", "cluster_size=512"] {
        if !qemu_img_ok(&["create", "-f", "qcow2", "-o", options, text(&path), "60M"]) {
            return;
        }
        let mut rig = Rig::new(open(&OpenOptions { locking: false, ..qcow2(&path) }).unwrap());
        let check = |rig: &mut Rig, requests: &[Request]| {
            assert!(rig.run(requests).iter().all(Result::is_ok));
            fs::copy(&path, &copy).unwrap();
            let output = qemu_img(&["check", "-f", "qcow2", text(&copy)]).unwrap();
            assert!(matches!(output.status.code(), Some(0 | 3)), "{options}: {output:?}");
        };
        let zeroes = |unmap| Operation::WriteZeroes { unmap, durable: false };
        for operation in [zeroes(false), zeroes(true), Operation::Discard] {
            check(&mut rig, &[Request::bare(operation, 1 << 20, 8 << 20)]);
        }
        // New places are written to while others flush, and some are given back.
        let place = |n: u64| (n * 7919 % 960) << 16;
        for round in (0..960).step_by(32) {
            let requests: Vec<_> = (round..round + 32)
                .map(|n| match n % 8 {
                    7 => Request::bare(Operation::Flush, 0, 0),
                    3 => Request::bare(Operation::Discard, place(n / 2), 65536),
                    _ => Request::plain(WRITE, place(n), 0, 4096),
                })
                .collect();
            check(&mut rig, &requests);
        }
        rig.disk
            .resize(2 << 30)
            .unwrap_or_else(|error| assert_eq!(error.kind(), std::io::ErrorKind::Unsupported));
        let last = rig.disk.capacity() - 4096;
        check(&mut rig, &[Request::plain(WRITE, last, 0, 4096)]);
    }
}

#[test]
fn unsuitable_qcow2_images_are_refused_in_one_line() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    fs::write(path("raw"), vec![0; 65536]).unwrap();
    fs::write(path("empty"), b"").unwrap();
    let mut table = vec![
        (path("raw"), "is not a qcow2 image; use format=raw"),
        (path("empty"), "is not a qcow2 image"),
        (path("missing"), "no such file"),
        (directory.path().into(), "is a directory"),
    ];
    let images = images(directory.path());
    if let Some((good, _)) = images.first() {
        let variant = |name: &str, change: &dyn Fn(&mut Vec<u8>)| {
            let mut image = fs::read(good).unwrap();
            change(&mut image);
            fs::write(path(name), image).unwrap();
        };
        variant("encrypted", &|image| image[35] = 2);
        variant("future", &|image| image[72] = 0x80);
        variant("version", &|image| image[7] = 9);
        variant("cut", &|image| image.truncate(100));
        variant("huge-l1", &|image| image[36..40].fill(0xff));
        variant("huge-size", &|image| image[24] = 0x40);
        variant("huge-refcounts", &|image| image[56] = 1);
        variant("no-refcounts", &|image| image[56..60].fill(0));
        variant("wild-refcounts", &|image| image[48] = 0x40);
        variant("wilder-refcounts", &|image| image[48..56].fill(0xff));
        variant("zstd", &|image| image[79] |= 8);
        variant("extended-l2", &|image| image[79] |= 16);
        variant("wild-l1", &|image| image[40..48].fill(0x7f));
        let small = ["create", "-f", "qcow2"];
        qemu_img_ok(&[&small[..], &[text(&path("no-size")), "0"]].concat());
        qemu_img_ok(
            &[
                &small[..],
                &[
                    "-o",
                    &format!("data_file={},data_file_raw=on", text(&path("data"))),
                    text(&path("split")),
                    "1M",
                ],
            ]
            .concat(),
        );
        // qemu-img no longer makes these.
        for name in ["no-format", "loop", "odd-format"] {
            fs::copy(path("over-raw"), path(name)).unwrap();
        }
        qemu_img_ok(&[
            "rebase",
            "-u",
            "-f",
            "qcow2",
            "-b",
            "loop",
            "-F",
            "qcow2",
            text(&path("loop")),
        ]);
        qemu_img_ok(&[
            "rebase",
            "-u",
            "-f",
            "qcow2",
            "-b",
            "content.raw",
            "-F",
            "vmdk",
            text(&path("odd-format")),
        ]);
        table.extend([
            (path("encrypted"), "is encrypted"),
            (path("future"), "is not usable as qcow2"),
            (path("version"), "is not usable as qcow2"),
            (path("cut"), "is not usable as qcow2"),
            (path("huge-l1"), "is not usable as qcow2: its L1 table is larger than 32 MiB"),
            (path("huge-size"), "is not usable as qcow2: its L1 table is larger than 32 MiB"),
            (path("huge-refcounts"), "its refcount table is larger than 8 MiB"),
            (path("no-refcounts"), "it has no refcount table"),
            (path("wild-refcounts"), "its refcount table does not count the header"),
            (path("wilder-refcounts"), "its refcount table does not count the header"),
            (path("zstd"), "has clusters that zstd compressed, which is not supported; convert it"),
            (path("extended-l2"), "has extended L2 entries, which is not supported; convert it"),
            (path("wild-l1"), "is not usable as qcow2"),
            (path("no-size"), "is 0 bytes long"),
            (path("split"), "keeps its data in another file"),
            (path("odd-format"), "does not call its backing file \"content.raw\" raw or qcow2"),
        ]);
    }
    for (path, reason) in table {
        let before = fs::read(&path).ok();
        let error = rig::refusal(&OpenOptions { backing: true, ..qcow2(&path) });
        assert!(error.contains(reason) && !error.contains('\n'), "{path:?}: {error}");
        assert!(fs::read(&path).ok() == before, "{path:?} was changed");
    }
    if path("over-raw").exists() {
        let error = rig::refusal(&qcow2(&path("over-raw")));
        assert!(
            error.contains("builds on the backing file \"content.raw\"; use backing=on"),
            "{error}"
        );
        // Each opening of the loop locks out the next, unless nothing is locked.
        let endless = OpenOptions { backing: true, locking: false, ..qcow2(&path("loop")) };
        assert!(matches!(
            open(&endless).err().unwrap().objection(),
            Some(OpenReason::BackingChain(_))
        ));
        assert!(matches!(
            open(&OpenOptions { locking: true, ..endless }).err().unwrap().objection(),
            Some(OpenReason::Locked)
        ));
    }
}

/// What an image builds on is locked too, for reading.
#[test]
fn a_backing_file_is_locked_against_writers() {
    let directory = tempfile::tempdir().unwrap();
    let images = images(directory.path());
    let Some((_, options)) = images.iter().find(|(path, _)| path.ends_with("over-raw")) else {
        return;
    };
    let _turn = super::rig::without_forks();
    let _disk = open(options).unwrap();
    let base = OpenOptions::new(directory.path().join("content.raw"));
    assert!(matches!(open(&base).err().unwrap().objection(), Some(OpenReason::Locked)));
    assert!(open(&OpenOptions { read_only: true, ..base }).is_ok());
}
