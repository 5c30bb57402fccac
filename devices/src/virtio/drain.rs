//! A reset or a pause under way: what [`VirtioDevice::reset`](super::device::VirtioDevice::reset) returns at once, so that no thread that
//! must answer (a vCPU, the main loop) waits for the host's disk. `devices/docs/follow-one-reset.md` walks through a reset.
//!
//! A drain has one or more *parties*: threads of the device, for a disk its worker threads. Each party takes no new requests and waits
//! for what the host already has. In a reset it hands its queues back ([`Party::hand_back`]). Then it drops its [`Party`], and from then
//! on does not touch guest memory. The drain is done when the last party has finished. It never fails, but may last as long as the host
//! keeps a request. So the main loop looks at a deadline, and a kick wakes a vCPU that waits.
//!
//! A thread waits for a drain in one of three ways:
//!
//! - by [`Drain::wait`] with a timeout;
//! - by [`Drain::on_done`], if it also waits for something else, as a vCPU does for a kick;
//! - by [`Drain::is_done`] now and then.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use super::active_queue::ActiveQueue;
use crate::lock;

/// A reset or a pause under way. Clones refer to the same one.
#[derive(Clone)]
pub struct Drain(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    done: Condvar,
}

#[derive(Default)]
struct State {
    /// Parties that have not finished.
    pending: usize,
    queues: Vec<ActiveQueue>,
    on_done: Vec<Box<dyn FnOnce() + Send>>,
}

impl Drain {
    /// A drain of that many parties; without any it is done.
    pub fn new(parties: usize) -> Self {
        let state = State { pending: parties, ..State::default() };
        Self(Arc::new(Shared { state: Mutex::new(state), done: Condvar::new() }))
    }

    /// A party has finished: called when its [`Party`] is dropped. `queues`: those that it hands back only now.
    pub fn finish(&self, queues: impl IntoIterator<Item = ActiveQueue>) {
        let mut state = lock(&self.0.state);
        state.queues.extend(queues);
        state.pending = state.pending.saturating_sub(1);
        if state.pending == 0 {
            let callbacks = std::mem::take(&mut state.on_done);
            drop(state);
            self.0.done.notify_all();
            callbacks.into_iter().for_each(|callback| callback());
        }
    }

    /// Whether all parties have finished, so that no thread of the device touches the guest memory of what is drained.
    pub fn is_done(&self) -> bool {
        lock(&self.0.state).pending == 0
    }

    /// Waits until the drain is done, for `timeout` at most. Returns whether it is done.
    pub fn wait(&self, timeout: Duration) -> bool {
        let pending = |state: &mut State| state.pending > 0;
        let waited = self.0.done.wait_timeout_while(lock(&self.0.state), timeout, pending);
        waited.unwrap_or_else(PoisonError::into_inner).0.pending == 0
    }

    /// Calls `callback` when the drain is done: at once if it is done already, else on the thread of the party that finishes last. It
    /// must not block: it is meant to wake a thread.
    pub fn on_done(&self, callback: impl FnOnce() + Send + 'static) {
        let mut state = lock(&self.0.state);
        if state.pending > 0 {
            state.on_done.push(Box::new(callback));
        } else {
            drop(state);
            callback();
        }
    }

    /// Takes the queues that were handed back so far, in index order.
    pub fn take_queues(&self) -> Vec<ActiveQueue> {
        let mut queues = std::mem::take(&mut lock(&self.0.state).queues);
        queues.sort_by_key(|queue| queue.index);
        queues
    }
}

/// One party of a drain. It finishes when this value is dropped, also if its thread ends by a panic: a thread that has ended
/// touches no guest memory.
pub struct Party(pub Drain);

impl Party {
    /// Hands back a queue of this party, for [`Drain::take_queues`]. The party has not finished by that.
    pub fn hand_back(&self, queue: ActiveQueue) {
        lock(&self.0.0.state).queues.push(queue);
    }
}

impl Drop for Party {
    fn drop(&mut self) {
        self.0.finish([]);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn a_drain_is_done_when_the_last_party_has_finished() {
        let drain = Drain::new(2);
        let (sender, called) = mpsc::channel();
        let early = sender.clone();
        drain.on_done(move || early.send("registered before").unwrap());
        drain.finish([]);
        assert!(!drain.is_done() && !drain.wait(Duration::from_millis(1)));
        assert!(called.try_recv().is_err());
        let other = drain.clone();
        let party = std::thread::spawn(move || other.finish([]));
        assert!(drain.wait(Duration::from_secs(60)) && drain.is_done());
        party.join().unwrap();
        drain.on_done(move || sender.send("registered after").unwrap());
        assert_eq!(called.iter().collect::<Vec<_>>(), ["registered before", "registered after"]);
        assert!(Drain::new(0).is_done());
    }
}
