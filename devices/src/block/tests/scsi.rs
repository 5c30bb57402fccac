//! SCSI commands in their classic framing: header, command, data, sense, trailer, status.

use super::disk::{SeenCommand, TestDisk};
use super::driver::{Buffer, Sent, UNTOUCHED};
use super::rig::{Outcome, Rig};
use crate::block::{ErrorPolicy, IoStatus, Kind};
use crate::disk::{ScsiDirection, ScsiReply};
use crate::virtio::spec::blk;

const INQUIRY: [u8; 6] = [0x12, 0, 0, 0, 36, 0];
const NOT_DONE: [u32; 4] = [255, 0, 0, 0];
const GOOD: ScsiReply = ScsiReply {
    status: 0,
    msg_status: 0,
    host_status: 0,
    driver_status: 0,
    residual: 0,
    sense: [0; 96],
    sense_length: 0,
};

/// A disk that takes SCSI commands, and what becomes of them.
fn rig(reply: Option<ScsiReply>) -> Rig {
    let rig = Rig::with(|setup| setup.disk.info.scsi = true);
    rig.disk.reply(reply);
    rig
}

/// What follows the data.
struct Reply {
    sense: Buffer,
    trailer: Buffer,
    status: Buffer,
}

impl Reply {
    fn new(rig: &mut Rig) -> Self {
        Self {
            sense: rig.driver.writable(blk::SCSI_SENSE_SIZE as u32),
            trailer: rig.driver.writable(blk::SCSI_TRAILER_SIZE as u32),
            status: rig.driver.writable(1),
        }
    }

    fn sense(&self, rig: &Rig) -> Vec<u8> {
        rig.driver.read(self.sense.address..self.sense.address + 96)
    }

    fn trailer(&self, rig: &Rig) -> [u32; 4] {
        let bytes = rig.driver.read(self.trailer.address..self.trailer.address + 16);
        std::array::from_fn(|i| u32::from_le_bytes(bytes[i * 4..][..4].try_into().unwrap()))
    }
}

/// Sends a command with these buffers of data in the classic framing.
fn send(rig: &mut Rig, request_type: u32, cdb: &[u8], data: &[Buffer]) -> (Outcome, Reply) {
    let header = rig.driver.header(request_type, 0);
    let command = rig.driver.readable(cdb);
    let reply = Reply::new(rig);
    let buffers = [&[header, command], data, &[reply.sense, reply.trailer, reply.status]].concat();
    (rig.run(&buffers), reply)
}

#[test]
fn scsi_commands_are_refused_with_errors_255() {
    for request_type in [blk::T_SCSI_CMD, blk::T_SCSI_CMD_OUT] {
        let mut rig = Rig::new();
        let (outcome, reply) = send(&mut rig, request_type, &INQUIRY, &[]);
        assert_eq!(outcome, Outcome { status: blk::S_UNSUPP, length: 17 });
        assert_eq!(reply.trailer(&rig), NOT_DONE);
        assert_eq!(reply.sense(&rig), [UNTOUCHED; 96]);
        // With less room there is no trailer to fill.
        assert_eq!(rig.request(request_type, 0, None), Outcome::UNSUPP);
        let small = rig.driver.writable(15);
        let sent = rig.driver.send(0, request_type, 0, Some(small));
        assert_eq!(rig.outcome(&sent), Outcome::UNSUPP);
        assert_eq!(rig.driver.data(&sent), [UNTOUCHED; 15]);
        assert_eq!(rig.disk.commands(), []);
    }
}

#[test]
fn the_bit_is_never_offered() {
    let rig = rig(None);
    assert_eq!(rig.shared().config_space.features & blk::F_SCSI, 0);
}

