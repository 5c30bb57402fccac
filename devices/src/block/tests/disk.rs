//! A disk in memory whose completions, failures and order the test controls.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use vm_memory::Bytes;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::GuestMemory;
use crate::disk::{
    BlockLimits, Completion, DeviceCommand, Disk, DiskError, DiskInfo, Engine, EngineSetup,
    GuestRange, Operation, ScsiCommand, ScsiDirection, ScsiReply, Transfer,
};

/// A transfer as the engine got it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Seen {
    /// Which engine, counted from the disk's first.
    engine: usize,
    pub(super) tag: u32,
    pub(super) operation: Operation,
    pub(super) offset: u64,
    pub(super) length: u64,
    pub(super) ranges: Vec<GuestRange>,
}

/// A SCSI command as the engine got it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct SeenCommand {
    pub(super) cdb: Vec<u8>,
    pub(super) direction: ScsiDirection,
    /// What it sends, or what was where its answer goes.
    pub(super) data: Vec<u8>,
}

type Judge = Box<dyn FnMut(&Seen) -> Result<(), DiskError> + Send>;

#[derive(Default)]
struct State {
    data: Vec<u8>,
    /// Everything submitted, ever.
    log: Vec<Seen>,
    commits: usize,
    /// Keep transfers until `release` or a drain.
    hold: bool,
    held: VecDeque<Seen>,
    done: Vec<(usize, Completion)>,
    judge: Option<Judge>,
    commands: Vec<SeenCommand>,
    /// What becomes of every SCSI command; without it all are refused.
    reply: Option<ScsiReply>,
    /// Engines alive, and made altogether.
    engines: usize,
    refuse_engines: bool,
}

pub(in crate::block) struct TestDisk {
    state: Mutex<State>,
    changed: Condvar,
    capacity: AtomicU64,
    pub(in crate::block) info: DiskInfo,
    pub(in crate::block) first_sector: Option<[u8; 512]>,
    pub(in crate::block) merges: bool,
    completion: EventFd,
}

impl TestDisk {
    pub(in crate::block) const LIMITS: BlockLimits = BlockLimits {
        logical_block_size: 512,
        physical_block_size: 4096,
        alignment_offset: 0,
        min_io_size: 4096,
        opt_io_size: 65536,
        discard_granularity: 4096,
        secure_erase: true,
    };

    /// What SCSI commands that ask for data get.
    pub(super) const ANSWER: u8 = 0x5c;

