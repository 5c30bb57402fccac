//! Any bytes may come from a client: no packet makes the protocol panic, or its replies grow without bound.

use gdbstub::stub::GdbStub;
use gdbstub::stub::state_machine::GdbStubStateMachine;
use vm_memory::GuestAddress;

use super::server::Replies;
use super::target::{Reason, Target};
use crate::GuestMemory;

/// Pseudo-random numbers, the same in each run (xorshift64).
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % limit as u64) as usize
    }
}

const COMMANDS: [&str; 30] = [
    "?",
    "g",
    "G",
    "m",
    "M",
    "X",
    "c",
    "s",
    "p",
    "P",
    "H",
    "Hg",
    "Hc",
    "T",
    "D",
    "R",
    "!",
    "Z0,",
    "Z1,",
    "Z2,",
    "z0,",
    "z4,",
    "vCont;",
    "vCont?",
    "qSupported:",
    "qXfer:features:read:target.xml:",
    "qfThreadInfo",
    "vAttach;",
    "qRcmd,",
    "QStartNoAckMode",
];
const PIECES: [&str; 16] = [
    "0",
    "1",
    "-1",
    "ffffffffffffffff",
    "ffffffffffffffffffff",
    "7",
    ",",
    ":",
    ";",
    "p1.",
    "c",
    "s",
    "4",
    "}",
    "*",
    "zz",
];

/// Feeds the protocol as the server does, but with a target that has no vCPUs, so that every request about one fails.
fn feed(bytes: &[u8], numbers: &mut Numbers) {
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
    let mut target = Target::new(memory, 2, true);
    let mut protocol = GdbStub::new(Replies::default()).run_state_machine(&mut target).unwrap();
    for byte in bytes {
        let next = match protocol {
            GdbStubStateMachine::Idle(idle) => idle.incoming_data(&mut target, *byte),
            GdbStubStateMachine::Running(running) if numbers.below(50) == 0 => {
                running.report_stop(&mut target, Reason::Exited(1))
            }
            GdbStubStateMachine::Running(running) => running.incoming_data(&mut target, *byte),
            GdbStubStateMachine::CtrlCInterrupt(interrupt) => {
                interrupt.interrupt_handled(&mut target, None::<Reason>)
            }
            GdbStubStateMachine::Disconnected(_) => return,
        };
        // The server closes the connection.
        let Ok(next) = next else { return };
        protocol = next;
    }
}

#[test]
fn no_packet_panics() {
    let mut numbers = Numbers(0x2545_f491_4f6c_dd1d);
    for _ in 0..3000 {
        let mut bytes = Vec::new();
        for _ in 0..numbers.below(12) {
            let mut packet = COMMANDS[numbers.below(COMMANDS.len())].to_owned();
            for _ in 0..numbers.below(8) {
                packet += PIECES[numbers.below(PIECES.len())];
            }
            let sum = packet.bytes().fold(0_u8, u8::wrapping_add);
            bytes.extend(format!("${packet}#{sum:02x}").into_bytes());
            if numbers.below(10) == 0 {
                bytes.push(numbers.below(256) as u8);
            }
        }
        feed(&bytes, &mut numbers);
    }
}
