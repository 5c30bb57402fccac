//! Requests that the disk's limits keep waiting: taken from the ring, so that those behind them are seen, and not started.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::request::{Action, Request, Rules};
use super::ring::Popped;
use super::stats::Kind;
use super::throttle::{Direction, Limit};
use super::worker::{Arrival, Worker};
use crate::disk::Operation;

/// The requests that wait, each direction in the order of arrival. No more than the rings hold.
#[derive(Debug, Default)]
pub(super) struct Delayed {
    queues: [VecDeque<Waiting>; 2],
    /// Whose turn it is when both directions may go.
    turn: usize,
}

#[derive(Debug)]
struct Waiting {
    /// Position of its ring.
    position: usize,
    popped: Popped,
    /// When it was taken from the ring: the wait is part of its time.
    started: Instant,
}

impl Delayed {
    fn is_empty(&self) -> bool {
        self.queues.iter().all(VecDeque::is_empty)
    }

    /// Takes out all requests of one ring, reads first.
    fn take(&mut self, position: usize) -> Vec<Waiting> {
        let mut taken = Vec::new();
        for queue in &mut self.queues {
            let (of_ring, others): (Vec<_>, Vec<_>) =
                std::mem::take(queue).into_iter().partition(|waiting| waiting.position == position);
            taken.extend(of_ring);
            queue.extend(others);
        }
        taken
    }
}

/// What of a request the limits count. As in QEMU discards and flushes go free.
fn measure(request: &Request, pieces: u64) -> Option<(Direction, u64)> {
    match (request.action, request.kind) {
        (Action::Transfer { operation: Operation::Read, length, .. }, _) => Some((Direction::Read, length)),
        (Action::Transfer { length, .. }, _) => Some((Direction::Write, length)),
        (Action::Pieces, Kind::WriteZeroes) => Some((Direction::Write, pieces)),
        _ => None,
    }
}

impl Worker {
    /// Whether `request` may start now. It is charged to the limits if so; otherwise it goes to the end of its queue.
    pub(super) fn admit(
        &mut self,
        position: usize,
        popped: Popped,
        request: &Request,
        started: Instant,
        arrival: Arrival,
    ) -> Option<Popped> {
        if arrival == Arrival::Retried || !self.shared.is_limited() {
            return Some(popped);
        }
        let pieces = self.parser.pieces.iter().map(|piece| piece.length).sum();
        let Some((direction, bytes)) = measure(request, pieces) else { return Some(popped) };
        if arrival == Arrival::Fresh && self.must_wait(direction, started) {
            self.delayed.queues[direction as usize].push_back(Waiting { position, popped, started });
            return None;
        }
        self.shared.throttle.charge(direction, bytes);
        Some(popped)
    }

    /// Nobody overtakes those who wait for the same limit.
    fn must_wait(&self, direction: Direction, now: Instant) -> bool {
        let options = self.shared.throttle.options();
        let total = |limit: Limit| options.rates[limit as usize].average > 0;
        let shared = total(Limit::BytesTotal) || total(Limit::OperationsTotal);
        let queue = &self.delayed.queues[direction as usize];
        !queue.is_empty()
            || shared && !self.delayed.is_empty()
            || self.shared.throttle.wait(direction, now) > Duration::ZERO
    }

    /// Starts what may start `now`, the two directions in turn.
    pub(super) fn release(&mut self, now: Instant) {
        if self.paused || !self.parked.is_empty() || self.delayed.is_empty() {
            return;
        }
        let rules = self.rules();
        self.now = now;
        while let Some(waiting) = self.next_admitted(now) {
            self.start_waiting(waiting, &rules);
        }
        self.submit();
    }

    /// Starts all that waits of the ring at `position`, whatever the limits say: somebody waits for the end of it. The limits
    /// count it all the same, so that what comes after waits longer.
    pub(super) fn let_through(&mut self, position: usize) {
        let rules = self.rules();
        self.now = Instant::now();
        for waiting in self.delayed.take(position) {
            self.start_waiting(waiting, &rules);
        }
        self.submit();
    }

    fn start_waiting(&mut self, Waiting { position, popped, started }: Waiting, rules: &Rules) {
        if let Err(error) = self.begin(position, popped, rules, started, Arrival::Released) {
            self.give_up(position, error);
        }
    }

    fn next_admitted(&mut self, now: Instant) -> Option<Waiting> {
        for index in [self.delayed.turn, 1 - self.delayed.turn] {
            let direction = [Direction::Read, Direction::Write][index];
            let queue = &mut self.delayed.queues[index];
            if !queue.is_empty() && self.shared.throttle.wait(direction, now) == Duration::ZERO {
                self.delayed.turn = 1 - index;
                return queue.pop_front();
            }
        }
        None
    }

    /// How long from `now` until `release` has something to do. `None`: nothing waits, or not for the clock.
    pub(super) fn next_release(&self, now: Instant) -> Option<Duration> {
        if self.paused || !self.parked.is_empty() || self.delayed.is_empty() {
            return None;
        }
        let directions = [Direction::Read, Direction::Write].into_iter().zip(&self.delayed.queues);
        let waiting = directions.filter(|(_, queue)| !queue.is_empty());
        waiting.map(|(direction, _)| self.shared.throttle.wait(direction, now)).min()
    }
}
