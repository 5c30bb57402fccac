//! The compiled filters, run in an interpreter of classic BPF: for every system call the answer is that of the list.

use seccompiler::{BpfProgram, SeccompAction};

use super::super::filters::{self, Kind};
use super::{NEEDS, Needs};

/// `struct seccomp_data` (include/uapi/linux/seccomp.h): number, architecture, instruction pointer, arguments.
type Data = [u32; 16];

const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
/// System calls of the x32 ABI have this bit.
const X32: u32 = 1 << 30;
/// The kernel's: BPF_MAXINSNS.
const LENGTH_MAX: usize = 4096;
/// Steps of the longest way through a filter: the bound on what each system call costs, where the kernel has learned nothing.
const STEPS_MAX: usize = 130;

fn data(number: u32, arguments: [u64; 6]) -> Data {
    let mut data = [0; 16];
    (data[0], data[1]) = (number, AUDIT_ARCH_X86_64);
    for (words, argument) in data[4..].as_chunks_mut().0.iter_mut().zip(arguments) {
        *words = [argument as u32, (argument >> 32) as u32];
    }
    data
}

/// What the program returns, and in how many steps.
fn run(program: &BpfProgram, data: &Data) -> (u32, usize) {
    let (mut accumulator, mut at) = (0, 0);
    for steps in 1.. {
        let instruction = &program[at];
        let (code, k) = (u32::from(instruction.code), instruction.k);
        let branch = |taken: bool| usize::from(if taken { instruction.jt } else { instruction.jf });
        at += 1;
        match code {
            0x20 => accumulator = data[k as usize / 4],
            0x05 => at += k as usize,
            0x15 => at += branch(accumulator == k),
            0x25 => at += branch(accumulator > k),
            0x35 => at += branch(accumulator >= k),
            0x54 => accumulator &= k,
            0x06 => return (k, steps),
            _ => panic!("instruction {code:#x}"),
        }
    }
    unreachable!()
}

#[test]
fn a_filter_answers_each_system_call_as_its_list_says() {
    for (kind, scsi, saves) in Kind::ALL
        .iter()
        .flat_map(|kind| [(false, false), (true, true)].map(|(scsi, saves)| (*kind, scsi, saves)))
    {
        let needs = Needs { process: 7, scsi, saves, debugs: saves };
        let program = filters::compile(kind, needs, SeccompAction::Trap).unwrap();
        assert!(program.len() < LENGTH_MAX);
        let list = filters::allowed(kind, needs);
        let values: Vec<u64> = list.iter().flat_map(|call| call.values()).collect();
        let mut longest = 0;
        let mut check = |number: u32, arguments: [u64; 6]| {
            let (answer, steps) = run(&program, &data(number, arguments));
            longest = longest.max(steps);
            let allows = |call: &&filters::Allowed| {
                u32::try_from(call.number) == Ok(number) && call.allows(arguments)
            };
            let expected = match list.iter().find(allows) {
                Some(_) => libc::SECCOMP_RET_ALLOW,
                None => libc::SECCOMP_RET_TRAP,
            };
            assert_eq!(answer, expected, "{kind:?}: call {number} {arguments:x?}");
        };
        for number in (0..600).chain([X32, X32 | 1, X32 | 16, u32::MAX]) {
            check(number, [0; 6]);
            check(number, [u64::MAX; 6]);
        }
        for call in &list {
            for (index, value) in
                (0..6).flat_map(|index| values.iter().map(move |value| (index, *value)))
            {
                for near in [value, value ^ 1, value.wrapping_add(1), value | 1 << 32, !value] {
                    let mut arguments = [0; 6];
                    arguments[index] = near;
                    check(call.number as u32, arguments);
                    // Both conditions of a pair.
                    arguments[(index + 5) % 6] = value;
                    arguments[(index + 1) % 6] = libc::MAP_ANONYMOUS as u64;
                    check(call.number as u32, arguments);
                }
            }
        }
        println!("{}: {} instructions, {longest} steps", kind.name(), program.len());
        assert!(longest <= STEPS_MAX, "{kind:?}: {longest} steps");
    }
}

#[test]
fn another_architecture_is_killed() {
    for kind in Kind::ALL {
        let program = filters::compile(kind, NEEDS, SeccompAction::Trap).unwrap();
        for number in 0..600 {
            let mut data = data(number, [0; 6]);
            data[1] = 0x4000_0003;
            assert_eq!(run(&program, &data).0, libc::SECCOMP_RET_KILL_PROCESS);
        }
    }
}
