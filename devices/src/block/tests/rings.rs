//! Rings that a driver got wrong, or made wrong: DEVICE_NEEDS_RESET, and only for that ring.

use virtio_queue::desc::split::Descriptor;

use super::driver::{Buffer, INDIRECT, MEMORY, NEXT, UNTOUCHED, WRITE, describe};
use super::rig::{Outcome, Rig};
use crate::disk::Operation;
use crate::virtio::spec::{self, STATUS_DEVICE_NEEDS_RESET, blk};

/// Serves a ring that is broken, checks the consequences, and that a reset heals it.
fn assert_breaks(rig: &mut Rig, what: &str) {
    let untouched = rig.disk.data();
    rig.serve();
    assert_eq!(rig.driver.interrupt.needs_reset(), STATUS_DEVICE_NEEDS_RESET, "{what}");
    assert_eq!(rig.driver.interrupt.status() & spec::mmio::INTERRUPT_CONFIG_CHANGE, 2, "{what}");
    assert_eq!(rig.driver.used(0), [], "{what}");
    // The ring is dead: even a good request on it is not looked at.
    rig.driver.send_write(0, 0, &[1; 512]);
    rig.serve();
    assert_eq!(rig.driver.used(0), [], "{what}");
    assert_eq!(rig.disk.data(), untouched, "{what}");
    assert_eq!(rig.stats().broken_rings, 1, "{what}");
    rig.reset();
    rig.assert_alive();
}

/// Serves a chain that starts with these descriptors at index 0.
fn assert_chain_breaks(what: &str, descriptors: impl FnOnce(&mut Rig) -> Vec<Descriptor>) {
    let mut rig = Rig::new();
    for (index, descriptor) in descriptors(&mut rig).into_iter().enumerate() {
        rig.driver.set_descriptor(0, index as u16, descriptor);
    }
    rig.driver.publish(0, 0);
    assert_breaks(&mut rig, what);
}

#[test]
fn head_beyond_the_queue() {
    for head in [64, 65, u16::MAX] {
        let mut rig = Rig::new();
        rig.driver.publish(0, head);
        assert_breaks(&mut rig, "head");
    }
}

#[test]
fn available_index_jumps() {
    for jump in [65, 1000, u16::MAX] {
        let mut rig = Rig::new();
        rig.driver.set_available_index(0, jump);
        assert_breaks(&mut rig, "available index");
    }
}

#[test]
fn loops_and_stray_next_indices() {
    assert_chain_breaks("points at itself", |rig| {
        let header = rig.driver.header(blk::T_IN, 0);
        vec![describe(&header, NEXT, 0)]
    });
    assert_chain_breaks("a longer loop", |rig| {
        let header = rig.driver.header(blk::T_IN, 0);
        let data = rig.driver.writable(512);
        vec![describe(&header, NEXT, 1), describe(&data, NEXT, 2), describe(&data, NEXT, 1)]
    });
    for next in [64, u16::MAX] {
        assert_chain_breaks("next", |rig| {
            let header = rig.driver.header(blk::T_IN, 0);
            vec![describe(&header, NEXT, next)]
        });
    }
}

#[test]
fn buffers_outside_guest_memory() {
    for (address, length) in [
        (MEMORY, 512),
        (MEMORY - 511, 512),
        (u64::MAX - 100, 512),
        (u64::MAX - 511, 512),
        (1 << 40, 1),
        (0, u32::MAX),
        (MEMORY - 512, u32::MAX),
    ] {
        let bad = |writable| Buffer { address, length, writable };
        assert_chain_breaks("readable", |_| vec![describe(&bad(false), 0, 0)]);
        assert_chain_breaks("writable", |_| vec![describe(&bad(true), 0, 0)]);
        assert_chain_breaks("data", |rig| {
            let header = rig.driver.header(blk::T_IN, 0);
            let status = rig.driver.writable(1);
            vec![describe(&header, NEXT, 1), describe(&bad(true), NEXT, 2), describe(&status, 0, 0)]
        });
    }
}

#[test]
fn an_empty_buffer_may_be_anywhere() {
    let mut rig = Rig::new();
    let header = rig.driver.header(blk::T_IN, 5);
    let data = rig.driver.writable(512);
    let status = rig.driver.writable(1);
    let nowhere = |writable| Buffer { address: u64::MAX, length: 0, writable };
    let chain =
        [nowhere(false), header, nowhere(false), nowhere(true), data, nowhere(true), status];
    assert_eq!(rig.run(&chain), Outcome::ok(512));
}

