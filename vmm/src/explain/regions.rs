//! The guest-physical address space: what the guest is told of it, what memory holds at the entry, and registers of devices.

use std::fmt::{self, Display};

use arch::layout;
use arch::machine_layout::MachineLayout;
use arch::memory::Kind;

use crate::boot_image::BootImage;

/// A range of addresses that is not empty.
#[derive(Clone, Debug)]
pub struct Region {
    /// What it is a part of. Those of one part do not overlap.
    pub part: Part,
    /// Its first address.
    pub start: u64,
    /// Its bytes.
    pub length: u64,
    /// What is there.
    pub name: String,
}

/// A view of the address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The memory map.
    Map,
    /// What memory holds.
    Content,
    /// Registers of devices.
    Registers,
}

impl Part {
    /// A few words for it.
    pub fn title(self) -> &'static str {
        match self {
            Self::Map => "memory map",
            Self::Content => "content at the entry",
            Self::Registers => "registers of devices",
        }
    }

    fn heading(self) -> &'static str {
        match self {
            Self::Map => "Memory map that the guest is given",
            Self::Content => "Content of memory before the first instruction; the rest is zero",
            Self::Registers => "Registers of devices in the hole below 4 GiB",
        }
    }
}

impl Display for Region {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let last = self.start.saturating_add(self.length).saturating_sub(1);
        write!(out, "{:#014x}-{last:#014x}  {}", self.start, self.name)
    }
}

/// All regions, those of a part in the order of their addresses.
pub(super) fn regions(layout: &MachineLayout, image: Option<&BootImage>) -> Vec<Region> {
    let mut regions: Vec<_> = [Part::Map, Part::Content, Part::Registers]
        .into_iter()
        .flat_map(|part| {
            let ranges = match part {
                Part::Map => memory_map(layout),
                Part::Content => image.map(content).unwrap_or_default(),
                Part::Registers => registers(layout),
            };
            ranges.into_iter().map(move |(start, length, name)| Region {
                part,
                start,
                length,
                name,
            })
        })
        .collect();
    regions.retain(|region| region.length > 0);
    regions
}

/// The heading and the rows of a part, if it has any.
pub(super) fn rows(regions: &[Region], part: Part) -> Vec<String> {
    let rows: Vec<_> = regions.iter().filter(|region| region.part == part).collect();
    let heading = (!rows.is_empty()).then(|| part.heading().to_owned());
    heading.into_iter().chain(rows.iter().map(|region| format!("  {region}"))).collect()
}

type Ranges = Vec<(u64, u64, String)>;

fn memory_map(layout: &MachineLayout) -> Ranges {
    let entries = layout.memory_map.iter().map(|entry| {
        let kind = match entry.kind {
            Kind::Ram => "RAM",
            Kind::Reserved => "reserved",
            Kind::Acpi => "ACPI tables",
        };
        (entry.start, entry.size, kind.to_owned())
    });
    entries.collect()
}

fn content(image: &BootImage) -> Ranges {
    let plan = &image.plan;
    let mut placed: Vec<_> = plan
        .structures
        .iter()
        .map(|structure| (structure.address.0, structure.bytes.len() as u64, structure.name))
        .chain(plan.kernel.iter().map(|file| (file.address.0, file.length, "kernel")))
        .chain(plan.initrd.iter().map(|file| (file.address.0, file.length, "initrd")))
        .map(|(start, length, name)| (start, length, name.to_owned()))
        .collect();
    placed.sort_unstable();
    placed
}

fn registers(layout: &MachineLayout) -> Ranges {
    let windows = layout.disks.iter().enumerate();
    let mut registers: Vec<_> = windows
        .map(|(index, window)| {
            (window.base.0, window.size, format!("disk {index}, interrupt {}", window.gsi))
        })
        .collect();
    registers.push((layout::IOAPIC.0, layout::PAGE_SIZE, "IOAPIC".to_owned()));
    registers.push((layout::LAPIC.0, layout::PAGE_SIZE, "local APICs".to_owned()));
    registers
}
