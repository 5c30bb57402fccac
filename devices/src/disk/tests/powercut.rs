//! Power cuts: every legal state of the medium is sound and holds what completed flushes covered.
//!
//! A random load runs on an image whose file is observed, with many requests in flight. Each sector of the disk that it writes
//! has a history of values with the moments between which each was written. At each moment of a cut a sector may read as the
//! value that the last completed flush covered, or as any that was begun later. Values name their write and their sector, so
//! that another sector's data is recognized.
//!
//! `cargo test` looks at some hundred states of each kind of image; with `MINIVMM_SOAK=1` (`make soak`) at 10,000 (clusters of 2 MiB: 200).

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

mod history;

use self::history::{Change, History, Value};
use super::rig::{self, Request, Rig};
use crate::disk::engine::uring;
use crate::disk::open::open_observed;
use crate::disk::powercut::medium::{Recorded, Replay, State};
use crate::disk::powercut::{Log, Random, choices, qcow2::Image};
use crate::disk::qcow2::without;
use crate::disk::{
    Aio, CacheMode, DiscardMode, Format, OpenOptions, OpenReason, Operation, SECTOR,
};

/// A kind of image, and how it is used.
#[derive(Clone, Copy)]
struct Setup {
    /// Options of `qemu-img create`; none: a raw image.
    create: Option<&'static [&'static str]>,
    cache: CacheMode,
    aio: Aio,
    /// Bytes of a cluster.
    cluster: u64,
    /// Bytes of the disk.
    size: u64,
    /// What the disk holds at first.
    start: Start,
    /// It is resized under the load.
    resized: bool,
}

#[derive(Clone, Copy, PartialEq)]
enum Start {
    Empty,
    Compressed,
    Snapshot,
    Backing,
}

/// What `write` puts into `sector`.
fn content(write: u64, sector: u64) -> Vec<u8> {
    [write.to_le_bytes(), sector.to_le_bytes()].concat().repeat(32)
}

/// What a sector held before the load.
fn at_start(setup: &Setup, sector: u64) -> Vec<u8> {
    match setup.start {
        Start::Empty => vec![0; 512],
        _ => content(u64::MAX, sector),
    }
}

/// Regions of the disk that the load uses: each is a cluster, or some small ones.
const PLACES: u64 = 12;

impl Setup {
    fn region(&self) -> u64 {
        self.cluster.max(4096)
    }

    /// The sectors of a place that are watched: those at both ends.
    fn probes(&self, place: u64) -> Vec<u64> {
        let start = self.offset(place) / SECTOR;
        let sectors = self.region() / SECTOR;
        (start..start + 4).chain(start + sectors - 4..start + sectors).collect()
    }

    fn offset(&self, place: u64) -> u64 {
        let regions = self.size / self.region();
        (place * regions / PLACES) * self.region()
    }

    fn create(&self, directory: &Path) -> Option<OpenOptions> {
        let (path, base) = (directory.join("image"), directory.join("base"));
        let text = |path: &Path| path.to_str().unwrap().to_owned();
        let mut options = OpenOptions {
            cache: self.cache,
            aio: self.aio,
            locking: false,
            backing: true,
            discard: DiscardMode::Unmap,
            ..OpenOptions::new(&path)
        };
        let Some(create) = self.create else {
            fs::File::create(&path).unwrap().set_len(self.size).unwrap();
            return Some(options);
        };
        options.format = Some(Format::Qcow2);
        let run = |arguments: &[&str]| {
            let output = rig::run(Command::new("qemu-img").args(arguments)).ok()?;
            assert!(output.status.success(), "{arguments:?}: {output:?}");
            Some(())
        };
        let size = self.size.to_string();
        if self.start == Start::Empty {
            let last = [text(&path), size];
            run(&[&["create", "-f", "qcow2"], create, &[&last[0], &last[1]]].concat())?;
            return Some(options);
        }
        let sectors = (0..self.size / SECTOR).flat_map(|sector| at_start(self, sector));
        fs::write(&base, sectors.collect::<Vec<_>>()).unwrap();
        let (base, path) = (text(&base), text(&path));
        match self.start {
            Start::Backing => {
                let below = ["create", "-f", "qcow2", "-F", "raw", "-b", &base];
                run(&[&below[..], create, &[&path]].concat())?;
            }
            start => {
                let how = if start == Start::Compressed { &["-c"][..] } else { &[] };
                let convert = ["convert", "-f", "raw", "-O", "qcow2"];
                run(&[&convert[..], how, create, &[&base, &path]].concat())?;
            }
        }
        if self.start == Start::Snapshot {
            run(&["snapshot", "-c", "before", &path])?;
        }
        Some(options)
    }

