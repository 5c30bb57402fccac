//! Submits the requests of a load to a disk's engine, one for one, and measures how long each takes.
//!
//! One thread submits and reaps, as a disk's worker does. Nothing is merged: a request is one transfer, or several if it is larger than
//! [`PIECE`], one after the other. In a loop, the thread submits all requests that may begin, commits them, and reaps what is
//! finished. If nothing is finished, it waits until the next request may begin or the engine's eventfd is written to. An engine that
//! executes a transfer within `submit` is reaped after each one, so that no latency includes the next request's execution.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use devices::disk::{Completion, Disk, DiskError, Engine, EngineSetup, Operation, Transfer};
use devices::{GuestMemory, GuestRange};
use rustix::event::{PollFd, PollFlags, Timespec, epoll, poll};
use vm_memory::{Bytes, GuestAddress};

use super::load::{Kind, Request};

/// Bytes of reads, writes and zeroes that the engine gets at once for a request: as many as it gets for a guest's.
const PIECE: u64 = 4 << 20;
/// Requests in flight have their data this many bytes apart. The data of larger ones overlaps: what is read is not looked at.
const STRIDE: u64 = 64 << 10;
const STRIDES: u64 = 1024;
/// The kernel's timers are late by about as much: the rest of a wait is spent in a loop.
const SPIN: Duration = Duration::from_micros(100);

#[derive(Clone, Copy, Debug)]
pub(super) struct Manner {
    /// Each request begins as soon as no more are in flight than were when it was recorded, not at the recorded time.
    pub(super) no_stall: bool,
    pub(super) durable: bool,
    pub(super) unmap: bool,
}

#[derive(Debug)]
pub(super) struct Played {
    /// In the order of the requests.
    pub(super) latencies: Vec<Result<Duration, DiskError>>,
    pub(super) duration: Duration,
    pub(super) in_flight_max: usize,
    /// How long after its recorded time a request began, at most: 0 if the disk and this thread kept up.
    pub(super) late: Duration,
}

#[derive(Clone, Copy)]
struct InFlight {
    request: usize,
    begun: Instant,
    /// Bytes that are done or with the engine.
    submitted: u64,
}

struct Player<'a> {
    requests: &'a [Request],
    manner: Manner,
    engine: Box<dyn Engine>,
    /// Where the memory that is read to begins, behind as much that is written from.
    area: u64,
    in_flight: Vec<Option<InFlight>>,
    free: Vec<u32>,
    start: Instant,
    played: Played,
}

/// Replays `requests` on `disk`. The caller has checked that they fit it.
///
/// # Errors
/// The host has no memory or descriptors for an engine.
pub(super) fn play(
    requests: &[Request],
    disk: Arc<dyn Disk>,
    manner: Manner,
) -> io::Result<Played> {
    let depth = requests.iter().map(|request| usize::from(request.in_flight) + 1).max();
    let depth = depth.unwrap_or(1);
    let largest = requests.iter().map(|request| request.length.min(PIECE)).max();
    let area = STRIDE * STRIDES.min(depth as u64) + largest.unwrap_or(0).next_multiple_of(STRIDE);
    let areas = [(GuestAddress(0), area as usize), (GuestAddress(area), area as usize)];
    let memory = GuestMemory::from_ranges(&areas).map_err(io::Error::other)?;
    fill(&memory, area)?;
    let engine = disk.engine(EngineSetup::new(memory, depth as u32))?;
    let latencies = vec![Ok(Duration::ZERO); requests.len()];
    let (duration, late) = (Duration::ZERO, Duration::ZERO);
    let mut player = Player {
        requests,
        manner,
        engine,
        area,
        in_flight: vec![None; depth],
        free: (0..depth as u32).rev().collect(),
        start: Instant::now(),
        played: Played { latencies, duration, in_flight_max: 0, late },
    };
    player.run()?;
    player.played.duration = player.start.elapsed();
    Ok(player.played)
}

/// Writes what no format takes for zeroes, and no file system compresses.
fn fill(memory: &GuestMemory, area: u64) -> io::Result<()> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut page = [0; 4096];
    for at in (0..area).step_by(page.len()) {
        for word in page.chunks_exact_mut(8) {
            // xorshift64.
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.copy_from_slice(&state.to_le_bytes());
        }
        memory.write_slice(&page, GuestAddress(at)).map_err(io::Error::other)?;
    }
    Ok(())
}