#[test]
fn readable_after_writable() {
    assert_chain_breaks("order", |rig| {
        let header = rig.driver.header(blk::T_IN, 0);
        let data = rig.driver.writable(512);
        let stray = rig.driver.readable(&[0; 16]);
        let status = rig.driver.writable(1);
        vec![
            describe(&header, NEXT, 1),
            describe(&data, NEXT, 2),
            describe(&stray, NEXT, 3),
            describe(&status, 0, 0),
        ]
    });
}

fn as_bytes(descriptor: &Descriptor) -> &[u8] {
    vm_memory::ByteValued::as_slice(descriptor)
}

/// An indirect table with a read request in it.
fn table(rig: &mut Rig, sector: u64) -> (u64, u32, Buffer) {
    let header = rig.driver.header(blk::T_IN, sector);
    let data = rig.driver.writable(512);
    let status = rig.driver.writable(1);
    let table = rig.driver.allocate(64).next_multiple_of(16);
    for (index, buffer) in [header, data, status].iter().enumerate() {
        let next = if index < 2 { NEXT } else { 0 };
        let descriptor = describe(buffer, next, index as u16 + 1);
        rig.driver.write(table + 16 * index as u64, as_bytes(&descriptor));
    }
    (table, 48, data)
}

#[test]
fn indirect_tables_after_direct_descriptors() {
    // §2.7.5.3.2: the device handles direct descriptors followed by one indirect table.
    let mut rig = Rig::new();
    let mut header = [0; 16];
    header[8] = 9;
    let front = rig.driver.readable(&header);
    let data = rig.driver.writable(512);
    let status = rig.driver.writable(1);
    let table = rig.driver.allocate(64).next_multiple_of(16);
    for (index, descriptor) in
        [describe(&data, NEXT, 1), describe(&status, 0, 0)].iter().enumerate()
    {
        rig.driver.write(table + 16 * index as u64, as_bytes(descriptor));
    }
    rig.driver.set_descriptor(0, 0, describe(&front, NEXT, 1));
    // The WRITE flag of the descriptor that names the table means nothing.
    rig.driver.set_descriptor(0, 1, Descriptor::new(table, 32, INDIRECT | WRITE, 0));
    rig.driver.publish(0, 0);
    rig.serve();
    assert_eq!(rig.driver.used(0), [(0, 513)]);
    assert_eq!(rig.driver.read(data.address..data.address + 512), [9; 512]);
}

#[test]
fn indirect_tables_that_are_wrong() {
    let with = |what, make: fn(u64, u32) -> Descriptor| {
        assert_chain_breaks(what, |rig| {
            let (table, length, _) = table(rig, 0);
            vec![make(table, length)]
        });
    };
    with("empty", |table, _| Descriptor::new(table, 0, INDIRECT, 0));
    with("half a descriptor", |table, _| Descriptor::new(table, 24, INDIRECT, 0));
    with("too long", |table, _| Descriptor::new(table, 16 * 1025, INDIRECT, 0));
    with("much too long", |table, _| Descriptor::new(table, !15, INDIRECT, 0));
    with("with next", |table, length| Descriptor::new(table, length, INDIRECT | NEXT, 1));
    with("outside memory", |_, length| Descriptor::new(MEMORY, length, INDIRECT, 0));
    with("around the end of the address space", |_, length| {
        Descriptor::new(u64::MAX - 15, length, INDIRECT, 0)
    });
    with("half outside memory", |_, _| Descriptor::new(MEMORY - 8, 16, INDIRECT, 0));
    assert_chain_breaks("nested", |rig| {
        let (inner, length, _) = table(rig, 0);
        let outer = rig.driver.allocate(32).next_multiple_of(16);
        rig.driver.write(outer, as_bytes(&Descriptor::new(inner, length, INDIRECT, 0)));
        vec![Descriptor::new(outer, 16, INDIRECT, 0)]
    });
    assert_chain_breaks("a loop inside", |rig| {
        let (table, length, _) = table(rig, 0);
        let header = rig.driver.header(blk::T_IN, 0);
        rig.driver.write(table, as_bytes(&describe(&header, NEXT, 0)));
        vec![Descriptor::new(table, length, INDIRECT, 0)]
    });
    assert_chain_breaks("next beyond the table", |rig| {
        let (table, _, _) = table(rig, 0);
        vec![Descriptor::new(table, 32, INDIRECT, 0)]
    });
    // Even when its first descriptor would make a chain of its own.
    for length in [0, 15, 24] {
        assert_chain_breaks("length of a table", |rig| {
            let table = rig.driver.allocate(32).next_multiple_of(16);
            let status = rig.driver.writable(1);
            rig.driver.write(table, as_bytes(&describe(&status, 0, 0)));
            vec![Descriptor::new(table, length, INDIRECT, 0)]
        });
    }
    let mut rig = Rig::with(|setup| setup.accepted &= !spec::F_INDIRECT_DESC);
    let (table, length, _) = table(&mut rig, 0);
    rig.driver.set_descriptor(0, 0, Descriptor::new(table, length, INDIRECT, 0));
    rig.driver.publish(0, 0);
    assert_breaks(&mut rig, "not agreed on");
}