    /// A disk of `sectors` sectors, each filled with the low byte of its number.
    pub(in crate::block) fn new(sectors: u64) -> Self {
        let mut data = Vec::with_capacity(sectors as usize * 512);
        (0..sectors).for_each(|sector| data.extend_from_slice(&[sector as u8; 512]));
        Self {
            state: Mutex::new(State { data, ..State::default() }),
            changed: Condvar::new(),
            capacity: AtomicU64::new(sectors * 512),
            info: DiskInfo {
                read_only: false,
                block_limits: Self::LIMITS,
                lifetime: None,
                scsi: false,
                backing_images: Vec::new(),
            },
            first_sector: None,
            merges: true,
            completion: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).unwrap(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A judge may panic on purpose.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn data(&self) -> Vec<u8> {
        self.state().data.clone()
    }

    pub(super) fn set_capacity(&self, bytes: u64) {
        self.capacity.store(bytes, Ordering::SeqCst);
    }

    /// Every transfer so far, in the order of submission.
    pub(super) fn log(&self) -> Vec<Seen> {
        self.state().log.clone()
    }

    /// The operations so far, in the order of submission.
    pub(super) fn operations(&self) -> Vec<Operation> {
        self.state().log.iter().map(|seen| seen.operation).collect()
    }

    pub(super) fn commits(&self) -> usize {
        self.state().commits
    }

    /// How many engines were made.
    pub(super) fn engines(&self) -> usize {
        self.state().engines
    }

    /// From now on transfers wait for `release`.
    pub(super) fn hold(&self) {
        self.state().hold = true;
    }

    /// Transfers finish at once again.
    pub(super) fn finish_at_once(&self) {
        self.state().hold = false;
    }

    /// Waits until `count` transfers are held.
    pub(super) fn wait_held(&self, count: usize) {
        drop(self.changed.wait_while(self.state(), |state| state.held.len() < count).unwrap());
    }

    pub(super) fn refuse_engines(&self) {
        self.state().refuse_engines = true;
    }

    pub(super) fn held(&self) -> usize {
        self.state().held.len()
    }

    /// Carries out the oldest `count` held transfers and signals their completion.
    pub(super) fn release(&self, count: usize) {
        let mut state = self.state();
        for _ in 0..count {
            state.finish_one();
        }
        drop(state);
        self.changed.notify_all();
        self.completion.write(1).unwrap();
    }

    /// What is held finishes.
    pub(super) fn finish_all(&self) {
        let mut state = self.state();
        while !state.held.is_empty() {
            state.finish_one();
        }
        drop(state);
        self.changed.notify_all();
        self.completion.write(1).unwrap();
    }

    /// From now on everything finishes, what is held too.
    pub(super) fn release_all(&self) {
        let mut state = self.state();
        state.hold = false;
        while !state.held.is_empty() {
            state.finish_one();
        }
        drop(state);
        self.changed.notify_all();
        self.completion.write(1).unwrap();
    }

    /// Decides from now on which transfers fail, and how.
    pub(super) fn judge(&self, judge: impl FnMut(&Seen) -> Result<(), DiskError> + Send + 'static) {
        self.state().judge = Some(Box::new(judge));
    }

    /// Fails everything with `error` from now on.
    pub(super) fn fail(&self, error: DiskError) {
        self.judge(move |_| Err(error));
    }

    /// Every SCSI command fares like this from now on.
    pub(super) fn reply(&self, reply: Option<ScsiReply>) {
        self.state().reply = reply;
    }

    /// The SCSI commands since the last call.
    pub(super) fn commands(&self) -> Vec<SeenCommand> {
        std::mem::take(&mut self.state().commands)
    }

    /// Nothing fails any more.
    pub(super) fn heal(&self) {
        self.state().judge = None;
    }
}

impl State {
    fn finish_one(&mut self) {
        let seen = self.held.pop_front().expect("a held transfer");
        let result = self.judge.as_mut().map_or(Ok(()), |judge| judge(&seen));
        self.done.push((seen.engine, Completion { tag: seen.tag, result }));
    }
}

impl Disk for TestDisk {
    fn allocated(&self) -> u64 {
        0
    }

    fn capacity(&self) -> u64 {
        self.capacity.load(Ordering::SeqCst)
    }

    fn info(&self) -> &DiskInfo {
        &self.info
    }

    fn first_sector(&self) -> Option<[u8; 512]> {
        self.first_sector
    }

    fn refresh_capacity(&self) -> std::io::Result<u64> {
        Ok(self.capacity())
    }

    fn resize(&self, bytes: u64) -> std::io::Result<()> {
        self.set_capacity(bytes);
        Ok(())
    }

    fn flush(&self) -> Result<(), DiskError> {
        Ok(())
    }

    fn engine(self: Arc<Self>, setup: EngineSetup) -> std::io::Result<Box<dyn Engine>> {
        let EngineSetup { memory, depth, .. } = setup;
        let mut state = self.state();
        if state.refuse_engines {
            return Err(std::io::ErrorKind::OutOfMemory.into());
        }
        state.engines += 1;
        let number = state.engines;
        drop(state);
        Ok(Box::new(TestEngine {
            disk: self,
            number,
            memory,
            depth,
            in_flight: 0,
            replied: Vec::new(),
        }))
    }
}

struct TestEngine {
    disk: Arc<TestDisk>,
    number: usize,
    memory: GuestMemory,
    depth: u32,
    in_flight: u32,
    /// SCSI commands, which finish at once.
    replied: Vec<Completion>,
}

impl TestEngine {
    /// Moves the data of everything that was finished without an error.
    fn collect(&mut self, done: &mut Vec<Completion>) {
        done.append(&mut self.replied);
        let mut state = self.disk.state();
        let State { data, done: finished, log, .. } = &mut *state;
        for (engine, completion) in finished.extract_if(.., |(engine, _)| *engine == self.number) {
            let seen = log
                .iter()
                .rfind(|seen| (seen.engine, seen.tag) == (engine, completion.tag))
                .unwrap();
            if completion.result.is_ok() {
                perform(&self.memory, data, seen);
            }
            self.in_flight -= 1;
            done.push(completion);
        }
    }
}

impl Engine for TestEngine {
    fn merges(&self) -> bool {
        self.disk.merges
    }

    fn submit(&mut self, transfer: Transfer<'_>) {
        self.in_flight += 1;
        assert!(self.in_flight <= self.depth, "more in flight than the depth");
        assert!(transfer.tag < self.depth, "a tag beyond the depth");
        let Transfer { tag, operation, offset, length, ranges } = transfer;
        if matches!(operation, Operation::Read | Operation::Write { .. }) {
            assert_eq!(length, ranges.iter().map(|range| u64::from(range.length)).sum::<u64>());
            assert!(length > 0, "an empty transfer");
        }
        let seen =
            Seen { engine: self.number, tag, operation, offset, length, ranges: ranges.to_vec() };
        let mut state = self.disk.state();
        assert!(
            !state.held.iter().any(|held| (held.engine, held.tag) == (self.number, tag)),
            "a tag used twice"
        );
        state.log.push(seen.clone());
        state.held.push_back(seen);
        if !state.hold {
            state.finish_one();
        }
        drop(state);
        self.disk.changed.notify_all();
    }

    fn submit_scsi(&mut self, tag: u32, command: Arc<dyn DeviceCommand>, data: &[GuestRange]) {
        let command: Arc<dyn std::any::Any + Send + Sync> = command;
        let command = command.downcast::<ScsiCommand>().unwrap();
        let mut state = self.disk.state();
        let mut seen = Vec::new();
        for range in data {
            let mut part = vec![0; range.length as usize];
            self.memory.read_slice(&mut part, range.address).unwrap();
            seen.append(&mut part);
            if command.direction() == ScsiDirection::FromDevice {
                self.memory
                    .write_slice(&vec![TestDisk::ANSWER; range.length as usize], range.address)
                    .unwrap();
            }
        }
        state.commands.push(SeenCommand {
            cdb: command.cdb().to_vec(),
            direction: command.direction(),
            data: seen,
        });
        let result =
            state.reply.map(|reply| command.set_reply(reply)).ok_or(DiskError::Host(libc::EPERM));
        self.replied.push(Completion { tag, result });
    }

    fn commit(&mut self) {
        self.disk.state().commits += 1;
    }

    fn reap(&mut self, done: &mut Vec<Completion>) {
        self.collect(done);
    }

    fn completion_fd(&self) -> Option<RawFd> {
        Some(self.disk.completion.as_raw_fd())
    }

    fn wait_for_all(&mut self, done: &mut Vec<Completion>) {
        let mut state = self.disk.state();
        let mine = |held: &Seen| held.engine == self.number;
        while let Some(position) = state.held.iter().position(mine) {
            state.held.swap(0, position);
            state.finish_one();
        }
        drop(state);
        self.collect(done);
    }
}

impl Drop for TestEngine {
    fn drop(&mut self) {
        assert!(
            std::thread::panicking() || self.in_flight == 0,
            "an engine dropped with transfers in flight"
        );
    }
}

fn perform(memory: &GuestMemory, data: &mut [u8], seen: &Seen) {
    let (offset, length) = (seen.offset as usize, seen.length as usize);
    let stretch = &mut data[offset..offset + length];
    let mut at = 0;
    match seen.operation {
        Operation::Read => seen.ranges.iter().for_each(|range| {
            let part = range.length as usize;
            memory.write_slice(&stretch[at..at + part], range.address).unwrap();
            at += part;
        }),
        Operation::Write { .. } => seen.ranges.iter().for_each(|range| {
            let part = range.length as usize;
            memory.read_slice(&mut stretch[at..at + part], range.address).unwrap();
            at += part;
        }),
        Operation::WriteZeroes { .. } => stretch.fill(0),
        Operation::SecureErase => stretch.fill(0xee),
        Operation::Discard => stretch.fill(0xdd),
        Operation::Flush => {}
    }
}
