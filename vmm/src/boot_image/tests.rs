//! What is in guest memory after a load, and what becomes of a guest whose kernel's file changes.

use std::io::Write;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Weak};

use arch::layout;
use arch::machine_layout::MachineSpec;
use vm_memory::{Bytes, GuestMemoryBackend};

use super::*;
use crate::kernel_pages::{self, KernelPages, Lease};
use crate::memory;

const MIB: u64 = 1 << 20;
/// Where the test kernel's only segment is, in the file and in memory.
const OFFSET: u64 = 0x2000;
const ADDRESS: GuestAddress = GuestAddress(2 * MIB);
const SEGMENT_SIZE: u64 = 0x8000;

fn content() -> Vec<u8> {
    (0..0x5234).map(|n| (n / 7) as u8 | 1).collect()
}

/// An ELF kernel whose pages can be mapped: its segment begins on a page in the file, and ends within one.
fn kernel_file() -> tempfile::TempPath {
    let mut bytes = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    bytes.extend([2u16, 62, 1, 0].map(u16::to_le_bytes).as_flattened());
    bytes.extend([ADDRESS.0, 64, 0].map(u64::to_le_bytes).as_flattened());
    bytes.extend([0u16, 0, 64, 56, 1, 0, 0, 0].map(u16::to_le_bytes).as_flattened());
    bytes.extend([1u32, 7].map(u32::to_le_bytes).as_flattened());
    let size = content().len() as u64;
    let fields = [OFFSET, ADDRESS.0, ADDRESS.0, size, SEGMENT_SIZE, 0x1000];
    bytes.extend(fields.map(u64::to_le_bytes).as_flattened());
    bytes.resize(OFFSET as usize, 0);
    bytes.extend(content());
    file_with(&bytes)
}

/// A file that no process has open for writing, which a lease needs.
fn file_with(bytes: &[u8]) -> tempfile::TempPath {
    let _turn = crate::sandbox::tests::without_forks();
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    file.into_temp_path()
}

struct Rig {
    memory: GuestMemory,
    image: BootImage,
    lease: Weak<Lease>,
}

fn rig(kernel: &Path, initrd: Option<&Path>) -> Rig {
    // What asks for the lease: no main loop reads it here.
    #[expect(unsafe_code, reason = "signal has no safe wrapper")]
    // SAFETY: no handler runs.
    unsafe {
        libc::signal(libc::SIGIO, libc::SIG_IGN);
    }
    let spec =
        MachineSpec { memory: 32 * MIB, cpus: 1, serial: [true, false], acpi: true, disks: 0 };
    let layout = MachineLayout::new(spec);
    let kernel = BootFile::open("--kernel", kernel).unwrap();
    let initrd = initrd.map(|path| BootFile::open("--initrd", path).unwrap());
    let lease = Lease::take(&kernel.file);
    let weak = lease.as_ref().map(Arc::downgrade).unwrap_or_default();
    let pages = Box::new(KernelPages(lease));
    let image = BootImage::new(&layout, kernel, initrd, "quiet", pages).unwrap();
    Rig { memory: memory::allocate(&layout).unwrap(), image, lease: weak }
}

impl Rig {
    fn read(&self, address: GuestAddress, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.memory.read_slice(&mut bytes, address).unwrap();
        bytes
    }

    /// The kernel is in memory, with zeroes behind it.
    fn assert_loaded(&self) {
        let mut expected = content();
        expected.resize(SEGMENT_SIZE as usize, 0);
        assert!(self.read(ADDRESS, SEGMENT_SIZE as usize) == expected);
    }

    /// Whether the host has memory for each of `count` pages.
    fn resident(&self, address: GuestAddress, count: usize) -> Vec<bool> {
        let mut pages = vec![0; count];
        let start = self.memory.get_host_address(address).unwrap();
        #[expect(unsafe_code, reason = "mincore has no safe wrapper")]
        // SAFETY: the pages are guest memory, and the vector has a byte for each.
        let result = unsafe { libc::mincore(start.cast(), count * 0x1000, pages.as_mut_ptr()) };
        assert_eq!(result, 0);
        pages.iter().map(|page| page & 1 != 0).collect()
    }

    fn mapped_pages(&self) -> usize {
        let start = self.memory.get_host_address(ADDRESS).unwrap() as usize;
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let line = maps
            .lines()
            .find(|line| line.starts_with(&format!("{start:x}-")) && line.contains(" 00002000 "));
        let end = line.and_then(|line| line.split(['-', ' ']).nth(1));
        end.map_or(0, |end| (usize::from_str_radix(end, 16).unwrap() - start) / 0x1000)
    }
}

/// Opens a file for writing, unless a lease makes that wait.
fn write(path: &Path) -> io::Result<File> {
    File::options().write(true).custom_flags(libc::O_NONBLOCK).open(path)
}