#[test]
fn the_buffers_give_the_direction() {
    let mut rig = rig(Some(GOOD));
    // Either type does for each.
    for request_type in [blk::T_SCSI_CMD, blk::T_SCSI_CMD_OUT] {
        let (outcome, reply) = send(&mut rig, request_type, &[0; 6], &[]);
        assert_eq!(outcome, Outcome::ok(96 + 16));
        assert_eq!(reply.trailer(&rig), [0; 4]);
        assert_eq!(reply.sense(&rig), [0; 96]);

        let (first, second) = (rig.driver.readable(&[1; 512]), rig.driver.readable(&[2; 100]));
        let (outcome, reply) = send(&mut rig, request_type, &[7; 10], &[first, second]);
        assert_eq!(outcome, Outcome::ok(96 + 16));
        assert_eq!(reply.trailer(&rig), [0, 612, 0, 0]);

        let (first, second) = (rig.driver.writable(30), rig.driver.writable(6));
        let (outcome, reply) = send(&mut rig, request_type, &INQUIRY, &[first, second]);
        assert_eq!(outcome, Outcome::ok(36 + 96 + 16));
        assert_eq!(reply.trailer(&rig), [0, 36, 0, 0]);
        for buffer in [first, second] {
            let content =
                rig.driver.read(buffer.address..buffer.address + u64::from(buffer.length));
            assert!(content.iter().all(|byte| *byte == TestDisk::ANSWER));
        }
        let seen = |cdb: &[u8], direction, data: Vec<u8>| SeenCommand {
            cdb: cdb.to_vec(),
            direction,
            data,
        };
        let sent = [vec![1; 512], vec![2; 100]].concat();
        let expected = [
            seen(&[0; 6], ScsiDirection::None, vec![]),
            seen(&[7; 10], ScsiDirection::ToDevice, sent),
            seen(&INQUIRY, ScsiDirection::FromDevice, vec![UNTOUCHED; 36]),
        ];
        assert_eq!(rig.disk.commands(), expected);
    }
    assert_eq!(rig.stats().kind(Kind::Other).operations, 6);
    rig.assert_alive();
}

#[test]
fn sense_and_residual_come_back() {
    let mut sense = [0; 96];
    sense[..8].copy_from_slice(&[0x70, 0, 5, 0, 0, 0, 0, 10]);
    let reply = ScsiReply {
        status: 2,
        msg_status: 3,
        host_status: 4,
        driver_status: 8,
        residual: 30,
        sense,
        sense_length: 18,
    };
    let mut rig = rig(Some(reply));
    let data = rig.driver.writable(36);
    let (outcome, reply) = send(&mut rig, blk::T_SCSI_CMD, &INQUIRY, &[data]);
    assert_eq!(outcome, Outcome::ok(6 + 96 + 16));
    assert_eq!(reply.trailer(&rig), [0x0804_0302, 36, 18, 30]);
    assert_eq!(reply.sense(&rig), sense);
    // More than the data is left over: nonsense, but the host's.
    rig.disk.reply(Some(ScsiReply { residual: u32::MAX, ..GOOD }));
    let (outcome, reply) = send(&mut rig, blk::T_SCSI_CMD, &INQUIRY, &[data]);
    assert_eq!(outcome, Outcome::ok(96 + 16));
    assert_eq!(reply.trailer(&rig), [0, 36, 0, u32::MAX]);
}

