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
    ($(#[$doc:meta])* $($name:ident = $offset:literal,)*) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[expect(missing_docs, reason = "the table describes each register")]
        #[repr(u64)]
        pub enum Register {
            $($name = $offset,)*
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
/// A control register: 32 bits wide, accessed whole and aligned (§4.2.2.2).
///
/// | register | access | meaning |
/// |---|---|---|
/// | `MagicValue` | R | [`MAGIC`]. |
/// | `Version` | R | [`VERSION`]. |
/// | `DeviceId` | R | The device type (§5); 0 is a placeholder without a device. |
/// | `VendorId` | R | [`VENDOR_ID`]. |
/// | `DeviceFeatures` | R | 32 of the offered feature bits, chosen by `DeviceFeaturesSel`. |
/// | `DeviceFeaturesSel` | W | 0 for feature bits 0-31, 1 for 32-63. |
/// | `DriverFeatures` | W | 32 of the feature bits that the driver accepts, chosen by `DriverFeaturesSel`. |
/// | `DriverFeaturesSel` | W | As `DeviceFeaturesSel`. |
/// | `QueueSel` | W | The index of the queue that the queue registers below speak of. |
/// | `QueueNumMax` | R | The selected queue's largest size in elements; 0: there is no such queue. Called QueueSizeMax since 1.3. |
/// | `QueueNum` | W | The selected queue's size in elements. Called QueueSize since 1.3. |
/// | `QueueReady` | RW | 1 enables the selected queue. |
/// | `QueueNotify` | W | The index of a queue with new buffers. |
/// | `InterruptStatus` | R | Why the interrupt was raised. |
/// | `InterruptAck` | W | Clears the bits that are written as 1. |
/// | `Status` | RW | The device status (§2.1); writing 0 resets the device. |
/// | `QueueDescLow` | W | Guest-physical address of the descriptor table, low half. |
/// | `QueueDescHigh` | W | Its high half. |
/// | `QueueDriverLow` | W | Guest-physical address of the available ring, low half. |
/// | `QueueDriverHigh` | W | Its high half. |
/// | `QueueDeviceLow` | W | Guest-physical address of the used ring, low half. |
/// | `QueueDeviceHigh` | W | Its high half. |
/// | `ShmSel` | W | The shared memory region that the SHM registers below speak of (§2.10). |
/// | `ShmLenLow` | R | The region's length in bytes, low half; all ones: no such region. |
/// | `ShmLenHigh` | R | Its high half. |
/// | `ShmBaseLow` | R | The region's guest-physical address, low half; all ones: no such region. |
/// | `ShmBaseHigh` | R | Its high half. |
/// | `QueueReset` | RW | With `F_RING_RESET`: 1 resets the selected queue and reads back as 1 until that is done (§4.2.2.1). |
/// | `ConfigGeneration` | R | Changes whenever a multi-access read of the configuration space could have been torn (§2.5.1). |
    MagicValue = 0x000,
    Version = 0x004,
    DeviceId = 0x008,
    VendorId = 0x00c,
    DeviceFeatures = 0x010,
    DeviceFeaturesSel = 0x014,
    DriverFeatures = 0x020,
    DriverFeaturesSel = 0x024,
    QueueSel = 0x030,
    QueueNumMax = 0x034,
    QueueNum = 0x038,
    QueueReady = 0x044,
    QueueNotify = 0x050,
    InterruptStatus = 0x060,
    InterruptAck = 0x064,
    Status = 0x070,
    QueueDescLow = 0x080,
    QueueDescHigh = 0x084,
    QueueDriverLow = 0x090,
    QueueDriverHigh = 0x094,
    QueueDeviceLow = 0x0a0,
    QueueDeviceHigh = 0x0a4,
    ShmSel = 0x0ac,
    ShmLenLow = 0x0b0,
    ShmLenHigh = 0x0b4,
    ShmBaseLow = 0x0b8,
    ShmBaseHigh = 0x0bc,
    QueueReset = 0x0c0,
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
