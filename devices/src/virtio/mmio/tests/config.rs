//! The configuration space and the register page.

use super::*;

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
    assert_eq!(
        driver.calls(),
        [Call::WriteConfig(3, vec![7], 0), Call::WriteConfig(0, vec![1, 2], GOOD)]
    );
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
fn a_change_before_driver_ok_is_shown_and_reported_once_the_driver_is_up() {
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
    // What the driver itself changes is shown and not reported.
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
    let offered = driver.transport.offered;
    let halves = [(0, offered as u32), (1, (offered >> 32) as u32), (2, 0), (u32::MAX, 0)];
    for (select, features) in halves {
        driver.write(Register::DeviceFeaturesSel, select);
        assert_eq!(page.load(Register::DeviceFeatures), features);
    }
}
