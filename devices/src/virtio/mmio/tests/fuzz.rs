//! A driver, its device and the host, which do anything in any order.

use minivmm_fuzz::Input;

use super::state::moved;
use super::*;

const INTERESTING: [u32; 16] = [
    0,
    1,
    2,
    3,
    4,
    7,
    8,
    11,
    15,
    64,
    256,
    0x1_0000,
    RAM_SIZE as u32 - 16,
    1 << 30,
    0xffff,
    u32::MAX,
];

/// Status bits come in the order of §3.1.1, and only a reset takes them away.
fn assert_steps(status: u32) {
    let steps = [STATUS_ACKNOWLEDGE, STATUS_DRIVER, STATUS_FEATURES_OK, STATUS_DRIVER_OK];
    for pair in steps.windows(2) {
        assert!(status & pair[1] == 0 || status & pair[0] != 0, "status {status:#x}");
    }
}

fn access(driver: &mut Driver, input: &mut Input<'_>) {
    let offset = match input.below(8) {
        0 => input.below(MmioTransport::SIZE + 16),
        1 => u64::MAX - input.below(8),
        _ => input.pick(Register::ALL) as u64,
    };
    let mut data = [0; 8];
    let value = if input.bool() { input.pick(&INTERESTING) } else { input.u32() };
    data[..4].copy_from_slice(&value.to_le_bytes());
    let width = if input.below(8) == 0 { input.below(9) as usize } else { 4 };
    if input.below(4) == 0 {
        driver.transport.read(offset, &mut data[..width]);
        let mut seen = [0; 8];
        driver.transport.page().read(offset, &mut seen[..width]);
        assert_eq!(data[..width], seen[..width], "a trapped read differs from a mapped one");
        return;
    }
    let before = driver.status();
    driver.transport.write(offset, &data[..width]);
    let after = driver.status();
    let is_reset = offset == Register::Status as u64 && width == 4 && value == 0;
    assert!(is_reset || before & !after == 0, "status {before:#x} became {after:#x}");
    if is_reset && !driver.shared.slow.load(Ordering::Relaxed) {
        assert_eq!(after, 0, "a reset that waits for nothing");
    }
}

/// A machine that stands still moves, and its driver cannot tell.
fn save(driver: &mut Driver) {
    if driver.transport.save().is_none() {
        let drains = driver.shared.drains.lock().unwrap();
        return assert!(drains.iter().any(|drain| !drain.is_done()), "nothing is waited for");
    }
    let (mut restored, state) = moved(driver);
    for register in Register::ALL {
        assert_eq!(restored.read(*register), driver.read(*register), "{register:?}");
    }
    assert_eq!(restored.transport.save(), Some(state));
}

#[test]
fn registers() {
    minivmm_fuzz::run("devices/registers", |input| {
        let mut driver = Driver::new();
        while !input.is_empty() {
            match input.below(16) {
                0 => {
                    driver.shared.finish_drains();
                    driver.write(Register::Status, 0);
                    driver.shared.finish_drains();
                    let refuses = driver.shared.refuse_to_start.swap(false, Ordering::Relaxed);
                    driver.initialize(Progress::DriverOk, GOOD);
                    driver.shared.refuse_to_start.store(refuses, Ordering::Relaxed);
                }
                1 => driver.change_config(input.u64()),
                2 => driver.shared.slow.store(input.bool(), Ordering::Relaxed),
                3 => driver.shared.finish_drains(),
                4 => driver.shared.refuse_to_start.store(input.bool(), Ordering::Relaxed),
                5 => driver.transport.interrupt.used_buffer(),
                6 => driver.transport.interrupt.device_needs_reset(),
                7 => save(&mut driver),
                _ => access(&mut driver, input),
            }
            assert_steps(driver.status());
            let interrupts = driver.read(Register::InterruptStatus);
            assert_eq!(interrupts & !(INTERRUPT_USED_BUFFER | INTERRUPT_CONFIG_CHANGE), 0);
        }
        driver.shared.slow.store(false, Ordering::Relaxed);
        driver.shared.refuse_to_start.store(false, Ordering::Relaxed);
        driver.shared.finish_drains();
        driver.write(Register::Status, 0);
        assert_eq!(driver.status(), 0);
        driver.calls();
        driver.initialize(Progress::DriverOk, GOOD);
        assert_eq!(driver.calls(), [started(GOOD)]);
    });
}
