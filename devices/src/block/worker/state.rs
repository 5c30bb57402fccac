//! The state of a disk's queues as values. A save reads them while the machine stands still, and a restore puts them into a new
//! machine.
//!
//! A capability: the worker does without it. It is a child of the worker's module, so that it can read and write the worker's
//! fields. It adds [`BlockHandle::queues`] and [`BlockHandle::restore_queue`]. The transport saves addresses, sizes and indices.

use serde::{Deserialize, Serialize};

use super::Worker;
use crate::block::device::{BlockHandle, place};
use crate::block::queue::{QueueState, WorkerQueue};
use crate::block::worker_thread::WorkerThread;
use crate::virtio::queue::DescriptorChain;

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
    /// Heads of the chains that were taken and not completed. `resume` begins them again.
    pub stopped: Vec<u16>,
}

impl WorkerQueue {
    /// The queue as a value. `in_flight`: the heads of its requests in the in-flight table.
    fn snapshot(&self, in_flight: impl Iterator<Item = u16>) -> QueueSnapshot {
        let waiting = self.waiting.iter().flatten().map(|request| &request.chain);
        let idle = self.stopped.iter().chain(waiting).map(DescriptorChain::head);
        let (next_avail, next_used) = self.split.position();
        QueueSnapshot {
            queue: self.index,
            next_avail,
            next_used,
            broken: self.state == QueueState::Broken,
            stopped: in_flight.chain(idle).collect(),
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
            let ready = self.dispatcher.ready().filter(|request| request.queue == position);
            queue.snapshot(ready.map(|request| request.chain.head()))
        };
        self.queues.iter().map(of_queue).collect()
    }

    /// Restores the queue at `position`. `false`: the worker does not have that queue, or a chain is impossible.
    pub(in crate::block) fn restore(&mut self, position: usize, snapshot: &QueueSnapshot) -> bool {
        self.queues.find_mut(position).is_some_and(|queue| queue.restore(snapshot))
    }
}

impl BlockHandle {
    /// The queues of a disk that stands still, as values, in index order.
    pub fn queues(&self) -> Vec<QueueSnapshot> {
        let states = |worker: &WorkerThread| {
            worker.request(|thread, _| thread.worker.as_ref().map_or(Vec::new(), Worker::snapshot))
        };
        let mut queues: Vec<_> = self.workers.iter().filter_map(states).flatten().collect();
        queues.sort_by_key(|queue| queue.queue);
        queues
    }

    /// Restores a queue, except for its indices. Called after the transport has started the restored device, and before `resume`.
    /// `false`: the device does not have that queue, or a chain is impossible.
    pub fn restore_queue(&self, snapshot: QueueSnapshot) -> bool {
        let (worker, position) = place(&self.workers, snapshot.queue);
        let restored = worker.request(move |thread, _| {
            thread.worker.as_mut().is_some_and(|worker| worker.restore(position, &snapshot))
        });
        restored.unwrap_or(false)
    }
}
