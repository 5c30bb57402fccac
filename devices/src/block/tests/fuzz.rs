//! A driver, the host's disk and the operator at a worker, in any order. The engine checks what it is asked for: ranges in guest
//! memory, tags and lengths.

use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use minivmm_fuzz::Input;
use virtio_queue::desc::split::Descriptor;
use vm_memory::ByteValued;

use super::driver::{BUFFERS, Buffer, INDIRECT, NEXT, WRITE};
use super::rig::Rig;
use crate::block::KindStats;
use crate::block::throttle::{Direction, Limit, Rate, Throttling};
use crate::block::throttle_group::Throttle;
use crate::block::{ErrorPolicy, Kind};
use crate::clock::Instant;
use crate::disk::DiskError;
use crate::virtio::spec::{self, blk};

/// Where buffers are that the device may write to.
const ARENA: Range<u64> = BUFFERS..BUFFERS + 0x8000;
/// Indirect tables: what the device writes must not move what it may write.
const INNER: Range<u64> = ARENA.end..ARENA.end + 0x1000;
const MEMORY: u64 = INNER.end + 0x1000;
const RINGS: u64 = 0x1_0000;
const RINGS_STRIDE: u64 = 0x8000;
/// Where the used ring is among a queue's rings.
const USED: u64 = 0x5000;
const SIZE: u16 = 16;
const QUEUES: u16 = 2;
const SECTORS: u64 = 64;

const KINDS: [Kind; 7] = [
    Kind::Read,
    Kind::Write,
    Kind::Flush,
    Kind::Discard,
    Kind::WriteZeroes,
    Kind::SecureErase,
    Kind::Other,
];

struct Fuzz {
    rig: Rig,
    /// The bytes that a writable descriptor has covered since the last reset.
    writable: Vec<bool>,
    /// Chains made available on each queue since the last reset, and used elements seen.
    published: [u64; 2],
    used: [u64; 2],
    /// Used elements altogether.
    answered: u64,
    /// The driver made an available index up.
    lied: [bool; 2],
}

fn policy(input: &mut Input<'_>) -> ErrorPolicy {
    input.pick(&[ErrorPolicy::Report, ErrorPolicy::Stop, ErrorPolicy::Ignore, ErrorPolicy::Enospc])
}

impl Fuzz {
    fn new(input: &mut Input<'_>) -> Self {
        let rig = Rig::with(|setup| {
            let options = &mut setup.options;
            (options.read_errors, options.write_errors) = (policy(input), policy(input));
            options.num_queues = QUEUES;
            options.poll = Duration::ZERO;
            setup.disk.info.read_only = input.below(8) == 1;
            setup.accepted =
                !input.pick(&[0, spec::F_EVENT_IDX, spec::F_INDIRECT_DESC, blk::F_FLUSH]);
            (setup.queues, setup.ring_size, setup.memory) = (QUEUES, SIZE, MEMORY);
        });
        let writable = vec![false; (MEMORY - BUFFERS) as usize];
        Self { rig, writable, published: [0; 2], used: [0; 2], answered: 0, lied: [false; 2] }
    }

    /// A descriptor that may be wrong in every way, but is writable only inside the arena, or where there is no memory.
    fn descriptor(&mut self, input: &mut Input<'_>) -> Descriptor {
        let address = match input.below(8) {
            0 => input.u64(),
            1 => MEMORY - 4 + input.below(8),
            2 => INNER.start + input.below(4) * 0x100,
            _ => ARENA.start + input.below(128) * 0x100,
        };
        let length = match input.below(4) {
            0 => input.u32(),
            1 => 16,
            2 => input.pick(&[0, 1, 2, 20, 32, 512, 513]),
            _ => 512 * input.below(9) as u32,
        };
        let mut flags = match input.below(16) {
            0 => input.u16(),
            flags => flags as u16 & (NEXT | WRITE | INDIRECT),
        };
        let end = address.saturating_add(length.into());
        let (start, end) = (address.min(MEMORY), end.min(MEMORY));
        if start < end && (start < ARENA.start || end > ARENA.end) {
            flags &= !WRITE;
        }
        if flags & WRITE != 0 && start < end {
            self.writable[(start - BUFFERS) as usize..(end - BUFFERS) as usize].fill(true);
        }
        Descriptor::new(address, length, flags, input.u8().into())
    }

