//! The configuration space while the device runs: the write cache and the capacity.

use super::machine::Machine;
use crate::disk::Disk;
use crate::disk::Operation;
use crate::virtio::device::VirtioDevice;
use crate::virtio::spec::{self, blk};

#[test]
fn the_driver_switches_the_write_cache() {
    let mut machine = Machine::new(1);
    let writeback = |machine: &Machine, features| {
        let mut byte = [9];
        machine.device.read_config(blk::Config::WRITEBACK_OFFSET, &mut byte, features);
        byte[0]
    };
    let features = machine.features();
    machine.start();
    assert_eq!(writeback(&machine, features), 1);
    let mut durable = Vec::new();
    for (step, value) in [None, Some(0), Some(1), Some(0)].into_iter().enumerate() {
        if let Some(value) = value {
            machine.device.write_config(blk::Config::WRITEBACK_OFFSET, &[value], features);
            assert_eq!(writeback(&machine, features), value);
        }
        machine.driver.send_write(0, 0, &[1; 512]);
        machine.driver.kick(0);
        machine.driver.line.wait(step as u32 + 1);
        durable.push(machine.disk.operations().pop() == Some(Operation::Write { durable: true }));
    }
    assert_eq!(durable, [false, true, false, true]);
    // The next driver finds what was configured.
    machine.reset();
    assert_eq!(writeback(&machine, features), 1);
    // Without CONFIG_WCE it is read-only; without FLUSH it is 0 (§5.2.5.2).
    machine.device.write_config(blk::Config::WRITEBACK_OFFSET, &[0], features & !blk::F_CONFIG_WCE);
    assert_eq!(writeback(&machine, features & !blk::F_CONFIG_WCE), 1);
    assert_eq!(writeback(&machine, features & !blk::F_FLUSH), 0);
}

#[test]
fn the_write_cache_may_be_switched_under_load() {
    let mut machine = Machine::new(1);
    let features = machine.features();
    machine.start();
    machine.disk.hold();
    for (count, value) in [1, 0, 1, 0].into_iter().enumerate() {
        machine.device.write_config(blk::Config::WRITEBACK_OFFSET, &[value], features);
        machine.driver.send_write(0, 10 * count as u64, &[1; 512]);
        machine.driver.kick(0);
        machine.disk.wait_held(count + 1);
    }
    let expected = [false, true, false, true].map(|durable| Operation::Write { durable });
    assert_eq!(machine.disk.operations(), expected);
    machine.disk.release(4);
    machine.driver.line.wait(1);
    machine.reset();
}

#[test]
fn only_writeback_is_writable_in_the_configuration_space() {
    let mut machine = Machine::new(1);
    let features = machine.features();
    let read = |machine: &Machine| {
        let mut bytes = [0; 80];
        machine.device.read_config(0, &mut bytes, features);
        bytes
    };
    let before = read(&machine);
    for offset in
        (0..80).filter(|offset| *offset != blk::Config::WRITEBACK_OFFSET).chain([u64::MAX])
    {
        machine.device.write_config(offset, &[0xff], features);
    }
    machine.device.write_config(blk::Config::WRITEBACK_OFFSET, &[0, 0], features);
    assert_eq!(read(&machine), before);
    assert_eq!(before[72..], [0; 8]);
    let mut far = [7; 4];
    machine.device.read_config(u64::MAX, &mut far, features);
    assert_eq!(far, [0; 4]);
}

#[test]
fn a_resize_reaches_the_driver() {
    let mut machine = Machine::new(1);
    let capacity = |machine: &Machine| {
        let mut bytes = [0; 8];
        machine.device.read_config(0, &mut bytes, 0);
        u64::from_le_bytes(bytes)
    };
    // Before the driver is there, there is no driver to interrupt.
    machine.disk.resize(32 * 512).unwrap();
    machine.handle.capacity_changed();
    assert_eq!((capacity(&machine), machine.driver.line.count()), (32, 0));
    machine.start();
    machine.disk.resize(48 * 512).unwrap();
    machine.handle.capacity_changed();
    assert_eq!((capacity(&machine), machine.driver.line.count()), (48, 1));
    assert_eq!(machine.driver.interrupt.status(), spec::mmio::INTERRUPT_CONFIG_CHANGE);
}
