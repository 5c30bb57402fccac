//! Single requests (virtio 1.2 §5.2.6): each type, each framing, each way to be wrong.

use super::disk::TestDisk;
use super::driver::{Buffer, UNTOUCHED};
use super::rig::{Outcome, Rig};
use crate::block::Kind;
use crate::disk::{DiskError, Lifetime, Operation};
use crate::virtio::spec::blk;

#[test]
fn reads_return_the_disk() {
    let mut rig = Rig::new();
    for (sector, sectors) in [(0, 1), (5, 3), (63, 1), (0, 64)] {
        let sent = rig.driver.send_read(0, sector, sectors * 512);
        assert_eq!(rig.outcome(&sent), Outcome::ok(sectors * 512));
        let expected: Vec<u8> =
            (sector..sector + u64::from(sectors)).flat_map(|n| [n as u8; 512]).collect();
        assert_eq!(rig.driver.data(&sent), expected);
    }
    let stats = *rig.stats().kind(Kind::Read);
    assert_eq!((stats.operations, stats.bytes, stats.errors, stats.invalid), (4, 69 * 512, 0, 0));
}

#[test]
fn writes_reach_the_disk() {
    let mut rig = Rig::new();
    let mut model = rig.disk.data();
    for (sector, sectors) in [(0, 1), (5, 3), (63, 1)] {
        let content = vec![0x80 + sector as u8; sectors * 512];
        let sent = rig.driver.send_write(0, sector, &content);
        assert_eq!(rig.outcome(&sent), Outcome::ok(0));
        model[sector as usize * 512..][..content.len()].copy_from_slice(&content);
        assert_eq!(rig.disk.data(), model);
    }
    let stats = *rig.stats().kind(Kind::Write);
    assert_eq!((stats.operations, stats.bytes), (3, 5 * 512));
}

#[test]
fn flush_reaches_the_disk() {
    let mut rig = Rig::new();
    assert_eq!(rig.request(blk::T_FLUSH, 0, None), Outcome::ok(0));
    // A driver should neither name a sector nor send data, and gets its flush all the same.
    let data = rig.driver.readable(&[1; 512]);
    assert_eq!(rig.request(blk::T_FLUSH, 1 << 60, Some(data)), Outcome::ok(0));
    assert_eq!(rig.disk.operations(), [Operation::Flush; 2]);
    assert_eq!(rig.stats().kind(Kind::Flush).operations, 2);
}

#[test]
fn get_id_is_padded_with_nul_and_cut_to_the_buffer() {
    for (serial, room, expected) in [
        (None, 20, [0; 20].to_vec()),
        (Some("disk-7"), 20, b"disk-7\0\0\0\0\0\0\0\0\0\0\0\0\0\0".to_vec()),
        (Some("12345678901234567890"), 20, b"12345678901234567890".to_vec()),
        (Some("12345678901234567890"), 8, b"12345678".to_vec()),
        (Some("12345678901234567890"), 0, vec![]),
    ] {
        for read_only in [false, true] {
            let mut rig = Rig::with(|setup| {
                setup.options.serial = serial.map(str::to_owned);
                setup.disk.info.read_only = read_only;
            });
            let data = rig.driver.writable(room);
            let sent = rig.driver.send(0, blk::T_GET_ID, 0, (room > 0).then_some(data));
            assert_eq!(rig.outcome(&sent), Outcome::ok(room));
            assert_eq!(rig.driver.read(data.address..data.address + u64::from(room)), expected);
        }
    }
}

#[test]
fn get_id_writes_no_more_than_20_bytes() {
    let mut rig = Rig::with(|setup| setup.options.serial = Some("x".to_owned()));
    let data = rig.driver.writable(64);
    let sent = rig.driver.send(0, blk::T_GET_ID, 0, Some(data));
    assert_eq!(rig.outcome(&sent), Outcome::ok(20));
    assert_eq!(rig.driver.data(&sent)[20..], [UNTOUCHED; 44]);
}