    fn header(&mut self, input: &mut Input<'_>) {
        let kind = if input.below(8) == 0 { input.u32() } else { input.below(16) as u32 };
        let sector = if input.below(8) == 0 { input.u64() } else { input.below(SECTORS + 2) };
        let mut header = [0; blk::HEADER_SIZE];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[blk::HEADER_SECTOR..].copy_from_slice(&sector.to_le_bytes());
        self.rig.driver.write(ARENA.start + input.below(16) * 0x100, &header);
    }

    fn publish(&mut self, queue: u16, head: u16) {
        self.rig.driver.publish(queue.into(), head);
        self.published[usize::from(queue)] += 1;
    }

    /// A request that could come from Linux.
    fn honest(&mut self, queue: u16, input: &mut Input<'_>) {
        let at = |slot| ARENA.start + slot * 0x100;
        let header = Buffer { address: at(input.below(16)), length: 16, writable: false };
        let data = at(16 + input.below(80));
        let length = 512 * input.below(5) as u32;
        let write = input.bool();
        let status = Buffer { address: at(input.below(100)), length: 1, writable: true };
        let data = Buffer { address: data, length, writable: !write };
        for buffer in [&data, &status].into_iter().filter(|buffer| buffer.writable) {
            let start = (buffer.address - BUFFERS) as usize;
            self.writable[start..start + buffer.length as usize].fill(true);
        }
        let head = self.rig.driver.chain(queue.into(), &[header, data, status]);
        self.publish(queue, head);
    }

    /// The driver writes to its memory.
    fn drive(&mut self, queue: u16, input: &mut Input<'_>) {
        match input.below(8) {
            0 | 1 => {
                let descriptor = self.descriptor(input);
                self.rig.driver.set_descriptor(queue.into(), input.u16() % SIZE, descriptor);
            }
            2 => {
                let descriptor = self.descriptor(input);
                let at = INNER.start + input.below(256) * 16;
                self.rig.driver.write(at, descriptor.as_slice());
            }
            3 => self.header(input),
            4 => self.honest(queue, input),
            5 => {
                let head = if input.below(16) == 0 { input.u16() } else { input.u16() % SIZE };
                self.publish(queue, head);
            }
            6 => self.rig.driver.set_used_event(queue.into(), input.u16()),
            _ => {
                self.rig.driver.set_available_index(queue.into(), input.u16());
                self.lied[usize::from(queue)] = true;
            }
        }
    }

    /// Anything happens on the host.
    fn act(&mut self, queue: u16, input: &mut Input<'_>) {
        let rig = &mut self.rig;
        match input.below(12) {
            0..=2 => rig.worker().serve(queue.into()),
            3 => rig.disk.hold(),
            4 => rig.disk.finish_at_once(),
            5 => {
                let count = input.below(4).min(rig.disk.held() as u64);
                rig.release(count as usize);
            }
            6 => {
                let error = input.pick(&[
                    DiskError::Host(libc::EIO),
                    DiskError::NoSpace,
                    DiskError::Unsupported,
                    DiskError::OutOfRange,
                ]);
                let count = AtomicU32::new(input.below(8) as u32);
                rig.disk.judge(move |_| {
                    let left = count.load(Ordering::Relaxed);
                    count.store(left.saturating_sub(1), Ordering::Relaxed);
                    if left == 0 { Ok(()) } else { Err(error) }
                });
            }
            7 => rig.pause(),
            8 => rig.worker().resume(),
            9 => rig.disk.set_capacity(512 * input.below(SECTORS + 1)),
            10 => {
                let mut throttling = Throttling::default();
                if input.bool() {
                    throttling.rates[input.below(6) as usize].average = 1;
                }
                throttling.operation_size = input.below(2) * 512;
                rig.set_throttling(throttling);
                rig.worker().start_waiting(Instant::now());
            }
            _ => {
                rig.remove_queue(queue.into()).unwrap();
                self.check();
                let rig = &mut self.rig;
                rig.driver.reset_ring(queue.into());
                let active = rig.driver.active(queue);
                rig.worker().add_queue(queue.into(), active);
                self.start_over(queue.into()..usize::from(queue) + 1);
            }
        }
    }

