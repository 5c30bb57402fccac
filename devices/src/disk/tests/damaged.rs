//! qcow2 images that are damaged, crafted, old or unusual: what their guests cannot do, and what their users are told.

use std::fs;
use std::path::Path;

use super::qcow2::{qcow2, qemu_img, qemu_img_ok, text};
use super::rig::{Request, Rig, WRITE, refusal};
use crate::disk::{DiscardMode, DiskError, Format, OpenOptions, OpenReason, Operation, open};

const CLUSTER: u64 = 64 << 10;

fn long(image: &[u8], at: u64) -> u64 {
    u64::from_be_bytes(*image[at as usize..].first_chunk().unwrap())
}

fn put(image: &mut [u8], at: u64, value: u64) {
    image[at as usize..at as usize + 8].copy_from_slice(&value.to_be_bytes());
}

/// Where an image has its tables.
struct Places {
    l1: u64,
    l2: u64,
    refcount_table: u64,
    refcount_block: u64,
}

fn places(image: &[u8]) -> Places {
    let (l1, refcount_table) = (long(image, 40), long(image, 48));
    let l2 = long(image, l1) & 0xff_ffff_ffff_fe00;
    Places { l1, l2, refcount_table, refcount_block: long(image, refcount_table) }
}

/// An image in which the first cluster is allocated.
fn image(path: &Path) -> Option<Vec<u8>> {
    if !qemu_img_ok(&["create", "-f", "qcow2", text(path), "1M"]) {
        return None;
    }
    let mut rig = Rig::new(open(&unlocked(path)).unwrap());
    rig.put(0, &[7; 512]);
    rig.ok(Request::plain(WRITE, 0, 0, 512));
    rig.ok(Request::bare(Operation::Flush, 0, 0));
    drop(rig);
    Some(fs::read(path).unwrap())
}

fn unlocked(path: &Path) -> OpenOptions {
    OpenOptions { locking: false, discard: DiscardMode::Unmap, ..qcow2(path) }
}

/// A guest that could write metadata could have the next start open any file of the host.
#[test]
fn a_crafted_image_does_not_let_its_guest_write_metadata() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image");
    let Some(good) = image(&path) else { return };
    let Places { l1, l2, refcount_table, refcount_block } = places(&good);
    let targets = [("header", 0), ("L1 table", l1), ("L2 table", l2)];
    let counts = [("refcount table", refcount_table), ("refcount block", refcount_block)];
    for (what, target) in targets.into_iter().chain(counts) {
        if target == 0 {
            // An entry without an offset is no reference: the compressed form can name the header.
            let mut crafted = good.clone();
            put(&mut crafted, l2, 1 << 62);
            fs::write(&path, crafted).unwrap();
        } else {
            let mut crafted = good.clone();
            put(&mut crafted, l2, 1 << 63 | target);
            fs::write(&path, crafted).unwrap();
        }
        let before = fs::read(&path).unwrap();
        for operation in [
            WRITE,
            Operation::WriteZeroes { unmap: true, durable: false },
            Operation::WriteZeroes { unmap: false, durable: false },
            Operation::Discard,
        ] {
            fs::write(&path, &before).unwrap();
            let mut rig = Rig::new(open(&unlocked(&path)).unwrap());
            let request = match operation {
                WRITE => Request::plain(WRITE, 0, 0, 512),
                operation => Request::bare(operation, 0, CLUSTER),
            };
            assert_eq!(rig.error(request), DiskError::Host(libc::EIO), "{what}, {operation:?}");
            // The table whose entry is wrong, and that once.
            let found = rig.disk.take_corruption().unwrap();
            assert_eq!(found.range, l2..l2 + CLUSTER, "{what}, {operation:?}: {found:?}");
            assert!(found.message.contains("an L2 table refers to cluster"), "{found:?}");
            // Nothing else is written either, since it could be allocated anywhere.
            let elsewhere = Request::plain(WRITE, CLUSTER, 0, 512);
            assert_eq!(rig.error(elsewhere), DiskError::Host(libc::EIO), "{what}");
            assert_eq!(rig.disk.take_corruption(), None);
            drop(rig);
            let mut after = fs::read(&path).unwrap();
            assert_eq!(after[79], 2, "{what}: not marked corrupt");
            after[79] = 0;
            assert!(after == before, "{what}, {operation:?}: the image was changed");
        }
        let marked = refusal(&unlocked(&path));
        assert!(marked.contains("was found to be corrupt"), "{what}: {marked}");
    }
}