impl Player<'_> {
    fn run(&mut self) -> io::Result<()> {
        let waiter = Waiter::new(&*self.engine)?;
        let (mut next, mut done) = (0, Vec::new());
        while next < self.requests.len() || self.free.len() < self.in_flight.len() {
            let due = self.begin(&mut next);
            self.engine.commit();
            self.engine.reap(&mut done);
            if done.is_empty() {
                waiter.wait(due);
            }
            let now = Instant::now();
            for completion in done.drain(..) {
                self.complete_piece(&completion, now);
            }
        }
        Ok(())
    }

    /// Begins requests from `next` on that may begin now. Returns when the next one does, if only time is missing.
    fn begin(&mut self, next: &mut usize) -> Option<Instant> {
        while let Some(request) = self.requests.get(*next) {
            let in_flight = self.in_flight.len() - self.free.len();
            let now = Instant::now();
            if self.manner.no_stall {
                if in_flight > usize::from(request.in_flight) {
                    return None;
                }
            } else if let Some(due) = self.start.checked_add(request.begin)
                && now < due
            {
                return Some(due);
            }
            let tag = self.free.pop()?;
            if !self.manner.no_stall {
                let late = now.duration_since(self.start).saturating_sub(request.begin);
                self.played.late = self.played.late.max(late);
            }
            self.played.in_flight_max = self.played.in_flight_max.max(in_flight + 1);
            self.in_flight[tag as usize] =
                Some(InFlight { request: *next, begun: now, submitted: 0 });
            *next += 1;
            self.submit_piece(tag);
            // What is finished already must not wait for others to be executed.
            if self.engine.finished() > 0 {
                return None;
            }
        }
        None
    }

    fn submit_piece(&mut self, tag: u32) {
        let Some(in_flight) = &mut self.in_flight[tag as usize] else { return };
        let Request { kind, offset, length, .. } = self.requests[in_flight.request];
        let Manner { durable, unmap, .. } = self.manner;
        let (operation, area) = match kind {
            Kind::Read => (Operation::Read, self.area),
            Kind::Write => (Operation::Write { durable }, 0),
            Kind::Flush => (Operation::Flush, 0),
            Kind::Discard => (Operation::Discard, 0),
            Kind::WriteZeroes => (Operation::WriteZeroes { unmap, durable }, 0),
        };
        let left = length - in_flight.submitted;
        let piece = if kind == Kind::Discard { left } else { left.min(PIECE) };
        let offset = if kind == Kind::Flush { 0 } else { offset + in_flight.submitted };
        in_flight.submitted += piece;
        let address = GuestAddress(area + u64::from(tag) % STRIDES * STRIDE);
        let data = [GuestRange { address, length: piece as u32 }];
        let ranges = if matches!(kind, Kind::Read | Kind::Write) { &data[..] } else { &[] };
        self.engine.submit(Transfer { tag, operation, offset, length: piece, ranges });
    }

    fn complete_piece(&mut self, completion: &Completion, now: Instant) {
        let Some(in_flight) = self.in_flight.get(completion.tag as usize).copied().flatten() else {
            return;
        };
        let length = self.requests[in_flight.request].length;
        let outcome = match completion.result {
            Ok(()) if in_flight.submitted < length => return self.submit_piece(completion.tag),
            Ok(()) => Ok(now.duration_since(in_flight.begun)),
            Err(error) => Err(error),
        };
        self.played.latencies[in_flight.request] = outcome;
        self.in_flight[completion.tag as usize] = None;
        self.free.push(completion.tag);
    }
}

struct Waiter {
    /// Edge-triggered, since the engine's descriptor is never read.
    completions: Option<rustix::fd::OwnedFd>,
}

impl Waiter {
    fn new(engine: &dyn Engine) -> io::Result<Self> {
        let Some(fd) = engine.completion_fd() else { return Ok(Self { completions: None }) };
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        #[expect(unsafe_code, reason = "the engine gives a plain number")]
        // SAFETY: the descriptor belongs to the engine, which is not dropped in this function.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) };
        let edges = epoll::EventFlags::IN | epoll::EventFlags::ET;
        epoll::add(&epoll, fd, epoll::EventData::new_u64(0), edges)?;
        Ok(Self { completions: Some(epoll) })
    }

    fn wait(&self, due: Option<Instant>) {
        let left = due.map(|due| due.saturating_duration_since(Instant::now()));
        match left {
            Some(left) if left <= SPIN => return std::hint::spin_loop(),
            None if self.completions.is_none() => return,
            _ => {}
        }
        let left = left.and_then(|left| Timespec::try_from(left - SPIN).ok());
        let mut ready = self.completions.iter().map(|fd| PollFd::new(fd, PollFlags::IN));
        // Whatever wakes it, the engine is asked.
        let _ = match ready.next() {
            Some(ready) => poll(&mut [ready], left.as_ref()),
            None => poll(&mut [], left.as_ref()),
        };
        if let Some(completions) = &self.completions {
            let mut events = Vec::with_capacity(1);
            let _ = epoll::wait(
                completions,
                rustix::buffer::spare_capacity(&mut events),
                Some(&Timespec::default()),
            );
        }
    }
}