#[test]
fn kernel_initrd_and_structures_are_where_the_plan_says() {
    let initrd = vec![0x5a; 0x1801];
    let rig = rig(&kernel_file(), Some(&file_with(&initrd)));
    let entry = rig.image.load(&rig.memory).unwrap();
    assert_eq!((entry.ip, entry.start), (ADDRESS, layout::ZERO_PAGE));
    rig.assert_loaded();
    assert_eq!(rig.read(GuestAddress(32 * MIB - 0x2000), initrd.len()), initrd);
    assert_eq!(rig.read(layout::CMDLINE, 6), b"quiet\0");
    assert_eq!(rig.read(layout::ACPI_TABLES, 8), b"RSD PTR ");
    assert_eq!(rig.read(GuestAddress(0x472), 2), layout::WARM_RESET_UNTOUCHED.to_le_bytes());
}

#[test]
fn whole_pages_of_a_kernel_are_mapped_until_its_file_is_written() {
    let path = kernel_file();
    let mut rig = rig(&path, None);
    rig.image.load(&rig.memory).unwrap();
    rig.assert_loaded();
    if rig.mapped_pages() == 0 {
        // Past libtest's capture: `.ci/run` counts these lines (see `skip` in tests/src/lib.rs).
        let line = b"\nskipped: mapped kernel pages: no leases on this file system\n";
        let _ = std::io::stderr().write_all(line);
        return;
    }
    assert_eq!(rig.mapped_pages(), 5);

    // What the guest writes stays with it, and is gone after a reset.
    rig.memory.write_slice(b"mine", GuestAddress(ADDRESS.0 + 0x1000)).unwrap();
    assert!(std::fs::read(&path).unwrap().ends_with(&content()));
    memory::clear(&rig.memory).unwrap();
    assert_eq!(rig.read(ADDRESS, 0x6000), [0; 0x6000]);
    rig.image.load(&rig.memory).unwrap();
    rig.assert_loaded();

    // A process that wants to write the file has to wait, and then changes nothing in the guest.
    assert_eq!(write(&path).unwrap_err().raw_os_error(), Some(libc::EWOULDBLOCK));
    rig.image.copy_and_release_kernel_file(&rig.memory).unwrap();
    assert_eq!(rig.mapped_pages(), 0);
    write(&path).unwrap().set_len(0).unwrap();
    rig.assert_loaded();
}

/// `VmFlags` of a mapping has "dd" where a core dump leaves it out (proc(5)).
#[test]
fn guest_memory_is_not_in_core_dumps() {
    let mut rig = rig(&kernel_file(), None);
    let check = |when: &str| {
        let start = rig.memory.get_host_address(GuestAddress(0)).unwrap() as usize;
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let (mut inside, mut mappings) = (false, 0);
        for line in smaps.lines() {
            let range = line.split(' ').next().and_then(|range| range.split_once('-'));
            let number = |text| usize::from_str_radix(text, 16).ok();
            if let Some((first, end)) =
                range.and_then(|(first, end)| number(first).zip(number(end)))
            {
                // The kernel merges neighbors of one kind: a mapping may begin before the guest's memory.
                inside = first < start + 32 * MIB as usize && end > start;
            } else if inside && let Some(flags) = line.strip_prefix("VmFlags:") {
                mappings += 1;
                assert!(flags.split(' ').any(|flag| flag == "dd"), "{when}: {flags}");
            }
        }
        assert!(mappings > 0, "{when}");
    };
    check("allocated");
    rig.image.load(&rig.memory).unwrap();
    check("loaded");
    rig.image.copy_and_release_kernel_file(&rig.memory).unwrap();
    check("copied");
    memory::clear(&rig.memory).unwrap();
    check("cleared");
}

/// Zeroes that nothing writes cost the host no memory: Linux has megabytes of them.
#[test]
fn pages_behind_the_kernels_bytes_are_not_committed() {
    let rig = rig(&kernel_file(), None);
    for _ in 0..2 {
        rig.image.load(&rig.memory).unwrap();
        if rig.mapped_pages() == 0 {
            // A copy may lie in a huge page, which holds what follows it, too.
            return;
        }
        assert_eq!(rig.resident(GuestAddress(ADDRESS.0 + 0x6000), 2), [false; 2]);
        rig.assert_loaded();
        memory::clear(&rig.memory).unwrap();
    }
}

#[test]
fn a_file_that_is_open_for_writing_is_copied() {
    let path = kernel_file();
    let _writer = File::options().append(true).open(&path).unwrap();
    let rig = rig(&path, None);
    rig.image.load(&rig.memory).unwrap();
    assert_eq!(rig.mapped_pages(), 0);
    rig.assert_loaded();
}

