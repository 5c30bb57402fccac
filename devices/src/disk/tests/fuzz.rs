//! qcow2 images with anything in their metadata, and operations on them. QEMU's own tools say what an image contains, and
//! whether it is still sound.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use minivmm_fuzz::Input;

use super::qcow2::{qcow2, qemu_img_ok, text};
use super::rig::{self, Request, Rig, WRITE};
use crate::disk::{DiscardMode, OpenOptions, Operation, SECTOR, open};

const SECTORS: usize = 512;
const LENGTH: usize = SECTORS * SECTOR as usize;
/// Larger disks are left alone: their images were crafted.
const SIZE_MAX: u64 = 16 << 20;
/// What a few operations can make of an image.
const GROWTH_MAX: u64 = 32 << 20;

fn content() -> Vec<u8> {
    (0..LENGTH).map(|at| if at < LENGTH / 2 { (at / 512) as u8 | 1 } else { 0 }).collect()
}

/// Images of every make, as qemu-img makes them. `None`: it is not installed.
fn images() -> &'static Option<Vec<Vec<u8>>> {
    static IMAGES: OnceLock<Option<Vec<Vec<u8>>>> = OnceLock::new();
    IMAGES.get_or_init(|| {
        let directory = rig::directories().pop().unwrap();
        let (raw, image) = (directory.path().join("content"), directory.path().join("made"));
        fs::write(&raw, content()).unwrap();
        let mut images = Vec::new();
        for options in [
            "cluster_size=64k",
            "compat=0.10,cluster_size=4k",
            "cluster_size=512",
            "cluster_size=4k,refcount_bits=1",
            "cluster_size=4k,lazy_refcounts=on",
            "cluster_size=4k,preallocation=metadata",
            "-c",
        ] {
            let convert = ["convert", "-f", "raw", "-O", "qcow2"];
            let options = if options == "-c" { vec!["-c"] } else { vec!["-o", options] };
            let arguments = [&convert[..], &options[..], &[text(&raw), text(&image)]].concat();
            if !qemu_img_ok(&arguments) {
                return None;
            }
            images.push(fs::read(&image).unwrap());
        }
        qemu_img_ok(&["snapshot", "-c", "before", text(&image)]);
        images.push(fs::read(&image).unwrap());
        Some(images)
    })
}

/// Writes into the metadata: a field of the header, an entry of a table, or bytes anywhere.
fn patch(image: &mut [u8], input: &mut Input<'_>) {
    let long = |image: &[u8], at: usize| {
        let bytes = image.get(at..at + 8).and_then(|bytes| bytes.try_into().ok());
        u64::from_be_bytes(bytes.unwrap_or_default())
    };
    let table = |image: &[u8], at: usize| (long(image, at) & 0xff_ffff_ffff_fe00) as usize;
    let (l1, counts) = (table(image, 40), table(image, 48));
    let tables = [0, l1, table(image, l1), counts, table(image, counts)];
    let at = input.pick(&tables) + input.below(128) as usize;
    let value = match input.below(4) {
        0 => input.bytes(8).to_vec(),
        1 => {
            let entry = input.pick(&tables) as u64 | u64::from(input.u8()) << 9;
            (entry | u64::from(input.u8()) << 56).to_be_bytes().to_vec()
        }
        2 => vec![input.u8()],
        _ => (1_u64 << input.below(64)).to_be_bytes().to_vec(),
    };
    let at = if input.bool() { at & !7 } else { at };
    for (byte, value) in image.iter_mut().skip(at).zip(value) {
        *byte = value;
    }
}

/// What the image contains, if QEMU finds it sound.
fn judged(image: &Path, size: u64) -> Option<Vec<u8>> {
    let run = |arguments: &[&str]| {
        let output = rig::run(Command::new("qemu-img").args(arguments)).unwrap();
        output.status.success().then_some(())
    };
    let raw = image.with_extension("raw");
    run(&["check", "-f", "qcow2", text(image)])?;
    run(&["convert", "-f", "qcow2", "-O", "raw", text(image), text(&raw)])?;
    let content = fs::read(raw).unwrap();
    assert_eq!(content.len() as u64, size, "another size than QEMU's");
    Some(content)
}