    /// One request of the load at `place`, and what it makes of which sectors.
    fn request(
        &self,
        place: u64,
        write: u64,
        memory: u64,
        rig: &Rig,
        random: &mut Random,
    ) -> (Request, Value, Vec<u64>) {
        let probes = self.probes(place);
        let (offset, region) = (self.offset(place), self.region());
        let synchronous = matches!(self.cache, CacheMode::Writethrough | CacheMode::DirectSync)
            || random.below(8) == 0;
        let whole = |operation| Request::bare(operation, offset, region);
        match random.below(12) {
            0 => (whole(Operation::Discard), Value::Discarded, probes),
            1 => {
                let zero = Operation::WriteZeroes { unmap: true, durable: synchronous };
                (whole(zero), Value::Zero, probes)
            }
            2 => {
                let zero = Operation::WriteZeroes { unmap: false, durable: synchronous };
                (whole(zero), Value::Zero, probes)
            }
            kind => {
                let (first, count) = match kind {
                    3..6 if region <= 64 << 10 => (probes[0], region / SECTOR),
                    _ => {
                        let at = random.below(8);
                        (probes[at as usize], 1 + random.below(4 - at % 4))
                    }
                };
                let data: Vec<_> =
                    (first..first + count).flat_map(|sector| content(write, sector)).collect();
                rig.put(memory, &data);
                let operation = Operation::Write { durable: synchronous };
                let request = Request::plain(operation, first * SECTOR, memory, data.len() as u32);
                let changed = |probe: &u64| (first..first + count).contains(probe);
                (request, Value::Write(write), probes.into_iter().filter(changed).collect())
            }
        }
    }
}

/// Runs a load of `batches`.
fn load(setup: &Setup, rig: &mut Rig, log: &Log, batches: u64, random: &mut Random) -> History {
    let mut history = History::default();
    for place in 0..PLACES {
        setup
            .probes(place)
            .into_iter()
            .for_each(|probe| _ = history.sectors.entry(probe).or_default());
    }
    let mut write = 0;
    for batch in 0..batches {
        if setup.resized && batch % 4 == 3 {
            resize(setup, rig, log, &mut history, batch % 8 == 3);
        }
        let mut requests = Vec::new();
        let mut changes: Vec<Option<(Value, Vec<u64>)>> = Vec::new();
        let first = random.below(PLACES);
        for place in 0..PLACES {
            if random.below(2) == 0 && place != first
                || setup.offset(place) + setup.region() > rig.disk.capacity()
            {
                continue;
            }
            write += 1;
            let memory = place * (128 << 10);
            let (request, value, sectors) = setup.request(place, write, memory, rig, random);
            requests.push(request);
            changes.push(Some((value, sectors)));
            if random.below(6) == 0 {
                requests.push(Request::bare(Operation::Flush, 0, 0));
                changes.push(None);
            }
        }
        let begin = log.moment();
        let mut ends = vec![0; requests.len()];
        rig.run_watched(&requests, |tag| ends[tag as usize] = log.moment());
        for ((request, change), end) in requests.iter().zip(changes).zip(ends) {
            let Some((value, sectors)) = change else {
                history.flushes.push((begin, end));
                continue;
            };
            let durable = matches!(
                request.operation,
                Operation::Write { durable: true } | Operation::WriteZeroes { durable: true, .. }
            );
            for sector in sectors {
                let change = Change { value, begin, end, durable };
                history.sectors.get_mut(&sector).unwrap().push(change);
            }
        }
    }
    history
}

/// Halves the disk, or makes it whole again: what was cut off is zero then.
fn resize(setup: &Setup, rig: &Rig, log: &Log, history: &mut History, shrink: bool) {
    let size = if shrink { setup.size / 2 - 1536 } else { setup.size };
    let begin = log.moment();
    rig.disk.resize(size).unwrap();
    let end = log.moment();
    let cut = setup.size / 2 - 1536;
    for (_, changes) in history.sectors.iter_mut().filter(|entry| *entry.0 * SECTOR >= cut) {
        changes.push(Change { value: Value::Zero, begin, end, durable: true });
    }
    history.flushes.push((begin, end));
}

