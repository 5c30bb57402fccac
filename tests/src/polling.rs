//! The benchmark's guest: `polling.s` with the tables that it needs, as a PVH kernel image.
//!
//! It runs on any /dev/kvm, at the processor's own speed, and on other monitors as well: it looks for its disk in a range
//! of virtio-mmio windows.
#![expect(
    unsafe_code,
    reason = "the program is assembled into this executable, and copied out from between two labels"
)]

use std::slice;

use arch::layout;

use crate::guest::BASE;
use crate::image;

const TABLES: u64 = BASE + 0x1000;
const PARAMETERS: u64 = BASE + 0x2000;
const PML4: u64 = BASE + 0x3000;
const GDT: u64 = TABLES;
const IDT: u64 = TABLES + 0x100;
const TSS: u64 = TABLES + 0x400;
const GDTR: u64 = TABLES + 0x500;
const IDTR: u64 = TABLES + 0x510;
/// The CPL 0 stack's top; that of CPL 3 lies below.
const STACK: u64 = 0x9_0000;

/// Bytes of a job's parameters, and the jobs that fit behind the others.
const JOB: usize = 96;
const JOBS_MAX: usize = (0x1000 - 32) / JOB;
/// Where a job's three ranks are.
const RANKS: u64 = 64;
const INVALID_OPCODE: usize = 6;

core::arch::global_asm!(
    ".pushsection .rodata.minivmm_polling, \"a\", @progbits",
    ".set PML4, {pml4}",
    ".set GDTR, {gdtr}",
    ".set IDTR, {idtr}",
    ".set PARAMETERS, {parameters}",
    ".set STACK, {stack}",
    ".set COM1, {com1}",
    ".globl poll_start",
    ".globl poll_end_of_code",
    "poll_start:",
    ".long poll_entry - poll_start, poll_end - poll_start, poll_fault - poll_start",
    include_str!("polling.s"),
    "poll_end_of_code:",
    ".code64",
    ".popsection",
    pml4 = const PML4,
    gdtr = const GDTR,
    idtr = const IDTR,
    parameters = const PARAMETERS,
    stack = const STACK,
    com1 = const layout::COM1,
    options(att_syntax),
);

unsafe extern "C" {
    safe static poll_start: u8;
    safe static poll_end_of_code: u8;
}

/// What the guest does with its disk, job after job.
#[derive(Clone, Copy, Debug)]
pub struct Job {
    /// Writes rather than reads.
    pub write: bool,
    /// At random places rather than one after the other.
    pub random: bool,
    /// Bytes a request: a power of two from 512 to 128 KiB.
    pub block: u32,
    /// Requests in flight: 1 to 32.
    pub depth: u32,
    /// Requests in all, at least `depth`.
    pub requests: u64,
}

/// Where a monitor puts virtio-mmio register windows.
#[derive(Clone, Copy, Debug)]
pub struct Windows {
    /// The first one's address.
    pub first: u64,
    /// Bytes from one to the next.
    pub stride: u64,
    /// How many may have a device.
    pub count: u64,
}

/// minivmm's first disk.
pub const MINIVMM: Windows =
    Windows { first: layout::VIRTIO_MMIO.0, stride: layout::VIRTIO_MMIO_SIZE, count: 1 };
/// QEMU's microvm (`hw/i386/microvm.c`).
pub const MICROVM: Windows = Windows { first: 0xfeb0_0000, stride: 512, count: 24 };

/// The shares of a job's requests whose longest latency the guest prints.
pub const QUANTILES: [f64; 3] = [0.5, 0.99, 0.999];

/// The latency, in TSC ticks, in the middle of a bucket: each power of two has 16 of them, for the ticks + 16.
#[must_use]
pub fn bucket_ticks(bucket: u32) -> f64 {
    let (octave, step) = (bucket / 16, bucket % 16);
    (f64::from(step) + 16.5) * f64::from(octave).exp2() - 16.0
}