#[test]
fn a_read_only_disk_refuses_writes_and_nothing_else() {
    let mut rig = Rig::with(|setup| setup.disk.info.read_only = true);
    let before = rig.disk.data();
    let sent = rig.driver.send_write(0, 0, &[1; 512]);
    assert_eq!(rig.outcome(&sent), Outcome::IOERR);
    for request_type in [blk::T_DISCARD, blk::T_WRITE_ZEROES, blk::T_SECURE_ERASE] {
        let data = rig.driver.readable(&[0; 16]);
        assert_eq!(rig.request(request_type, 0, Some(data)), Outcome::IOERR);
    }
    assert_eq!(rig.disk.data(), before);
    assert_eq!(rig.request(blk::T_FLUSH, 0, None), Outcome::ok(0));
    rig.assert_alive();
    assert_eq!(rig.disk.operations(), [Operation::Flush, Operation::Read]);
    assert_eq!(rig.stats().kind(Kind::Write).invalid, 1);
}

#[test]
fn unknown_types_are_unsupported() {
    let mut rig = Rig::new();
    let zones = [15, 16, 18, 20, 22, 24, 26];
    for request_type in
        [5, 6, 7, 9, 12, 17, 1 << 31, blk::T_OUT | 1 << 31, u32::MAX].into_iter().chain(zones)
    {
        assert_eq!(rig.request(request_type, 0, None), Outcome::UNSUPP, "type {request_type}");
        let data = rig.driver.writable(512);
        assert_eq!(
            rig.request(request_type, 0, Some(data)),
            Outcome::UNSUPP,
            "type {request_type}"
        );
    }
    assert_eq!(rig.disk.operations(), []);
    assert_eq!(rig.stats().kind(Kind::Other).invalid, 32);
    rig.assert_alive();
}

#[test]
fn lifetime_is_told_where_the_host_tells() {
    let mut rig = Rig::new();
    let data = rig.driver.writable(6);
    assert_eq!(rig.request(blk::T_GET_LIFETIME, 0, Some(data)), Outcome::UNSUPP);
    assert_eq!(rig.shared().config_space.features & blk::F_LIFETIME, 0);

    let lifetime =
        Lifetime { pre_eol_info: 1, device_lifetime_est_typ_a: 2, device_lifetime_est_typ_b: 0x0b };
    let mut rig = Rig::with(|setup| setup.disk.info.lifetime = Some(lifetime));
    let data = rig.driver.writable(6);
    let sent = rig.driver.send(0, blk::T_GET_LIFETIME, 0, Some(data));
    assert_eq!(rig.outcome(&sent), Outcome::ok(6));
    assert_eq!(rig.driver.data(&sent), [1, 0, 2, 0, 0x0b, 0]);
}

#[test]
fn sectors_and_lengths_are_whole_logical_blocks() {
    let mut rig = Rig::with(|setup| setup.options.logical_block_size = Some(4096));
    for (sector, length) in [(1, 4096), (8, 512), (8, 4095), (7, 4096), (8, 4097)] {
        let sent = rig.driver.send_read(0, sector, length);
        assert_eq!(rig.outcome(&sent), Outcome::IOERR, "{sector} {length}");
        let sent = rig.driver.send_write(0, sector, &vec![1; length as usize]);
        assert_eq!(rig.outcome(&sent), Outcome::IOERR, "{sector} {length}");
    }
    let sent = rig.driver.send_read(0, 8, 8192);
    assert_eq!(rig.outcome(&sent), Outcome::ok(8192));
    assert_eq!(rig.disk.log().len(), 1);

    let mut rig = Rig::new();
    let sent = rig.driver.send_read(0, 8, 511);
    assert_eq!(rig.outcome(&sent), Outcome::IOERR);
}

#[test]
fn nothing_beyond_the_end_is_touched() {
    let mut rig = Rig::new();
    for (sector, length) in [
        (64, 512),
        (63, 1024),
        (u64::MAX, 512),
        (u64::MAX / 512, 512),
        (u64::MAX / 512 + 1, 512),
        (1 << 55, 1024),
    ] {
        let sent = rig.driver.send_read(0, sector, length);
        assert_eq!(rig.outcome(&sent), Outcome::IOERR, "{sector} {length}");
        assert_eq!(rig.driver.data(&sent), vec![UNTOUCHED; length as usize]);
        let sent = rig.driver.send_write(0, sector, &vec![1; length as usize]);
        assert_eq!(rig.outcome(&sent), Outcome::IOERR, "{sector} {length}");
    }
    assert_eq!(rig.disk.operations(), []);
    assert_eq!(
        (rig.stats().kind(Kind::Read).invalid, rig.stats().kind(Kind::Write).invalid),
        (6, 6)
    );
}