#[test]
fn files_that_changed_in_place_are_not_loaded_again() {
    for change in [
        |path: &Path| std::fs::write(path, [0xcc; 0x8001]),
        |path: &Path| File::options().write(true).open(path)?.set_len(0x3000),
    ] {
        let (kernel, initrd) = (kernel_file(), file_with(&[0x5a; 0x8000]));
        for (changed, option) in [(&initrd, "--initrd"), (&kernel, "--kernel")] {
            let mut rig = rig(&kernel, Some(&initrd));
            rig.image.load(&rig.memory).unwrap();
            rig.image.copy_and_release_kernel_file(&rig.memory).unwrap();
            rig.image.check_unchanged().unwrap();
            change(changed).unwrap();
            for result in [rig.image.check_unchanged(), rig.image.load(&rig.memory).map(drop)] {
                let message = result.unwrap_err().to_string();
                let expected = format!("{option} {}: the file was changed", changed.display());
                assert!(message.starts_with(&expected), "{message}");
            }
        }
    }
}

/// Parts begin and end at boundaries of huge pages, whatever the boundaries of the file's pages are.
#[test]
fn pages_are_copied_part_by_part() {
    let rig = rig(&kernel_file(), None);
    let mut content: Vec<_> = (0..5 * MIB + 0x3000).map(|n| (n / 0x1000 + n) as u8).collect();
    let path = file_with(&content);
    let range = FileRange {
        offset: 0x1000,
        length: content.len() as u64 - 0x1000,
        address: GuestAddress(3 * MIB - 0x2000),
    };
    let file = File::open(&path).unwrap();
    assert_eq!(kernel_pages::map(&rig.memory, &file, &range).unwrap(), range.length);
    for page in [0, 1, 0x201] {
        rig.memory.write_slice(b"mine", GuestAddress(range.address.0 + page * 0x1000)).unwrap();
        content[(page as usize + 1) * 0x1000..][..4].copy_from_slice(b"mine");
    }
    kernel_pages::copy(&rig.memory, &range).unwrap();
    write(&path).unwrap().set_len(0).unwrap();
    assert!(rig.read(range.address, range.length as usize) == content[0x1000..]);
    assert_eq!(rig.read(GuestAddress(range.address.0 + range.length), 0x1000), [0; 0x1000]);
}

/// The host takes a lease away after a while, and the file is cut off: an error when its pages are copied, not a signal.
#[test]
#[expect(unsafe_code, reason = "fcntl has no safe wrapper for leases")]
fn pages_that_are_gone_before_they_are_copied_are_an_error() {
    let path = kernel_file();
    let mut rig = rig(&path, None);
    rig.image.load(&rig.memory).unwrap();
    if rig.mapped_pages() == 0 {
        return;
    }
    let lease = rig.lease.upgrade().unwrap().0.as_raw_fd();
    // SAFETY: the call touches no memory.
    assert_eq!(unsafe { libc::fcntl(lease, libc::F_SETLEASE, libc::F_UNLCK) }, 0);
    write(&path).unwrap().set_len(OFFSET).unwrap();
    let error = rig.image.copy_and_release_kernel_file(&rig.memory).unwrap_err();
    assert!(
        error.to_string().contains("the kernel's pages, whose file is being changed"),
        "{error}"
    );
}

#[test]
fn a_file_that_shrinks_while_it_is_copied_was_changed() {
    let rig = rig(&kernel_file(), None);
    let path = file_with(&[7; 0x3000]);
    let initrd = BootFile::open("--initrd", &path).unwrap();
    write(&path).unwrap().set_len(0x1000).unwrap();
    let range = FileRange { offset: 0, length: 0x3000, address: ADDRESS };
    let error = initrd.copy(&rig.memory, &range, 0).unwrap_err().to_string();
    assert!(error.contains("the file was changed after minivmm opened it"), "{error}");
}

#[test]
fn a_file_that_is_shorter_than_it_says_ends_unexpectedly() {
    let rig = rig(&kernel_file(), None);
    let initrd = BootFile::open("--initrd", Path::new("/sys/kernel/uevent_seqnum")).unwrap();
    let range = FileRange { offset: 0, length: 4096, address: ADDRESS };
    let error = initrd.copy(&rig.memory, &range, 0).unwrap_err();
    assert_eq!(
        crate::WithCauses(&error).to_string(),
        "--initrd /sys/kernel/uevent_seqnum: unexpected end of file"
    );
}

#[test]
fn a_kernel_that_cannot_be_read_says_why() {
    let kernel = BootFile::open("--kernel", Path::new("/proc/self/mem")).unwrap();
    let spec =
        MachineSpec { memory: 32 * MIB, cpus: 1, serial: [true, false], acpi: true, disks: 0 };
    let layout = MachineLayout::new(spec);
    let pages = Box::new(KernelPages(None));
    let error = BootImage::new(&layout, kernel, None, "", pages).err().unwrap();
    assert_eq!(
        crate::error::WithCauses(&error).to_string(),
        "--kernel /proc/self/mem: cannot read the kernel: Input/output error (os error 5)"
    );
}
