//! Parses the description of a saved machine, and checks that its parts agree with each other. Anyone may have written it.
//!
//! [`saved`](super::saved) has its fields. A restore calls both functions for the user's file and for each of its bases.

use arch::memory::ram_ranges;

use super::SnapshotError;
use super::core_file::CoreFile;
use super::saved::{MAJOR, NEEDS_BASE, SavedMachine, Versioned};

/// Parses the description, if its format is one that this program can read.
pub(super) fn parse(json: &[u8]) -> Result<SavedMachine, SnapshotError> {
    let saved = serde_json::from_slice::<SavedMachine>(json);
    // Another format may also be the reason why it cannot be parsed.
    let format = match &saved {
        Ok(saved) => &saved.format,
        Err(_) => {
            &serde_json::from_slice::<Versioned>(json).map_err(SnapshotError::Description)?.format
        }
    };
    if format.major != MAJOR {
        return Err(SnapshotError::Format(format.major, format.minor));
    }
    let unknown: Vec<_> = format.needs.iter().filter(|word| *word != NEEDS_BASE).cloned().collect();
    if !unknown.is_empty() {
        return Err(SnapshotError::Needs(unknown.join(", ")));
    }
    saved.map_err(SnapshotError::Description)
}

/// Checks that the parts of the description agree with each other and with the file's RAM.
pub(super) fn check(saved: &SavedMachine, core: &CoreFile) -> Result<(), SnapshotError> {
    let damaged = SnapshotError::Damaged;
    let config = &saved.config;
    if !(1..=arch::layout::CPUS_MAX).contains(&config.cpus)
        || saved.vcpus.len() != config.cpus as usize
    {
        return Err(damaged("the number of vCPUs"));
    }
    if saved.base.is_some() != core.pages.is_some() {
        return Err(damaged("its base"));
    }
    let serial_ports = config.serial.iter().filter(|present| **present).count();
    if saved.serial.len() != serial_ports {
        return Err(damaged("the number of serial ports"));
    }
    if saved.disks.len() > arch::layout::VIRTIO_MMIO_MAX {
        return Err(damaged("the number of disks"));
    }
    // They become names of threads and parts of messages.
    let mut names = saved.disks.iter().flat_map(|disk| [&disk.config.id, &disk.config.device.name]);
    if names.any(|name| name.contains(char::is_control)) {
        return Err(damaged("the name of a disk"));
    }
    let pages = config.memory.is_multiple_of(arch::layout::PAGE_SIZE);
    let total: u64 = core.segments.iter().map(|segment| segment.length).sum();
    if !pages || total != config.memory {
        return Err(damaged("the size of memory"));
    }
    let ram = ram_ranges(config.memory);
    let ranges = ram.iter().map(|(start, length)| (start.0, *length as u64));
    if !ranges.eq(core.segments.iter().map(|segment| (segment.address, segment.length))) {
        return Err(damaged("the ranges of memory"));
    }
    Ok(())
}
