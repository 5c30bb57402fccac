//! What a boot protocol passes to the kernel.

use vm_memory::GuestAddress;

use crate::memory::Range;

/// A range of a file and its place in guest memory: `length` bytes at `offset` of the file belong to the guest-physical
/// `address`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the text above names the fields")]
pub struct FileRange {
    pub offset: u64,
    pub address: GuestAddress,
    pub length: u64,
}

/// What either boot protocol passes to the kernel besides the command line, which has a fixed address.
pub(super) struct Parameters<'a> {
    pub(super) map: &'a [Range],
    pub(super) initrd: Option<FileRange>,
    pub(super) rsdp: Option<GuestAddress>,
}
