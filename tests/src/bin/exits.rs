//! What a VM exit costs on this machine: `make exits` prints the table of the chapter of that name.
//!
//! A guest in real mode does one thing many times. The time that it takes, without the time of the same loop with nothing in it, is what
//! the exit costs: from the guest through KVM to whatever handles it, and back.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a measurement reports by panicking")]
#![expect(unsafe_code, reason = "a memory slot has no safe interface")]

use std::time::Duration;

use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::{IoEventAddress, NoDatamatch, VcpuExit};
use minivmm_tests::ten_lines::TinyVm;
use rustix::time::{ClockId, clock_gettime};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Rounds of a guest's loop. The fastest of `REPETITIONS` counts: other programs only make it slower.
const ROUNDS: u32 = 2_000;
const REPETITIONS: u32 = 50;
/// Ends a guest.
const END: u16 = 0xf4;
/// Where no memory is, a register whose writes KVM counts at an eventfd, and a page that the guest reads without an exit.
const NOTHING: u64 = 0x2_0000;
const KICK: u64 = NOTHING + 0x50;
const REGISTERS: u64 = 0x3_0000;
/// A line of the interrupt controllers that no device has.
const LINE: u32 = 5;

/// What is measured, what handles it, and the instructions.
const KINDS: [(&str, &str, &[u8]); 7] = [
    ("CPUID", "KVM", &[0x66, 0x31, 0xc0, 0x0f, 0xa2]),
    ("write to a port", "user space", &[0xe6, 0x10]),
    ("read from a port", "user space", &[0xe4, 0x10]),
    ("write to a register (MMIO)", "user space", &[0x66, 0xa3, 0x00, 0x00]),
    ("read of a register (MMIO)", "user space", &[0x66, 0xa1, 0x00, 0x00]),
    ("write to a register with an ioeventfd", "KVM", &[0x66, 0xa3, 0x50, 0x00]),
    // Prefixed by FS, which is at REGISTERS.
    ("read of a register in a mapped page", "no exit", &[0x64, 0x66, 0xa1, 0x00, 0x00]),
];

/// DS and FS; the rounds; the instructions; a write to `END`.
fn program(instructions: &[u8]) -> Vec<u8> {
    let mut code = vec![0xb8, 0, (NOTHING >> 12) as u8, 0x8e, 0xd8];
    code.extend([0xb8, 0, (REGISTERS >> 12) as u8, 0x8e, 0xe0]);
    code.extend([0x66, 0xbd]); // mov $ROUNDS, %ebp
    code.extend(ROUNDS.to_le_bytes());
    code.extend(instructions);
    code.extend([0x66, 0x4d]); // dec %ebp
    let back = u8::try_from(instructions.len() + 4).unwrap().wrapping_neg();
    code.extend([0x75, back, 0xe6, END as u8]);
    code
}

fn time(instructions: &[u8]) -> Duration {
    let mut vm = TinyVm::new(&program(instructions), true);
    let registers = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
    let slot = kvm_userspace_memory_region {
        slot: 1,
        flags: KVM_MEM_READONLY,
        guest_phys_addr: REGISTERS,
        memory_size: 0x1000,
        userspace_addr: registers.get_host_address(GuestAddress(0)).unwrap() as u64,
    };
    // SAFETY: `registers` is dropped at the end of this function, when the guest does not run any more.
    unsafe { vm.vm.set_user_memory_region(slot) }.unwrap();
    let kicks = EventFd::new(EFD_NONBLOCK).unwrap();
    vm.vm.register_ioevent(&kicks, &IoEventAddress::Mmio(KICK), NoDatamatch).unwrap();
    let start = processor_time();
    loop {
        match vm.run() {
            VcpuExit::IoOut(END, _) => return processor_time() - start,
            VcpuExit::IoOut(..) | VcpuExit::MmioWrite(..) => {}
            VcpuExit::IoIn(_, data) | VcpuExit::MmioRead(_, data) => data.fill(0),
            other => panic!("{other:?}"),
        }
    }
}

/// The processor time of this thread, in which the guest runs. Other programs' time is not in it.
fn processor_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec.unsigned_abs().try_into().unwrap())
}

fn fastest(measure: impl Fn() -> Duration) -> Duration {
    (0..REPETITIONS).map(|_| measure()).min().unwrap()
}

fn main() {
    let processor = std::fs::read_to_string("/proc/cpuinfo").unwrap();
    let field =
        |name: &str| processor.lines().find(|line| line.starts_with(name)).unwrap_or_default();
    println!("{}", field("model name"));
    let flags: Vec<_> = field("flags").split_whitespace().collect();
    let hardware = flags.contains(&"vmx") || flags.contains(&"svm");
    let nested = flags.contains(&"hypervisor");
    println!(
        "hardware virtualization: {}; this machine is {} virtual machine itself\n",
        if hardware { "yes" } else { "no, KVM interprets the guest's instructions" },
        if nested { "a" } else { "no" },
    );
    let row = |what: &str, by: &str, time: Duration| {
        println!("| {what} | {by} | {} |", time.as_nanos() / u128::from(ROUNDS));
    };
    println!("| what the guest does | handled by | ns |\n|---|---|---|");
    let nothing = fastest(|| time(&[]));
    for (what, by, instructions) in KINDS {
        row(what, by, fastest(|| time(instructions)).saturating_sub(nothing));
    }
    let vm = TinyVm::new(&[], true);
    let pulses = || {
        let start = processor_time();
        for level in (0..ROUNDS).flat_map(|_| [true, false]) {
            vm.vm.set_irq_line(LINE, level).unwrap();
        }
        processor_time() - start
    };
    row(
        "nothing: a thread of the host pulses an interrupt line (KVM_IRQ_LINE twice)",
        "KVM",
        fastest(pulses),
    );
}
