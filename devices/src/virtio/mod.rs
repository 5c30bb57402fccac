//! Virtio: the facts of the specification, the device trait, and the virtio-mmio transport.

pub mod device;
pub mod mmio;
pub mod spec;