/// Whether a state is sound, and what a flush covered is there.
fn judge(
    setup: &Setup,
    state: &State<'_>,
    allowed: &HashMap<u64, Vec<Value>>,
) -> Result<(), String> {
    let image = match setup.create {
        Some(_) => {
            let image = Image::open(state)?;
            image.check()?;
            Some(image)
        }
        None => None,
    };
    for (&sector, allowed) in allowed {
        let read = match &image {
            Some(image) if sector * SECTOR >= image.size => continue,
            Some(image) => image.sector(sector, setup.start == Start::Backing),
            None => Some(state.bytes(sector * SECTOR, 512)),
        };
        let Some(read) = read else {
            if allowed.contains(&Value::Start) {
                continue;
            }
            return Err(format!("sector {sector} is as before the load, not {allowed:?}"));
        };
        let is = |value: &Value| match value {
            Value::Start => read == at_start(setup, sector),
            Value::Zero | Value::Discarded => read.iter().all(|byte| *byte == 0),
            Value::Write(write) => read == content(*write, sector),
        };
        if !allowed.iter().any(is) {
            let word = |at: usize| u64::from_le_bytes(*read[at..].first_chunk().unwrap());
            let (write, of) = (word(0), word(8));
            return Err(format!(
                "sector {sector} holds write {write} of sector {of}, not {allowed:?}"
            ));
        }
    }
    Ok(())
}

/// qemu-img's judgement of a state; `None`: it is not installed.
fn referee(state: &State<'_>, directory: &Path) -> Option<Result<(), String>> {
    let path = directory.join("state");
    fs::write(&path, state.file()).unwrap();
    let check = ["check", "-f", "qcow2", path.to_str().unwrap()];
    let output = rig::run(Command::new("qemu-img").args(check)).ok()?;
    Some(match output.status.code() {
        // 3: leaked clusters.
        Some(0 | 3) => Ok(()),
        _ => Err(String::from_utf8_lossy(&output.stdout).into_owned()),
    })
}

/// Looks at `states` states of an image under load. Returns what was wrong, and how many states there were.
fn cut(setup: &Setup, seed: u64, states: usize) -> Option<(Vec<String>, usize)> {
    // In memory, files have no direct I/O, and raw ones are never made durable.
    let is_in_memory = !setup.cache.direct() && setup.create.is_some();
    let place = if is_in_memory { memory() } else { rig::directories().swap_remove(0) };
    let (judges, options) = (memory(), setup.create(place.path())?);
    let log = Arc::new(Log::default());
    let before = fs::read(&options.path).unwrap();
    let disk = match open_observed(&options, Some(Arc::clone(&log) as _)) {
        Err(error) if matches!(error.objection(), Some(OpenReason::NoDirect)) => return None,
        result => result.unwrap(),
    };
    let mut random = Random(seed);
    let mut rig = Rig::new(disk);
    let history = load(setup, &mut rig, &log, 30, &mut random);
    drop(rig);
    let (changes, end) = log.changes();
    if setup.aio == Aio::IoUring && setup.cache.direct() && uring::available() {
        assert!(has_asynchronous(&changes), "io_uring was not used, or not observed");
    }
    let mut wrong = Vec::new();
    let mut seen = 0;
    let a_moment = 8;
    let mut moments: Vec<_> = (0..states / a_moment).map(|_| random.below(end)).collect();
    moments.push(end);
    moments.sort_unstable();
    let mut replay = Replay::new(&changes, before);
    for moment in moments {
        let medium = replay.at(moment);
        let flushed = history.flushes.iter().filter(|flush| flush.1 < moment);
        let covered = flushed.map(|flush| flush.0).max().unwrap_or(0);
        let allowed: HashMap<_, _> = history
            .sectors
            .keys()
            .map(|sector| (*sector, history.allowed(*sector, moment, covered)))
            .collect();
        choices(&medium, a_moment, &mut random, |state, name| {
            seen += 1;
            let mut verdict = judge(setup, state, &allowed);
            let every = if setup.start == Start::Snapshot { 10 } else { 50 };
            if setup.create.is_some()
                && (seen % every == 0 || soak() && seen % 10 == 0)
                && let Some(qemu) = referee(state, judges.path())
            {
                verdict = verdict.and(qemu.map_err(|text| format!("{text} (not found here)")));
            }
            if let Err(error) = verdict {
                wrong.push(format!("at {moment}, {name}: {error}"));
            }
        });
        if moment == end {
            let last = State::new(&medium, |_, _| true);
            let file = fs::read(&options.path).unwrap();
            assert!(last.bytes(0, file.len()) == file, "a change of the file was not observed");
        }
    }
    Some((wrong, seen))
}

/// Whether a thread began a change before an earlier one of its own had ended, as only a ring allows.
fn has_asynchronous(changes: &[Recorded]) -> bool {
    let overlaps =
        |pair: &[Recorded]| pair[0].thread == pair[1].thread && pair[1].begin < pair[0].end;
    changes.windows(2).any(overlaps)
}

fn memory() -> tempfile::TempDir {
    rig::directories().pop().unwrap()
}

fn soak() -> bool {
    std::env::var_os("MINIVMM_SOAK").is_some()
}

const QCOW2: Setup = Setup {
    create: Some(&[]),
    cache: CacheMode::Writeback,
    aio: Aio::Threads,
    cluster: 64 << 10,
    size: 1 << 30,
    start: Start::Empty,
    resized: false,
};

