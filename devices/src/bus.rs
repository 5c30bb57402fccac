//! Address range -> device, for port I/O and for MMIO: what a vCPU consults when the guest leaves KVM.
//!
//! A bus is built once and shared by all vCPU threads as `Arc<Bus>`. Finding a device takes no lock. Each device has one of its own, held
//! for the length of one access.

mod reset;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::thread;

use thiserror::Error;

use crate::virtio::drain::Drain;

/// A device that answers reads and writes inside its address range.
///
/// Any vCPU thread may read and write, and another thread resets the machine, one at a time. All return without waiting for the host.
/// `offset` is in bytes from the start of the range. The access lies inside the range and is 1 to 8 bytes wide, of any width and
/// alignment.
pub trait BusDevice: Send {
    /// Fills all of `data` (little-endian).
    fn read(&mut self, offset: u64, data: &mut [u8]);

    /// Takes `data` (little-endian).
    fn write(&mut self, offset: u64, data: &[u8]);

    /// The machine is reset, with its vCPUs stopped: the device returns to its state at power-on. Stateless devices need not
    /// implement it.
    fn reset(&mut self) {}

    /// What has to end before the last write or reset has taken effect, if anything. Asked after each `write` and `reset`, and again when
    /// the returned drain is done: then the device completes the reset and returns `None`.
    fn draining(&mut self) -> Option<Drain> {
        None
    }
}

/// A write or a reset that waits for the threads of its device. Nothing is locked meanwhile.
pub struct Unfinished {
    device: Arc<Mutex<dyn BusDevice>>,
    drain: Drain,
}

impl Unfinished {
    fn of(device: &Arc<Mutex<dyn BusDevice>>) -> Option<Self> {
        // A device whose lock is poisoned is in an unknown state; its VM is about to stop.
        let drain = device.lock().ok()?.draining()?;
        Some(Self { device: Arc::clone(device), drain })
    }

    /// Waits until the write has taken effect (`None`), or `called_away` says so. Whatever makes `called_away` true has to
    /// unpark this thread afterwards.
    pub fn wait_unless(self, called_away: impl Fn() -> bool) -> Option<Self> {
        self.wait(|drain| {
            let this = thread::current();
            drain.on_done(move || this.unpark());
            while !drain.is_done() && !called_away() {
                thread::park();
            }
            drain.is_done()
        })
    }

    fn wait(mut self, is_done: impl Fn(&Drain) -> bool) -> Option<Self> {
        // Another vCPU may have begun another reset of the device meanwhile.
        while is_done(&self.drain) {
            self = Self::of(&self.device)?;
        }
        Some(self)
    }
}

/// Why a device cannot be put on a bus. Both are mistakes in the machine's address map.
#[derive(Debug, Error, PartialEq, Eq)]
#[expect(missing_docs, reason = "each message says what the fields and the variant are")]
pub enum BusError {
    #[error("address range {base:#x}+{length:#x} is empty or wraps around")]
    Invalid { base: u64, length: u64 },
    #[error("address range {base:#x}+{length:#x} overlaps the device at {other:#x}")]
    Overlap { base: u64, length: u64, other: u64 },
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
    /// Puts `device` at `base`, `length` bytes long.
    ///
    /// # Errors
    /// When the range is not one, or is taken.
    pub fn insert(
        &mut self,
        base: u64,
        length: u64,
        device: Arc<Mutex<dyn BusDevice>>,
    ) -> Result<(), BusError> {
        let Some(last) = length.checked_sub(1).and_then(|rest| base.checked_add(rest)) else {
            return Err(BusError::Invalid { base, length });
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

    /// Reads from the device at `address`. Without one it reads as all ones, as on a PC.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        self.with_device(address, data.len(), |device, offset| device.read(offset, data));
    }

    /// Writes to the device at `address`; without one, the write is lost. Returns what the write waits for before it takes
    /// effect, if anything: the vCPU must not enter the guest before.
    pub fn write(&self, address: u64, data: &[u8]) -> Option<Unfinished> {
        let write = |device: &mut dyn BusDevice, offset| device.write(offset, data);
        Unfinished::of(self.with_device(address, data.len(), write)?)
    }

    /// Runs `access` on the device that has all `width` bytes at `address`, and returns the device. No device claims an
    /// access that straddles the end of its range.
    fn with_device(
        &self,
        address: u64,
        width: usize,
        access: impl FnOnce(&mut dyn BusDevice, u64),
    ) -> Option<&Arc<Mutex<dyn BusDevice>>> {
        let (base, entry) = self.entries.range(..=address).next_back()?;
        let offset = address - base;
        offset.checked_add(width as u64).filter(|end| *end <= entry.length)?;
        // Poisoned: a thread panicked inside this device, which is in an unknown state and must not be touched again.
        // That thread has reported it and the VM is about to stop; until then the device is as if unplugged.
        let mut device = entry.device.lock().ok()?;
        access(&mut *device, offset);
        Some(&entry.device)
    }
}

#[cfg(test)]
mod tests {