#[test]
fn an_empty_transfer_succeeds_inside_the_disk() {
    let mut rig = Rig::new();
    for request_type in [blk::T_IN, blk::T_OUT] {
        assert_eq!(rig.request(request_type, 0, None), Outcome::ok(0));
        assert_eq!(rig.request(request_type, 64, None), Outcome::ok(0));
        assert_eq!(rig.request(request_type, 65, None), Outcome::IOERR);
    }
    assert_eq!(rig.disk.operations(), []);
}

#[test]
fn the_disk_may_shrink_and_grow() {
    let mut rig = Rig::new();
    rig.disk.set_capacity(32 * 512);
    let sent = rig.driver.send_read(0, 32, 512);
    assert_eq!(rig.outcome(&sent), Outcome::IOERR);
    // Shrunk after the check: the engine's verdict, and no case for the error policy.
    rig.disk.fail(DiskError::OutOfRange);
    let sent = rig.driver.send_read(0, 31, 512);
    assert_eq!(rig.outcome(&sent), Outcome::IOERR);
    assert_eq!(rig.events(), []);
    rig.disk.heal();
    rig.disk.set_capacity(64 * 512);
    let sent = rig.driver.send_read(0, 63, 512);
    assert_eq!(rig.outcome(&sent), Outcome::ok(512));
}

#[test]
fn a_short_header_is_an_error() {
    let mut rig = Rig::new();
    for length in 0..blk::HEADER_SIZE {
        let header = rig.driver.readable(&vec![0; length]);
        let status = rig.driver.writable(1);
        let outcome = if length == 0 { rig.run(&[status]) } else { rig.run(&[header, status]) };
        assert_eq!(outcome, Outcome::IOERR, "header of {length} bytes");
    }
    rig.assert_alive();
}

#[test]
fn a_chain_without_a_writable_byte_gets_length_0() {
    let mut rig = Rig::new();
    let header = rig.driver.header(blk::T_OUT, 0);
    let data = rig.driver.readable(&[9; 512]);
    let empty = Buffer { address: data.address, length: 0, writable: true };
    for chain in [&[header][..], &[header, data], &[header, data, empty], &[empty]] {
        let head = rig.driver.chain(0, chain);
        rig.driver.publish(0, head);
        rig.serve();
        assert_eq!(rig.driver.used(0), [(head, 0)]);
    }
    assert_eq!(rig.stats().unanswerable, 4);
    assert_eq!(rig.disk.operations(), []);
    rig.driver.interrupt.acknowledge(u32::MAX);
    rig.assert_alive();
}

#[test]
fn header_and_status_may_be_split_anywhere() {
    let mut rig = Rig::new();
    let mut header = [0; 16];
    header[8] = 3;
    for cut in 0..=16 {
        // A read of sector 3: the header in two parts, the status at the end of the data's second part.
        let (front, back) = header.split_at(cut);
        let parts =
            [rig.driver.readable(front), rig.driver.readable(back), rig.driver.writable(100)];
        let tail = rig.driver.writable(413);
        let chain: Vec<_> =
            parts.into_iter().chain([tail]).filter(|part| part.length > 0).collect();
        assert_eq!(rig.run(&chain), Outcome::ok(512), "cut at {cut}");
        let data = [parts[2].address..parts[2].address + 100, tail.address..tail.address + 412];
        assert_eq!(data.map(|range| rig.driver.read(range)).concat(), [3; 512]);
    }
    // A write whose header ends inside the descriptor with the data.
    header[0] = 1;
    for cut in 0..=16 {
        let joined = [&header[cut..], &[0x40 + cut as u8; 512]].concat();
        let parts = [
            rig.driver.readable(&header[..cut]),
            rig.driver.readable(&joined),
            rig.driver.writable(1),
        ];
        let chain: Vec<_> = parts.into_iter().filter(|part| part.length > 0).collect();
        assert_eq!(rig.run(&chain), Outcome::ok(0), "cut at {cut}");
        assert_eq!(rig.disk.data()[3 * 512..4 * 512], [0x40 + cut as u8; 512]);
    }
}

