//! Wakes a worker when a request that a fault holds back may complete, or when the inner engine has completions.
//!
//! A worker watches one descriptor of its engine. With faults that is an epoll instance, which is readable when the engine's own
//! descriptor, a timer or an eventfd is. So no thread waits for a delay, and other requests of the worker go on.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
use vmm_sys_util::timerfd::TimerFd;

use crate::log_limit::LogLimit;

pub(super) struct Alarm {
    epoll: Epoll,
    timer: TimerFd,
    /// Written to when the rules change, so that held requests may have to complete.
    pub(super) wake: Arc<EventFd>,
    limit: LogLimit,
}

impl Alarm {
    /// `engine` is the descriptor of the inner engine. No descriptor is ever read: epoll reports each new event as an edge.
    pub(super) fn new(engine: Option<RawFd>) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        let timer = TimerFd::new().map_err(io::Error::from)?;
        let wake = Arc::new(EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?);
        for descriptor in [Some(timer.as_raw_fd()), Some(wake.as_raw_fd()), engine] {
            let edges = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, 0);
            descriptor.map_or(Ok(()), |fd| epoll.ctl(ControlOperation::Add, fd, edges))?;
        }
        Ok(Self { epoll, timer, wake, limit: LogLimit::default() })
    }

    /// Wakes the worker after `wait`. An earlier call no longer has an effect.
    pub(super) fn set(&mut self, wait: Duration) {
        // A timer set to zero never expires.
        if let Err(error) = self.timer.reset(wait.max(Duration::from_micros(1)), None) {
            self.limit.warn(format_args!("fault=delay: cannot set the timer: {error}"));
        }
    }
}

impl AsRawFd for Alarm {
    fn as_raw_fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }
}
