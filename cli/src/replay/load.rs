//! A trace as a load: the requests of one disk, when they began and how long the host's disk took.
//!
//! A request's time with the engine is what a replay can measure, too. It is from `virtio_blk_submit`, or else the request's first event,
//! to the last `virtio_blk_rw_complete`: a large request has one for each piece.
//!
//! With `--no-stall`, a request begins when no more requests are in flight than when it was recorded. The trace says no more about which
//! requests wait for others: a guest that reads, waits and reads again never has two in flight, however fast the disk is.
//!
//! The file is not trusted. The number of requests, and of those in flight at once, is bounded. A request that ends before it begins has
//! no latency. The caller compares offsets with the disk.

use std::collections::BTreeMap;
use std::io::BufRead;
use std::time::Duration;

use devices::disk::SECTOR;
use serde_json::Value;

use super::error::ReplayError;
use crate::trace_view::lines;

/// Requests beyond this number are left out. So many take some 250 MiB.
pub(super) const REQUESTS_MAX: usize = 1 << 22;
/// Requests that are under way at once. Those whose end the trace lacks would make the list grow.
pub(super) const IN_FLIGHT_MAX: usize = 1024;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Read,
    Write,
    Flush,
    Discard,
    WriteZeroes,
}

impl Kind {
    pub(super) const ALL: [(Self, &str); 5] = [
        (Self::Read, "read"),
        (Self::Write, "write"),
        (Self::Flush, "flush"),
        (Self::Discard, "discard"),
        (Self::WriteZeroes, "write-zeroes"),
    ];

    /// As the field `kind` has it. `None`: it does not reach the disk, or cannot be replayed.
    fn of(text: &str) -> Option<Self> {
        match text {
            "Read" => Some(Self::Read),
            "Write" => Some(Self::Write),
            "Flush" => Some(Self::Flush),
            "Discard" => Some(Self::Discard),
            "WriteZeroes" => Some(Self::WriteZeroes),
            _ => None,
        }
    }

    pub(super) fn changes(self) -> bool {
        !matches!(self, Self::Read | Self::Flush)
    }
}

#[derive(Clone, Debug)]
pub(super) struct Request {
    pub(super) kind: Kind,
    /// How many requests were under way when it began.
    pub(super) in_flight: u16,
    pub(super) offset: u64,
    pub(super) length: u64,
    /// Since the first request of the load.
    pub(super) begin: Duration,
    pub(super) recorded: Option<Duration>,
}

#[derive(Debug, Default)]
pub(super) struct Load {
    pub(super) requests: Vec<Request>,
    /// Requests of the trace that are not among them, since there were too many.
    pub(super) left_out: u64,
    pub(super) lost: u64,
}

struct Begun {
    /// The place in [`Load::requests`]. `None`: the request is not replayed, but counts as one under way.
    index: Option<usize>,
    end: Option<Duration>,
}

struct Reader<'a> {
    load: Load,
    wanted: Option<&'a str>,
    /// The disk of the requests, and another one if there is.
    disks: [Option<String>; 2],
    /// By the trace's number, which grows with time, so that the first one is the oldest.
    begun: BTreeMap<u64, Begun>,
}

impl Load {
    /// Reads a trace: the requests of the disk `wanted`, or of the only one.
    ///
    /// # Errors
    /// It is no trace, it has no request, or it has those of several disks and none is wanted.
    pub(super) fn read(file: impl BufRead, wanted: Option<&str>) -> Result<Self, ReplayError> {
        let begun = BTreeMap::new();
        let mut reader = Reader { load: Self::default(), wanted, disks: [None, None], begun };
        lines::each(file, |name, time, event| {
            reader.event(name, Duration::from_nanos((time * 1e3) as u64), event);
        })?;
        let Reader { mut load, disks, .. } = reader;
        match (load.requests.first(), disks, wanted) {
            (_, [Some(one), Some(other)], None) => Err(ReplayError::SeveralDisks([one, other])),
            (None, [Some(seen), _], Some(_)) => Err(ReplayError::OtherDisk(seen)),
            (None, ..) => Err(ReplayError::NoRequest),
            (Some(_), ..) => {
                load.requests.sort_by_key(|request| request.begin);
                let start = load.requests[0].begin;
                load.requests.iter_mut().for_each(|request| request.begin -= start);
                Ok(load)
            }
        }
    }
}

impl Reader<'_> {
    fn event(&mut self, name: &str, time: Duration, event: &Value) {
        if name == "lost" {
            self.load.lost = self.load.lost.saturating_add(event["count"].as_u64().unwrap_or(0));
            // Which of them have ended is not known.
            self.begun.clear();
        }
        let Some(number) = event["req"].as_u64() else { return };
        if name.starts_with("virtio_blk_handle_") {
            if self.is_wanted(event["disk"].as_str().unwrap_or_default()) {
                self.begin(number, time, event);
            }
            return;
        }
        let Some(begun) = self.begun.get_mut(&number) else { return };
        let request = begun.index.and_then(|index| self.load.requests.get_mut(index));
        match name {
            "virtio_blk_submit" => {
                if let Some(request) = request {
                    request.begin = time;
                }
            }
            "virtio_blk_rw_complete" => begun.end = Some(time),
            "virtio_blk_req_complete" => {
                if let (Some(request), Some(end)) = (request, begun.end) {
                    request.recorded = end.checked_sub(request.begin);
                }
                self.begun.remove(&number);
            }
            _ => {}
        }
    }

    fn is_wanted(&mut self, disk: &str) -> bool {
        let [first, second] = &mut self.disks;
        match first {
            None => *first = Some(disk.to_owned()),
            Some(first) if second.is_none() && first != disk => *second = Some(disk.to_owned()),
            Some(_) => {}
        }
        self.wanted.is_none_or(|wanted| wanted == disk)
    }

    fn begin(&mut self, number: u64, time: Duration, event: &Value) {
        let kind = event["kind"].as_str().and_then(Kind::of);
        let bytes = |field: &str| event[field].as_u64().unwrap_or(0).saturating_mul(SECTOR);
        let (offset, mut length) = (bytes("sector"), bytes("nsectors"));
        // A flush covers the disk, whatever the file says.
        if kind == Some(Kind::Flush) {
            length = 0;
        }
        // The device answers a request of no length without the engine.
        let kind = kind.filter(|kind| *kind == Kind::Flush || length > 0);
        let index = match kind {
            None => None,
            Some(_) if self.load.requests.len() == REQUESTS_MAX => {
                self.load.left_out += 1;
                None
            }
            Some(kind) => {
                let in_flight = self.begun.len() as u16;
                let (begin, recorded) = (time, None);
                self.load.requests.push(Request {
                    kind,
                    in_flight,
                    offset,
                    length,
                    begin,
                    recorded,
                });
                Some(self.load.requests.len() - 1)
            }
        };
        if self.begun.len() == IN_FLIGHT_MAX {
            self.begun.pop_first();
        }
        self.begun.insert(number, Begun { index, end: None });
    }
}
