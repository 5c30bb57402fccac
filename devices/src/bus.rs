//! Address range -> device, for port I/O and for MMIO: what a vCPU consults when the guest leaves KVM.
//!
//! A bus is built once and then shared by all vCPU threads as `Arc<Bus>`: looking up takes no lock, only the device
//! that is hit has one.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use thiserror::Error;

/// A device that answers reads and writes inside its address range.
///
/// Both calls come from whichever vCPU thread the guest chose, one at a time, and must not block on anything but host
/// work that is sure to end. `offset` is in bytes from the start of the range; the access lies inside the range, and is
/// 1 to 8 bytes wide, but not otherwise sane: a guest may use any width and alignment anywhere.
pub trait BusDevice: Send {
    /// Fills all of `data` (little-endian).
    fn read(&mut self, offset: u64, data: &mut [u8]);

    /// Takes `data` (little-endian).
    fn write(&mut self, offset: u64, data: &[u8]);

    /// The machine is reset, with its vCPUs stopped: forgets what the guest did, as at power-on. What was under way is
    /// finished first. A device that remembers nothing has nothing to do.
    fn reset(&mut self) {}
}

/// Why a device cannot be put on a bus. Both are mistakes in the machine's address map.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum BusError {
    /// The range is empty or goes past the last address.
    #[error("address range {base:#x}+{length:#x} is empty or wraps around; correct the machine's address map")]
    Invalid {
        /// First address.
        base: u64,
        /// Bytes.
        length: u64,
    },
    /// The range meets that of another device.
    #[error("address range {base:#x}+{length:#x} overlaps the device at {other:#x}; correct the machine's address map")]
    Overlap {
        /// First address.
        base: u64,
        /// Bytes.
        length: u64,
        /// First address of the device that was there before.
        other: u64,
    },
}

struct Entry {
    length: u64,
    device: Arc<Mutex<dyn BusDevice>>,
}

/// One address space of devices.
#[derive(Default)]
pub struct Bus {
    /// By first address; ranges do not overlap.
    entries: BTreeMap<u64, Entry>,
}

impl Bus {
    /// A bus with nothing on it.
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts `device` at `base`, `length` bytes long.
    ///
    /// # Errors
    /// When the range is not one, or is taken.
    pub fn insert(&mut self, base: u64, length: u64, device: Arc<Mutex<dyn BusDevice>>) -> Result<(), BusError> {
        let last = match length.checked_sub(1).and_then(|rest| base.checked_add(rest)) {
            Some(last) => last,
            None => return Err(BusError::Invalid { base, length }),
        };
        // Of the ranges that start at or before `last`, the last one ends last: no other can reach `base`.
        if let Some((&other, entry)) = self.entries.range(..=last).next_back()
            && other + (entry.length - 1) >= base
        {
            return Err(BusError::Overlap { base, length, other });
        }
        self.entries.insert(base, Entry { length, device });
        Ok(())
    }

