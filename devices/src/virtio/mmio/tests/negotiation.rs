//! From reset to DRIVER_OK: identification, features, and the steps of the device status.

use super::*;

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
    for register in
        [Register::ShmLenLow, Register::ShmLenHigh, Register::ShmBaseLow, Register::ShmBaseHigh]
    {
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
    assert_eq!(driver.calls(), []);
    driver.add_status(STATUS_DRIVER_OK);
    assert_eq!(
        driver.status(),
        STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FEATURES_OK | STATUS_DRIVER_OK
    );
    assert_eq!(driver.calls(), [started(GOOD)]);

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
    assert!(
        driver.shared.active.lock().unwrap().iter().all(|queue| !queue.queue.event_idx_enabled())
    );
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
        assert_eq!(driver.calls(), []);
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
    assert_eq!(driver.calls(), [started(GOOD)]);
}

#[test]
fn a_feature_beyond_those_that_exist_is_refused_until_a_reset() {
    for select in [2, 3, u32::MAX] {
        let mut driver = Driver::at(Progress::Driver, 0);
        driver.accept(GOOD);
        driver.write(Register::DriverFeaturesSel, select);
        driver.write(Register::DriverFeatures, 1);
        driver.add_status(STATUS_FEATURES_OK);
        assert_eq!(driver.status() & STATUS_FEATURES_OK, 0, "{select}");
        driver.write(Register::Status, 0);
        driver.initialize(Progress::DriverOk, GOOD);
        assert_eq!(driver.calls(), [started(GOOD)]);
    }
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
    assert_eq!(driver.calls(), []);
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
    assert_eq!(driver.calls(), []);
    driver.write(Register::Status, 0);
    driver.initialize(Progress::DriverOk, GOOD);
    assert_eq!(driver.calls(), [started(GOOD)]);
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
    assert_eq!(driver.calls(), [started(GOOD)], "nothing more is asked of it");

    driver.shared.refuse_to_start.store(false, Ordering::Relaxed);
    driver.write(Register::Status, 0);
    assert_eq!(driver.status(), 0);
    driver.initialize(Progress::DriverOk, GOOD);
    assert_eq!(driver.calls(), [started(GOOD)]);
    assert_eq!(driver.status() & STATUS_DEVICE_NEEDS_RESET, 0);
}

#[test]
fn a_driver_that_starts_a_device_in_vain_again_and_again_fills_no_log() {
    let log = Log::default();
    let _logging = log.listen();
    let mut driver = Driver::new();
    driver.shared.refuse_to_start.store(true, Ordering::Relaxed);
    for _ in 0..1000 {
        driver.initialize(Progress::DriverOk, GOOD);
        driver.write(Register::Status, 0);
    }
    // One a second.
    let lines = log.lines();
    assert!((1..100).contains(&lines.len()), "{} lines", lines.len());
    assert_eq!(lines[0], "WARNmessage=recorder: the device did not start: refused ");
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