#[test]
fn every_byte_in_its_own_descriptor() {
    let mut rig = Rig::with(|setup| {
        setup.options.queue_size = 1024;
        setup.ring_size = 1024;
    });
    let mut header = [0; 16];
    (header[0], header[8]) = (1, 2);
    let content: Vec<u8> = (0..512).map(|byte| byte as u8).collect();
    let mut chain: Vec<_> =
        [&header[..], &content].concat().iter().map(|byte| rig.driver.readable(&[*byte])).collect();
    chain.push(rig.driver.writable(1));
    assert_eq!(rig.run(&chain), Outcome::ok(0));
    assert_eq!(rig.disk.data()[2 * 512..3 * 512], content);
    // And through an indirect table.
    let head = rig.driver.indirect_chain(0, &chain);
    rig.driver.publish(0, head);
    rig.serve();
    assert_eq!(rig.driver.used(0), [(head, 1)]);
    assert_eq!(rig.disk.log().len(), 2);
}

#[test]
fn full_seg_max_through_an_indirect_table() {
    let mut rig = Rig::with(|setup| setup.disk = TestDisk::new(512));
    let seg_max = rig.shared().config_space.config(0, true).seg_max;
    assert_eq!(seg_max, 254);
    let header = rig.driver.header(blk::T_IN, 1);
    let data: Vec<_> = (0..seg_max).map(|_| rig.driver.writable(512)).collect();
    let status = rig.driver.writable(1);
    let chain: Vec<_> = [header].into_iter().chain(data.iter().copied()).chain([status]).collect();
    let head = rig.driver.indirect_chain(0, &chain);
    rig.driver.publish(0, head);
    rig.serve();
    assert_eq!(rig.driver.used(0), [(head, seg_max * 512 + 1)]);
    for (n, part) in data.iter().enumerate() {
        assert_eq!(rig.driver.read(part.address..part.address + 512), [(n + 1) as u8; 512]);
    }
}

#[test]
fn size_max_binds_those_who_agreed() {
    let setup = |accepted: u64| {
        Rig::with(|setup| {
            setup.disk = TestDisk::new(8192);
            setup.options.queue_size = 1024;
            setup.accepted &= accepted;
        })
    };
    let mut rig = setup(u64::MAX);
    let size_max = rig.shared().config_space.config(0, true).size_max;
    assert!((1 << 20..4 << 20).contains(&size_max), "{size_max}");
    let sent = rig.driver.send_read(0, 0, size_max);
    assert_eq!(rig.outcome(&sent), Outcome::ok(size_max));
    let sent = rig.driver.send_read(0, 0, size_max + 512);
    assert_eq!(rig.outcome(&sent), Outcome::IOERR);
    let mut rig = setup(!blk::F_SIZE_MAX);
    let sent = rig.driver.send_read(0, 0, size_max + 512);
    assert_eq!(rig.outcome(&sent), Outcome::ok(size_max + 512));
}

#[test]
fn without_a_volatile_cache_each_write_is_durable() {
    let write = |rig: &mut Rig| {
        let sent = rig.driver.send_write(0, 0, &[1; 512]);
        assert_eq!(rig.outcome(&sent), Outcome::ok(0));
        rig.disk.operations().pop()
    };
    let durable = |durable| Some(Operation::Write { durable });
    // The driver agreed to flush: the cache is as configured.
    assert_eq!(write(&mut Rig::new()), durable(false));
    assert_eq!(write(&mut Rig::with(|setup| setup.options.write_cache = false)), durable(true));
    // It did not: nothing may be volatile, whatever `writeback` says.
    assert_eq!(write(&mut Rig::with(|setup| setup.accepted &= !blk::F_FLUSH)), durable(true));
    let neither = !(blk::F_FLUSH | blk::F_CONFIG_WCE);
    assert_eq!(write(&mut Rig::with(|setup| setup.accepted &= neither)), durable(true));
}
