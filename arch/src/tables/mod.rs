//! What tells the guest about its hardware: ACPI, or for kernels without it an MPTable.

pub mod acpi;
pub mod mptable;

use crate::WriteError;

/// Why the tables cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// More processors or devices than the tables' place in memory holds.
    #[error("the {what} take {size} bytes, and there is room for {room}; use fewer vCPUs")]
    TooLarge {
        /// Which tables.
        what: &'static str,
        /// Bytes they take.
        size: usize,
        /// Bytes there are.
        room: usize,
    },
    /// Guest memory ends before the tables' place.
    #[error(transparent)]
    Write(#[from] WriteError),
}

/// The byte that makes `bytes` sum to 0, as both kinds of table want.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)).wrapping_neg()
}