#[test]
fn only_the_command_needs_a_buffer_of_its_own() {
    let mut rig = rig(Some(GOOD));
    // Command in the rest of the header's buffer; data, sense, trailer and status in one.
    let mut bytes = rig.driver.header(blk::T_SCSI_CMD, 0);
    bytes = rig
        .driver
        .readable(&[&rig.driver.read(bytes.address..bytes.address + 16)[..], &INQUIRY].concat());
    let rest = rig.driver.writable(36 + 96 + 16 + 1);
    assert_eq!(rig.run(&[bytes, rest]), Outcome::ok(36 + 96 + 16));
    let answer = rig.driver.read(rest.address..rest.address + 149);
    assert_eq!(answer[..36], [TestDisk::ANSWER; 36]);
    assert_eq!(answer[36..], [&[0; 96 + 4][..], &[36], &[0; 12]].concat());
    // Everything but the command in bytes.
    let header = rig.driver.header(blk::T_SCSI_CMD, 0);
    let byte = |n| Buffer { address: header.address + n, length: 1, ..header };
    let mut buffers: Vec<_> = (0..16).map(byte).collect();
    buffers.push(rig.driver.readable(&INQUIRY));
    let small: Vec<_> = (0..37).map(|_| rig.driver.writable(4)).collect();
    buffers.extend(&small);
    buffers.push(rig.driver.writable(1));
    assert_eq!(rig.run(&buffers), Outcome::ok(36 + 96 + 16));
    assert_eq!(rig.driver.read(small[34].address..small[34].address + 4), [36, 0, 0, 0]);
    assert_eq!(rig.disk.commands().len(), 2);
}

#[test]
fn packets_that_lack_a_part_or_have_too_much_are_refused() {
    let mut rig = rig(Some(GOOD));
    // No room for the trailer, none for the sense, no command.
    let small = rig.driver.writable(15);
    assert_eq!(rig.request(blk::T_SCSI_CMD, 0, Some(small)), Outcome::IOERR);
    let trailer_only = Outcome { status: blk::S_IOERR, length: 17 };
    let header = rig.driver.header(blk::T_SCSI_CMD, 0);
    let command = rig.driver.readable(&INQUIRY);
    let short = rig.driver.writable(95 + 16 + 1);
    assert_eq!(rig.run(&[header, command, short]), trailer_only);
    let enough = rig.driver.writable(96 + 16 + 1);
    assert_eq!(rig.run(&[header, enough]), trailer_only);
    // Both ways; a command longer than any.
    let refused = Outcome { status: blk::S_UNSUPP, length: 17 };
    let (to, from) = (rig.driver.readable(&[0; 512]), rig.driver.writable(512));
    let (outcome, reply) = send(&mut rig, blk::T_SCSI_CMD, &INQUIRY, &[to, from]);
    assert_eq!((outcome, reply.trailer(&rig)), (refused, NOT_DONE));
    let (outcome, reply) = send(&mut rig, blk::T_SCSI_CMD, &[0; 33], &[]);
    assert_eq!((outcome, reply.trailer(&rig)), (refused, NOT_DONE));
    // More data than any command has, in one buffer named again and again.
    let large = rig.driver.writable(7 << 20);
    let mut rings = vec![large; 147];
    let header = rig.driver.header(blk::T_SCSI_CMD, 0);
    let command = rig.driver.readable(&INQUIRY);
    rings.splice(..0, [header, command]);
    rings.push(enough);
    let head = rig.driver.indirect_chain(0, &rings);
    rig.driver.publish(0, head);
    let sent = Sent { head, data: 0..0, status: enough.address + 112 };
    assert_eq!(rig.outcome(&sent), refused);
    assert_eq!(rig.disk.commands(), []);
    assert_eq!(rig.stats().kind(Kind::Other).invalid, 6);
    rig.assert_alive();
}

#[test]
fn what_the_host_refuses_is_no_disk_error() {
    let mut rig = Rig::with(|setup| {
        setup.disk.info.scsi = true;
        setup.options.write_errors = ErrorPolicy::Stop;
        setup.options.read_errors = ErrorPolicy::Stop;
    });
    let (outcome, reply) = send(&mut rig, blk::T_SCSI_CMD, &INQUIRY, &[]);
    assert_eq!(outcome, Outcome { status: blk::S_UNSUPP, length: 17 });
    assert_eq!(reply.trailer(&rig), NOT_DONE);
    assert_eq!(rig.events().len(), 0);
    assert_eq!(rig.shared().host_errors.io_status(), IoStatus::Ok);
    rig.assert_alive();
}
