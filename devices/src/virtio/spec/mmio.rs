//! The virtio-mmio transport's registers (virtio 1.2 §4.2.2).

/// MagicValue: "virt" in little-endian ASCII.
pub const MAGIC: u32 = u32::from_le_bytes(*b"virt");
/// Version: 2; 1 was the legacy interface (§4.2.4).
pub const VERSION: u32 = 2;
/// VendorID: "mVMM". The specification leaves the value to the vendor; drivers only show it.
pub const VENDOR_ID: u32 = u32::from_le_bytes(*b"mVMM");

/// Where the device's configuration space starts; control registers lie below.
pub const CONFIG_OFFSET: u64 = 0x100;
/// Where the driver's notifications arrive: the address of the ioeventfds.
pub const QUEUE_NOTIFY_OFFSET: u64 = Register::QueueNotify as u64;
/// Where the driver's acknowledgements of interrupts arrive.
pub const INTERRUPT_ACK_OFFSET: u64 = Register::InterruptAck as u64;

/// InterruptStatus bit: a used ring moved.
pub const INTERRUPT_USED_BUFFER: u32 = 1;
/// InterruptStatus bit: the configuration space or the device status changed.
pub const INTERRUPT_CONFIG_CHANGE: u32 = 2;

/// Declares the registers once: as names, as offsets (`as u64`), and as the way back from an offset.
macro_rules! registers {
    ($($(#[$doc:meta])* $name:ident = $offset:literal,)*) => {
        /// A control register: 32 bits wide, accessed whole and aligned (§4.2.2.2).
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u64)]
        pub enum Register {
            $($(#[$doc])* $name = $offset,)*
        }

        impl Register {
            /// All of them, in ascending order.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// The register at `offset` bytes into the window, if there is one.
            pub fn decode(offset: u64) -> Option<Self> {
                match offset {
                    $($offset => Some(Self::$name),)*
                    _ => None,
                }
            }
        }
    };
}

registers! {
    /// R: [`MAGIC`].
    MagicValue = 0x000,
    /// R: [`VERSION`].
    Version = 0x004,
    /// R: the device type (§5); 0 is a placeholder without a device.
    DeviceId = 0x008,
    /// R: [`VENDOR_ID`].
    VendorId = 0x00c,
    /// R: 32 of the offered feature bits, chosen by `DeviceFeaturesSel`.
    DeviceFeatures = 0x010,
    /// W: 0 for feature bits 0-31, 1 for 32-63.
    DeviceFeaturesSel = 0x014,
    /// W: 32 of the feature bits that the driver accepts, chosen by `DriverFeaturesSel`.
    DriverFeatures = 0x020,
    /// W: as `DeviceFeaturesSel`.
    DriverFeaturesSel = 0x024,
    /// W: the index of the queue that the queue registers below speak of.
    QueueSel = 0x030,
    /// R: the selected queue's largest size in elements; 0: there is no such queue. Called QueueSizeMax since 1.3.
    QueueNumMax = 0x034,
    /// W: the selected queue's size in elements. Called QueueSize since 1.3.
    QueueNum = 0x038,
    /// RW: 1 enables the selected queue.
    QueueReady = 0x044,
    /// W: the index of a queue with new buffers.
    QueueNotify = 0x050,
    /// R: why the interrupt was raised.
    InterruptStatus = 0x060,
    /// W: clears the bits that are written as 1.
    InterruptAck = 0x064,
    /// RW: the device status (§2.1); writing 0 resets the device.
    Status = 0x070,
    /// W: guest-physical address of the descriptor table, low half.
    QueueDescLow = 0x080,
    /// W: its high half.
    QueueDescHigh = 0x084,
    /// W: guest-physical address of the available ring, low half.
    QueueDriverLow = 0x090,
    /// W: its high half.
    QueueDriverHigh = 0x094,
    /// W: guest-physical address of the used ring, low half.
    QueueDeviceLow = 0x0a0,
    /// W: its high half.
    QueueDeviceHigh = 0x0a4,
    /// W: the shared memory region that the SHM registers below speak of (§2.10).
    ShmSel = 0x0ac,
    /// R: the region's length in bytes, low half; all ones: no such region.
    ShmLenLow = 0x0b0,
    /// R: its high half.
    ShmLenHigh = 0x0b4,
    /// R: the region's guest-physical address, low half; all ones: no such region.
    ShmBaseLow = 0x0b8,
    /// R: its high half.
    ShmBaseHigh = 0x0bc,
    /// RW, with `F_RING_RESET`: 1 resets the selected queue and reads back as 1 until that is done (§4.2.2.1).
    QueueReset = 0x0c0,
    /// R: changes whenever a multi-access read of the configuration space could have been torn (§2.5.1).
    ConfigGeneration = 0x0fc,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_are_aligned_ascending_and_decode_to_themselves() {
        for pair in Register::ALL.windows(2) {
            assert!((pair[0] as u64) < pair[1] as u64);
        }
        for register in Register::ALL {
            assert_eq!(Register::decode(*register as u64), Some(*register));
            assert_eq!(*register as u64 % 4, 0);
            assert!((*register as u64) < CONFIG_OFFSET);
        }
        assert_eq!(Register::decode(0x001), None);
        assert_eq!(Register::decode(CONFIG_OFFSET), None);
    }
}
