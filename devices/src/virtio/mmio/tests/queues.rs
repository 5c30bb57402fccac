//! Queue registers: what makes a queue, and how one is disabled, reset and enabled again.

use super::*;

#[test]
fn bad_queues_stay_disabled_and_can_be_corrected() {
    let [desc, avail, used] = areas(0);
    let bad: [(u32, [u64; 3]); 24] = [
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
        // An address that was never written: the rings would lie over the interrupt vectors.
        (64, [0, 0, 0]),
        (64, [0, avail, used]),
        (64, [desc, 0, used]),
        (64, [desc, avail, 0]),
        (64, [desc, desc + 64 * 16 - 2, used]),
        (64, [desc, avail, desc]),
        (64, [desc, avail, avail + 64 * 2 + 4]),
        (64, [used + 64 * 8, avail, used]),
    ];
    for (size, areas) in bad {
        let mut driver = Driver::at(Progress::FeaturesOk, GOOD);
        driver.configure_queue(0, size, areas);
        driver.write(Register::QueueReady, 1);
        assert_eq!(driver.read(Register::QueueReady), 0, "{size} {areas:x?}");
        driver.initialize(Progress::DriverOk, GOOD);
        assert_eq!(driver.calls(), [started(GOOD)]);
    }
    // The last places that fit: at the end of memory, and one right behind the other.
    let end = RAM_SIZE - 64 * 16;
    for areas in [
        [end, avail, used],
        [desc, RAM_SIZE - 64 * 2 - 6, used],
        [desc, avail, RAM_SIZE - 64 * 8 - 8],
        [desc, desc + 64 * 16, desc + 64 * 16 + 64 * 2 + 8],
    ] {
        let mut driver = Driver::at(Progress::FeaturesOk, GOOD);
        driver.configure_queue(0, 64, areas);
        driver.write(Register::QueueReady, 1);
        assert_eq!(driver.read(Register::QueueReady), 1, "{areas:x?}");
    }
}

#[test]
fn a_queue_is_as_large_as_it_can_be_unless_told() {
    let mut driver = Driver::at(Progress::FeaturesOk, GOOD);
    driver.write_addresses(1, areas(1));
    driver.write(Register::QueueReady, 1);
    driver.add_status(STATUS_DRIVER_OK);
    assert_eq!(driver.shared.active.lock().unwrap()[0].queue.size(), QUEUE_SIZES[1]);
}

#[test]
fn queues_are_configured_only_between_features_ok_and_driver_ok() {
    for progress in
        [Progress::Nothing, Progress::Acknowledged, Progress::Driver, Progress::DriverOk]
    {
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
    assert_eq!(driver.calls(), [Call::Start { features: GOOD, queues: vec![1] }]);
}

#[test]
fn a_disabled_queue_keeps_its_addresses_and_a_reset_one_does_not() {
    let mut driver = Driver::at(Progress::QueuesReady, GOOD);
    let ready = |driver: &mut Driver, value| {
        driver.write(Register::QueueReady, value);
        driver.read(Register::QueueReady)
    };
    driver.write(Register::QueueSel, 1);
    assert_eq!((ready(&mut driver, 0), ready(&mut driver, 1)), (0, 1));
    driver.add_status(STATUS_DRIVER_OK);
    assert_eq!((ready(&mut driver, 0), ready(&mut driver, 1)), (0, 1));
    assert_eq!(driver.calls(), [started(GOOD), Call::StopQueue(1), Call::StartQueue(1)]);
    driver.write(Register::QueueReset, 1);
    assert_eq!(ready(&mut driver, 1), 0);
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
fn a_ring_reset_leaves_the_other_queues_alone_and_the_queue_can_come_back() {
    let mut driver = Driver::at(Progress::DriverOk, GOOD);
    driver.calls();
    driver.write(Register::QueueSel, 1);
    driver.write(Register::QueueReset, 0);
    assert_eq!(driver.read(Register::QueueReady), 1);
    driver.write(Register::QueueReset, 1);
    assert_eq!(driver.read(Register::QueueReset), 0, "done");
    assert_eq!(driver.read(Register::QueueReady), 0);
    driver.write(Register::QueueSel, 0);
    assert_eq!(driver.read(Register::QueueReady), 1);
    assert_eq!(driver.calls(), [Call::StopQueue(1)]);

    driver.configure_queue(1, 16, areas(5));
    driver.write(Register::QueueReady, 1);
    assert_eq!(driver.read(Register::QueueReady), 1);
    assert_eq!(driver.read(Register::QueueReset), 0);
    assert_eq!(driver.calls(), [Call::StartQueue(1)]);
    let active = driver.shared.active.lock().unwrap();
    assert_eq!((active[1].queue.size(), active[1].queue.desc_table()), (16, areas(5)[0]));
    assert!(active[1].queue.event_idx_enabled());
}

#[test]
fn a_queue_that_was_not_enabled_at_driver_ok_cannot_be_added_by_a_ring_reset() {
    let mut driver = Driver::at(Progress::DriverOk, GOOD);
    driver.calls();
    driver.write(Register::QueueSel, 2);
    driver.write(Register::QueueReset, 1);
    driver.enable_queue(2);
    assert_eq!(driver.read(Register::QueueReady), 0);
    assert_eq!(driver.calls(), []);
}

#[test]
fn without_ring_reset_a_stopped_queue_stays_stopped() {
    let mut driver = Driver::at(Progress::DriverOk, F_VERSION_1);
    driver.calls();
    driver.write(Register::QueueSel, 0);
    driver.write(Register::QueueReset, 1);
    assert_eq!(driver.read(Register::QueueReady), 1);
    driver.write(Register::QueueReady, 0);
    assert_eq!(driver.read(Register::QueueReady), 0);
    driver.enable_queue(0);
    assert_eq!(driver.read(Register::QueueReady), 0);
    assert_eq!(driver.calls(), [Call::StopQueue(0)]);
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