/// What is known of a disk, sector by sector. `sound`: nothing may fail, and nothing is unknown at the start.
struct Model {
    sectors: Vec<Option<[u8; 512]>>,
    sound: bool,
}

impl Model {
    fn new(content: Option<&[u8]>, size: u64) -> Self {
        let unknown = || vec![None; (size / SECTOR) as usize];
        let known = |content: &[u8]| content.as_chunks().0.iter().copied().map(Some).collect();
        Self { sectors: content.map_or_else(unknown, known), sound: content.is_some() }
    }

    fn agrees(&self, first: usize, data: &[u8]) -> bool {
        let known = self.sectors[first..].iter().zip(data.as_chunks::<512>().0);
        known
            .filter_map(|(known, data)| Some((known.as_ref()?, data)))
            .all(|(known, data)| known == data)
    }

    fn step(&mut self, rig: &mut Rig, input: &mut Input<'_>) {
        let first = input.below(self.sectors.len() as u64) as usize;
        let most = input.pick(&[16, 130]);
        let count = (1 + input.below(most) as usize).min(self.sectors.len() - first);
        let (offset, length) = (first as u64 * SECTOR, (count * 512) as u32);
        let range = first..first + count;
        let kind = input.below(8);
        let zeroes = |unmap| Operation::WriteZeroes { unmap, durable: false };
        let request = match kind {
            0 | 1 => Request::plain(WRITE, offset, 0, length),
            2 => Request::bare(zeroes(true), offset, length.into()),
            3 => Request::bare(zeroes(false), offset, length.into()),
            4 => Request::bare(Operation::Discard, offset, length.into()),
            5 => Request::bare(Operation::Flush, 0, 0),
            _ => Request::plain(Operation::Read, offset, 0, length),
        };
        let fill = [input.u8(); 512];
        if kind < 2 {
            rig.put(0, &fill.repeat(count));
        }
        let result = rig.run(std::slice::from_ref(&request)).remove(0);
        assert!(result.is_ok() || !self.sound, "{request:?} of a sound image: {result:?}");
        match (kind, result) {
            (0..=3, Ok(())) => {
                self.sectors[range].fill(Some(if kind < 2 { fill } else { [0; 512] }));
            }
            (5, _) => {}
            (6.., Ok(())) => {
                let data = rig.get(0, length as usize);
                assert!(self.agrees(first, &data), "{request:?} read something else");
            }
            (6.., Err(_)) => {}
            // What failed may have been done in part, and a discarded sector is zero or as before.
            _ => self.sectors[range].fill(None),
        }
    }
}

#[test]
fn qcow2_images() {
    minivmm_fuzz::run("devices/qcow2_images", |input| {
        let Some(images) = images() else { return };
        // In memory, where /dev/shm is there.
        let directory = rig::directories().pop().unwrap();
        let mut image = images[input.below(images.len() as u64) as usize].clone();
        let patches = input.below(6);
        let judge = patches == 0 || input.below(8) == 0;
        (0..patches).for_each(|_| patch(&mut image, input));
        let path: PathBuf = directory.path().join("image");
        fs::write(&path, &image).unwrap();
        let options = OpenOptions { locking: false, discard: DiscardMode::Unmap, ..qcow2(&path) };
        let disk = match open(&options) {
            Ok(disk) if disk.capacity() <= SIZE_MAX && disk.capacity() >= SECTOR => disk,
            Ok(_) => return,
            Err(error) => {
                assert!(!error.to_string().contains('\n'));
                return assert!(fs::read(&path).unwrap() == image, "refused, and changed: {error}");
            }
        };
        let size = disk.capacity();
        let original = match patches {
            0 => Some(content()),
            _ if judge => judged(&path, size),
            _ => None,
        };
        let mut model = Model::new(original.as_deref(), size);
        let mut rig = Rig::new(disk);
        let mut steps = 0..24;
        while !input.is_empty() && steps.next().is_some() {
            model.step(&mut rig, input);
        }
        drop(rig);
        let grown = fs::metadata(&path).unwrap().len().saturating_sub(image.len() as u64);
        assert!(grown < GROWTH_MAX, "grown by {grown} bytes");
        if judge && model.sound {
            let content = judged(&path, size).expect("a sound image was damaged");
            assert!(model.agrees(0, &content), "QEMU reads something else");
        }
    });
}
