//! Plays the driver's side of the transport against a device that records its calls and checks what it was promised.

mod config;
mod fuzz;
mod hostile;
mod negotiation;
mod notification;
mod queues;
mod reset;
mod state;

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use virtio_queue::QueueT;
use vm_memory::GuestAddress;

use super::*;
use crate::log_limit::tests::Log;
use crate::virtio::device::{ActiveQueue, RingIndices};
use crate::virtio::spec::mmio::{INTERRUPT_CONFIG_CHANGE, INTERRUPT_USED_BUFFER};
use crate::virtio::spec::{
    F_EVENT_IDX, F_INDIRECT_DESC, F_NOTIFICATION_DATA, STATUS_DEVICE_NEEDS_RESET,
};

const RAM_SIZE: u64 = 0x10_0000;
const QUEUE_SIZES: [u16; 3] = [256, 128, 64];
const DEVICE_FEATURES: u64 = F_INDIRECT_DESC | F_EVENT_IDX | 1 << 5;

#[derive(Clone, Debug, PartialEq, Eq)]
enum Call {
    Start { features: u64, queues: Vec<u16> },
    Stop,
    StopQueue(u16),
    StartQueue(u16),
    WriteConfig(u64, Vec<u8>, u64),
    RestoreConfig(u8),
}

/// What the test shares with the device inside the transport.
#[derive(Default)]
struct Shared {
    calls: Mutex<Vec<Call>>,
    config: AtomicU64,
    refuse_to_start: AtomicBool,
    interrupts: AtomicU32,
    active: Mutex<Vec<ActiveQueue>>,
    /// Drains last until the test finishes these.
    slow: AtomicBool,
    drains: Mutex<Vec<Drain>>,
}

impl Shared {
    fn drain(&self) -> Drain {
        if !self.slow.load(Ordering::Relaxed) {
            return Drain::new(0);
        }
        let drain = Drain::new(1);
        self.drains.lock().unwrap().push(drain.clone());
        drain
    }

    fn finish_drains(&self) {
        self.drains.lock().unwrap().drain(..).for_each(|drain| drain.finish([]));
    }
}

impl InterruptLine for Shared {
    fn pulse(&self) -> io::Result<()> {
        self.interrupts.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

#[derive(Default)]
struct Recorder {
    shared: Arc<Shared>,
    activation: Option<(GuestMemory, Interrupt)>,
}

impl Recorder {
    fn record(&self, call: Call) {
        self.shared.calls.lock().unwrap().push(call);
    }

    fn result(&self) -> io::Result<()> {
        if self.shared.refuse_to_start.load(Ordering::Relaxed) {
            Err(io::Error::other("refused"))
        } else {
            Ok(())
        }
    }
}

impl VirtioDevice for Recorder {
    fn device_id(&self) -> u32 {
        0x1234
    }

    fn name(&self) -> String {
        "recorder".to_owned()
    }

    fn features(&self) -> u64 {
        DEVICE_FEATURES
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8], _features: u64) {
        let config = self.shared.config.load(Ordering::Relaxed).to_le_bytes();
        for (index, byte) in data.iter_mut().enumerate() {
            *byte = config.get(offset as usize + index).copied().unwrap_or(0);
        }
    }

    fn write_config(&mut self, offset: u64, data: &[u8], features: u64) {
        self.record(Call::WriteConfig(offset, data.to_vec(), features));
    }

    fn start(&mut self, activation: Activation) -> io::Result<()> {
        assert!(self.activation.is_none(), "started twice");
        assert_eq!(activation.features & !(DEVICE_FEATURES | F_VERSION_1 | F_RING_RESET), 0);
        assert!(activation.queues.is_sorted_by_key(|queue| queue.index));
        assert!(activation.queues.iter().all(|queue| queue.queue.is_valid(&activation.memory)));
        let queues = activation.queues.iter().map(|queue| queue.index).collect();
        self.record(Call::Start { features: activation.features, queues });
        self.result()?;
        self.activation = Some((activation.memory, activation.interrupt));
        *self.shared.active.lock().unwrap() = activation.queues;
        Ok(())
    }

    fn restore_config(&mut self, config: &[u8]) {
        self.record(Call::RestoreConfig(config[0]));
    }

    fn reset(&mut self) -> Drain {
        if let Some((_, interrupt)) = self.activation.take() {
            self.record(Call::Stop);
            // The last requests are answered while stopping.
            interrupt.used_buffer();
        }
        self.shared.active.lock().unwrap().clear();
        self.shared.drain()
    }

    fn reset_queue(&mut self, index: u16) -> Drain {
        assert!(self.activation.is_some(), "not started");
        self.record(Call::StopQueue(index));
        self.shared.active.lock().unwrap().retain(|queue| queue.index != index);
        self.shared.drain()
    }

    fn ring_indices(&self) -> Vec<RingIndices> {
        let active = self.shared.active.lock().unwrap();
        active
            .iter()
            .map(|ActiveQueue { index, queue, .. }| RingIndices {
                queue: *index,
                next_available: queue.next_avail(),
                next_used: queue.next_used(),
            })
            .collect()
    }

    fn start_queue(&mut self, queue: ActiveQueue) -> io::Result<()> {
        let (memory, _) = self.activation.as_ref().expect("not started");
        assert!(queue.queue.is_valid(memory));
        self.record(Call::StartQueue(queue.index));
        self.result()?;
        let mut active = self.shared.active.lock().unwrap();
        assert!(active.iter().all(|other| other.index != queue.index), "started twice");
        active.push(queue);
        Ok(())
    }
}

/// The driver, and what it can see.
struct Driver {
    transport: MmioTransport,
    shared: Arc<Shared>,
}

/// The part of the initialization that has been done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Progress {
    Nothing,
    Acknowledged,
    Driver,
    FeaturesOk,
    QueuesReady,
    DriverOk,
}