fn setups() -> Vec<(String, Setup)> {
    let mut setups = Vec::new();
    let mut add = |name: &str, setup: Setup| setups.push((name.to_owned(), setup));
    let small =
        Setup { create: Some(&["-o", "cluster_size=512"]), cluster: 512, size: 512 << 10, ..QCOW2 };
    for &cache in CacheMode::ALL.iter().filter(|cache| !cache.ignores_flush()) {
        add(&format!("cache={cache}"), Setup { cache, ..QCOW2 });
        add(&format!("512-byte clusters, cache={cache}"), Setup { cache, ..small });
        let raw = Setup { create: None, cluster: 4096, size: 256 << 10, cache, ..QCOW2 };
        for &aio in Aio::ALL {
            add(&format!("raw, aio={aio}, cache={cache}"), Setup { aio, ..raw });
        }
    }
    let v2 = &["-o", "compat=0.10"];
    add("version 2", Setup { create: Some(v2), ..QCOW2 });
    let v2_small = &["-o", "compat=0.10,cluster_size=512"];
    add("version 2, 512-byte clusters", Setup { create: Some(v2_small), ..small });
    let four = &["-o", "cluster_size=4k"];
    add("4k clusters", Setup { create: Some(four), cluster: 4096, size: 8 << 20, ..QCOW2 });
    let large = &["-o", "cluster_size=2M"];
    add("2M clusters", Setup { create: Some(large), cluster: 2 << 20, size: 1 << 30, ..QCOW2 });
    let bit = &["-o", "cluster_size=512,refcount_bits=1"];
    add("1-bit refcounts", Setup { create: Some(bit), ..small });
    let wide = &["-o", "cluster_size=512,refcount_bits=64"];
    add("64-bit refcounts", Setup { create: Some(wide), ..small });
    for (name, start) in [
        ("compressed", Start::Compressed),
        ("snapshot", Start::Snapshot),
        ("backing file", Start::Backing),
    ] {
        add(name, Setup { create: Some(four), cluster: 4096, size: 1 << 20, start, ..QCOW2 });
        add(&format!("{name}, 512-byte clusters"), Setup { start, ..small });
    }
    add(
        "resized",
        Setup { create: Some(four), cluster: 4096, size: 8 << 20, resized: true, ..QCOW2 },
    );
    add("resized, 512-byte clusters", Setup { resized: true, ..small });
    let start = Start::Backing;
    add("resized, backing file", Setup { resized: true, start, ..small });
    setups
}

#[test]
fn every_state_after_a_power_cut_is_sound() {
    for (name, setup) in setups() {
        // Large clusters take a hundred times as long.
        let is_large = setup.cluster > 64 << 10;
        let states = if soak() { [10_000, 200] } else { [120, 16] }[usize::from(is_large)];
        let start = std::time::Instant::now();
        let (mut wrong, mut seen) = (Vec::new(), 0);
        for seed in 0.. {
            if seen >= states {
                break;
            }
            let Some((errors, count)) = cut(&setup, seed, states.min(2_000)) else {
                eprintln!("not tested: {name}");
                break;
            };
            wrong.extend(errors);
            seen += count;
        }
        eprintln!("{name}: {} bad states of {seen} in {:?}", wrong.len(), start.elapsed());
        assert!(wrong.is_empty(), "{name}: {} of {seen}, such as {}", wrong.len(), wrong[0]);
    }
}

/// Without its fixes the rig finds what they fix, or it would prove nothing.
#[test]
fn the_rig_finds_the_faults_that_the_order_prevents() {
    let small = setups().into_iter().find(|setup| setup.0.starts_with("512-byte")).unwrap().1;
    let found = |setup: Setup| {
        let runs = (0..4).filter_map(|seed| cut(&setup, seed, 160));
        let (wrong, seen) = runs.fold((0, 0), |sum, run| (sum.0 + run.0.len(), sum.1 + run.1));
        (wrong, seen)
    };
    for (what, switch) in [("order", &without::ORDER), ("barriers", &without::BARRIERS)] {
        switch.set(true);
        let (wrong, seen) = found(small);
        switch.set(false);
        eprintln!("without {what}: {wrong} bad states of {seen}");
        assert!(wrong > 0 || seen == 0, "without {what}");
    }
    let (wrong, seen) = found(Setup { cache: CacheMode::Unsafe, ..small });
    eprintln!("cache=unsafe: {wrong} bad states of {seen}");
    assert!(wrong > 0 || seen == 0);
    let raw = Setup { create: None, cluster: 4096, cache: CacheMode::Unsafe, ..QCOW2 };
    assert!(found(Setup { size: 256 << 10, ..raw }).0 > 0, "raw, cache=unsafe");
}
