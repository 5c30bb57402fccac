//! The queues of a worker: each a virtqueue with its state, and the requests that were taken from it and wait.
//!
//! | state | chains are taken | leads to |
//! | --- | --- | --- |
//! | `Running` | yes | `Broken` when the driver broke the ring; `Leaving` when it resets the queue |
//! | `Broken` | no; what the engine has is still answered | `Leaving` |
//! | `Leaving` | no; what has not begun is given up | the queue is handed back when nothing of it is in flight |
//!
//! Stopped requests have been taken from the ring and are not with the engine. The queue keeps only their tokens: when the request
//! begins again, its chain is walked and parsed again.

use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use crate::GuestMemory;
use crate::clock::Instant;
use crate::virtio::device::ActiveQueue;
use crate::virtio::queue::{DescriptorChain, SplitQueue};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum QueueState {
    Running,
    Broken,
    Leaving,
}

/// A chain that was taken from a queue and has not been completed yet.
#[derive(Debug)]
pub(super) struct TakenChain {
    pub(super) chain: DescriptorChain,
    /// Position of its queue among the worker's queues.
    pub(super) queue: usize,
    /// When it was taken from the ring. Its latency in the statistics begins there.
    pub(super) started: Instant,
}

impl TakenChain {
    /// The request's ID in trace events: its queue and its head, which no other request has until this one is completed.
    pub(super) fn id(&self) -> u64 {
        (self.queue as u64) << 16 | u64::from(self.chain.head())
    }
}

pub(super) struct WorkerQueue {
    pub(super) index: u16,
    pub(super) kick: Arc<EventFd>,
    pub(super) split: SplitQueue,
    pub(super) state: QueueState,
    /// Requests that wait for `resume`, in the order in which they stopped.
    pub(super) stopped: Vec<DescriptorChain>,
}

impl WorkerQueue {
    pub(super) fn new(active: ActiveQueue, event_index: bool) -> Self {
        let ActiveQueue { index, queue, kick, restored } = active;
        let split = SplitQueue::new(queue, event_index, restored);
        Self { index, kick, split, state: QueueState::Running, stopped: Vec::new() }
    }

    /// Makes a request wait for `resume`. If the queue is leaving, the request is abandoned instead. Returns whether it waits.
    pub(super) fn stop_request(&mut self, chain: DescriptorChain) -> bool {
        let waits = self.state != QueueState::Leaving;
        if waits {
            self.stopped.push(chain);
        } else {
            self.split.abandon(chain);
        }
        waits
    }

    /// Whether chains are available. Also true if the available index is invalid: `fetch` then finds and reports that.
    pub(super) fn has_work(&self, memory: &GuestMemory) -> bool {
        self.state == QueueState::Running && self.split.available(memory) != Ok(0)
    }
}

/// The queues of a worker, by position; `None` while the driver has a queue disabled.
pub(super) struct Queues(pub(super) Vec<Option<WorkerQueue>>);

impl Queues {
    pub(super) fn new(positions: usize) -> Self {
        Self((0..positions).map(|_| None).collect())
    }

    pub(super) fn positions(&self) -> std::ops::Range<usize> {
        0..self.0.len()
    }

    /// Puts a queue at `position`, which is one of the worker's.
    pub(super) fn set(&mut self, position: usize, queue: WorkerQueue) {
        self.0[position] = Some(queue);
    }

    pub(super) fn find(&self, position: usize) -> Option<&WorkerQueue> {
        self.0.get(position)?.as_ref()
    }

    pub(super) fn find_mut(&mut self, position: usize) -> Option<&mut WorkerQueue> {
        self.0.get_mut(position)?.as_mut()
    }

    /// The queue at `position`, which the caller has found before, or of which it has a chain: a queue stays until none of its
    /// chains is outstanding.
    pub(super) fn get(&mut self, position: usize) -> &mut WorkerQueue {
        waypoint!();
        match &mut self.0[position] {
            Some(queue) => queue,
            None => unreachable!("a queue stays until its chains are completed or abandoned"),
        }
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (usize, &WorkerQueue)> {
        self.0.iter().enumerate().filter_map(|(at, queue)| Some((at, queue.as_ref()?)))
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut WorkerQueue> {
        self.0.iter_mut().flatten()
    }

    pub(super) fn is_leaving(&self, position: usize) -> bool {
        self.find(position).is_some_and(|queue| queue.state == QueueState::Leaving)
    }
}
