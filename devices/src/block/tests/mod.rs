//! The device as a driver sees it: data, status byte, used length and interrupt.

mod batching;
mod disk;
mod driver;
mod interrupts;
mod lifecycle;
mod policy;
mod properties;
mod requests;
mod rig;
mod rings;
mod scsi;
mod segments;
mod threshold;
mod throttling;

pub(in crate::block) use disk::TestDisk;
