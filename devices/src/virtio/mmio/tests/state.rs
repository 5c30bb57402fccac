//! The transport as a value: saved, serialized, and put back into a new one.

use super::*;

/// A new transport over the memory of `driver`, with its state after a round trip through JSON.
pub(super) fn moved(driver: &mut Driver) -> (Driver, TransportState) {
    let state = driver.transport.save().expect("the machine stands still");
    let state: TransportState =
        serde_json::from_str(&serde_json::to_string(&state).unwrap()).unwrap();
    let mut restored = Driver::new();
    let config = driver.shared.config.load(Ordering::Relaxed);
    restored.shared.config.store(config, Ordering::Relaxed);
    restored.transport.restore(&state).unwrap();
    (restored, state)
}

#[test]
fn each_step_of_the_initialization_moves_and_can_be_continued() {
    for progress in [
        Progress::Nothing,
        Progress::Acknowledged,
        Progress::Driver,
        Progress::FeaturesOk,
        Progress::QueuesReady,
    ] {
        let mut driver = Driver::at(progress, GOOD);
        let (mut restored, state) = moved(&mut driver);
        assert_eq!(restored.transport.save(), Some(state), "{progress:?}");
        for register in Register::ALL {
            assert_eq!(restored.read(*register), driver.read(*register), "{register:?}");
        }
        restored.calls();
        if progress == Progress::QueuesReady {
            restored.add_status(STATUS_DRIVER_OK);
            assert_eq!(restored.calls(), [started(GOOD)]);
        }
    }
}

#[test]
fn a_started_device_starts_where_it_was() {
    let mut driver = Driver::at(Progress::DriverOk, GOOD);
    driver.shared.active.lock().unwrap()[1].queue.set_next_avail(9);
    driver.shared.active.lock().unwrap()[1].queue.set_next_used(7);
    driver.write(Register::QueueSel, 0);
    driver.write(Register::QueueReset, 1);
    driver.change_config(0x11);
    driver.transport.interrupt.used_buffer();
    driver.write(Register::InterruptAck, INTERRUPT_CONFIG_CHANGE);
    let (mut restored, state) = moved(&mut driver);
    let only_second = Call::Start { features: GOOD, queues: vec![1] };
    assert_eq!(restored.calls(), [Call::RestoreConfig(0x11), only_second]);
    assert_eq!(restored.transport.save().unwrap().ring_indices, state.ring_indices);
    assert_eq!(state.ring_indices, [RingIndices { queue: 1, next_available: 9, next_used: 7 }]);
    assert_eq!(restored.status(), driver.status());
    // The queue that was reset can come back.
    restored.enable_queue(0);
    assert_eq!(restored.calls(), [Call::StartQueue(0)]);
}

#[test]
fn a_device_that_needs_a_reset_still_does() {
    let mut driver = Driver::at(Progress::DriverOk, GOOD);
    driver.transport.interrupt.device_needs_reset();
    let (mut restored, _) = moved(&mut driver);
    assert_eq!(restored.status(), driver.status());
    assert_eq!(restored.read(Register::InterruptStatus), INTERRUPT_CONFIG_CHANGE);
    restored.write(Register::Status, 0);
    assert_eq!(restored.status(), 0);
}

#[test]
fn a_configuration_that_changed_meanwhile_is_reported() {
    let mut driver = Driver::at(Progress::DriverOk, GOOD);
    driver.change_config(1);
    let generation = driver.read(Register::ConfigGeneration);
    let state = driver.transport.save().unwrap();
    let mut restored = Driver::new();
    restored.shared.config.store(2, Ordering::Relaxed);
    restored.transport.restore(&state).unwrap();
    assert_eq!((restored.read_config(0), restored.interrupts()), ([2], 1));
    assert_ne!(restored.read(Register::ConfigGeneration), generation);
    // And one that did not change is not.
    let mut restored = Driver::new();
    restored.shared.config.store(1, Ordering::Relaxed);
    restored.transport.restore(&state).unwrap();
    assert_eq!(restored.interrupts(), 0);
    assert_eq!(restored.read(Register::ConfigGeneration), generation);
}

#[test]
fn a_pending_reset_has_no_state_yet() {
    let mut driver = Driver::at(Progress::DriverOk, GOOD);
    driver.shared.slow.store(true, Ordering::Relaxed);
    driver.write(Register::Status, 0);
    assert_eq!(driver.transport.save(), None);
    driver.shared.finish_drains();
    assert!(driver.transport.save().is_some());
}

#[test]
fn a_state_of_another_device_is_refused() {
    let mut driver = Driver::at(Progress::DriverOk, GOOD);
    let state = driver.transport.save().unwrap();
    let refused = |change: fn(&mut TransportState)| {
        let mut state = state.clone();
        change(&mut state);
        Driver::new().transport.restore(&state).unwrap_err()
    };
    assert!(matches!(
        refused(|state| state.device_id = 2),
        RestoreError::DeviceId { saved: 2, .. }
    ));
    assert!(matches!(refused(|state| state.registers.queues.truncate(2)), RestoreError::Queues));
    assert!(matches!(
        refused(|state| state.registers.accepted |= 1 << 63),
        RestoreError::Features(features) if features == 1 << 63
    ));
    let new = Driver::new();
    new.shared.refuse_to_start.store(true, Ordering::Relaxed);
    let mut transport = new.transport;
    assert!(matches!(transport.restore(&state), Err(RestoreError::Start(_))));
}
