//! Drives the example device as a driver does: through the registers of its transport and the rings in guest memory.

#![expect(clippy::unwrap_used, reason = "what fails here fails the test")]

#[allow(dead_code, reason = "its main is for cargo run")]
#[path = "../examples/entropy.rs"]
mod example;

use std::io;
use std::sync::{Arc, mpsc};

use devices::GuestMemory;
use devices::bus::BusDevice;
use devices::irq::InterruptLine;
use devices::virtio::mmio::MmioTransport;
use devices::virtio::spec::mmio::{INTERRUPT_CONFIG_CHANGE, INTERRUPT_USED_BUFFER, Register};
use devices::virtio::spec::ring::DESC_F_WRITE;
use devices::virtio::spec::{
    STATUS_ACKNOWLEDGE, STATUS_DEVICE_NEEDS_RESET, STATUS_DRIVER, STATUS_DRIVER_OK,
    STATUS_FEATURES_OK,
};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress};

const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
const BUFFER: u64 = 0x4000;

struct Line(mpsc::Sender<()>);

impl InterruptLine for Line {
    fn pulse(&self) -> io::Result<()> {
        self.0.send(()).map_err(io::Error::other)
    }
}

struct Driver {
    transport: MmioTransport,
    memory: GuestMemory,
    interrupts: mpsc::Receiver<()>,
    available: u16,
}

impl Driver {
    fn new() -> Self {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap();
        let (line, interrupts) = mpsc::channel();
        let device = Box::new(example::Entropy::default());
        let transport = MmioTransport::new(device, memory.clone(), Arc::new(Line(line))).unwrap();
        Self { transport, memory, interrupts, available: 0 }
    }

    fn write(&mut self, register: Register, value: u32) {
        self.transport.write(register as u64, &value.to_le_bytes());
    }

    fn read(&mut self, register: Register) -> u32 {
        let mut value = [0; 4];
        self.transport.read(register as u64, &mut value);
        u32::from_le_bytes(value)
    }

    fn initialize(&mut self) {
        assert_eq!(self.read(Register::DeviceId), 4);
        self.write(Register::Status, STATUS_ACKNOWLEDGE);
        self.write(Register::Status, STATUS_ACKNOWLEDGE | STATUS_DRIVER);
        self.write(Register::DriverFeaturesSel, 1);
        self.write(Register::DriverFeatures, 1);
        let status = STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FEATURES_OK;
        self.write(Register::Status, status);
        assert_eq!(self.read(Register::Status), status);
        self.write(Register::QueueDescLow, DESCRIPTORS as u32);
        self.write(Register::QueueDriverLow, AVAILABLE as u32);
        self.write(Register::QueueDeviceLow, USED as u32);
        self.write(Register::QueueReady, 1);
        self.write(Register::Status, status | STATUS_DRIVER_OK);
    }

    /// Makes a buffer of `length` bytes available and notifies.
    fn post(&mut self, address: u64, length: u32, flags: u16) {
        let descriptor = Descriptor::new(address, length, flags, 0);
        self.memory.write_obj(descriptor, GuestAddress(DESCRIPTORS)).unwrap();
        let entry = AVAILABLE + 4 + 2 * u64::from(self.available % 64);
        self.memory.write_obj(0_u16, GuestAddress(entry)).unwrap();
        self.available += 1;
        self.memory.write_obj(self.available, GuestAddress(AVAILABLE + 2)).unwrap();
        self.write(Register::QueueNotify, 0);
    }

    /// Waits for the interrupt of the last buffer and returns the bytes used.
    fn used(&mut self) -> u32 {
        self.interrupts.recv().unwrap();
        assert_eq!(self.read(Register::InterruptStatus), INTERRUPT_USED_BUFFER);
        self.write(Register::InterruptAck, INTERRUPT_USED_BUFFER);
        let index: u16 = self.memory.read_obj(GuestAddress(USED + 2)).unwrap();
        assert_eq!(index, self.available);
        let element = USED + 4 + 8 * u64::from((index - 1) % 64);
        self.memory.read_obj(GuestAddress(element + 4)).unwrap()
    }
}

#[test]
fn a_buffer_comes_back_full_of_random_bytes() {
    let mut driver = Driver::new();
    // Queued before DRIVER_OK: served without a notification.
    driver.post(BUFFER, 64, DESC_F_WRITE);
    driver.initialize();
    assert_eq!(driver.used(), 64);
    let mut random = [0_u8; 65];
    driver.memory.read_slice(&mut random, GuestAddress(BUFFER)).unwrap();
    assert!(random[..64].iter().any(|byte| *byte != 0));
    assert_eq!(random[64], 0, "nothing past the end");
    // A large buffer is used in part, an unwritable one not at all.
    driver.post(BUFFER, 0x8000, DESC_F_WRITE);
    assert_eq!(driver.used(), 4096);
    driver.post(BUFFER, 64, 0);
    assert_eq!(driver.used(), 0);
}

#[test]
fn a_reset_ends_the_thread_and_the_device_starts_again() {
    let mut driver = Driver::new();
    for _ in 0..10 {
        driver.post(BUFFER, 8, DESC_F_WRITE);
        driver.initialize();
        assert_eq!(driver.used(), 8);
        driver.write(Register::Status, 0);
        while let Some(drain) = driver.transport.draining() {
            assert!(drain.wait(std::time::Duration::MAX));
        }
        assert_eq!(driver.read(Register::Status), 0);
        driver.memory.write_slice(&[0; 0x2000], GuestAddress(AVAILABLE)).unwrap();
        driver.available = 0;
    }
}

#[test]
fn a_broken_ring_needs_a_reset_and_gets_it() {
    let mut driver = Driver::new();
    driver.initialize();
    driver.post(0x10_0000, 8, DESC_F_WRITE);
    driver.interrupts.recv().unwrap();
    assert_eq!(driver.read(Register::InterruptStatus), INTERRUPT_CONFIG_CHANGE);
    assert_ne!(driver.read(Register::Status) & STATUS_DEVICE_NEEDS_RESET, 0);
    driver.write(Register::Status, 0);
    while let Some(drain) = driver.transport.draining() {
        assert!(drain.wait(std::time::Duration::MAX));
    }
    assert_eq!(driver.read(Register::Status), 0);
}
