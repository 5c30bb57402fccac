//! Follows each request from the available ring to the used ring: gives it a number, and the time since its last event.
//!
//! Events name a request by its queue and its head descriptor, which a later request reuses. All events of a request come from the worker
//! thread of its disk, so they arrive in order.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use super::record::Record;

/// Most completed requests of a thread that wait for an interrupt. If a driver asks for no interrupts, the list would grow without end.
const WAITING_MAX: usize = 1024;

struct Life {
    number: u64,
    last: Instant,
    /// It was passed to the engine. Some requests need no engine, such as one for the disk's serial number.
    submitted: bool,
}

#[derive(Default)]
struct Worker {
    /// The last kick, if nothing was completed since. Requests that are now taken from the ring came with it.
    kick: Option<Instant>,
    /// The requests in flight, by queue and descriptor.
    lives: HashMap<u64, Life>,
    /// The requests that were completed since the last interrupt.
    waiting: Vec<u64>,
}

/// The time in which a request is with the engine.
pub(super) enum EngineSpan {
    Begins,
    Ends,
}

/// What an event means for requests.
#[derive(Default)]
pub(super) struct Station {
    /// The request that it is about.
    pub(super) request: Option<u64>,
    /// The time since that request's last event, or since the kick.
    pub(super) since: Option<Duration>,
    /// When the kick came, if a request was taken because of one.
    pub(super) kick: Option<Instant>,
    /// Whether that request is passed to the engine now for the first time, or was there.
    pub(super) engine: Option<EngineSpan>,
    /// The requests that it interrupts for.
    pub(super) interrupts_for: Vec<u64>,
}

/// The requests in flight, by thread.
#[derive(Default)]
pub(super) struct Requests {
    workers: HashMap<u32, Worker>,
    count: u64,
}

impl Requests {
    /// Updates the requests by an event of this name.
    pub(super) fn station(&mut self, name: &str, record: &Record) -> Station {
        let worker = self.workers.entry(record.thread.id).or_default();
        let mut station = Station::default();
        match name {
            "virtio_queue_notify" => worker.kick = Some(record.time),
            "virtio_notify" => station.interrupts_for = std::mem::take(&mut worker.waiting),
            _ => {}
        }
        let Some(place) = record.number("req") else { return station };
        if name.starts_with("virtio_blk_handle_") {
            self.count += 1;
            let last = worker.kick.unwrap_or(record.time);
            worker.lives.insert(place, Life { number: self.count, last, submitted: false });
            station.kick = worker.kick;
        }
        let Some(life) = worker.lives.get_mut(&place) else { return station };
        station.request = Some(life.number);
        station.since = Some(record.time.saturating_duration_since(life.last));
        life.last = record.time;
        if name.ends_with("_complete") {
            worker.kick = None;
        }
        if name == "virtio_blk_submit" && !std::mem::replace(&mut life.submitted, true) {
            station.engine = Some(EngineSpan::Begins);
        }
        if name == "virtio_blk_req_complete" {
            station.engine = life.submitted.then_some(EngineSpan::Ends);
            worker.waiting.truncate(WAITING_MAX);
            worker.waiting.push(life.number);
            worker.lives.remove(&place);
        }
        station
    }
}
