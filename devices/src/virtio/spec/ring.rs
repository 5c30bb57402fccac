//! The split virtqueue's three areas (virtio 1.2 §2.7): offsets, sizes and flags, for a queue of `size` elements.
//!
//! ```text
//! descriptor table   16 bytes an element: address le64, length le32, flags le16, next le16          (§2.7.5)
//! available ring     flags le16, idx le16, ring[size] le16, used_event le16                         (§2.7.6)
//! used ring          flags le16, idx le16, ring[size] of {id le32, len le32}, avail_event le16      (§2.7.8)
//! ```

/// Bytes in a descriptor.
pub const DESCRIPTOR_SIZE: u64 = 16;
/// Descriptor flag: the chain goes on at `next`.
pub const DESC_F_NEXT: u16 = 1;
/// Descriptor flag: the device writes the buffer; without it the device reads it.
pub const DESC_F_WRITE: u16 = 2;
/// Descriptor flag, with `F_INDIRECT_DESC`: the buffer is a table of descriptors.
pub const DESC_F_INDIRECT: u16 = 4;

/// Available ring flag, without `F_EVENT_IDX`: the driver asks for no interrupts (§2.7.7).
pub const AVAIL_F_NO_INTERRUPT: u16 = 1;
/// Used ring flag, without `F_EVENT_IDX`: the device asks for no notifications (§2.7.10).
pub const USED_F_NO_NOTIFY: u16 = 1;

/// Offset in bytes of `idx` in the available and the used ring; `flags` is at 0.
pub const IDX: u64 = 2;
/// Offset in bytes of the first element of the available and the used ring.
pub const ELEMENTS: u64 = 4;
/// Bytes in an element of the available ring: the head's index.
pub const AVAILABLE_ELEMENT: u64 = 2;
/// Bytes in an element of the used ring: the head's index and the bytes written.
pub const USED_ELEMENT: u64 = 8;

/// Bytes in the descriptor table.
pub const fn descriptor_table_size(size: u16) -> u64 {
    DESCRIPTOR_SIZE * size as u64
}

/// Offset in bytes of `used_event`, behind the available ring's elements (§2.7.7).
pub const fn used_event(size: u16) -> u64 {
    ELEMENTS + AVAILABLE_ELEMENT * size as u64
}

/// Bytes in the available ring, `used_event` included.
pub const fn available_ring_size(size: u16) -> u64 {
    used_event(size) + 2
}

/// Offset in bytes of `avail_event`, behind the used ring's elements (§2.7.10).
pub const fn avail_event(size: u16) -> u64 {
    ELEMENTS + USED_ELEMENT * size as u64
}

/// Bytes in the used ring, `avail_event` included.
pub const fn used_ring_size(size: u16) -> u64 {
    avail_event(size) + 2
}

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use virtio_bindings::virtio_ring as linux;

    use super::*;

    #[test]
    fn the_layout_is_that_of_the_linux_header() {
        assert_eq!(size_of::<linux::vring_desc>() as u64, DESCRIPTOR_SIZE);
        assert_eq!(u32::from(DESC_F_NEXT), linux::VRING_DESC_F_NEXT);
        assert_eq!(u32::from(DESC_F_WRITE), linux::VRING_DESC_F_WRITE);
        assert_eq!(u32::from(DESC_F_INDIRECT), linux::VRING_DESC_F_INDIRECT);
        assert_eq!(u32::from(AVAIL_F_NO_INTERRUPT), linux::VRING_AVAIL_F_NO_INTERRUPT);
        assert_eq!(u32::from(USED_F_NO_NOTIFY), linux::VRING_USED_F_NO_NOTIFY);
        assert_eq!(offset_of!(linux::vring_avail, idx) as u64, IDX);
        assert_eq!(offset_of!(linux::vring_used, idx) as u64, IDX);
        assert_eq!(offset_of!(linux::vring_avail, ring) as u64, ELEMENTS);
        assert_eq!(offset_of!(linux::vring_used, ring) as u64, ELEMENTS);
        assert_eq!(size_of::<linux::vring_used_elem>() as u64, USED_ELEMENT);
        assert_eq!((available_ring_size(256), used_ring_size(256)), (518, 2054));
    }
}
