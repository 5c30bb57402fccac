//! The split virtqueue (virtio 1.2 §2.7), for any kind of device.
//!
//! A device that serves a queue holds a [`SplitQueue`]. It takes [`DescriptorChain`] tokens from the available ring,
//! has [`SplitQueue::walk`] turn each chain into lists of guest ranges ([`ChainBuffers`]), and in the end completes or
//! abandons each token. [`SplitQueue::publish`] shows the driver the completed chains, and notes whether the driver
//! wants an interrupt for them. When to send that one is the device's decision, by `coalesce`.
//!
//! The invariant: each chain that was taken is completed or abandoned exactly once. The token enforces it, since
//! dropping one panics in a debug build and is logged in a release build. Everything in the rings is the driver's to
//! change at any moment, so each field is read once and checked after it was read. A ring that breaks the rules gives a
//! [`QueueError`], and the device decides what becomes of the queue.
//!
//! This module leaves to the device: what a chain means, when to interrupt, and the queue's eventfd.

mod chain;
mod coalesce;
pub(crate) mod memory;
mod split;

pub(crate) use chain::{CHAIN_MAX, total, write_at};
pub use chain::{ChainBuffers, ChainError};
pub use split::{DescriptorChain, QueueError, SplitQueue};
