//! Every order of what can happen to a worker: requests, completions, host errors, a pause, a queue that leaves and comes back.

use super::driver::{BUFFERS, Sent};
use super::rig::Rig;
use crate::block::ErrorPolicy;
use crate::disk::DiskError;
use crate::virtio::drain::{Drain, Party};
use crate::virtio::spec::blk;

/// Events in a sequence: all of them in CI, and more under `make soak`.
const EVENTS: u32 = 4;
const EVENTS_SOAK: u32 = 6;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Event {
    /// The driver sends a request on this queue, and kicks.
    Send(u16),
    /// The oldest transfer finishes.
    Finish,
    /// The host fails the oldest transfer, so that the request stops.
    Fail,
    Pause,
    Resume,
    /// The driver resets queue 0.
    Leave,
    /// The driver enables queue 0 again.
    Return,
}

const ALL: [Event; 8] = [
    Event::Send(0),
    Event::Send(1),
    Event::Finish,
    Event::Fail,
    Event::Pause,
    Event::Resume,
    Event::Leave,
    Event::Return,
];

struct Play {
    rig: Rig,
    /// By queue: requests since the queue was enabled.
    sent: [Vec<Sent>; 2],
    paused: bool,
    leaving: Option<Drain>,
}

impl Play {
    fn new() -> Self {
        let rig = Rig::with(|setup| {
            let options = &mut setup.options;
            (options.read_errors, options.write_errors) = (ErrorPolicy::Stop, ErrorPolicy::Stop);
            options.num_queues = 2;
            options.poll = std::time::Duration::ZERO;
            (setup.queues, setup.ring_size, setup.memory) = (2, 16, BUFFERS + 0x1_0000);
        });
        rig.disk.hold();
        Self { rig, sent: Default::default(), paused: false, leaving: None }
    }

    fn has_left(&self) -> bool {
        self.leaving.as_ref().is_some_and(Drain::is_done)
    }

    /// Plays the event, as the worker's thread would. `false`: it cannot happen now.
    fn play(&mut self, event: Event) -> bool {
        let rig = &mut self.rig;
        match event {
            Event::Send(0) if self.leaving.is_some() => return false,
            Event::Send(queue) => {
                let number = usize::from(queue);
                let sector = self.sent[number].len() as u64 * 2 + u64::from(queue);
                // Neighbors are not merged, so that each transfer is a request.
                let sent = match self.sent[number].len() % 2 {
                    0 => rig.driver.send_write(number, sector * 4, &[7; 512]),
                    _ => rig.driver.send_read(number, sector * 4, 512),
                };
                self.sent[number].push(sent);
                let begun = rig.disk.held();
                rig.worker().serve(number);
                assert!(
                    !self.paused || rig.disk.held() == begun,
                    "a paused worker began a request"
                );
            }
            Event::Finish | Event::Fail if rig.disk.held() == 0 => return false,
            Event::Finish => {
                rig.disk.heal();
                rig.release(1);
            }
            Event::Fail => {
                rig.disk.fail(DiskError::Host(libc::EIO));
                rig.release(1);
                rig.disk.heal();
            }
            Event::Pause => {
                rig.worker().pause();
                self.paused = true;
            }
            Event::Resume => {
                rig.worker().resume();
                self.paused = false;
            }
            Event::Leave if self.leaving.is_some() => return false,
            Event::Leave => {
                let drain = Drain::new(1);
                rig.worker().reset_queue(0, Party(drain.clone()));
                self.leaving = Some(drain);
            }
            Event::Return if !self.has_left() => return false,
            Event::Return => self.come_back(),
        }
        let had_left = self.has_left();
        self.rig.worker().advance_resets();
        if self.has_left() && !had_left {
            // What the device writes from now on is not the driver's any more.
            self.rig.driver.reset_ring(0);
            self.sent[0].clear();
        }
        true
    }

    fn come_back(&mut self) {
        let drain = self.leaving.take().unwrap();
        assert_eq!(drain.take_queues().len(), 1);
        let active = self.rig.driver.active(0);
        self.rig.worker().add_queue(0, active);
        self.rig.worker().serve(0);
    }

    /// Whatever happened: once the host answers and the operator resumes, each request is answered once, and rightly.
    fn check(mut self, events: &[Event]) {
        self.rig.worker().resume();
        while self.rig.disk.held() > 0 {
            self.rig.release(1);
        }
        assert!(self.rig.worker().stands_still(), "{events:?}");
        self.rig.worker().advance_resets();
        if let Some(drain) = &self.leaving {
            assert!(drain.is_done(), "{events:?}: the queue does not leave");
            // Answers from before it left may be there, or be given up.
            self.sent[0].clear();
            self.rig.driver.reset_ring(0);
            self.come_back();
        }
        for queue in 0..2 {
            let answered = self.rig.driver.used(queue);
            let mut heads: Vec<_> = answered.iter().map(|(head, _)| *head).collect();
            let mut sent: Vec<_> = self.sent[queue].iter().map(|sent| sent.head).collect();
            heads.sort_unstable();
            sent.sort_unstable();
            assert_eq!(heads, sent, "{events:?}, queue {queue}");
            for sent in &self.sent[queue] {
                assert_eq!(self.rig.driver.status(sent), blk::S_OK, "{events:?}, queue {queue}");
            }
        }
        let stopped: Vec<_> = self.rig.stopped();
        assert!(stopped.is_empty(), "{events:?}: {stopped:?}");
    }
}

#[test]
fn each_request_is_answered_once_in_every_order_of_events() {
    let soak = std::env::var_os("MINIVMM_SOAK").is_some();
    let length = if soak { EVENTS_SOAK } else { EVENTS };
    // Sequences whose events can happen, each longer by one than those before.
    let mut sequences = vec![Vec::new()];
    for _ in 0..length {
        let longer = |events: Vec<Event>| {
            ALL.iter().filter_map(move |event| {
                let events = [&events[..], &[*event]].concat();
                let mut play = Play::new();
                let possible = events.iter().all(|event| play.play(*event));
                possible.then(|| play.check(&events)).map(|()| events)
            })
        };
        sequences = sequences.into_iter().flat_map(longer).collect();
    }
    println!("{} sequences of {length} events", sequences.len());
    assert!(sequences.len() > 500);
}
