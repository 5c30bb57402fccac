//! Transfers through a buffer of our own: when guest memory does not suit direct I/O, and for zeroes that have to be
//! written out. Unaligned ends are read, modified and written back.

use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::{Condvar, Mutex, PoisonError};

use rustix::io::{Errno, ReadWriteFlags};

/// Most bytes moved at once. A multiple of every `unit`.
const CAPACITY: usize = 256 << 10;
/// Where the buffer starts: enough for any device's direct I/O.
const ALIGNMENT: usize = 64 << 10;

/// What direct I/O asks of a transfer, in bytes; both are powers of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Alignment {
    /// Of guest buffers.
    pub(super) memory: u32,
    /// Of offsets and lengths.
    pub(super) offset: u32,
}

impl Alignment {
    /// A bounce buffer can serve it.
    pub(super) fn supported(self) -> bool {
        let fits = |unit: u32| unit.is_power_of_two() && unit as usize <= ALIGNMENT;
        fits(self.memory) && fits(self.offset)
    }
}

/// An aligned buffer, allocated at its first use. Each thread that may bounce owns one.
#[derive(Default)]
pub(super) struct Bounce(Vec<u8>);

impl Bounce {
    /// The whole buffer, with whatever is in it.
    pub(super) fn buffer(&mut self) -> &mut [u8] {
        if self.0.is_empty() {
            self.0 = vec![0; CAPACITY + ALIGNMENT];
        }
        let start = self.0.as_ptr().align_offset(ALIGNMENT);
        &mut self.0[start..start + CAPACITY]
    }

    /// Tries whether the file can be read in multiples of `unit`.
    pub(super) fn probe(&mut self, file: impl AsFd, unit: u32) -> io::Result<()> {
        read_up_to(file, &mut self.buffer()[..unit as usize], 0).map(drop)
    }

    /// Reads `length` bytes from `offset` in multiples of `unit`, and hands them to `sink` in order.
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
            let want = (end.next_multiple_of(unit) - start).min(CAPACITY as u64) as usize;
            let got = read_up_to(&file, &mut buffer[..want], start)? as u64;
            let next = (start + got).min(end);
            if next <= at {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            sink(&buffer[(at - start) as usize..(next - start) as usize]);
            at = next;
        }
        Ok(())
    }

    /// Writes `length` bytes at `offset` in multiples of `unit`; `source` fills each piece in order. Where a piece does
    /// not start or end on a unit, the rest of that unit keeps its content: the caller holds off other writes to it.
    pub(super) fn write(
        &mut self,
        file: impl AsFd,
        unit: u32,
        offset: u64,
        length: u64,
        flags: ReadWriteFlags,
        mut source: impl FnMut(&mut [u8]),
    ) -> io::Result<()> {
        let unit = u64::from(unit);
        let (mut at, end) = (offset, offset + length);
        while at < end {
            let start = at - at % unit;
            let stop = end.next_multiple_of(unit).min(start + CAPACITY as u64);
            let next = stop.min(end);
            let buffer = &mut self.buffer()[..(stop - start) as usize];
            if at > start {
                read_exactly(&file, &mut buffer[..unit as usize], start)?;
            }
            if next < stop && (at == start || stop - start > unit) {
                let last = stop - unit;
                read_exactly(&file, &mut buffer[(last - start) as usize..], last)?;
            }
            source(&mut buffer[(at - start) as usize..(next - start) as usize]);
            write_all(&file, buffer, start, flags)?;
            at = next;
        }
        Ok(())
    }
}

/// Reads until `buffer` is full or the file ends; returns the bytes read.
fn read_up_to(file: impl AsFd, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut done = 0;
    while done < buffer.len() {
        match rustix::io::pread(&file, &mut buffer[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(count) => done += count,
            // A direct read that stopped at an unaligned end of the file cannot go on from there.
            Err(Errno::INVAL) if done > 0 => break,
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(done)
}

fn read_exactly(file: impl AsFd, buffer: &mut [u8], offset: u64) -> io::Result<()> {
    match read_up_to(file, buffer, offset)? {
        count if count == buffer.len() => Ok(()),
        _ => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

fn write_all(file: impl AsFd, mut buffer: &[u8], mut offset: u64, flags: ReadWriteFlags) -> io::Result<()> {
    while !buffer.is_empty() {
        match rustix::io::pwritev2(&file, &[io::IoSlice::new(buffer)], offset, flags) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => {
                buffer = &buffer[count..];
                offset += count as u64;
            }
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Keeps writes apart that touch the same unit, where units are larger than the guest's sectors: the read-modify-write
/// of one must not undo another. One per image, shared by all its queues. Ranges are bytes, in whole units.
#[derive(Default)]
pub(super) struct WriteRanges {
    held: Mutex<Vec<Range<u64>>>,
    released: Condvar,
}

impl WriteRanges {
    /// Takes the range, unless some of it is taken.
    pub(super) fn try_take(&self, range: &Range<u64>) -> bool {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let free = !overlaps(&held, range);
        if free {
            held.push(range.clone());
        }
        free
    }

    /// Takes the range, waiting for those who hold some of it.
    pub(super) fn take(&self, range: &Range<u64>) {
        let held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        self.released
            .wait_while(held, |held| overlaps(held, range))
            .unwrap_or_else(PoisonError::into_inner)
            .push(range.clone());
    }

    /// Gives a taken range back.
    pub(super) fn release(&self, range: &Range<u64>) {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(index) = held.iter().position(|taken| taken == range) {
            held.swap_remove(index);
        }
        drop(held);
        self.released.notify_all();
    }
}

fn overlaps(held: &[Range<u64>], range: &Range<u64>) -> bool {
    held.iter().any(|taken| taken.start < range.end && range.start < taken.end)
}