const GOOD: u64 = F_VERSION_1 | F_RING_RESET | F_EVENT_IDX;

impl Driver {
    fn new() -> Self {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), RAM_SIZE as usize)]).unwrap();
        let shared = Arc::new(Shared::default());
        let device = Recorder { shared: Arc::clone(&shared), ..Recorder::default() };
        let transport =
            MmioTransport::new(Box::new(device), memory, Arc::clone(&shared) as _).unwrap();
        Self { transport, shared }
    }

    /// A driver whose device has come as far as `progress` with `features`.
    fn at(progress: Progress, features: u64) -> Self {
        let mut driver = Self::new();
        driver.initialize(progress, features);
        driver
    }

    fn initialize(&mut self, progress: Progress, features: u64) {
        if progress >= Progress::Acknowledged {
            self.write(Register::Status, STATUS_ACKNOWLEDGE);
        }
        if progress >= Progress::Driver {
            self.write(Register::Status, STATUS_ACKNOWLEDGE | STATUS_DRIVER);
        }
        if progress >= Progress::FeaturesOk {
            self.accept(features);
            self.add_status(STATUS_FEATURES_OK);
        }
        if progress >= Progress::QueuesReady {
            for index in [0, 1] {
                self.enable_queue(index);
                assert_eq!(self.read(Register::QueueReady), 1);
            }
        }
        if progress >= Progress::DriverOk {
            self.add_status(STATUS_DRIVER_OK);
        }
    }

    fn read(&mut self, register: Register) -> u32 {
        let mut data = [0xa5; 4];
        self.transport.read(register as u64, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&mut self, register: Register, value: u32) {
        self.transport.write(register as u64, &value.to_le_bytes());
    }

    fn read_config<const WIDTH: usize>(&mut self, offset: u64) -> [u8; WIDTH] {
        let mut data = [0xa5; WIDTH];
        self.transport.read(CONFIG_OFFSET + offset, &mut data);
        data
    }

    /// The device's configuration changes, and it says so.
    fn change_config(&mut self, value: u64) {
        self.shared.config.store(value, Ordering::Relaxed);
        self.transport
            .interrupt
            .show_config(|config| config[..8].copy_from_slice(&value.to_le_bytes()));
        self.transport.interrupt.config_changed();
    }

    fn status(&mut self) -> u32 {
        self.read(Register::Status)
    }

    fn add_status(&mut self, bit: u32) {
        let status = self.status();
        self.write(Register::Status, status | bit);
    }

    fn accept(&mut self, features: u64) {
        for (select, half) in [(0, features as u32), (1, (features >> 32) as u32)] {
            self.write(Register::DriverFeaturesSel, select);
            self.write(Register::DriverFeatures, half);
        }
    }

    fn offered(&mut self) -> u64 {
        let mut half = |select| {
            self.write(Register::DeviceFeaturesSel, select);
            u64::from(self.read(Register::DeviceFeatures))
        };
        half(0) | half(1) << 32
    }

    fn configure_queue(&mut self, index: u32, size: u32, areas: [u64; 3]) {
        self.write(Register::QueueSel, index);
        self.write(Register::QueueNum, size);
        self.write_addresses(index, areas);
    }

    fn write_addresses(&mut self, index: u32, areas: [u64; 3]) {
        self.write(Register::QueueSel, index);
        for (low, high, address) in [
            (Register::QueueDescLow, Register::QueueDescHigh, areas[0]),
            (Register::QueueDriverLow, Register::QueueDriverHigh, areas[1]),
            (Register::QueueDeviceLow, Register::QueueDeviceHigh, areas[2]),
        ] {
            self.write(low, address as u32);
            self.write(high, (address >> 32) as u32);
        }
    }

    fn enable_queue(&mut self, index: u32) {
        self.configure_queue(index, 64, areas(index));
        self.write(Register::QueueReady, 1);
    }

    fn calls(&self) -> Vec<Call> {
        std::mem::take(&mut *self.shared.calls.lock().unwrap())
    }

    fn interrupts(&self) -> u32 {
        self.shared.interrupts.swap(0, Ordering::Relaxed)
    }
}

/// Where the driver puts the rings of a queue.
fn areas(index: u32) -> [u64; 3] {
    let base = 0x1_0000 + u64::from(index) * 0x4000;
    [base, base + 0x1000, base + 0x2000]
}

fn started(features: u64) -> Call {
    Call::Start { features, queues: vec![0, 1] }
}