    use super::*;

    /// Reads as `id` in every byte; remembers the last write; drains what the test put there.
    struct Probe {
        id: u8,
        written: Option<(u64, Vec<u8>)>,
        drains: Vec<Drain>,
    }

    impl BusDevice for Probe {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            assert_ne!(offset, 0x66, "a probe panics when asked to");
            data.fill(self.id);
        }

        fn write(&mut self, offset: u64, data: &[u8]) {
            self.written = Some((offset, data.to_vec()));
        }

        fn draining(&mut self) -> Option<Drain> {
            self.drains.pop_if(|drain| drain.is_done());
            self.drains.last().cloned()
        }
    }

    fn probe(id: u8) -> Arc<Mutex<Probe>> {
        Arc::new(Mutex::new(Probe { id, written: None, drains: Vec::new() }))
    }

    fn bus(ranges: &[(u64, u64)]) -> Bus {
        let mut bus = Bus::default();
        for (id, (base, length)) in (1..).zip(ranges) {
            bus.insert(*base, *length, probe(id)).unwrap();
        }
        bus
    }

    /// `None`: all ones, which no probe answers.
    fn read_byte(bus: &Bus, address: u64) -> Option<u8> {
        let mut data = [0];
        bus.read(address, &mut data);
        (data != [0xff]).then_some(data[0])
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
        bus.read(0x50, &mut data);
        assert_eq!(data, [0xff; 8]);
        assert!(bus.write(0x50, &data).is_none());
    }

    #[test]
    fn an_access_that_straddles_an_end_is_unclaimed() {
        let (mut bus, devices) = (Bus::default(), [1, 2, 3].map(probe));
        for (device, (base, length)) in
            devices.iter().zip([(0x100, 4), (0x104, 4), (u64::MAX - 1, 2)])
        {
            bus.insert(base, length, Arc::clone(device) as _).unwrap();
        }
        let mut data = [0; 4];
        bus.read(0x100, &mut data);
        assert_eq!(data, [1; 4]);
        bus.read(0x101, &mut data);
        assert_eq!(data, [0xff; 4]);
        for address in [0xfe, u64::MAX - 1, u64::MAX] {
            assert!(bus.write(address, &data).is_none());
        }
        assert!(devices.iter().all(|device| device.lock().unwrap().written.is_none()));
    }

    #[test]
    fn a_write_arrives_with_its_offset() {
        let device = probe(1);
        let mut bus = Bus::default();
        bus.insert(0x1000, 0x100, Arc::clone(&device) as _).unwrap();
        assert!(bus.write(0x1010, &[1, 2]).is_none());
        assert_eq!(device.lock().unwrap().written, Some((0x10, vec![1, 2])));
    }

    #[test]
    fn a_write_that_drains_waits_outside_of_the_devices_lock_until_all_is_done() {
        let device = probe(1);
        let (first, second) = (Drain::new(1), Drain::new(1));
        device.lock().unwrap().drains = vec![second.clone(), first.clone()];
        let mut bus = Bus::default();
        bus.insert(0x1000, 0x100, Arc::clone(&device) as _).unwrap();
        let unfinished = bus.write(0x1000, &[0]).expect("no drain");
        let unfinished = unfinished.wait_unless(|| true).expect("called away");
        assert_eq!(read_byte(&bus, 0x1000), Some(1), "another vCPU gets at the device");
        first.finish([]);
        let unfinished = unfinished.poll().expect("the second drain is left");
        second.finish([]);
        assert!(unfinished.wait_unless(|| false).is_none());
        assert!(bus.reset().is_empty());
    }

    #[test]
    fn overlaps_are_refused_on_every_side() {
        let mut bus = bus(&[(0x100, 0x10)]);
        for (base, length) in
            [(0x100, 0x10), (0x0f8, 9), (0x10f, 1), (0x0, 0x1000), (0x104, 2), (0, u64::MAX)]
        {
            let refused = bus.insert(base, length, probe(9));
            assert_eq!(
                refused,
                Err(BusError::Overlap { base, length, other: 0x100 }),
                "{base:#x}+{length:#x}"
            );
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
        assert!(bus.write(0x100, &[0]).is_none());
        assert_eq!(read_byte(&bus, 0x200), Some(2));
    }
}
