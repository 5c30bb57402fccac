//! Plays the driver's side of the transport against a device that keeps a diary and checks what it was promised.

use std::collections::BTreeSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use virtio_queue::QueueT;
use vm_memory::GuestAddress;

use super::*;
use crate::log_limit::tests::Log;
use crate::virtio::device::ActiveQueue;
use crate::virtio::spec::mmio::{INTERRUPT_CONFIG_CHANGE, INTERRUPT_USED_BUFFER};
use crate::virtio::spec::{F_EVENT_IDX, F_INDIRECT_DESC, F_NOTIFICATION_DATA, STATUS_DEVICE_NEEDS_RESET};

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
}

/// What the test shares with the device inside the transport.
#[derive(Default)]
struct Shared {
    diary: Mutex<Vec<Call>>,
    config: AtomicU64,
    refuse_to_start: AtomicBool,
    interrupts: AtomicU32,
    active: Mutex<Vec<ActiveQueue>>,
}

impl Trigger for Shared {
    fn trigger(&self) -> io::Result<()> {
        self.interrupts.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

#[derive(Default)]
struct Diarist {
    shared: Arc<Shared>,
    activation: Option<(GuestMemory, Interrupt)>,
    /// The queues that the transport took back and may start again.
    taken: BTreeSet<u16>,
}

impl Diarist {
    fn note(&self, call: Call) {
        self.shared.diary.lock().unwrap().push(call);
    }

    fn answer(&self) -> io::Result<()> {
        if self.shared.refuse_to_start.load(Ordering::Relaxed) { Err(io::Error::other("refused")) } else { Ok(()) }
    }
}

impl VirtioDevice for Diarist {
    fn device_id(&self) -> u32 {
        0x1234
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
        self.note(Call::WriteConfig(offset, data.to_vec(), features));
    }

    fn start(&mut self, activation: Activation) -> io::Result<()> {
        assert!(self.activation.is_none(), "started twice");
        assert_eq!(activation.features & !(DEVICE_FEATURES | F_VERSION_1 | F_RING_RESET), 0);
        assert!(activation.queues.is_sorted_by_key(|queue| queue.index));
        assert!(activation.queues.iter().all(|queue| queue.queue.is_valid(&activation.memory)));
        let queues = activation.queues.iter().map(|queue| queue.index).collect();
        self.note(Call::Start { features: activation.features, queues });
        self.answer()?;
        self.activation = Some((activation.memory, activation.interrupt));
        *self.shared.active.lock().unwrap() = activation.queues;
        Ok(())
    }

    fn stop(&mut self) -> Vec<ActiveQueue> {
        self.taken.clear();
        if let Some((_, interrupt)) = self.activation.take() {
            self.note(Call::Stop);
            // The last requests are answered while stopping.
            interrupt.used_buffer();
        }
        std::mem::take(&mut *self.shared.active.lock().unwrap())
    }

    fn stop_queue(&mut self, index: u16) -> Option<ActiveQueue> {
        assert!(self.activation.is_some(), "not started");
        self.note(Call::StopQueue(index));
        self.taken.insert(index);
        let mut active = self.shared.active.lock().unwrap();
        let position = active.iter().position(|queue| queue.index == index)?;
        Some(active.remove(position))
    }

    fn start_queue(&mut self, queue: ActiveQueue) -> io::Result<()> {
        let (memory, _) = self.activation.as_ref().expect("not started");
        assert!(self.taken.remove(&queue.index), "queue {} was not stopped", queue.index);
        assert!(queue.queue.is_valid(memory));
        self.note(Call::StartQueue(queue.index));
        self.answer()?;
        self.shared.active.lock().unwrap().push(queue);
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
        let device = Diarist { shared: Arc::clone(&shared), ..Diarist::default() };
        let transport = MmioTransport::new(Box::new(device), memory, Arc::clone(&shared) as _).unwrap();
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
        self.transport.interrupt.show_config(|config| config[..8].copy_from_slice(&value.to_le_bytes()));
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

    fn diary(&self) -> Vec<Call> {
        std::mem::take(&mut *self.shared.diary.lock().unwrap())
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

#[test]
fn identifies_itself() {
    let mut driver = Driver::new();
    assert_eq!(driver.read(Register::MagicValue), 0x7472_6976);
    assert_eq!(driver.read(Register::Version), 2);
    assert_eq!(driver.read(Register::DeviceId), 0x1234);
    assert_eq!(driver.read(Register::VendorId), VENDOR_ID);
    assert_eq!(driver.status(), 0);
}

#[test]
fn has_no_shared_memory() {
    let mut driver = Driver::new();
    driver.write(Register::ShmSel, 0);
    for register in [Register::ShmLenLow, Register::ShmLenHigh, Register::ShmBaseLow, Register::ShmBaseHigh] {
        assert_eq!(driver.read(register), u32::MAX);
    }
}

#[test]
fn offers_the_devices_features_and_its_own() {
    let mut driver = Driver::new();
    assert_eq!(driver.offered(), DEVICE_FEATURES | F_VERSION_1 | F_RING_RESET);
    driver.write(Register::DeviceFeaturesSel, 2);
    assert_eq!(driver.read(Register::DeviceFeatures), 0);
}

#[test]
fn the_whole_initialization_hands_the_queues_over() {
    let mut driver = Driver::new();
    driver.write(Register::Status, 0);
    driver.add_status(STATUS_ACKNOWLEDGE);
    driver.add_status(STATUS_DRIVER);
    driver.accept(GOOD);
    driver.add_status(STATUS_FEATURES_OK);
    assert_eq!(driver.status(), STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FEATURES_OK);
    for (index, size) in (0..).zip(QUEUE_SIZES) {
        driver.write(Register::QueueSel, index);
        assert_eq!(driver.read(Register::QueueReady), 0);
        assert_eq!(driver.read(Register::QueueNumMax), u32::from(size));
    }
    driver.enable_queue(0);
    driver.enable_queue(1);
    assert_eq!(driver.diary(), []);
    driver.add_status(STATUS_DRIVER_OK);
    assert_eq!(driver.status(), STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FEATURES_OK | STATUS_DRIVER_OK);
    assert_eq!(driver.diary(), [started(GOOD)]);

    let active = driver.shared.active.lock().unwrap();
    let queue = &active[1].queue;
    assert_eq!((queue.size(), queue.max_size()), (64, QUEUE_SIZES[1]));
    assert_eq!([queue.desc_table(), queue.avail_ring(), queue.used_ring()], areas(1));
    assert!(queue.event_idx_enabled() && queue.ready());
    assert_eq!((queue.next_avail(), queue.next_used()), (0, 0));
}

#[test]
fn event_idx_is_off_unless_negotiated() {
    let driver = Driver::at(Progress::DriverOk, F_VERSION_1);
    assert!(driver.shared.active.lock().unwrap().iter().all(|queue| !queue.queue.event_idx_enabled()));
}

#[test]
fn refuses_features_that_are_not_on_offer_and_accepts_a_second_choice() {
    for bad in [GOOD | 1 << 63, GOOD | 1, GOOD | F_NOTIFICATION_DATA, GOOD & !F_VERSION_1, 0] {
        let mut driver = Driver::at(Progress::FeaturesOk, bad);
        assert_eq!(driver.status(), STATUS_ACKNOWLEDGE | STATUS_DRIVER, "{bad:#x}");
        driver.add_status(STATUS_DRIVER_OK);
        assert_eq!(driver.status(), STATUS_ACKNOWLEDGE | STATUS_DRIVER, "{bad:#x}");
        driver.accept(F_VERSION_1);
        driver.add_status(STATUS_FEATURES_OK);
        assert_ne!(driver.status() & STATUS_FEATURES_OK, 0, "{bad:#x}");
        assert_eq!(driver.diary(), []);
    }
}

#[test]
fn features_are_settled_once_agreed_and_beyond_64_there_are_none() {
    let mut driver = Driver::at(Progress::Acknowledged, 0);
    driver.accept(u64::MAX);
    driver.add_status(STATUS_DRIVER);
    driver.accept(GOOD);
    driver.write(Register::DriverFeaturesSel, 2);
    driver.write(Register::DriverFeatures, 0);
    driver.add_status(STATUS_FEATURES_OK);
    assert_ne!(driver.status() & STATUS_FEATURES_OK, 0);
    driver.accept(F_VERSION_1 | F_INDIRECT_DESC);
    driver.enable_queue(0);
    driver.enable_queue(1);
    driver.add_status(STATUS_DRIVER_OK);
    assert_eq!(driver.diary(), [started(GOOD)]);
}

#[test]
fn steps_cannot_be_skipped_nor_taken_back() {
    let mut driver = Driver::new();
    driver.write(Register::Status, STATUS_DRIVER);
    assert_eq!(driver.status(), 0);
    driver.write(Register::Status, STATUS_ACKNOWLEDGE | STATUS_FEATURES_OK | STATUS_DRIVER_OK);
    assert_eq!(driver.status(), STATUS_ACKNOWLEDGE);
    driver.write(Register::Status, STATUS_DRIVER);
    assert_eq!(driver.status(), STATUS_ACKNOWLEDGE | STATUS_DRIVER);
    driver.write(Register::Status, STATUS_DEVICE_NEEDS_RESET | 16 | 32 | 1 << 31);
    assert_eq!(driver.status(), STATUS_ACKNOWLEDGE | STATUS_DRIVER);
    driver.write(Register::Status, STATUS_DRIVER_OK);
    assert_eq!(driver.status(), STATUS_ACKNOWLEDGE | STATUS_DRIVER);
    assert_eq!(driver.diary(), []);
}

#[test]
fn a_driver_that_gave_up_has_to_reset_first() {
    let mut driver = Driver::at(Progress::QueuesReady, GOOD);
    driver.add_status(STATUS_FAILED);
    assert_ne!(driver.status() & STATUS_FAILED, 0);
    driver.add_status(STATUS_DRIVER_OK);
    assert_eq!(driver.status() & STATUS_DRIVER_OK, 0);
    driver.enable_queue(2);
    assert_eq!(driver.read(Register::QueueReady), 0);
    assert_eq!(driver.diary(), []);
    driver.write(Register::Status, 0);
    driver.initialize(Progress::DriverOk, GOOD);
    assert_eq!(driver.diary(), [started(GOOD)]);
}

#[test]
fn bad_queues_stay_disabled_and_can_be_corrected() {
    let [desc, avail, used] = areas(0);
    let bad: [(u32, [u64; 3]); 16] = [
        (0, areas(0)),
        (3, areas(0)),
        (512, areas(0)),
        (0x1_0000, areas(0)),
        (0x1_0040, areas(0)),
        (u32::MAX, areas(0)),
        (64, [desc + 8, avail, used]),
        (64, [desc, avail + 1, used]),
        (64, [desc, avail, used + 2]),
        (64, [RAM_SIZE, avail, used]),
        (64, [desc, RAM_SIZE, used]),
        (64, [desc, avail, RAM_SIZE]),
        (64, [RAM_SIZE - 64 * 16 + 16, avail, used]),
        (64, [desc, RAM_SIZE - 64 * 2 - 4, used]),
        (64, [desc, avail, RAM_SIZE - 64 * 8 - 4]),
        (64, [u64::MAX - 15, u64::MAX - 1, u64::MAX - 3]),
    ];
    for (size, areas) in bad {
        let mut driver = Driver::at(Progress::FeaturesOk, GOOD);
        driver.configure_queue(0, size, areas);
        driver.write(Register::QueueReady, 1);
        assert_eq!(driver.read(Register::QueueReady), 0, "{size} {areas:x?}");
        driver.initialize(Progress::DriverOk, GOOD);
        assert_eq!(driver.diary(), [started(GOOD)]);
    }
    // The last places that fit.
    let mut driver = Driver::at(Progress::FeaturesOk, GOOD);
    driver.configure_queue(0, 64, [RAM_SIZE - 64 * 16, RAM_SIZE - 64 * 2 - 6, RAM_SIZE - 64 * 8 - 8]);
    driver.write(Register::QueueReady, 1);
    assert_eq!(driver.read(Register::QueueReady), 1);
}

#[test]
fn a_queue_is_as_large_as_it_can_be_unless_told() {
    let mut driver = Driver::at(Progress::FeaturesOk, GOOD);
    driver.write(Register::QueueSel, 1);
    driver.write(Register::QueueReady, 1);
    driver.add_status(STATUS_DRIVER_OK);
    assert_eq!(driver.shared.active.lock().unwrap()[0].queue.size(), QUEUE_SIZES[1]);
}

#[test]
fn queues_are_configured_only_between_features_ok_and_driver_ok() {
    for progress in [Progress::Nothing, Progress::Acknowledged, Progress::Driver, Progress::DriverOk] {
        let mut driver = Driver::at(progress, GOOD);
        driver.enable_queue(2);
        assert_eq!(driver.read(Register::QueueReady), 0, "{progress:?}");
    }
}

#[test]
fn an_enabled_queue_keeps_its_configuration() {
    let mut driver = Driver::at(Progress::QueuesReady, GOOD);
    driver.configure_queue(0, 32, areas(7));
    driver.write(Register::QueueReady, 1);
    driver.write(Register::QueueReady, 2);
    driver.add_status(STATUS_DRIVER_OK);
    let active = driver.shared.active.lock().unwrap();
    assert_eq!((active[0].queue.size(), active[0].queue.desc_table()), (64, areas(0)[0]));
}

#[test]
fn a_queue_can_be_disabled_before_driver_ok() {
    let mut driver = Driver::at(Progress::QueuesReady, GOOD);
    driver.write(Register::QueueSel, 0);
    driver.write(Register::QueueReady, 0);
    assert_eq!(driver.read(Register::QueueReady), 0);
    driver.add_status(STATUS_DRIVER_OK);
    assert_eq!(driver.diary(), [Call::Start { features: GOOD, queues: vec![1] }]);
}

#[test]
fn queues_that_do_not_exist_are_not_available() {
    let mut driver = Driver::at(Progress::FeaturesOk, GOOD);
    for index in [3, 0xffff, 0x1_0000, u32::MAX] {
        driver.enable_queue(index);
        assert_eq!(driver.read(Register::QueueReady), 0);
        assert_eq!(driver.read(Register::QueueNumMax), 0);
        driver.write(Register::QueueReady, 0);
        driver.write(Register::QueueReset, 1);
        driver.write(Register::QueueNotify, index);
    }
}

#[test]
fn a_reset_in_any_state_leads_back_to_the_start() {
    for progress in [
        Progress::Nothing,
        Progress::Acknowledged,
        Progress::Driver,
        Progress::FeaturesOk,
        Progress::QueuesReady,
        Progress::DriverOk,
    ] {
        let mut driver = Driver::at(progress, GOOD);
        driver.transport.interrupt.device_needs_reset();
        driver.diary();
        driver.write(Register::Status, 0);
        let expected: &[Call] = if progress == Progress::DriverOk { &[Call::Stop] } else { &[] };
        assert_eq!(driver.diary(), expected, "{progress:?}");
        // The machine's reset leads to the same.
        if progress == Progress::DriverOk {
            driver.initialize(progress, GOOD);
            driver.diary();
        }
        BusDevice::reset(&mut driver.transport);
        assert_eq!(driver.diary(), expected, "{progress:?}");
        assert_eq!(driver.status(), 0);
        assert_eq!(driver.read(Register::InterruptStatus), 0, "what the device raised while stopping is gone too");
        for index in 0..3 {
            driver.write(Register::QueueSel, index);
            assert_eq!(driver.read(Register::QueueReady), 0);
        }
        driver.write(Register::Status, 0);
        driver.initialize(Progress::DriverOk, F_VERSION_1);
        assert_eq!(driver.diary(), [started(F_VERSION_1)], "{progress:?}");
    }
}

#[test]
fn a_reset_forgets_the_features() {
    let mut driver = Driver::at(Progress::DriverOk, GOOD);
    driver.write(Register::Status, 0);
    driver.initialize(Progress::Driver, GOOD);
    driver.add_status(STATUS_FEATURES_OK);
    assert_eq!(driver.status(), STATUS_ACKNOWLEDGE | STATUS_DRIVER, "VERSION_1 was not accepted this time");
}

#[test]
fn a_ring_reset_leaves_the_other_queues_alone_and_the_queue_can_come_back() {
    let mut driver = Driver::at(Progress::DriverOk, GOOD);
    driver.diary();
    driver.write(Register::QueueSel, 1);
    driver.write(Register::QueueReset, 0);
    assert_eq!(driver.read(Register::QueueReady), 1);
    driver.write(Register::QueueReset, 1);
    assert_eq!(driver.read(Register::QueueReset), 0, "done");
    assert_eq!(driver.read(Register::QueueReady), 0);
    driver.write(Register::QueueSel, 0);
    assert_eq!(driver.read(Register::QueueReady), 1);
    assert_eq!(driver.diary(), [Call::StopQueue(1)]);

    driver.configure_queue(1, 16, areas(5));
    driver.write(Register::QueueReady, 1);
    assert_eq!(driver.read(Register::QueueReady), 1);
    assert_eq!(driver.read(Register::QueueReset), 0);
    assert_eq!(driver.diary(), [Call::StartQueue(1)]);
    let active = driver.shared.active.lock().unwrap();
    assert_eq!((active[1].queue.size(), active[1].queue.desc_table()), (16, areas(5)[0]));
    assert!(active[1].queue.event_idx_enabled());
}

#[test]
fn a_queue_that_was_not_enabled_at_driver_ok_cannot_be_added_by_a_ring_reset() {
    let mut driver = Driver::at(Progress::DriverOk, GOOD);
    driver.diary();
    driver.write(Register::QueueSel, 2);
    driver.write(Register::QueueReset, 1);
    driver.enable_queue(2);
    assert_eq!(driver.read(Register::QueueReady), 0);
    assert_eq!(driver.diary(), []);
}

#[test]
fn without_ring_reset_a_stopped_queue_stays_stopped() {
    let mut driver = Driver::at(Progress::DriverOk, F_VERSION_1);
    driver.diary();
    driver.write(Register::QueueSel, 0);
    driver.write(Register::QueueReset, 1);
    assert_eq!(driver.read(Register::QueueReady), 1);
    driver.write(Register::QueueReady, 0);
    assert_eq!(driver.read(Register::QueueReady), 0);
    driver.enable_queue(0);
    assert_eq!(driver.read(Register::QueueReady), 0);
    assert_eq!(driver.diary(), [Call::StopQueue(0)]);
}

#[test]
fn a_device_that_does_not_start_needs_a_reset() {
    let mut driver = Driver::at(Progress::QueuesReady, GOOD);
    driver.shared.refuse_to_start.store(true, Ordering::Relaxed);
    driver.add_status(STATUS_DRIVER_OK);
    assert_ne!(driver.status() & STATUS_DEVICE_NEEDS_RESET, 0);
    assert_eq!(driver.read(Register::InterruptStatus), INTERRUPT_CONFIG_CHANGE);
    assert_eq!(driver.interrupts(), 1);
    driver.write(Register::QueueSel, 0);
    driver.write(Register::QueueReset, 1);
    driver.enable_queue(0);
    assert_eq!(driver.diary(), [started(GOOD)], "nothing more is asked of it");

    driver.shared.refuse_to_start.store(false, Ordering::Relaxed);
    driver.write(Register::Status, 0);
    assert_eq!(driver.status(), 0);
    driver.initialize(Progress::DriverOk, GOOD);
    assert_eq!(driver.diary(), [started(GOOD)]);
    assert_eq!(driver.status() & STATUS_DEVICE_NEEDS_RESET, 0);
}

#[test]
fn a_driver_that_starts_a_device_in_vain_again_and_again_fills_no_log() {
    let log = Log::default();
    let _logging = tracing::subscriber::set_default(log.clone());
    let mut driver = Driver::new();
    driver.shared.refuse_to_start.store(true, Ordering::Relaxed);
    for _ in 0..1000 {
        driver.initialize(Progress::DriverOk, GOOD);
        driver.write(Register::Status, 0);
    }
    // One a second.
    let lines = log.lines();
    assert!((1..100).contains(&lines.len()), "{} lines", lines.len());
    assert!(lines[0].contains("the device did not start"), "{}", lines[0]);
}

#[test]
fn a_queue_that_does_not_start_again_needs_a_reset() {
    let mut driver = Driver::at(Progress::DriverOk, GOOD);
    driver.shared.refuse_to_start.store(true, Ordering::Relaxed);
    driver.write(Register::QueueSel, 0);
    driver.write(Register::QueueReset, 1);
    driver.enable_queue(0);
    assert_ne!(driver.status() & STATUS_DEVICE_NEEDS_RESET, 0);
    driver.write(Register::Status, 0);
    assert_eq!(driver.status(), 0);
}

#[test]
fn a_broken_device_says_so_until_it_is_reset() {
    let mut driver = Driver::at(Progress::DriverOk, GOOD);
    driver.transport.interrupt.device_needs_reset();
    let status = driver.status();
    assert_ne!(status & STATUS_DEVICE_NEEDS_RESET, 0);
    assert_eq!(driver.interrupts(), 1);
    driver.write(Register::Status, status);
    assert_eq!(driver.status(), status, "writing back what was read changes nothing");
    driver.write(Register::Status, 0);
    assert_eq!(driver.status(), 0);
}

#[test]
fn interrupts_are_reported_until_acknowledged() {
    let mut driver = Driver::at(Progress::DriverOk, GOOD);
    let interrupt = driver.transport.interrupt.clone();
    interrupt.used_buffer();
    interrupt.config_changed();
    assert_eq!(driver.interrupts(), 2);
    assert_eq!(driver.read(Register::InterruptStatus), INTERRUPT_USED_BUFFER | INTERRUPT_CONFIG_CHANGE);
    driver.write(Register::InterruptAck, INTERRUPT_USED_BUFFER);
    assert_eq!(driver.read(Register::InterruptStatus), INTERRUPT_CONFIG_CHANGE);
    driver.write(Register::InterruptAck, u32::MAX);
    assert_eq!(driver.read(Register::InterruptStatus), 0);
}

#[test]
fn a_notification_without_an_ioeventfd_reaches_its_queue_alone() {
    let mut driver = Driver::at(Progress::DriverOk, GOOD);
    driver.write(Register::QueueNotify, 1);
    let active = driver.shared.active.lock().unwrap();
    assert_eq!(active[1].kick.read().unwrap(), 1);
    assert_eq!(active[0].kick.read().unwrap_err().kind(), io::ErrorKind::WouldBlock);
}

#[test]
fn the_kicks_are_what_the_device_waits_for() {
    let driver = Driver::at(Progress::DriverOk, GOOD);
    assert_eq!(driver.transport.kicks().len(), QUEUE_SIZES.len());
    driver.transport.kicks()[0].write(1).unwrap();
    assert_eq!(driver.shared.active.lock().unwrap()[0].kick.read().unwrap(), 1);
}

#[test]
fn configuration_is_read_at_any_width_and_ends_in_zeroes() {
    let mut driver = Driver::new();
    driver.change_config(0x8877_6655_4433_2211);
    assert_eq!(driver.read_config(0), [0x11]);
    assert_eq!(driver.read_config(2), [0x33, 0x44]);
    assert_eq!(driver.read_config(1), [0x22, 0x33, 0x44, 0x55]);
    assert_eq!(driver.read_config(0), [0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88]);
    assert_eq!(driver.read_config(6), [0x77, 0x88, 0, 0]);
    assert_eq!(driver.read_config(254), [0; 4]);
    assert_eq!(driver.read_config(0xeff), [0]);
    assert_eq!(driver.read_config(u64::MAX - CONFIG_OFFSET), [0]);
}

#[test]
fn configuration_writes_come_with_the_agreed_features() {
    let mut driver = Driver::at(Progress::Driver, 0);
    driver.accept(GOOD);
    driver.transport.write(CONFIG_OFFSET + 3, &[7]);
    driver.add_status(STATUS_FEATURES_OK);
    driver.transport.write(CONFIG_OFFSET, &[1, 2]);
    assert_eq!(driver.diary(), [Call::WriteConfig(3, vec![7], 0), Call::WriteConfig(0, vec![1, 2], GOOD)]);
}

/// Reads 64 bits as a driver does (§2.5.1), with a change in the middle of the first attempt.
#[test]
fn a_torn_read_of_the_configuration_is_noticed() {
    let mut driver = Driver::at(Progress::DriverOk, GOOD);
    driver.change_config(0x1_ffff_ffff);
    let mut attempts = 0;
    let value = loop {
        let before = driver.read(Register::ConfigGeneration);
        let low: [u8; 4] = driver.read_config(0);
        if attempts == 0 {
            driver.change_config(0x2_0000_0000);
        }
        let high: [u8; 4] = driver.read_config(4);
        attempts += 1;
        if before == driver.read(Register::ConfigGeneration) {
            break u64::from(u32::from_le_bytes(low)) | u64::from(u32::from_le_bytes(high)) << 32;
        }
    };
    assert_eq!((value, attempts), (0x2_0000_0000, 2));
    let settled = driver.read(Register::ConfigGeneration);
    assert_eq!(driver.read(Register::ConfigGeneration), settled);
}

#[test]
fn a_change_that_nobody_could_report_is_shown_and_reported_once_the_driver_is_up() {
    let mut driver = Driver::at(Progress::QueuesReady, GOOD);
    driver.shared.config.store(1, Ordering::Relaxed);
    driver.add_status(STATUS_DRIVER_OK);
    assert_eq!((driver.read_config(0), driver.interrupts()), ([1], 1));
    assert_eq!(driver.read(Register::InterruptStatus), INTERRUPT_CONFIG_CHANGE);
    // The driver may have looked before it set up its queues: each of its writes shows a change, and none reports it.
    let mut driver = Driver::at(Progress::FeaturesOk, GOOD);
    driver.shared.config.store(1, Ordering::Relaxed);
    driver.enable_queue(0);
    driver.add_status(STATUS_DRIVER_OK);
    assert_eq!((driver.read_config(0), driver.interrupts()), ([1], 1));
    // What the driver itself changes is no news to it, but shows.
    driver.shared.config.store(2, Ordering::Relaxed);
    driver.transport.write(CONFIG_OFFSET, &[2]);
    assert_eq!((driver.read_config(0), driver.interrupts()), ([2], 0));
}

#[test]
fn the_page_shows_what_the_driver_selects() {
    let mut driver = Driver::at(Progress::DriverOk, GOOD);
    let page = Arc::clone(driver.transport.page());
    for (queue, max) in (0..).zip(QUEUE_SIZES) {
        driver.write(Register::QueueSel, queue);
        assert_eq!(page.load(Register::QueueNumMax), u32::from(max));
        assert_eq!(page.load(Register::QueueReady), u32::from(queue < 2));
    }
    driver.write(Register::QueueSel, 0);
    driver.write(Register::QueueReset, 1);
    assert_eq!((page.load(Register::QueueReset), page.load(Register::QueueReady)), (0, 0));
    for select in [0, 1, 2, u32::MAX] {
        driver.write(Register::DeviceFeaturesSel, select);
        assert_eq!(page.load(Register::DeviceFeatures), half(driver.transport.offered, select));
    }
}

#[test]
fn control_registers_are_written_whole() {
    let mut driver = Driver::at(Progress::DriverOk, GOOD);
    let status = driver.status();
    driver.transport.write(Register::Status as u64, &[0]);
    driver.transport.write(Register::Status as u64, &[0; 8]);
    driver.transport.write(Register::Status as u64 - 1, &[0; 4]);
    assert_eq!(driver.status(), status);
}

#[test]
fn stopping_for_good_stops_the_device_once() {
    let mut driver = Driver::at(Progress::DriverOk, GOOD);
    driver.diary();
    driver.transport.stop();
    driver.transport.stop();
    assert_eq!(driver.diary(), [Call::Stop]);
    driver.write(Register::QueueSel, 0);
    driver.write(Register::QueueReset, 1);
    driver.enable_queue(0);
    assert_eq!(driver.diary(), []);
}

#[test]
fn queues_of_impossible_size_are_refused_at_once() {
    for size in [0, 3, 32769] {
        assert!(QueueRegisters::new(size).is_err());
    }
    assert!(QueueRegisters::new(32768).is_ok());
}

/// Any access at any time: nothing panics, the device gets what it was promised (it checks), a reset always revives.
#[test]
fn survives_a_driver_gone_mad() {
    let mut driver = Driver::new();
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move |below: u64| {
        // xorshift64: deterministic, and good enough to wander.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % below
    };
    let interesting = [0, 1, 2, 3, 4, 7, 8, 15, 64, 128, 0x1_0000, RAM_SIZE - 16, 1 << 30, 0xffff, u64::from(u32::MAX)];
    let mut starts = 0;
    for round in 0..40_000 {
        // From time to time sane, so that it gets past the first steps.
        if random(100) == 0 {
            driver.write(Register::Status, 0);
            driver.initialize(Progress::DriverOk, GOOD);
        }
        let register = Register::ALL[random(Register::ALL.len() as u64) as usize] as u64;
        let offset = match random(10) {
            0 => random(MmioTransport::SIZE),
            1 => register + random(4),
            2 => u64::MAX - random(300),
            _ => register,
        };
        let width = if random(10) == 0 { random(9) as usize } else { 4 };
        let mut data = interesting[random(interesting.len() as u64) as usize].to_le_bytes();
        match random(3) {
            0 => driver.transport.read(offset, &mut data[..width]),
            _ => driver.transport.write(offset, &data[..width]),
        }
        if round % 64 == 0 {
            starts += driver.diary().iter().filter(|call| matches!(call, Call::Start { .. })).count();
            driver.shared.config.fetch_add(1, Ordering::Relaxed);
        }
    }
    assert!(starts > 100, "the device was started {starts} times");
    driver.write(Register::Status, 0);
    assert_eq!(driver.status(), 0);
    driver.diary();
    driver.initialize(Progress::DriverOk, GOOD);
    assert_eq!(driver.diary(), [started(GOOD)]);
}