    /// What is true at any moment.
    fn check(&mut self) {
        for queue in 0..QUEUES {
            let number = usize::from(queue);
            let answers = self.rig.driver.used(number);
            assert!(answers.iter().all(|(head, _)| *head < SIZE));
            self.used[number] += answers.len() as u64;
            self.answered += answers.len() as u64;
            let (used, published) = (self.used[number], self.published[number]);
            assert!(self.lied[number] || used <= published, "{used} answers to {published} chains");
        }
        assert_eq!(self.counted(), self.answered, "{:?}", self.rig.stats());
    }

    fn counted(&self) -> u64 {
        let stats = self.rig.stats();
        let kinds = KINDS.map(|kind| stats.kind(kind));
        let of_kind = |kind: &&KindStats| kind.operations + kind.invalid + kind.errors;
        kinds.iter().map(of_kind).sum::<u64>() + stats.unanswerable
    }

    /// The driver has taken queues back, with what was in flight, and starts over.
    fn start_over(&mut self, queues: Range<usize>) {
        for queue in queues {
            (self.published[queue], self.used[queue], self.lied[queue]) = (0, 0, false);
        }
        self.answered = self.counted();
    }

    /// What the device must not write to, and buffers.
    fn memory(&self) -> Vec<(u64, Vec<u8>)> {
        let driver = &self.rig.driver;
        let tables = (0..u64::from(QUEUES)).map(|queue| RINGS + queue * RINGS_STRIDE);
        let around = tables.flat_map(|table| {
            let used = table + USED + u64::from(SIZE) * 8 + 6;
            [table..table + 0x200, used..used + 0x200]
        });
        around
            .chain(std::iter::once(BUFFERS..MEMORY))
            .map(|range| (range.start, driver.read(range)))
            .collect()
    }

    fn check_memory(&self, before: &[(u64, Vec<u8>)]) {
        for ((start, before), (_, after)) in before.iter().zip(self.memory()) {
            if *before == after {
                continue;
            }
            let changed = (0..after.len()).filter(|at| before[*at] != after[*at]);
            let is_buffer = |address: u64| {
                address.checked_sub(BUFFERS).is_some_and(|at| self.writable[at as usize])
            };
            let mut stray = changed.map(|at| start + at as u64).filter(|at| !is_buffer(*at));
            assert_eq!(stray.next(), None, "a byte that is not the device's was changed");
        }
    }

    /// When nothing is with the host: each chain that was taken is answered, or waits, once.
    fn check_standstill(&mut self) {
        self.rig.pause();
        self.check();
        for queue in self.rig.worker().snapshot() {
            let number = usize::from(queue.queue);
            let waiting = queue.stopped.len() as u16;
            assert_eq!(queue.next_used, self.used[number] as u16);
            let unanswered = queue.next_avail.wrapping_sub(queue.next_used) - waiting;
            // The chain that broke the ring has no answer.
            assert!(unanswered == 0 || queue.broken && unanswered == 1, "{queue:?}");
        }
    }
}

