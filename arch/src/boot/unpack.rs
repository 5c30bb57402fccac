//! The ELF vmlinux inside a bzImage, unpacked here instead of by the guest.
//!
//! The setup header says where the compressed kernel is (boot.rst, `payload_offset` and `payload_length`), its first bytes
//! by which program it was made, and its last four how long it was before (`arch/x86/boot/compressed/Makefile`: gzip
//! ends that way by itself, for the others the kernel's build adds them). Everything in it is hostile: what comes out
//! is as long as it says or refused, and takes no more memory on the way than the limits below.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Seek, SeekFrom, Write};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};

use super::read_array;

/// How far back a compressed stream may refer, which is what its reader keeps in memory. Linux is compressed with 128 MiB at
/// most (`zstd -22 --ultra`).
const WINDOW_LIMIT: u64 = 128 << 20;

/// LZ4's legacy frames (lz4's doc/lz4_Frame_format.md): a magic number, then blocks with their compressed length before
/// them, each of which unpacks to this much at most.
const LZ4_MAGIC: [u8; 4] = 0x184c_2102_u32.to_le_bytes();
const LZ4_BLOCK: usize = 8 << 20;

/// Why a bzImage's kernel is left to the guest to unpack.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UnpackError {
    /// Not a bzImage: there is nothing to unpack.
    #[error("it is no bzImage")]
    NotPacked,
    /// Its header and its length contradict each other, or guest memory.
    #[error("its compressed kernel of {packed} bytes, {size} unpacked, is not there, or larger than guest memory")]
    Size {
        /// Bytes of compressed kernel by the header.
        packed: u64,
        /// Bytes that it says that it unpacks to.
        size: u64,
    },
    /// bzip2, LZMA or LZO, which nobody uses any more; or nothing of the kind.
    #[error("it is compressed in a way that is not known here")]
    Format,
    /// Damaged, or not as long as it says.
    #[error("its compressed kernel is damaged")]
    Damaged(#[source] io::Error),
    /// An ELF file is inside, but not one with a PVH entry: nothing would be won.
    #[error("the kernel inside cannot be entered at once")]
    NoPvhEntry,
}

/// Unpacks the kernel of `length` bytes at `offset` of `file` into a file without a name, of at most `limit` bytes, that
/// nobody can change any more.
pub(super) fn unpack(file: &File, offset: u64, length: u64, limit: u64) -> Result<File, UnpackError> {
    let read = |at| read_array(file, at).ok().flatten();
    let trailer = offset.checked_add(length).and_then(|end| end.checked_sub(4)).and_then(read);
    let size = trailer.map(u32::from_le_bytes).map_or(u64::MAX, u64::from);
    if length > limit || size > limit {
        return Err(UnpackError::Size { packed: length, size });
    }
    let magic: [u8; 4] = read(offset).ok_or(UnpackError::Format)?;
    let payload = |length| {
        let mut file = file;
        file.seek(SeekFrom::Start(offset))?;
        Ok(BufReader::new(file.take(length)))
    };
    let unpacked = match magic {
        [0x1f, 0x8b, ..] => payload(length).and_then(|input| keep(flate2::bufread::GzDecoder::new(input), size)),
        [0xfd, b'7', b'z', b'X'] => payload(length - 4).and_then(|input| {
            keep(lzma_rust2::XzReader::new_mem_limit(input, false, (WINDOW_LIMIT >> 10) as u32), size)
        }),
        [0x28, 0xb5, 0x2f, 0xfd] => payload(length - 4).and_then(|input| {
            use ruzstd::decoding::StreamingDecoder;
            keep(StreamingDecoder::new_with_max_window_size(input, WINDOW_LIMIT).map_err(io::Error::other)?, size)
        }),
        LZ4_MAGIC => payload(length - 4).and_then(|input| keep(Lz4::new(input), size)),
        _ => return Err(UnpackError::Format),
    };
    unpacked.map_err(UnpackError::Damaged)
}

/// Writes what `input` has to say, `size` bytes exactly, into a file that is sealed then.
fn keep(input: impl Read, size: u64) -> io::Result<File> {
    let file = File::from(memfd_create("vmlinux", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?);
    let mut output = BufWriter::with_capacity(1 << 20, &file);
    // To the end, where checksums are compared; and a byte further shows what is too long.
    let written = io::copy(&mut input.take(size + 1), &mut output)?;
    output.flush()?;
    drop(output);
    if written != size {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("it should unpack to {size} bytes")));
    }
    fcntl_add_seals(&file, SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(file)
}

/// Reads LZ4's legacy frames.
struct Lz4<R> {
    input: R,
    packed: Vec<u8>,
    block: Vec<u8>,
    /// What is left of the block.
    rest: std::ops::Range<usize>,
}

impl<R: Read> Lz4<R> {
    fn new(input: R) -> Self {
        Self { input, packed: Vec::new(), block: vec![0; LZ4_BLOCK], rest: 0..0 }
    }

    /// Unpacks the next block. Nothing is left where the input ends.
    fn next_block(&mut self) -> io::Result<()> {
        let invalid = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what);
        let mut word = [0; 4];
        loop {
            match self.input.read_exact(&mut word) {
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
                result => result?,
            }
            // A frame begins anywhere that a block may.
            if word != LZ4_MAGIC {
                break;
            }
        }
        let length = u64::from(u32::from_le_bytes(word));
        if length > lz4_flex::block::get_maximum_output_size(LZ4_BLOCK) as u64 {
            return Err(invalid("an LZ4 block is too long"));
        }
        self.packed.clear();
        (&mut self.input).take(length).read_to_end(&mut self.packed)?;
        let unpacked = lz4_flex::block::decompress_into(&self.packed, &mut self.block).map_err(io::Error::other)?;
        if unpacked == 0 {
            return Err(invalid("an LZ4 block is empty"));
        }
        self.rest = 0..unpacked;
        Ok(())
    }
}

impl<R: Read> Read for Lz4<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.rest.is_empty() {
            self.next_block()?;
        }
        let count = self.rest.len().min(buffer.len());
        let end = self.rest.start + count;
        buffer[..count].copy_from_slice(&self.block[self.rest.start..end]);
        self.rest.start = end;
        Ok(count)
    }
}