    /// Reads from the device at `address`. Unclaimed addresses read as all ones, as on a PC. Tells whether a device
    /// claimed the access.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        let claimed = self.with_device(address, data.len(), |device, offset| device.read(offset, data));
        if !claimed {
            data.fill(0xff);
        }
        claimed
    }

    /// Writes to the device at `address`; without one the write is lost. Tells whether a device claimed the access.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        self.with_device(address, data.len(), |device, offset| device.write(offset, data))
    }

    /// Resets every device.
    pub fn reset(&self) {
        for entry in self.entries.values() {
            // A poisoned device: as in `with_device`.
            if let Ok(mut device) = entry.device.lock() {
                device.reset();
            }
        }
    }

    /// Runs `access` on the device that has all `width` bytes at `address`. An access that straddles the end of a
    /// device belongs to nobody.
    fn with_device(&self, address: u64, width: usize, access: impl FnOnce(&mut dyn BusDevice, u64)) -> bool {
        let Some((base, entry)) = self.entries.range(..=address).next_back() else { return false };
        let offset = address - base;
        let fits = offset.checked_add(width as u64).is_some_and(|end| end <= entry.length);
        if !fits {
            return false;
        }
        // Poisoned: a thread panicked inside this device, which is in an unknown state and must not be touched again.
        // That thread has said why, and its owner is about to stop the VM; until then the device is as if unplugged.
        let Ok(mut device) = entry.device.lock() else { return false };
        access(&mut *device, offset);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads as `id` in every byte; remembers the last write.
    struct Probe {
        id: u8,
        written: Option<(u64, Vec<u8>)>,
    }

    impl BusDevice for Probe {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            assert_ne!(offset, 0x66, "a probe panics when asked to");
            data.fill(self.id);
        }

        fn write(&mut self, offset: u64, data: &[u8]) {
            self.written = Some((offset, data.to_vec()));
        }
    }

    fn probe(id: u8) -> Arc<Mutex<Probe>> {
        Arc::new(Mutex::new(Probe { id, written: None }))
    }

    fn bus(ranges: &[(u64, u64)]) -> Bus {
        let mut bus = Bus::new();
        for (id, (base, length)) in (1..).zip(ranges) {
            bus.insert(*base, *length, probe(id)).unwrap();
        }
        bus
    }

    fn read_byte(bus: &Bus, address: u64) -> Option<u8> {
        let mut data = [0];
        bus.read(address, &mut data).then_some(data[0])
    }

    #[test]
    fn each_address_reaches_its_device_and_no_other() {
        let bus = bus(&[(0x100, 0x10), (0x110, 0x10), (0x200, 1), (u64::MAX, 1)]);
        assert_eq!(read_byte(&bus, 0xff), None);
        assert_eq!(read_byte(&bus, 0x100), Some(1));
        assert_eq!(read_byte(&bus, 0x10f), Some(1));
        assert_eq!(read_byte(&bus, 0x110), Some(2));
        assert_eq!(read_byte(&bus, 0x11f), Some(2));
        assert_eq!(read_byte(&bus, 0x120), None);
        assert_eq!(read_byte(&bus, 0x200), Some(3));
        assert_eq!(read_byte(&bus, 0x201), None);
        assert_eq!(read_byte(&bus, u64::MAX), Some(4));
    }

    #[test]
    fn unclaimed_reads_are_all_ones() {
        let bus = bus(&[(0x100, 4)]);
        let mut data = [0; 8];
        assert!(!bus.read(0x50, &mut data));
        assert_eq!(data, [0xff; 8]);
        assert!(!bus.write(0x50, &data));
    }

    #[test]
    fn an_access_that_straddles_an_end_belongs_to_nobody() {
        let bus = bus(&[(0x100, 4), (0x104, 4), (u64::MAX - 1, 2)]);
        let mut data = [0; 4];
        assert!(bus.read(0x100, &mut data));
        assert!(!bus.read(0x101, &mut data));
        assert_eq!(data, [0xff; 4]);
        assert!(!bus.write(0xfe, &data));
        assert!(!bus.write(u64::MAX - 1, &data));
        assert!(!bus.write(u64::MAX, &data));
    }

    #[test]
    fn a_write_arrives_with_its_offset() {
        let device = probe(1);
        let mut bus = Bus::new();
        bus.insert(0x1000, 0x100, Arc::clone(&device) as _).unwrap();
        assert!(bus.write(0x1010, &[1, 2]));
        assert_eq!(device.lock().unwrap().written, Some((0x10, vec![1, 2])));
    }

    #[test]
    fn overlaps_are_refused_on_every_side() {
        let mut bus = bus(&[(0x100, 0x10)]);
        for (base, length) in [(0x100, 0x10), (0x0f8, 9), (0x10f, 1), (0x0, 0x1000), (0x104, 2), (0, u64::MAX)] {
            let refused = bus.insert(base, length, probe(9));
            assert_eq!(refused, Err(BusError::Overlap { base, length, other: 0x100 }), "{base:#x}+{length:#x}");
        }
        for (base, length) in [(0, 0), (0x500, 0), (u64::MAX, 2), (2, u64::MAX)] {
            assert_eq!(bus.insert(base, length, probe(9)), Err(BusError::Invalid { base, length }));
        }
        bus.insert(0x0f0, 0x10, probe(2)).unwrap();
        bus.insert(0x110, 0x10, probe(3)).unwrap();
        assert_eq!(read_byte(&bus, 0x108), Some(1));
    }

    #[test]
    fn a_device_that_panicked_is_unplugged_and_the_others_go_on() {
        let bus = Arc::new(bus(&[(0x100, 0x80), (0x200, 1)]));
        let vcpu = Arc::clone(&bus);
        let panicked = std::thread::spawn(move || vcpu.read(0x166, &mut [0])).join();
        assert!(panicked.is_err());
        assert_eq!(read_byte(&bus, 0x100), None);
        assert!(!bus.write(0x100, &[0]));
        assert_eq!(read_byte(&bus, 0x200), Some(2));
    }
}