#[test]
fn good_requests_before_the_broken_one_are_answered() {
    let mut rig = Rig::new();
    let write = rig.driver.send_write(0, 7, &[0x77; 512]);
    rig.driver.publish(0, 200);
    rig.serve();
    assert_eq!(rig.driver.used(0), [(write.head, 1)]);
    assert_eq!(rig.driver.status(&write), blk::S_OK);
    assert_eq!(rig.disk.data()[7 * 512..8 * 512], [0x77; 512]);
    assert_eq!(rig.driver.interrupt.needs_reset(), STATUS_DEVICE_NEEDS_RESET);
    assert_eq!(rig.driver.interrupt.status(), 3);
}

#[test]
fn requests_in_flight_on_a_broken_ring_are_answered() {
    let mut rig = Rig::new();
    rig.disk.hold();
    let read = rig.driver.send_read(0, 7, 512);
    rig.serve();
    rig.driver.publish(0, 200);
    rig.serve();
    assert_eq!(rig.driver.used(0), []);
    rig.release(1);
    assert_eq!(rig.driver.used(0), [(read.head, 513)]);
    assert_eq!(rig.driver.data(&read), [7; 512]);
}

#[test]
fn other_rings_go_on() {
    let mut rig = Rig::with(|setup| {
        setup.options.num_queues = 2;
        setup.queues = 2;
    });
    rig.driver.publish(0, 200);
    rig.serve();
    let read = rig.driver.send_read(1, 3, 512);
    rig.worker().serve(1);
    assert_eq!(rig.driver.used(1), [(read.head, 513)]);
    assert_eq!(rig.driver.data(&read), [3; 512]);
}

#[test]
fn more_chains_than_the_queue_holds() {
    // A driver that makes a chain available again and again before it was used.
    let mut rig = Rig::with(|setup| setup.ring_size = 4);
    rig.disk.hold();
    let first = rig.driver.send_read(0, 1, 512);
    for _ in 1..4 {
        rig.driver.publish(0, first.head);
    }
    rig.serve();
    assert_eq!(rig.driver.interrupt.needs_reset(), 0);
    rig.driver.publish(0, first.head);
    rig.serve();
    assert_eq!(rig.driver.interrupt.needs_reset(), STATUS_DEVICE_NEEDS_RESET);
    assert_eq!(rig.disk.held(), 4);
    rig.release(4);
    assert_eq!(rig.driver.used(0), [(first.head, 513); 4]);
    rig.reset();
    rig.disk.release(0);
    let read = rig.driver.send_read(0, 1, 512);
    rig.serve();
    rig.release(1);
    assert_eq!(rig.driver.used(0), [(read.head, 513)]);
}

#[test]
fn indices_wrap_around() {
    let mut rig = Rig::with(|setup| setup.ring_size = 4);
    let header = rig.driver.header(blk::T_FLUSH, 0);
    let status = rig.driver.writable(1);
    for _ in 0..70_000 {
        rig.driver.write(status.address, &[UNTOUCHED]);
        let head = rig.driver.chain(0, &[header, status]);
        rig.driver.publish(0, head);
        rig.serve();
        assert_eq!(rig.driver.used(0), [(head, 1)]);
        assert_eq!(rig.driver.read(status.address..status.address + 1), [blk::S_OK]);
    }
    assert_eq!(rig.disk.operations()[69_999], Operation::Flush);
}
