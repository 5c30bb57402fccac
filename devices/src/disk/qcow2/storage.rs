//! The host file of a layer as imago sees it: its own kind of file, but with what the host says of direct I/O.
//!
//! imago 0.2.6 finds that out by reading single bytes, which succeeds where a file has a hole: it would then hand the host
//! buffers that only suit holes.

#![expect(unsafe_code, reason = "imago's own file is called as imago calls this one")]

use std::fmt;
use std::fs;
use std::io;

use imago::file::File;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::storage::PreallocateMode;
use imago::storage::drivers::CommonStorageHelper;
use imago::{Storage, StorageOpenOptions};

use crate::disk::bounce::Alignment;

/// A host file, and what it asks of a transfer.
#[derive(Debug)]
pub(super) struct HostStorage {
    file: File,
    alignment: Alignment,
}

impl HostStorage {
    /// Wraps an open `file`, which wants `direct` I/O or does not care.
    pub(super) fn new(file: fs::File, writable: bool, direct: Option<Alignment>) -> io::Result<Self> {
        // Without `write`, imago does not try writing to find out what direct I/O wants.
        let options = StorageOpenOptions::new().direct(direct.is_some()).write(writable && direct.is_none());
        let alignment = direct.unwrap_or(Alignment { memory: 1, offset: 1 });
        Ok(Self { file: File::from_open_file(file, options)?, alignment })
    }

    /// What transfers, zeroes and discards may start and end on, if imago's file asks for `own`.
    fn unit(&self, own: usize) -> usize {
        own.max(self.alignment.offset as usize)
    }
}

impl fmt::Display for HostStorage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.file.fmt(f)
    }
}

impl Storage for HostStorage {
    fn mem_align(&self) -> usize {
        self.file.mem_align().max(self.alignment.memory as usize)
    }

    fn req_align(&self) -> usize {
        self.unit(self.file.req_align())
    }

    fn zero_align(&self) -> usize {
        self.unit(self.file.zero_align())
    }

    fn discard_align(&self) -> usize {
        self.unit(self.file.discard_align())
    }

    fn size(&self) -> io::Result<u64> {
        self.file.size()
    }

    unsafe fn pure_readv(&self, buffers: IoVectorMut<'_>, offset: u64) -> io::Result<()> {
        // SAFETY: here and below: the caller keeps to our alignments, which are multiples of the file's, and to all else.
        unsafe { self.file.pure_readv(buffers, offset) }
    }

    unsafe fn pure_writev(&self, buffers: IoVector<'_>, offset: u64) -> io::Result<()> {
        // SAFETY: as in `pure_readv`.
        unsafe { self.file.pure_writev(buffers, offset) }
    }

    unsafe fn pure_write_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        // SAFETY: as in `pure_readv`.
        unsafe { self.file.pure_write_zeroes(offset, length) }
    }

    unsafe fn pure_write_allocated_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        // SAFETY: as in `pure_readv`.
        unsafe { self.file.pure_write_allocated_zeroes(offset, length) }
    }

    unsafe fn pure_discard(&self, offset: u64, length: u64) -> io::Result<()> {
        // SAFETY: as in `pure_readv`.
        unsafe { self.file.pure_discard(offset, length) }
    }

    fn flush(&self) -> io::Result<()> {
        self.file.flush()
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync()
    }

    fn settle_writes(&self) -> io::Result<()> {
        self.file.settle_writes()
    }

    unsafe fn invalidate_cache(&self) -> io::Result<()> {
        // SAFETY: as in `pure_readv`.
        unsafe { self.file.invalidate_cache() }
    }

    fn get_storage_helper(&self) -> &CommonStorageHelper {
        self.file.get_storage_helper()
    }

    fn resize(&self, size: u64, mode: PreallocateMode) -> io::Result<()> {
        self.file.resize(size, mode)
    }
}
