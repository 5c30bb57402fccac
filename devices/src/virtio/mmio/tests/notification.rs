//! Kicks to the device and interrupts to the driver.

use super::*;

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
    assert_eq!(
        driver.read(Register::InterruptStatus),
        INTERRUPT_USED_BUFFER | INTERRUPT_CONFIG_CHANGE
    );
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
fn an_acknowledgement_by_eventfd_clears_the_interrupt_at_the_next_access() {
    let mut driver = Driver::at(Progress::DriverOk, GOOD);
    driver.transport.interrupt.used_buffer();
    assert_eq!(driver.read(Register::InterruptStatus), INTERRUPT_USED_BUFFER);
    driver.transport.acknowledgements().write(1).unwrap();
    assert_eq!(driver.read(Register::InterruptStatus), 0);
}
