//! Runs batches of requests of 4 KiB through a device, 32 or as many as the second argument says, for a count of instructions a
//! request.
//!
//! Wall-clock time drifts with the host; instructions do not. `make instructions` runs this under callgrind, twice with
//! different numbers of batches, and divides the difference in the worker thread's instructions by the difference in
//! requests, so that starting up does not count. Busy polling is off, because its spinning would count.

#![expect(clippy::unwrap_used, reason = "a benchmark that cannot run has nothing better to do")]

use std::time::Duration;

use devices::disk::{self, Aio, OpenOptions};

#[path = "../tests/support/mod.rs"]
mod support;

const BLOCKS: u64 = 4096;

fn main() {
    let mut numbers = std::env::args().skip(1).filter_map(|argument| argument.parse().ok());
    let batches: u64 = numbers.next().unwrap_or(100);
    let depth = numbers.next().map_or(32, |depth| depth.clamp(1, 64) as u16);
    let write = std::env::args().any(|argument| argument == "write");
    let sequential = std::env::args().any(|argument| argument == "sequential");
    let image = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
    image.as_file().set_len(BLOCKS * 4096).unwrap();
    // On a file in memory, without io_uring, the worker does all transfers itself.
    let options = OpenOptions { aio: Aio::Threads, ..OpenOptions::new(image.path()) };
    let mut load = support::Load::with(disk::open(&options).unwrap(), 4096, |options| {
        options.poll = Duration::ZERO;
    });
    (0..depth).for_each(|slot| load.prepare(slot, 4096, write));
    let (mut next, mut random) = (0_u64, 0_u64);
    for _ in 0..batches {
        load.send(0..depth, || {
            next += 1;
            // Knuth's MMIX generator, whose high bits are the random ones.
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (if sequential { next } else { random >> 40 }) % BLOCKS * 8
        });
        load.wait(depth);
    }
}
