//! Gives a disk another size while the machine runs.
//!
//! A capability: QMP's `block_resize` asks for it. The disk's job thread does it, because it takes minutes for some formats, and
//! wakes the main loop. [`Reports`](super::Reports) then looks for its result.

use std::sync::Arc;

use super::{Machine, MachineDisk, MachineEvent};
use crate::error::Error;

#[derive(Debug, thiserror::Error)]
#[error("disk {0}: cannot change its size")]
struct ResizeError(String, #[source] std::io::Error);

impl Machine {
    /// Makes the disk `id` `bytes` long. Returns the number of the `Done` event. `None`: there is no disk with that `id`.
    pub(crate) fn resize(&mut self, id: &str, bytes: u64) -> Option<u64> {
        let job = self.next_job();
        let disk = self.hardware.disks.iter_mut().find(|disk| disk.config.id == id)?;
        let (image, id) = (Arc::clone(&disk.image), id.to_owned());
        let resize = move || {
            let failed = |error| Error::Capability(ResizeError(id, error).into());
            image.resize(bytes).map_err(failed)
        };
        disk.resizes.push((job, disk.job_thread.run(resize)));
        Some(job)
    }

    /// Sends the `Done` event of each resize that is over.
    pub(super) fn finish_resizes(&mut self) {
        let Self { hardware, pending_events, .. } = self;
        for MachineDisk { resizes, handle, .. } in &mut hardware.disks {
            resizes.retain(|(job, pending)| {
                let Some(result) = pending.poll() else { return true };
                // After a failure, too: the owner of a block device may have resized it.
                handle.capacity_changed();
                pending_events.push(MachineEvent::Done(*job, result));
                false
            });
        }
    }
}