/// What is not counted is allocated a second time.
#[test]
fn an_image_whose_metadata_is_not_counted_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image");
    let Some(good) = image(&path) else { return };
    let Places { l1, l2, refcount_table, refcount_block } = places(&good);
    for cluster in [0, l1, l2, refcount_table, refcount_block] {
        let mut crafted = good.clone();
        let count = (refcount_block + cluster / CLUSTER * 2) as usize;
        crafted[count..count + 2].fill(0);
        fs::write(&path, &crafted).unwrap();
        let error = refusal(&unlocked(&path));
        assert!(error.contains("of its metadata is not counted"), "{cluster:#x}: {error}");
        assert!(fs::read(&path).unwrap() == crafted);
        assert!(open(&OpenOptions { read_only: true, ..unlocked(&path) }).is_ok());
    }
    // Two tables in one place.
    for (at, target) in [(l1, refcount_block), (refcount_table + 8, l2), (40, 0)] {
        let mut crafted = good.clone();
        put(&mut crafted, at, target);
        fs::write(&path, crafted).unwrap();
        let error = refusal(&unlocked(&path));
        assert!(error.contains("its tables overlap"), "{at:#x}: {error}");
    }
    // Data that is not counted would be allocated for something else.
    let mut crafted = good.clone();
    let data = (long(&good, l2) & 0xff_ffff_ffff_fe00) / CLUSTER * 2 + refcount_block;
    crafted[data as usize..data as usize + 2].fill(0);
    fs::write(&path, crafted).unwrap();
    let mut rig = Rig::new(open(&unlocked(&path)).unwrap());
    assert_eq!(rig.error(Request::plain(WRITE, 0, 0, 512)), DiskError::Host(libc::EIO));
}

/// What is wrong with an image that can be repaired, or only be read, is said with what helps, and that does help.
#[test]
fn an_image_to_be_repaired_can_be_read_meanwhile() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image");
    let Some(good) = image(&path) else { return };
    for (bit, reason) in [(1, "was not closed properly"), (2, "was found to be corrupt")] {
        let mut marked = good.clone();
        marked[79] |= bit;
        fs::write(&path, &marked).unwrap();
        let error = refusal(&unlocked(&path));
        assert!(error.contains(reason) && error.contains("`qemu-img check -r all"), "{error}");
        let mut rig = Rig::new(open(&OpenOptions { read_only: true, ..unlocked(&path) }).unwrap());
        rig.ok(Request::plain(Operation::Read, 0, 4096, 512));
        assert_eq!(rig.get(4096, 512), [7; 512]);
        drop(rig);
        assert!(fs::read(&path).unwrap() == marked);
        qemu_img_ok(&["check", "-r", "all", text(&path)]);
        assert!(open(&unlocked(&path)).is_ok());
    }
}

/// Nothing is written before the guest writes, so that a start that fails later leaves an image's bitmaps valid.
#[test]
fn bitmaps_are_valid_until_the_guest_writes() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image");
    if image(&path).is_none() || !qemu_img_ok(&["bitmap", "--add", text(&path), "backup"]) {
        return;
    }
    let before = fs::read(&path).unwrap();
    assert_eq!(long(&before, 88), 1, "no bitmap is vouched for");
    let mut rig = Rig::new(open(&unlocked(&path)).unwrap());
    rig.ok(Request::plain(Operation::Read, 0, 0, 65536));
    rig.ok(Request::bare(Operation::Flush, 0, 0));
    assert!(fs::read(&path).unwrap() == before, "changed before the first write");
    rig.ok(Request::plain(WRITE, 0, 0, 512));
    drop(rig);
    assert_eq!(long(&fs::read(&path).unwrap(), 88), 0, "the bitmap does not know of the write");
    // 3: the clusters of the bitmap are leaked.
    let output = qemu_img(&["check", text(&path)]).unwrap();
    assert_eq!(output.status.code(), Some(3), "{output:?}");
}

#[test]
fn backing_files_are_named_by_a_path() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image");
    fs::write(directory.path().join("base"), vec![5; 1 << 20]).unwrap();
    let options = OpenOptions { backing: true, ..unlocked(&path) };
    let named = |name: &str| {
        let create = ["create", "-q", "-f", "qcow2", "-u", "-F", "raw", "-b", name];
        qemu_img_ok(&[&create[..], &[text(&path), "1M"]].concat())
    };
    if !named("file:base") {
        return;
    }
    let mut rig = Rig::new(open(&options).unwrap());
    rig.ok(Request::plain(Operation::Read, 0, 0, 512));
    assert_eq!(rig.get(0, 512), [5; 512]);
    // As QEMU counts, for `query-block`.
    for (snapshot, names) in [(false, &["base"][..]), (true, &["image", "base"])] {
        let disk = open(&OpenOptions { snapshot, ..options.clone() }).unwrap();
        let below: Vec<_> =
            disk.info().backing_images.iter().map(|image| image.path.clone()).collect();
        let expected: Vec<_> = names.iter().map(|name| directory.path().join(name)).collect();
        assert_eq!(below, expected);
        let base = disk.info().backing_images.last().unwrap();
        assert_eq!((base.format, base.capacity), (Format::Raw, 1 << 20));
        assert!(base.allocated >= 1 << 20);
    }
    for name in
        [r#"json:{"driver":"raw","file.filename":"base"}"#, "nbd:localhost:1", "https://x/y"]
    {
        assert!(named(name));
        assert!(matches!(
            open(&options).err().unwrap().objection(),
            Some(OpenReason::BackingProtocol(_))
        ));
    }
    qemu_img_ok(&["rebase", "-u", "-b", "base", "-F", "raw", text(&path)]);
    assert!(open(&options).is_ok());
}

