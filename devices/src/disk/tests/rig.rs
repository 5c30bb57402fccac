//! Engines under test: every kind of engine, cache mode and file system that this host offers.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::GuestMemory;
use crate::disk::engine::uring;
use crate::disk::host_file::{Alignment, FileKind, HostFile};
use crate::disk::open::raw_image;
use crate::disk::opened::OpenedDisk;
use crate::disk::{
    Aio, CacheMode, DetectZeroes, Disk, DiskError, Engine, EngineSetup, GuestRange, OpenOptions,
    OpenReason, Operation, Transfer, open,
};

pub(super) const MEMORY_SIZE: usize = 4 << 20;
pub(super) const DEPTH: u32 = 64;

/// A transfer with ranges of its own.
#[derive(Clone, Debug)]
pub(super) struct Request {
    pub(super) operation: Operation,
    pub(super) offset: u64,
    pub(super) length: u64,
    pub(super) ranges: Vec<GuestRange>,
}

impl Request {
    /// A read or write of one piece of guest memory.
    pub(super) fn plain(operation: Operation, offset: u64, address: u64, length: u32) -> Self {
        let ranges = vec![GuestRange { address: GuestAddress(address), length }];
        Self { operation, offset, length: length.into(), ranges }
    }

    /// An operation without data.
    pub(super) fn bare(operation: Operation, offset: u64, length: u64) -> Self {
        Self { operation, offset, length, ranges: Vec::new() }
    }
}

pub(super) const WRITE: Operation = Operation::Write { durable: false };

/// An engine, driven as a queue worker drives it: asleep on the completion descriptor, woken by edges.
pub(super) struct Rig {
    pub(super) disk: Arc<dyn Disk>,
    pub(super) memory: GuestMemory,
    pub(super) engine: Box<dyn Engine>,
    epoll: Epoll,
}

impl Rig {
    pub(super) fn new(disk: Arc<dyn Disk>) -> Self {
        // Two regions that touch: requests may cross.
        let half = MEMORY_SIZE / 2;
        let memory =
            GuestMemory::from_ranges(&[(GuestAddress(0), half), (GuestAddress(half as u64), half)])
                .unwrap();
        let engine = Arc::clone(&disk).engine(EngineSetup::new(memory.clone(), DEPTH)).unwrap();
        let epoll = Epoll::new().unwrap();
        let edges = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, 0);
        epoll.ctl(ControlOperation::Add, engine.completion_fd().unwrap(), edges).unwrap();
        Self { disk, memory, engine, epoll }
    }

    /// Submits a batch of at most `DEPTH` and sleeps until all of it is finished.
    pub(super) fn run(&mut self, requests: &[Request]) -> Vec<Result<(), DiskError>> {
        self.run_watched(requests, |_| {})
    }

    /// As `run`, and calls `completed` with the tag of each request that completes.
    pub(super) fn run_watched(
        &mut self,
        requests: &[Request],
        completed: impl FnMut(u32),
    ) -> Vec<Result<(), DiskError>> {
        self.submit(requests);
        let mut results = self.wait(requests.len(), completed);
        (0..requests.len() as u32).map(|tag| results.remove(&tag).unwrap()).collect()
    }

    /// Sleeps until `count` requests that were submitted are finished. Returns their results by tag.
    pub(super) fn wait(
        &mut self,
        count: usize,
        mut completed: impl FnMut(u32),
    ) -> HashMap<u32, Result<(), DiskError>> {
        let mut results = HashMap::new();
        let mut done = Vec::new();
        self.engine.reap(&mut done);
        loop {
            for completion in done.drain(..) {
                completed(completion.tag);
                let again = results.insert(completion.tag, completion.result);
                assert!(again.is_none(), "completed twice");
            }
            if results.len() == count {
                return results;
            }
            let woken = match self.epoll.wait(20_000, &mut [EpollEvent::default()]) {
                Ok(count) => count > 0,
                Err(error) => error.kind() == io::ErrorKind::Interrupted,
            };
            self.engine.reap(&mut done);
            // A slow host may not have answered yet.
            assert!(woken || done.is_empty(), "a completion without a wake-up");
        }
    }

    pub(super) fn submit(&mut self, requests: &[Request]) {
        for (tag, request) in requests.iter().enumerate() {
            let Request { operation, offset, length, ref ranges } = *request;
            self.engine.submit(Transfer { tag: tag as u32, operation, offset, length, ranges });
        }
        self.engine.commit();
    }

    /// Runs one request that must succeed.
    pub(super) fn ok(&mut self, request: Request) {
        assert_eq!(self.run(std::slice::from_ref(&request)), [Ok(())], "{request:?}");
    }

    /// Runs one request that must fail.
    pub(super) fn error(&mut self, request: Request) -> DiskError {
        self.run(std::slice::from_ref(&request)).remove(0).unwrap_err()
    }

    pub(super) fn put(&self, address: u64, data: &[u8]) {
        self.memory.write_slice(data, GuestAddress(address)).unwrap();
    }

    pub(super) fn get(&self, address: u64, length: usize) -> Vec<u8> {
        let mut data = vec![0; length];
        self.memory.read_slice(&mut data, GuestAddress(address)).unwrap();
        data
    }
}

