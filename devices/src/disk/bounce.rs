//! Transfers through an aligned buffer, for data whose address, offset or length is not aligned for direct I/O.
//!
//! The guest's sectors stay 512 bytes, whatever the file requires. A [`Bounce`] buffer turns any transfer into whole units. For a write,
//! the first and the last unit are read, modified and written back. Two writes to one unit at once would undo each other, so each locks
//! its units in [`WriteRanges`], which all queues of a disk share.
//!
//! Zeroes that no system call can make are written from this buffer, too. The formats decide which transfers need it. Each thread of an
//! engine's pool has its own.

#![expect(unsafe_code, reason = "system calls with raw pointers into the buffer")]

use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::{Condvar, Mutex, PoisonError};

use libc::iovec;

use super::host_file::Alignment;
use super::positioned_io::{READ, WRITE, transfer};
use crate::lock;

/// Most bytes moved at once. A multiple of every unit.
const CAPACITY: usize = 256 << 10;
/// Where the buffer starts: enough for any device's direct I/O.
const ALIGNMENT: usize = 64 << 10;

/// Whether a buffer can be aligned as direct I/O requires it.
pub(super) fn supports(alignment: Alignment) -> bool {
    let fits = |unit: u32| unit.is_power_of_two() && unit as usize <= ALIGNMENT;
    fits(alignment.memory) && fits(alignment.offset)
}

/// An aligned buffer of 256 KiB for direct I/O whose guest memory or length does not fit the device's units. Each
/// thread has its own, allocated at its first use: most guests never need one.
#[derive(Default)]
pub(super) struct Bounce(Vec<u8>);

impl Bounce {
    pub(super) fn buffer(&mut self) -> &mut [u8] {
        if self.0.is_empty() {
            self.0 = vec![0; CAPACITY + ALIGNMENT];
        }
        let start = self.0.as_ptr().align_offset(ALIGNMENT);
        &mut self.0[start..start + CAPACITY]
    }

    /// Tries to read `unit` bytes of the file, to find out whether direct I/O works with this unit.
    pub(super) fn probe(&mut self, file: impl AsFd, unit: u32) -> io::Result<()> {
        read_up_to(file, &mut self.buffer()[..unit as usize], 0).map(drop)
    }

    /// Reads `length` bytes from `offset` on in whole units, and passes them to `sink` in order.
    ///
    /// # Errors
    /// `UnexpectedEof` when the file ends before.
    pub(super) fn read(
        &mut self,
        file: impl AsFd,
        unit: u32,
        offset: u64,
        length: u64,
        mut sink: impl FnMut(&[u8]),
    ) -> io::Result<()> {
        let unit = u64::from(unit);
        let (mut at, end) = (offset, offset + length);
        while at < end {
            let start = at - at % unit;
            let buffer = self.buffer();
            let wanted = (end.next_multiple_of(unit) - start).min(CAPACITY as u64) as usize;
            let got = read_up_to(&file, &mut buffer[..wanted], start)? as u64;
            let next = (start + got).min(end);
            if next <= at {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            sink(&buffer[(at - start) as usize..(next - start) as usize]);
            at = next;
        }
        Ok(())
    }

    /// Writes `length` bytes at `offset` in whole units. `source` fills each part of the data in order. Bytes of the first and last unit
    /// beside the data keep their content: the caller has locked these units.
    pub(super) fn write(
        &mut self,
        file: impl AsFd,
        unit: u32,
        offset: u64,
        length: u64,
        mut source: impl FnMut(&mut [u8]),
    ) -> io::Result<()> {
        let unit = u64::from(unit);
        let (mut at, end) = (offset, offset + length);
        while at < end {
            let start = at - at % unit;
            let stop = end.next_multiple_of(unit).min(start + CAPACITY as u64);
            let next = stop.min(end);
            let buffer = &mut self.buffer()[..(stop - start) as usize];
            if at > start || next < stop {
                // Reads what the first or last unit has beside the data.
                if (read_up_to(&file, buffer, start)? as u64) < stop - start {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
            }
            source(&mut buffer[(at - start) as usize..(next - start) as usize]);
            write_all(&file, buffer, start)?;
            at = next;
        }
        Ok(())
    }
}

/// Reads until `buffer` is full or the file ends; returns the bytes read.
fn read_up_to(file: impl AsFd, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut done = 0;
    while done < buffer.len() {
        let rest = &mut buffer[done..];
        let list = [iovec { iov_base: rest.as_mut_ptr().cast(), iov_len: rest.len() }];
        // SAFETY: the list is one buffer, borrowed for writing.
        match unsafe { transfer(READ, &file, &list, offset + done as u64, 0) } {
            Ok(0) => break,
            Ok(count) => done += count as usize,
            // A direct read that stopped at an unaligned end of the file cannot go on from there.
            Err(error) if done > 0 && error.raw_os_error() == Some(libc::EINVAL) => break,
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

fn write_all(file: impl AsFd, buffer: &[u8], offset: u64) -> io::Result<()> {
    let mut done = 0;
    while done < buffer.len() {
        let rest = &buffer[done..];
        let list = [iovec { iov_base: rest.as_ptr().cast_mut().cast(), iov_len: rest.len() }];
        // SAFETY: the list is one buffer, borrowed; writing to a file only reads it.
        match unsafe { transfer(WRITE, &file, &list, offset + done as u64, 0) }? {
            0 => return Err(io::ErrorKind::WriteZero.into()),
            count => done += count as usize,
        }
    }
    Ok(())
}

/// The byte ranges, in whole units, that writes in flight have locked. One value for each image whose unit is larger than a
/// sector, shared by all its queues.
#[derive(Default)]
pub(super) struct WriteRanges {
    locked: Mutex<Vec<Range<u64>>>,
    unlocked: Condvar,
}

impl WriteRanges {
    /// Locks `range`, unless a part of it is locked. Returns whether it did.
    pub(super) fn try_lock(&self, range: &Range<u64>) -> bool {
        let mut locked = lock(&self.locked);
        let free = !overlaps(&locked, range);
        if free {
            locked.push(range.clone());
        }
        free
    }

    /// Locks `range`, and waits for that as long as a part of it is locked.
    pub(super) fn lock(&self, range: &Range<u64>) {
        self.unlocked
            .wait_while(lock(&self.locked), |locked| overlaps(locked, range))
            .unwrap_or_else(PoisonError::into_inner)
            .push(range.clone());
    }

    pub(super) fn unlock(&self, range: &Range<u64>) {
        let mut locked = lock(&self.locked);
        if let Some(index) = locked.iter().position(|other| other == range) {
            locked.swap_remove(index);
        }
        drop(locked);
        self.unlocked.notify_all();
    }
}

fn overlaps(locked: &[Range<u64>], range: &Range<u64>) -> bool {
    locked.iter().any(|other| other.start < range.end && range.start < other.end)
}
