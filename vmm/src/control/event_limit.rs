//! Limits how many events clients get about a disk's I/O errors, as QEMU does. A guest can cause any number of errors, and a client
//! with too many unread events is disconnected.

use std::time::Duration;

use devices::block::{BlockEvent, ErrorAction};
use serde_json::Value;
use vmm_sys_util::timerfd::TimerFd;

use super::event_messages::message;
use crate::machine::MachineEvent;

/// A disk's first error is reported at once and begins an interval. Of the errors within it, the last is reported when it is over.
const INTERVAL: Duration = Duration::from_secs(1);

/// The disks that reported an error in the last interval.
pub(super) struct EventLimit {
    pub(super) timer: TimerFd,
    /// Each disk's name, and the last message that was held back.
    disks: Vec<(String, Option<Value>)>,
}

impl EventLimit {
    pub(super) fn new() -> std::io::Result<Self> {
        Ok(Self { timer: TimerFd::new()?, disks: Vec::new() })
    }

    /// The message to send for an event now. An error that stops the machine is never held back.
    pub(super) fn admit(&mut self, event: &MachineEvent) -> Option<Value> {
        let message = message(event)?;
        let MachineEvent::Disk(BlockEvent::IoError { device, action, .. }) = event else {
            return Some(message);
        };
        if *action == ErrorAction::Stop {
            return Some(message);
        }
        if let Some((_, held)) = self.disks.iter_mut().find(|(name, _)| name == device) {
            *held = Some(message);
            return None;
        }
        self.disks.push((device.clone(), None));
        self.start_interval();
        Some(message)
    }

    /// Returns the messages that were held back, when the interval is over.
    pub(super) fn expire(&mut self) -> Vec<Value> {
        self.disks.retain(|(_, held)| held.is_some());
        if !self.disks.is_empty() {
            self.start_interval();
        }
        self.disks.iter_mut().filter_map(|(_, held)| held.take()).collect()
    }

    fn start_interval(&mut self) {
        if let Err(error) = self.timer.reset(INTERVAL, None) {
            tracing::warn!("--qmp: the rate of disk events cannot be limited: {error}");
            self.disks.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use devices::block::Kind;
    use devices::disk::DiskError;

    use super::*;

    #[test]
    fn a_disk_reports_its_first_error_at_once_and_the_last_one_later() {
        let error = |device: &str, action, errno| {
            MachineEvent::Disk(BlockEvent::IoError {
                device: device.to_owned(),
                operation: Kind::Write,
                action,
                error: DiskError::Host(errno),
            })
        };
        let mut limit = EventLimit::new().unwrap();
        assert!(limit.admit(&error("vda", ErrorAction::Report, libc::EIO)).is_some());
        for _ in 0..1000 {
            assert!(limit.admit(&error("vda", ErrorAction::Report, libc::EIO)).is_none());
        }
        assert!(limit.admit(&error("vda", ErrorAction::Report, libc::ENODEV)).is_none());
        assert!(limit.admit(&error("vda", ErrorAction::Stop, libc::EIO)).is_some());
        assert!(limit.admit(&error("vdb", ErrorAction::Report, libc::EIO)).is_some());
        assert!(limit.admit(&MachineEvent::Stop).is_some());
        let held = limit.expire();
        assert_eq!(held.len(), 1);
        assert_eq!(held[0]["data"]["reason"], "No such device");
        assert!(limit.admit(&error("vda", ErrorAction::Report, libc::EIO)).is_none());
        assert!(limit.admit(&error("vdb", ErrorAction::Report, libc::EIO)).is_some());
    }
}
