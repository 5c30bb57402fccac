//! Virtio: the facts of the specification, the device trait, and the virtio-mmio transport.

mod active_queue;
pub mod device;
pub mod drain;
pub mod interrupt;
pub mod mmio;
#[cfg(test)]
pub(crate) mod model;
pub mod queue;
pub mod registers;
pub mod spec;
