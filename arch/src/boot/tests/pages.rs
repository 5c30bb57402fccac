//! Kernels whose pages are mapped, and what becomes of guests whose kernel's file changes.

use std::io::Write;

use vm_memory::{Bytes, GuestMemoryBackend};

use super::*;

/// A kernel whose pages can be mapped: its segment begins on a page in the file, and ends within one.
fn mappable() -> (tempfile::TempPath, Vec<u8>) {
    let mut bytes = elf(&[code(), notes(pvh_note())]);
    let content: Vec<u8> = (0..0x5234).map(|n| (n / 7) as u8).collect();
    let offset = 0x2000;
    for (field, value) in [(8, offset), (32, content.len() as u64)] {
        bytes = patched(bytes, 64 + field, &u64::to_le_bytes(value));
    }
    bytes.resize(offset as usize, 0);
    bytes.extend(&content);
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&bytes).unwrap();
    (file.into_temp_path(), content)
}

fn mapped_pages(memory: &GuestMemory) -> usize {
    let start = memory.get_host_address(GuestAddress(2 * MIB)).unwrap() as usize;
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let line = maps.lines().find(|line| line.starts_with(&format!("{start:x}-")) && line.contains(" 00002000 "));
    let end = line.map(|line| usize::from_str_radix(line.split(['-', ' ']).nth(1).unwrap(), 16).unwrap());
    end.map_or(0, |end| (end - start) / PAGE_SIZE as usize)
}

#[test]
fn whole_pages_of_a_kernel_are_mapped_and_survive_its_replacement() {
    // What asks for the lease: without a main loop nobody reads it.
    #[expect(unsafe_code, reason = "signal has no safe wrapper")]
    // SAFETY: no handler runs.
    unsafe {
        libc::signal(libc::SIGIO, libc::SIG_IGN);
    }
    let (path, content) = mappable();
    let kernel = Kernel::identify(File::open(&path).unwrap()).unwrap();
    let memory = dirty_memory(32 * MIB);
    load(&memory, &kernel, None, "", RSDP).unwrap();
    let expected = [&content[..], &[0; 0x100]].concat();
    let in_memory = || read(&memory, 2 * MIB, expected.len());
    assert!(in_memory() == expected);
    if mapped_pages(&memory) == 0 {
        println!("skipped: no leases on this file system");
        return;
    }
    assert_eq!(mapped_pages(&memory), 5);

    // What the guest writes stays with it, and is gone when the kernel is loaded anew.
    memory.write_slice(b"mine", GuestAddress(2 * MIB + 0x1000)).unwrap();
    assert!(std::fs::read(&path).unwrap().ends_with(&content));
    load(&memory, &kernel, None, "", RSDP).unwrap();
    assert!(in_memory() == expected);

    // Whoever wants to write the file has to wait, and then changes nothing in the guest.
    let write = || {
        let mut options = File::options();
        std::os::unix::fs::OpenOptionsExt::custom_flags(options.write(true), libc::O_NONBLOCK).open(&path)
    };
    assert_eq!(write().unwrap_err().raw_os_error(), Some(libc::EWOULDBLOCK));
    kernel.let_go(&memory).unwrap();
    write().unwrap().set_len(0).unwrap();
    assert!(in_memory() == expected);

    // Nor is the mapping used again.
    std::fs::write(&path, [0; 0x8000]).unwrap();
    let writer = write().unwrap();
    load(&memory, &kernel, None, "", RSDP).unwrap();
    assert_eq!(mapped_pages(&memory), 0);
    writer.set_len(0).unwrap();
    assert_eq!(read(&memory, 2 * MIB, 0x5234), [0; 0x5234]);
}

#[test]
fn a_file_that_is_being_written_is_copied() {
    let (path, content) = mappable();
    let _writer = File::options().append(true).open(&path).unwrap();
    let kernel = Kernel::identify(File::open(&path).unwrap()).unwrap();
    let memory = dirty_memory(32 * MIB);
    load(&memory, &kernel, None, "", RSDP).unwrap();
    assert_eq!(mapped_pages(&memory), 0);
    assert!(read(&memory, 2 * MIB, content.len()) == content);
}
