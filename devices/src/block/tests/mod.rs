//! The device as a driver sees it: data, status byte, used length and interrupt.

mod batching;
mod configuration;
mod disk;
mod driver;
mod exhaustive;
mod fuzz;
mod interrupts;
mod lifecycle;
mod machine;
mod policy;
mod properties;
mod requests;
mod rig;
mod rings;
mod scsi;
mod segments;
mod standstill;
mod threshold;
mod throttling;

pub(in crate::block) use disk::TestDisk;