static FORKS: Mutex<()> = Mutex::new(());

/// No child of this process starts meanwhile. For a moment a new child has copies of all descriptors, with their locks. A test that
/// expects a lock to be free must not run in that moment.
pub(in crate::disk) fn without_forks() -> MutexGuard<'static, ()> {
    FORKS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs a program, in turn with those who want no forks.
pub(in crate::disk) fn run(command: &mut Command) -> io::Result<Output> {
    let command = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = {
        let _turn = without_forks();
        command.spawn()?
    };
    child.wait_with_output()
}

/// A directory for images: on the file system of the build, and in memory.
pub(super) fn directories() -> Vec<tempfile::TempDir> {
    let beside_the_test = std::env::current_exe().unwrap().parent().unwrap().to_owned();
    let places = [beside_the_test, PathBuf::from("/dev/shm")];
    places.iter().filter_map(|place| tempfile::tempdir_in(place).ok()).collect()
}

/// Every way to serve the raw image at `path` that works here.
pub(super) fn every_way(path: &Path, detect_zeroes: DetectZeroes) -> Vec<(String, Arc<dyn Disk>)> {
    let mut ways = Vec::new();
    for &aio in Aio::ALL {
        for &cache in CacheMode::ALL {
            let options =
                OpenOptions { aio, cache, detect_zeroes, locking: false, ..OpenOptions::new(path) };
            let name =
                format!("{} aio={aio},cache={cache},detect-zeroes={detect_zeroes}", path.display());
            match open(&options) {
                Ok(disk) => ways.push((name.clone(), disk)),
                Err(error) if matches!(error.objection(), Some(OpenReason::NoDirect)) => {
                    eprintln!("not tested: {error}")
                }
                Err(error) => panic!("{error}"),
            }
            if cache == CacheMode::None {
                let alignment = Alignment { memory: 512, offset: 4096 };
                ways.extend(
                    demanding(&options, alignment)
                        .map(|disk| (format!("{name}, in units of 4096"), disk)),
                );
            }
        }
    }
    ways
}

/// The image through direct I/O that asks for more than this host's does.
pub(super) fn demanding(options: &OpenOptions, alignment: Alignment) -> Option<Arc<dyn Disk>> {
    let mut flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::CLOEXEC;
    flags |= rustix::fs::OFlags::DIRECT;
    let file = rustix::fs::open(&options.path, flags, rustix::fs::Mode::empty()).ok()?;
    let mode = rustix::fs::fstat(&file).unwrap().st_mode;
    let kind = match rustix::fs::FileType::from_raw_mode(mode) {
        rustix::fs::FileType::BlockDevice => FileKind::BlockDevice,
        _ => FileKind::Regular,
    };
    let file = HostFile::new(file.into(), kind, Some(alignment));
    Some(raw_disk(file, options))
}

/// A raw disk over `file`, served as `options` say.
pub(super) fn raw_disk(file: HostFile, options: &OpenOptions) -> Arc<dyn Disk> {
    let (backend, info) = raw_image(file, options).unwrap();
    let uses_ring = options.aio == Aio::IoUring && uring::available();
    Arc::new(OpenedDisk::new(backend, info, options, uses_ring))
}

/// What a user reads about an image that is refused: the error and its causes.
pub(in crate::disk) fn refusal(options: &OpenOptions) -> String {
    let error = open(options).err().unwrap();
    let causes = std::iter::successors(Some(&error as &dyn std::error::Error), |e| e.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}
