//! `fault=` of disks: puts faults around an image, and ends delays when the machine is to stand still. A capability: the builder
//! calls [`over`] and [`source`], and `devices::disk::injected_faults` does the rest.

use std::sync::Arc;

use devices::disk::Disk;
use devices::disk::injected_faults;

use crate::config::DiskConfig;
use crate::machine::{DiskState, Machine, MachineEvent};
use crate::sources::{Poller, Source};

/// Puts the faults of each disk around its image. `cli` has checked what the user wrote; `none` is no rule.
pub(crate) fn over(images: &mut [Arc<dyn Disk>], disks: &[DiskConfig]) {
    for (image, disk) in
        images.iter_mut().zip(disks).filter(|(_, disk)| !disk.image.faults.is_empty())
    {
        let rules = disk.image.faults.iter().filter_map(|rule| rule.parse().ok()).collect();
        *image = injected_faults::over(Arc::clone(image), rules);
    }
}

/// What ends delays, if a disk may have some.
pub(crate) fn source(disks: &[DiskConfig]) -> Option<Box<dyn Source>> {
    let has_faults = disks.iter().any(|disk| !disk.image.faults.is_empty());
    has_faults.then(|| Box::new(DelayEnd) as _)
}

/// Sees to it that no standstill waits for a delay. It has no descriptor.
struct DelayEnd;

impl Source for DelayEnd {
    fn watch(&mut self, _: &mut Poller<'_, '_>) -> event_manager::Result<()> {
        Ok(())
    }

    fn process(&mut self, _: u8, _: &mut Poller<'_, '_>, _: &mut Machine) {}

    fn on_events(
        &mut self,
        _: &[MachineEvent],
        _: &mut Poller<'_, '_>,
        machine: &mut Machine,
    ) -> bool {
        for disk in &machine.hardware.disks {
            if let Some(faults) = injected_faults::of(&*disk.image) {
                faults.hurry(!matches!(disk.state, DiskState::Running));
            }
        }
        false
    }
}