/// As QEMU's block_resize: what it refuses, what it does, and that only tables change.
#[test]
fn images_are_resized_as_far_as_their_format_goes() {
    let directory = tempfile::tempdir().unwrap();
    let (path, base) = (directory.path().join("image"), directory.path().join("base"));
    fs::write(&base, vec![9; 3 << 20]).unwrap();
    let create = |options: &[&str]| {
        qemu_img_ok(&[&["create", "-q", "-f", "qcow2"], options, &[text(&path), "1M"]].concat())
    };
    let backing = ["-F", "raw", "-b", text(&base)];
    for (version, has_snapshot, has_backing) in [
        ("0.10", false, false),
        ("0.10", true, false),
        ("0.10", false, true),
        ("1.1", false, false),
        ("1.1", true, false),
        ("1.1", false, true),
    ] {
        let compat = format!("compat={version}");
        let below = if has_backing { &backing[..] } else { &[] };
        let options = [&["-o", compat.as_str()][..], below].concat();
        if !create(&options) {
            return;
        }
        if has_snapshot {
            qemu_img_ok(&["snapshot", "-c", "before", text(&path)]);
        }
        let mut rig = Rig::new(open(&OpenOptions { backing: true, ..unlocked(&path) }).unwrap());
        let what = format!("{compat}, snapshot {has_snapshot}, backing file {has_backing}");
        let result = rig.disk.resize(2 << 20);
        if version == "0.10" && (has_snapshot || has_backing) {
            assert_eq!(result.unwrap_err().kind(), std::io::ErrorKind::Unsupported, "{what}");
            assert_eq!(rig.disk.capacity(), 1 << 20);
        } else {
            result.unwrap();
            rig.ok(Request::plain(Operation::Read, (2 << 20) - 512, 0, 512));
            assert_eq!(rig.get(0, 512), [0; 512], "{what}: the new part shows what is below");
            rig.disk.resize(16 << 40).unwrap();
            rig.ok(Request::plain(WRITE, (16 << 40) - 512, 0, 512));
            rig.disk.resize(512 << 10).unwrap();
            let length = fs::metadata(&path).unwrap().len();
            assert!(length < 4 << 20, "{what}: {length} bytes of tables");
        }
        drop(rig);
        qemu_img_ok(&["check", text(&path)]);
    }
}

/// imago panics at a table of feature names that ends in the first byte of an entry.
#[test]
fn a_table_of_feature_names_has_whole_entries() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image");
    let Some(good) = image(&path) else { return };
    let first = u32::from_be_bytes(*good[100..].first_chunk().unwrap()) as usize;
    for (at, length) in [(first, 1_u32), (first, 49), (8192, 1)] {
        let mut crafted = good.clone();
        // One that no program knows fills the space before it.
        let filler =
            [[0xde, 0xad, 0xbe, 0xef], ((at - first).saturating_sub(8) as u32).to_be_bytes()];
        crafted[first..first + 8].copy_from_slice(filler.as_flattened());
        let names = [0x6803_f857_u32.to_be_bytes(), length.to_be_bytes()];
        crafted[at..at + 8].copy_from_slice(names.as_flattened());
        crafted[at + 8..at + 72].fill(0);
        fs::write(&path, crafted).unwrap();
        for read_only in [false, true] {
            let error = refusal(&OpenOptions { read_only, ..unlocked(&path) });
            assert!(error.contains("its table of feature names is damaged"), "{at}: {error}");
        }
    }
}

/// A file of a few hundred bytes a snapshot would take hundreds of megabytes of memory otherwise.
#[test]
fn snapshots_that_claim_more_than_any_image_has_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image");
    let Some(good) = image(&path) else { return };
    let (count, table) = (2100_u32, good.len().next_multiple_of(CLUSTER as usize));
    // Disjoint L1 tables of 32 MiB each.
    let mut crafted = good;
    crafted[60..64].copy_from_slice(&count.to_be_bytes());
    put(&mut crafted, 64, table as u64);
    crafted.resize(table, 0);
    for snapshot in 0..u64::from(count) {
        let mut entry = [0; 40];
        put(&mut entry, 0, (1 << 32) + (snapshot << 25));
        entry[8..12].copy_from_slice(&(4_u32 << 20).to_be_bytes());
        crafted.extend_from_slice(&entry);
    }
    fs::write(&path, crafted).unwrap();
    let error = refusal(&unlocked(&path));
    assert!(error.contains("its snapshots have tables of more than"), "{error}");
}
