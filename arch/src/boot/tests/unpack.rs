//! bzImages with a kernel in them: compressed in each way, and damaged in each way.

use std::io::Write;

use super::*;
use crate::boot::unpack::UnpackError;

/// What a kernel is compressed to, with its length where the kernel's build puts it.
fn packed(name: &str, kernel: &[u8]) -> Vec<u8> {
    let mut bytes = match name {
        "gzip" => {
            let mut writer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            writer.write_all(kernel).unwrap();
            // Its trailer has the length.
            return writer.finish().unwrap();
        }
        "xz" => {
            // scripts/xz_wrap.sh: --check=crc32 --x86 --lzma2
            let mut options = lzma_rust2::XzOptions::with_preset(1);
            options.set_check_sum_type(lzma_rust2::CheckType::Crc32);
            options.prepend_pre_filter(lzma_rust2::FilterType::BcjX86, 0);
            let mut writer = lzma_rust2::XzWriter::new(Vec::new(), options).unwrap();
            writer.write_all(kernel).unwrap();
            writer.finish().unwrap()
        }
        "zstd" => ruzstd::encoding::compress_to_vec(kernel, ruzstd::encoding::CompressionLevel::Fastest),
        "lz4" => lz4(kernel),
        _ => unreachable!(),
    };
    bytes.extend((kernel.len() as u32).to_le_bytes());
    bytes
}

fn lz4(kernel: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0x02, 0x21, 0x4c, 0x18];
    for block in kernel.chunks(64 << 10) {
        let block = lz4_flex::block::compress(block);
        bytes.extend((block.len() as u32).to_le_bytes());
        bytes.extend(block);
    }
    bytes
}

/// A bzImage around a compressed kernel.
fn around(payload: &[u8]) -> Vec<u8> {
    let bytes = bzimage();
    let start = (1 + SETUP_SECTORS) * 512;
    let mut bytes = patched(bytes, 0x248, &[0x1000, payload.len() as u32].map(u32::to_le_bytes).concat());
    bytes.truncate(start + 0x1000);
    bytes.extend(payload);
    bytes.resize(bytes.len().max(start + 0x2_0000), 0);
    let paragraphs = (bytes.len() - start).div_ceil(16) as u32;
    patched(bytes, 0x1f4, &paragraphs.to_le_bytes())
}

/// A kernel with a PVH entry that takes more than one LZ4 block.
fn vmlinux() -> Vec<u8> {
    let code: Vec<u8> = (0..0x4_5678_u64).map(|n| (n * n / 4099) as u8).collect();
    elf(&[Part(LOAD, 2 * MIB, code, MIB), notes(pvh_note())])
}

fn unpack(payload: &[u8], limit: u64) -> Result<Kernel, UnpackError> {
    Kernel::identify(file(&around(payload))).unwrap().unpack(limit)
}

#[test]
fn every_compression_gives_the_kernel_back() {
    let vmlinux = vmlinux();
    let expected = dirty_memory(32 * MIB);
    load(&expected, &Kernel::identify(file(&vmlinux)).unwrap(), None, "", RSDP).unwrap();
    for name in ["gzip", "xz", "zstd", "lz4"] {
        let kernel = unpack(&packed(name, &vmlinux), 32 * MIB).unwrap_or_else(|why| panic!("{name}: {why:?}"));
        assert_eq!(kernel.protocol(), Protocol::Pvh);
        let memory = dirty_memory(32 * MIB);
        load(&memory, &kernel, None, "", RSDP).unwrap();
        let kernel = |memory| read(memory, 2 * MIB, MIB as usize);
        assert!(kernel(&memory) == kernel(&expected), "{name}");
    }
}

#[test]
fn what_is_inside_has_to_be_worth_it() {
    let no_pvh = elf(&[code()]);
    for inside in [&no_pvh[..], b"something else"] {
        assert!(matches!(unpack(&packed("lz4", inside), MIB), Err(UnpackError::NoPvhEntry)));
    }
    assert!(matches!(unpack(&[0x5d; 64], 1 << 40), Err(UnpackError::Format)));
    let elf = Kernel::identify(file(&vmlinux())).unwrap();
    assert!(matches!(elf.unpack(32 * MIB), Err(UnpackError::NotPacked)));
}

#[test]
fn sizes_that_lie_are_refused() {
    let vmlinux = vmlinux();
    let end = |bytes: &[u8]| bytes.len() - 4;
    for name in ["gzip", "xz", "zstd", "lz4"] {
        let good = packed(name, &vmlinux);
        // More than guest memory; then one byte too few and one too many, which is a bomb's first.
        let size = unpack(&good, vmlinux.len() as u64 - 1).unwrap_err();
        assert!(matches!(size, UnpackError::Size { .. }), "{name}: {size:?}");
        for lie in [vmlinux.len() as u32 - 1, vmlinux.len() as u32 + 1, 0] {
            let error = unpack(&patched(good.clone(), end(&good), &lie.to_le_bytes()), 32 * MIB).unwrap_err();
            assert!(matches!(error, UnpackError::Damaged(_)), "{name}: {error:?}");
        }
    }
    // A payload that is not where it is said to be.
    for (offset, length) in [(0x1000, u32::MAX), (u32::MAX, 16), (u32::MAX, u32::MAX), (0x1000, 0), (0x1000, 3)] {
        let bytes = patched(around(&[0; 64]), 0x248, &[offset, length].map(u32::to_le_bytes).concat());
        let error = Kernel::identify(file(&bytes)).unwrap().unpack(1 << 40).unwrap_err();
        assert!(matches!(error, UnpackError::Size { .. } | UnpackError::Format), "{error:?}");
    }
}

#[test]
fn damage_anywhere_is_survived() {
    let vmlinux = elf(&[code(), notes(pvh_note())]);
    for name in ["gzip", "xz", "zstd", "lz4"] {
        let good = packed(name, &vmlinux);
        assert!(unpack(&good, MIB).is_ok());
        for cut in 0..good.len() - 4 {
            // The length stays last.
            let cut = [&good[..cut], &good[good.len() - 4..]].concat();
            assert!(unpack(&cut, MIB).is_err(), "{name} cut to {}", cut.len());
        }
        for at in 0..good.len() {
            for bit in [1, 0x80] {
                // Not every format has a checksum for everything; whatever comes out, it is not a panic.
                let _ = unpack(&patched(good.clone(), at, &[good[at] ^ bit]), MIB);
            }
        }
    }
}

#[test]
fn lz4_blocks_are_bounded() {
    for block in [u32::MAX, 9 << 20, 0] {
        let payload = [&[0x02, 0x21, 0x4c, 0x18][..], &block.to_le_bytes(), &[0; 64]].concat();
        assert!(matches!(unpack(&payload, MIB), Err(UnpackError::Damaged(_))), "{block:#x}");
    }
}