/// A PVH kernel that prints 'R' when it runs, and does `jobs` on a disk of `capacity` bytes (a power of two). For each it prints a
/// line of hexadecimal numbers: TSC ticks, notifications, and the bucket of each quantile's latency; then "E"; and it spins.
/// A line that begins with F tells of a failure.
pub fn kernel(windows: Windows, jobs: &[Job], capacity: u64) -> Vec<u8> {
    assert!(jobs.len() <= JOBS_MAX);
    let start = &raw const poll_start;
    let length = (&raw const poll_end_of_code).addr() - start.addr();
    // SAFETY: the two labels enclose initialised, read-only bytes of this executable.
    let code = unsafe { slice::from_raw_parts(start, length) };
    let [entry, end, fault] = [0, 4, 8]
        .map(|at| BASE + u64::from(u32::from_le_bytes(code[at..at + 4].try_into().unwrap())));

    let mut memory = vec![0; (PML4 + 6 * 0x1000 - BASE) as usize];
    let mut put = |address: u64, bytes: &[u8]| {
        let at = (address - BASE) as usize;
        memory[at..at + bytes.len()].copy_from_slice(bytes);
    };
    put(BASE, code);
    descriptor_tables(&mut put, end, fault);
    page_tables(&mut put);
    let words = [windows.first, windows.stride, windows.count, jobs.len() as u64];
    for (word, at) in words.into_iter().zip((PARAMETERS..).step_by(8)) {
        put(at, &word.to_le_bytes());
    }
    for (job, at) in jobs.iter().zip((PARAMETERS + 32..).step_by(JOB)) {
        let block = u64::from(job.block);
        put(at, &u32::from(job.write).to_le_bytes());
        put(at + 4, &[if job.write { 0 } else { 2 }]);
        put(at + 8, &job.block.to_le_bytes());
        put(at + 12, &job.depth.to_le_bytes());
        for (value, field) in [job.requests, job.random.into(), capacity / block - 1, block / 512]
            .into_iter()
            .zip([16, 24, 32, 40])
        {
            put(at + field, &value.to_le_bytes());
        }
        let ranks = QUANTILES.map(|quantile| (job.requests as f64 * quantile).ceil() as u64);
        put(at + RANKS, &ranks.map(u64::to_le_bytes).concat());
    }
    image::pvh_code(&memory, entry)
}

/// Flat segments for CPL 0 and 3, a TSS for the way back to CPL 0, and gates that all lead to `end` or `fault` (SDM 3A 3.4.5,
/// 6.14, 7.7).
fn descriptor_tables(put: &mut impl FnMut(u64, &[u8]), end: u64, fault: u64) {
    let tss = TSS << 16 | 0x89 << 40 | 103;
    let gdt = [
        0,
        0xaf_9b00_0000_ffff,
        0xcf_9300_0000_ffff,
        0xcf_f300_0000_ffff,
        0xaf_fb00_0000_ffff,
        tss,
        0,
    ];
    put(GDT, &gdt.map(u64::to_le_bytes).concat());
    put(TSS + 4, &STACK.to_le_bytes());
    for vector in 0..32 {
        let handler = if vector == INVALID_OPCODE { end } else { fault };
        let gate = handler & 0xffff | 0x08 << 16 | 0x8e00 << 32 | (handler >> 16) << 48;
        put(IDT + 16 * vector as u64, &gate.to_le_bytes());
    }
    let register = |limit: u16, base: u64| [&limit.to_le_bytes()[..], &base.to_le_bytes()].concat();
    put(GDTR, &register(7 * 8 - 1, GDT));
    put(IDTR, &register(32 * 16 - 1, IDT));
}

/// 4 GiB of identity map in pages of 2 MiB, open to CPL 3.
fn page_tables(put: &mut impl FnMut(u64, &[u8])) {
    const FLAGS: u64 = 0b111;
    const LARGE: u64 = 1 << 7;
    let pdpt = PML4 + 0x1000;
    put(PML4, &(pdpt | FLAGS).to_le_bytes());
    for gib in 0..4 {
        let directory = pdpt + 0x1000 * (gib + 1);
        put(pdpt + 8 * gib, &(directory | FLAGS).to_le_bytes());
        for entry in 0..512 {
            put(
                directory + 8 * entry,
                &((gib << 30) | (entry << 21) | FLAGS | LARGE).to_le_bytes(),
            );
        }
    }
}
