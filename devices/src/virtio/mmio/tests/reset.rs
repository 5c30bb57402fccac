//! Device resets and ring resets, also while requests are at the host.

use super::*;

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
        driver.calls();
        driver.write(Register::Status, 0);
        let expected: &[Call] = if progress == Progress::DriverOk { &[Call::Stop] } else { &[] };
        assert_eq!(driver.calls(), expected, "{progress:?}");
        // The machine's reset leads to the same.
        if progress == Progress::DriverOk {
            driver.initialize(progress, GOOD);
            driver.calls();
        }
        BusDevice::reset(&mut driver.transport);
        assert_eq!(driver.calls(), expected, "{progress:?}");
        assert_eq!(driver.status(), 0);
        assert_eq!(
            driver.read(Register::InterruptStatus),
            0,
            "what the device raised while stopping is gone too"
        );
        for index in 0..3 {
            driver.write(Register::QueueSel, index);
            assert_eq!(driver.read(Register::QueueReady), 0);
        }
        driver.write(Register::Status, 0);
        driver.initialize(Progress::DriverOk, F_VERSION_1);
        assert_eq!(driver.calls(), [started(F_VERSION_1)], "{progress:?}");
    }
}

#[test]
fn a_reset_forgets_the_features() {
    let mut driver = Driver::at(Progress::DriverOk, GOOD);
    driver.write(Register::Status, 0);
    driver.initialize(Progress::Driver, GOOD);
    driver.add_status(STATUS_FEATURES_OK);
    assert_eq!(
        driver.status(),
        STATUS_ACKNOWLEDGE | STATUS_DRIVER,
        "VERSION_1 was not accepted this time"
    );
}

#[test]
fn a_reset_that_has_begun_stops_the_device_once() {
    let mut driver = Driver::at(Progress::DriverOk, GOOD);
    driver.shared.slow.store(true, Ordering::Relaxed);
    driver.calls();
    driver.transport.reset();
    driver.transport.reset();
    assert_eq!(driver.calls(), [Call::Stop]);
    driver.shared.finish_drains();
    driver.write(Register::QueueSel, 0);
    driver.write(Register::QueueReset, 1);
    driver.enable_queue(0);
    assert_eq!(driver.calls(), []);
}

#[test]
fn a_reset_with_requests_at_the_host_returns_and_takes_effect_later() {
    let mut driver = Driver::at(Progress::DriverOk, GOOD);
    driver.shared.slow.store(true, Ordering::Relaxed);
    let status = driver.status();
    driver.calls();
    driver.write(Register::Status, 0);
    assert_eq!(driver.calls(), [Call::Stop]);
    let drain = driver.transport.draining().expect("a drain");
    assert!(!drain.is_done());
    // Meanwhile nothing but another reset is heard, and nothing reaches the device.
    assert_eq!(driver.status(), status);
    driver.write(Register::Status, 0);
    driver.write(Register::Status, STATUS_ACKNOWLEDGE);
    driver.transport.write(CONFIG_OFFSET, &[1]);
    driver.initialize(Progress::Nothing, GOOD);
    assert_eq!((driver.status(), driver.calls()), (status, vec![]));

    driver.shared.finish_drains();
    assert!(drain.is_done());
    assert!(driver.transport.draining().is_none());
    let page = Arc::clone(driver.transport.page());
    assert_eq!((page.load(Register::Status), page.load(Register::InterruptStatus)), (0, 0));
    driver.initialize(Progress::DriverOk, GOOD);
    assert_eq!(driver.calls(), [started(GOOD)]);
}

#[test]
fn a_ring_reset_with_requests_at_the_host_reads_1_until_it_is_done() {
    let mut driver = Driver::at(Progress::DriverOk, GOOD);
    driver.shared.slow.store(true, Ordering::Relaxed);
    driver.calls();
    driver.write(Register::QueueSel, 1);
    driver.write(Register::QueueReset, 1);
    let page = Arc::clone(driver.transport.page());
    assert_eq!(page.load(Register::QueueReset), 1);
    let drain = driver.transport.draining().expect("a drain");
    // The driver may still configure the device, and reset it.
    driver.transport.write(CONFIG_OFFSET, &[1]);
    assert_eq!(driver.calls(), [Call::StopQueue(1), Call::WriteConfig(0, vec![1], GOOD)]);
    driver.shared.finish_drains();
    assert!(drain.is_done() && driver.transport.draining().is_none());
    assert_eq!((page.load(Register::QueueReset), page.load(Register::QueueReady)), (0, 0));
    driver.enable_queue(1);
    assert_eq!(driver.calls(), [Call::StartQueue(1)]);

    driver.write(Register::QueueReset, 1);
    driver.write(Register::Status, 0);
    assert_eq!(driver.calls(), [Call::StopQueue(1), Call::Stop]);
    // The ring's drain alone does not end the device's.
    driver.shared.drains.lock().unwrap().remove(0).finish([]);
    assert!(driver.transport.draining().is_some());
    driver.shared.finish_drains();
    assert_eq!(driver.status(), 0);
}
