//! What a device does with the ranges of a chain beside moving data: measures them, takes the end of them for a reply of several
//! bytes, and writes the reply.
//!
//! A capability: reads, writes and flushes do without it, since their reply is one status byte. The request types that
//! `block/device.rs` plugs in call it. It adds [`ChainBuffers::take_tail`], as a child of the module whose fields it changes.

use vm_memory::{Bytes, GuestAddress};

use super::ChainBuffers;
use crate::{GuestMemory, GuestRange};

impl ChainBuffers {
    /// Removes the last `length` device-writable bytes and returns their ranges. `None`: there are fewer.
    pub(crate) fn take_tail(&mut self, length: u64) -> Option<Vec<GuestRange>> {
        let mut left = total(self.writable()).checked_sub(length)?;
        let mut tail = Vec::new();
        let mut kept_ranges = self.readable;
        for range in &mut self.ranges[self.readable..] {
            let kept = left.min(range.length.into()) as u32;
            left -= u64::from(kept);
            kept_ranges += usize::from(kept > 0);
            if kept < range.length {
                let address = GuestAddress(range.address.0 + u64::from(kept));
                tail.push(GuestRange { address, length: range.length - kept });
                range.length = kept;
            }
        }
        self.ranges.truncate(kept_ranges);
        Some(tail)
    }
}

/// Writes `bytes` into `ranges`, as far as the ranges go. Returns how many were written.
pub(crate) fn write_into(memory: &GuestMemory, ranges: &[GuestRange], bytes: &[u8]) -> usize {
    let mut written = 0;
    for range in ranges {
        let part = (bytes.len() - written).min(range.length as usize);
        if memory.write_slice(&bytes[written..written + part], range.address).is_err() {
            break;
        }
        written += part;
    }
    written
}

/// The length of some ranges in bytes.
pub(crate) fn total(ranges: &[GuestRange]) -> u64 {
    ranges.iter().map(|range| u64::from(range.length)).sum()
}
