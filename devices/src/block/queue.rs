//! The queues of a worker: each a virtqueue with its state, and the requests that were taken from it and wait.
//!
//! | state | chains are taken | leads to |
//! | --- | --- | --- |
//! | `Running` | yes | `Broken` when the driver broke the ring; `Leaving` when it resets the queue |
//! | `Broken` | no; what the engine has is still answered | `Leaving` |
//! | `Leaving` | no; what has not begun is given up | the queue is handed back when nothing of it is in flight |
//!
//! Stopped and waiting requests have been taken from the ring and are not with the engine. The queue keeps only their
//! tokens (and for waiting ones, when they were taken): when the request begins, its chain is walked and parsed again.

use std::collections::VecDeque;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use super::admission::{Direction, WaitingRequest};
use crate::GuestMemory;
use crate::virtio::device::ActiveQueue;
use crate::virtio::queue::{DescriptorChain, SplitQueue};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum QueueState {
    Running,
    Broken,
    Leaving,
}

pub(super) struct WorkerQueue {
    pub(super) index: u16,
    pub(super) kick: Arc<EventFd>,
    pub(super) split: SplitQueue,
    pub(super) state: QueueState,
    /// Requests that wait for `resume`, in the order in which they stopped.
    pub(super) stopped: Vec<DescriptorChain>,
    /// Requests that wait for the limiter, by direction, in the order of arrival.
    pub(super) waiting: [VecDeque<WaitingRequest>; 2],
}

impl WorkerQueue {
    pub(super) fn new(active: ActiveQueue, event_index: bool) -> Self {
        let ActiveQueue { index, queue, kick, restored } = active;
        let split = SplitQueue::new(queue, event_index, restored);
        let (state, stopped, waiting) = (QueueState::Running, Vec::new(), Default::default());
        Self { index, kick, split, state, stopped, waiting }
    }

    pub(super) fn into_active(self) -> ActiveQueue {
        let queue = self.split.into_inner();
        ActiveQueue { index: self.index, queue, kick: self.kick, restored: false }
    }

    pub(super) fn waiting(&mut self, direction: Direction) -> &mut VecDeque<WaitingRequest> {
        &mut self.waiting[direction as usize]
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

    /// The driver resets the queue: takes no more chains, and abandons the stopped and waiting requests.
    pub(super) fn leave(&mut self) {
        self.state = QueueState::Leaving;
        let waiting = self.waiting.iter_mut().flat_map(|queue| queue.drain(..));
        for chain in self.stopped.drain(..).chain(waiting.map(|request| request.chain)) {
            self.split.abandon(chain);
        }
    }

    /// Whether chains are available. Also true if the available index is invalid: `fetch` then finds and reports that.
    pub(super) fn has_work(&self, memory: &GuestMemory) -> bool {
        self.state == QueueState::Running && self.split.available(memory) != Ok(0)
    }
}

/// The queues of a worker, by position; `None` while the driver has a queue disabled.
pub(super) struct Queues(Vec<Option<WorkerQueue>>);

impl Queues {
    pub(super) fn new(positions: usize) -> Self {
        Self((0..positions).map(|_| None).collect())
    }

    pub(super) fn positions(&self) -> std::ops::Range<usize> {
        0..self.0.len()
    }

    /// The entry for `position`, to put a queue there. `None`: the worker has no such position.
    pub(super) fn entry(&mut self, position: usize) -> Option<&mut Option<WorkerQueue>> {
        self.0.get_mut(position)
    }

    pub(super) fn find(&self, position: usize) -> Option<&WorkerQueue> {
        self.0.get(position)?.as_ref()
    }

    pub(super) fn find_mut(&mut self, position: usize) -> Option<&mut WorkerQueue> {
        self.0.get_mut(position)?.as_mut()
    }

    /// The queue at `position`, of which the caller has a chain: a queue stays until none of its chains is outstanding.
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

    /// Takes the queue at `position` out when nothing of it is outstanding.
    pub(super) fn take_if_empty(&mut self, position: usize) -> Option<WorkerQueue> {
        self.0.get_mut(position)?.take_if(|queue| queue.split.outstanding() == 0)
    }

    pub(super) fn into_active(self) -> impl Iterator<Item = ActiveQueue> {
        self.0.into_iter().flatten().map(WorkerQueue::into_active)
    }

    /// The position of the queue that has the oldest waiting request in this direction. `None`: none waits.
    pub(super) fn oldest_waiting(&self, direction: Direction) -> Option<usize> {
        let first = |(at, queue): (usize, &WorkerQueue)| {
            Some((queue.waiting[direction as usize].front()?.started, at))
        };
        self.iter().filter_map(first).min().map(|(_, at)| at)
    }

    pub(super) fn is_waiting(&self) -> bool {
        self.iter().any(|(_, queue)| queue.waiting.iter().any(|waiting| !waiting.is_empty()))
    }
}
