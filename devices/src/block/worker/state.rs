//! The state of a disk's queues as values, which a save reads and a restore puts into a new machine.
//!
//! Of a request that was taken and not completed, only the head of its chain is saved. A restored worker has it as a stopped request:
//! `resume` walks and parses the chain again, and executes the request from its beginning. If a limit does not admit it, it waits.
//!
//! A capability: the worker does without it. It is a child of the worker's module, so that it can use the worker's fields. It adds
//! [`BlockHandle::queues`] and [`BlockHandle::restore_queue`]. The transport saves addresses, sizes and indices.

use std::sync::mpsc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::Worker;
use crate::block::device::{BlockHandle, place};
use crate::block::queue::{QueueState, WorkerQueue};
use crate::block::worker_thread::{Loop, WorkerThread};
use crate::virtio::queue::DescriptorChain;

/// The longest that a question waits for its answer: the thread may be waiting for host I/O that it has begun before.
const REPLY_TIMEOUT: Duration = Duration::from_secs(10);

/// The state of a queue while the disk stands still. Together with the addresses and the size, which the transport saves, this
/// is all that a restore needs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueueSnapshot {
    /// Index of the queue.
    pub queue: u16,
    /// Index into the available ring of the next chain to take.
    pub next_avail: u16,
    /// Index into the used ring of the next completion.
    pub next_used: u16,
    /// The driver broke the ring: nothing is taken from it until a reset.
    pub broken: bool,
    /// Heads of the chains that were taken and not completed: large requests with pieces left, requests that the error policy has
    /// stopped, and those that wait for a limit. `resume` begins them again, in this order.
    pub stopped: Vec<u16>,
}

impl WorkerQueue {
    /// The queue as a value. `in_flight`: the heads of its large requests that are between two pieces. `waiting`: of those that wait
    /// for the limiter.
    fn snapshot(&self, in_flight: impl Iterator<Item = u16>, waiting: Vec<u16>) -> QueueSnapshot {
        let stopped = self.stopped.iter().map(DescriptorChain::head);
        let (next_avail, next_used) = self.split.ring_indices();
        QueueSnapshot {
            queue: self.index,
            next_avail,
            next_used,
            broken: self.state == QueueState::Broken,
            stopped: in_flight.chain(stopped).chain(waiting).collect(),
        }
    }

    /// Restores the state and the stopped chains. The indices have come with the queue. `false`: a chain is impossible.
    fn restore(&mut self, snapshot: &QueueSnapshot) -> bool {
        if snapshot.broken {
            self.state = QueueState::Broken;
        }
        snapshot.stopped.iter().all(|head| {
            let chain = self.split.restore_chain(*head);
            chain.map(|chain| self.stopped.push(chain)).is_some()
        })
    }
}

impl Worker {
    /// The queues of a worker that stands still, as values.
    pub(in crate::block) fn snapshot(&self) -> Vec<QueueSnapshot> {
        let of_queue = |(position, queue): (usize, &WorkerQueue)| {
            let ready =
                self.dispatcher.ready.iter().filter_map(|tag| self.dispatcher.in_flight.find(*tag));
            let of_queue =
                ready.map(|request| &request.taken).filter(|taken| taken.queue == position);
            queue.snapshot(of_queue.map(|taken| taken.chain.head()), self.limiter.waiting(position))
        };
        self.queues.iter().map(of_queue).collect()
    }

    /// Restores the queue at `position`. `false`: the worker does not have that queue, or a chain is impossible.
    pub(in crate::block) fn restore(&mut self, position: usize, snapshot: &QueueSnapshot) -> bool {
        self.queues.find_mut(position).is_some_and(|queue| queue.restore(snapshot))
    }
}

impl WorkerThread {
    /// Sends a question, and waits for the answer, at most [`REPLY_TIMEOUT`]. `None`: the thread is gone, or is waiting for the
    /// host. A question must need no host I/O. A command that does gets a drain instead.
    fn request<T: Send + 'static>(
        &self,
        question: impl FnOnce(&mut Loop) -> T + Send + 'static,
    ) -> Option<T> {
        let (reply, answer) = mpsc::sync_channel(1);
        // The caller may have given up.
        let _ = self.send(move |thread, _| drop(reply.send(question(thread))));
        answer.recv_timeout(REPLY_TIMEOUT).ok()
    }
}

impl BlockHandle {
    /// The queues of a disk that stands still, as values, in index order.
    pub fn queues(&self) -> Vec<QueueSnapshot> {
        let states = |worker: &WorkerThread| worker.request(|thread| thread.worker.snapshot());
        let mut queues: Vec<_> = self.workers.iter().filter_map(states).flatten().collect();
        queues.sort_by_key(|queue| queue.queue);
        queues
    }

    /// Restores a queue, except for its indices. Called after the transport has started the restored device, and before `resume`.
    /// `false`: the device does not have that queue, or a chain is impossible.
    pub fn restore_queue(&self, snapshot: QueueSnapshot) -> bool {
        let (worker, position) = place(&self.workers, snapshot.queue);
        let restored = worker.request(move |thread| thread.worker.restore(position, &snapshot));
        restored.unwrap_or(false)
    }
}