#[test]
fn block() {
    minivmm_fuzz::run("devices/block", |input| {
        let mut fuzz = Fuzz::new(input);
        while !input.is_empty() {
            let (what, queue) = (input.below(8), input.u16() % QUEUES);
            if what < 5 {
                fuzz.drive(queue, input);
                continue;
            }
            let before = fuzz.memory();
            if what < 7 {
                fuzz.act(queue, input);
                fuzz.check();
            } else if input.below(4) == 0 {
                fuzz.rig.reset();
                fuzz.start_over(0..QUEUES.into());
            } else {
                fuzz.check_standstill();
                fuzz.rig.worker().resume();
            }
            fuzz.check_memory(&before);
        }
        fuzz.check_standstill();
        fuzz.rig.disk.heal();
        fuzz.rig.disk.finish_at_once();
        fuzz.rig.disk.set_capacity(512 * SECTORS);
        fuzz.rig.set_throttling(Throttling::default());
        fuzz.rig.reset();
        fuzz.rig.worker().resume();
        fuzz.rig.assert_alive();
    });
}

/// Limits that pass their check.
fn limits(input: &mut Input<'_>) -> Throttling {
    let mut limits = Throttling { operation_size: input.u16().into(), ..Throttling::default() };
    for rate in &mut limits.rates {
        if input.bool() {
            let average = 1 + (u64::from(input.u16()) << input.below(32));
            let (max, max_length) = match input.below(3) {
                0 => (0, 1),
                1 => (average + u64::from(input.u16()), 1),
                _ => (average * 2, 1 + input.below(100)),
            };
            *rate = Rate { average, max, max_length };
        }
    }
    if limits.check().is_ok() { limits } else { Throttling::default() }
}

/// What the disks of a group have started by now is within each limit, however the requests came. What waits starts when it was told
/// to, or soon after that where another disk has its turn and does not use it.
#[test]
fn throttle() {
    minivmm_fuzz::run("devices/throttle", |input| {
        let limits = limits(input);
        let start = Instant::now();
        let members: Vec<_> =
            (0..=input.below(3)).map(|_| Throttle::new(&limits, "vda", start)).collect();
        members[1..].iter().for_each(|member| member.join(&members[0]));
        let mut now = start;
        let mut started = [0.0; 6];
        while !input.is_empty() {
            now += Duration::from_nanos(u64::from(input.u16()) << input.below(24));
            let direction = input.pick(&Direction::BOTH);
            let throttle = &members[input.below(members.len() as u64) as usize];
            let mut wait = throttle.wait(direction, now);
            if wait > Duration::ZERO && (wait > Duration::from_secs(1 << 20) || input.bool()) {
                continue;
            }
            // A second look, and in a group more for as long as a turn may be unused.
            for _ in 0..if members.len() > 1 { 100 } else { 1 } {
                if wait > Duration::ZERO {
                    now += wait + Duration::from_micros(1);
                    wait = throttle.wait(direction, now);
                }
            }
            assert_eq!(wait, Duration::ZERO, "it waited in vain");
            let elapsed = (now - start).as_secs_f64();
            let bytes = u64::from(input.u16()) << input.below(16);
            for (number, rate) in limits.rates.iter().enumerate() {
                let Rate { average, max, max_length } = *rate;
                let limit = Limit::ALL[number];
                if average == 0 || !limit.concerns(direction) {
                    continue;
                }
                let (average, max, length) = (average as f64, max as f64, max_length as f64);
                let burst = if max == 0.0 { average / 10.0 } else { max * length };
                let slack = 1.0 + (average + max) * 1e-5;
                let most = average * elapsed + burst + slack;
                assert!(started[number] <= most, "{limit:?}: {} of {most}", started[number]);
                if max_length > 1 {
                    let most = max * elapsed + max / 10.0 + slack;
                    assert!(started[number] <= most, "{limit:?}: {} of {most}", started[number]);
                }
            }
            throttle.charge(direction, bytes);
            let size = limits.operation_size as f64;
            let operations = if size > 0.0 { (bytes as f64 / size).max(1.0) } else { 1.0 };
            for (number, limit) in Limit::ALL.into_iter().enumerate() {
                if limit.concerns(direction) {
                    started[number] += if limit.counts_bytes() { bytes as f64 } else { operations };
                }
            }
        }
    });
}
