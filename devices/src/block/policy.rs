//! The error policy (`rerror`, `werror`): what becomes of a request that the host failed.

use std::time::Instant;

use super::events::{BlockEvent, ErrorAction};
use super::options::ErrorPolicy;
use super::ring::Popped;
use super::slots::Slot;
use super::stats::{IoStatus, Kind};
use super::worker::{Arrival, Worker};
use crate::disk::DiskError;
use crate::virtio::spec::blk;

/// A request that the `stop` policy kept. Its descriptors still belong to the device, so that queue and head say all
/// there is to know: the chain is read anew when it is retried, also after a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeptRequest {
    /// Index of the queue.
    pub queue: u16,
    /// The chain's first descriptor.
    pub head: u16,
}

/// What `policy` says to do about `error`.
fn decide(policy: ErrorPolicy, error: DiskError) -> ErrorAction {
    match policy {
        ErrorPolicy::Report => ErrorAction::Report,
        ErrorPolicy::Ignore => ErrorAction::Ignore,
        ErrorPolicy::Stop => ErrorAction::Stop,
        ErrorPolicy::Enospc if error == DiskError::NoSpace => ErrorAction::Stop,
        ErrorPolicy::Enospc => ErrorAction::Report,
    }
}

impl Worker {
    /// A transfer failed. A merged one says nothing about its single requests: each is tried again, alone.
    pub(super) fn fail(&mut self, tag: u32, error: DiskError) {
        if self.slots.get(tag).next.is_none() {
            let slot = self.slots.remove(tag);
            return self.fail_one(slot, error);
        }
        let mut member = Some(tag);
        while let Some(tag) = member {
            let slot = self.slots.remove(tag);
            member = slot.next;
            self.retry(slot.ring, slot.popped, slot.started);
        }
    }

    fn fail_one(&mut self, slot: Slot, error: DiskError) {
        if slot.scsi.is_some() {
            tracing::debug!(disk = self.shared.options.name, %error, "the host refused a SCSI command");
            return self.answer_scsi(slot);
        }
        let code = match error {
            DiskError::Unsupported => return self.answer(slot, blk::S_UNSUPP),
            // The image shrank under a request that was in bounds when it was parsed: the driver's to know.
            DiskError::OutOfRange => blk::S_IOERR,
            DiskError::Host(_) | DiskError::NoSpace => {
                let policies = &self.shared.options;
                let policy = if slot.kind == Kind::Read { policies.read_errors } else { policies.write_errors };
                let action = decide(policy, error);
                self.report(&slot, error, action);
                match action {
                    ErrorAction::Report => blk::S_IOERR,
                    ErrorAction::Ignore => blk::S_OK,
                    ErrorAction::Stop => return self.parked.push((slot.ring, slot.popped)),
                }
            }
        };
        self.answer(slot, code);
    }

    fn report(&mut self, slot: &Slot, error: DiskError, action: ErrorAction) {
        let nospace = error == DiskError::NoSpace;
        if action == ErrorAction::Stop {
            self.shared.set_io_status(if nospace { IoStatus::NoSpace } else { IoStatus::Failed });
        }
        if let Some(suppressed) = self.shared.limits.host_error.admit() {
            let (disk, kind) = (&self.shared.options.name, slot.kind);
            tracing::warn!(disk, ?kind, %error, ?action, suppressed, "the host failed a request");
        }
        (self.shared.events)(BlockEvent::IoError {
            device: self.shared.options.name.clone(),
            operation: slot.kind,
            action,
            nospace,
            reason: error.to_string(),
        });
    }

    /// Starts a chain over that was taken before: after a failed merge, or when the VM goes on after a stop.
    fn retry(&mut self, position: usize, popped: Popped, started: Instant) {
        let rules = self.rules();
        if let Err(error) = self.begin(position, popped, &rules, started, Arrival::Retried) {
            self.give_up(position, error);
        }
    }

    /// Retries what the error policy kept, in order, then serves what has arrived since.
    pub(super) fn resume(&mut self) {
        self.paused = false;
        let now = Instant::now();
        for (position, popped) in std::mem::take(&mut self.parked) {
            self.retry(position, popped, now);
        }
        self.engine.commit();
        self.reap();
        self.release(now);
        for position in 0..self.rings.len() {
            self.serve(position);
        }
    }

    /// What the policy keeps, in order.
    pub(super) fn kept(&self) -> Vec<KeptRequest> {
        let kept = |(position, popped): &(usize, Popped)| {
            let queue = self.ring(*position)?.index();
            Some(KeptRequest { queue, head: popped.head() })
        };
        self.parked.iter().filter_map(kept).collect()
    }

    /// Keeps a request that was kept when the snapshot was made. `false`: its queue is not there, or has no such head.
    pub(super) fn park(&mut self, position: usize, head: u16) -> bool {
        let popped = self.rings.get_mut(position).and_then(Option::as_mut).and_then(|ring| ring.adopt(head));
        popped.map(|popped| self.parked.push((position, popped))).is_some()
    }

    /// Drops what was kept of the ring at `position`: its driver has reset it.
    pub(super) fn forget_kept(&mut self, position: usize) {
        let Some(Some(ring)) = self.rings.get_mut(position) else { return };
        for (owner, popped) in std::mem::take(&mut self.parked) {
            if owner == position {
                ring.forget(popped);
            } else {
                self.parked.push((owner, popped));
            }
        }
    }
}
