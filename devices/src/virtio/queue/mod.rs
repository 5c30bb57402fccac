//! The split virtqueue (virtio 1.2 §2.7), for any kind of device.
//!
//! A device that serves a queue holds a [`SplitQueue`]. It takes [`DescriptorChain`] tokens from the available ring, and
//! calls [`SplitQueue::walk`] to turn each chain into lists of guest ranges ([`ChainBuffers`]). In the end it completes or
//! abandons each token. [`SplitQueue::publish`] shows the driver the completed chains, and notes whether the driver
//! wants an interrupt for them. The device asks `coalesce` when to send that interrupt.
//!
//! The invariant: each chain that was taken is completed or abandoned exactly once. The token enforces it: a token that is
//! dropped panics in a debug build and is logged in a release build. The driver can change the rings at any moment, so each
//! field is copied once and the copy is checked. A ring that breaks the rules gives a [`QueueError`], and the device decides
//! what becomes of the queue.
//!
//! This module leaves to the device: what a chain means, when to interrupt, and the queue's eventfd.

mod chain;
mod coalesce;
pub(crate) mod memory;
mod split;

pub(crate) use chain::CHAIN_MAX;
pub(crate) use chain::ranges::{total, write_into};
pub use chain::{ChainBuffers, ChainError};
pub use split::{DescriptorChain, QueueError, SplitQueue};
