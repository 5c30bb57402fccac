//! A driver that writes anything anywhere.

use super::*;

/// Any access at any time: nothing panics, the device gets what it was promised (it checks), a reset always revives.
#[test]
fn any_access_at_any_time_leaves_a_device_that_a_reset_revives() {
    let mut driver = Driver::new();
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move |below: u64| {
        // xorshift64: deterministic, and good enough to wander.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % below
    };
    let interesting = [
        0,
        1,
        2,
        3,
        4,
        7,
        8,
        15,
        64,
        128,
        0x1_0000,
        RAM_SIZE - 16,
        1 << 30,
        0xffff,
        u64::from(u32::MAX),
    ];
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
            starts +=
                driver.calls().iter().filter(|call| matches!(call, Call::Start { .. })).count();
            driver.shared.config.fetch_add(1, Ordering::Relaxed);
        }
    }
    assert!(starts > 100, "the device was started {starts} times");
    driver.write(Register::Status, 0);
    assert_eq!(driver.status(), 0);
    driver.calls();
    driver.initialize(Progress::DriverOk, GOOD);
    assert_eq!(driver.calls(), [started(GOOD)]);
}
