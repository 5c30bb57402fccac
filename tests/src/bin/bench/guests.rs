//! A Linux guest that runs fio: the same kernel, jobs and file under each monitor, and the jobs on the host itself.
//!
//! A guest boots once for a monitor and a file. It runs the jobs twice: for their times, undisturbed, and then, shorter,
//! while its exits and the monitor's system calls are counted.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use minivmm_tests::linux::{SMALL, artefact, cpio};

use crate::counters::{Counters, EVENTS};
use crate::fio::{self, Job, LATENCIES, Score};
use crate::monitors::{DiskSetup, Monitor, Setup};
use crate::process::Process;
use crate::results::{self, Key, Results};
use crate::{FILE_SIZE, Options, fill};

/// MiB.
const MEMORY: u32 = 256;
/// How long a guest may be silent before it counts as lost: longer than it takes to boot in the lab.
const SILENCE: Duration = Duration::from_secs(90);
/// Milliseconds that each job runs while it is counted.
const COUNTED: u32 = 700;
const REPORT_SIZE: usize = 1 << 20;
const INIT: &[u8] = include_bytes!("../../../../resources/guest/bench-init");

/// On the command line of a guest that polls.
const POLLED: &str = "virtio_blk.poll_queues=1";

/// What the results are saved as.
pub(crate) const PART: &str = "guests.json";
pub(crate) const IOPS: &str = "requests a second";

/// A directory for the file under test.
struct Place {
    name: &'static str,
    directory: PathBuf,
    /// Past the host's page cache.
    direct: bool,
}

pub(crate) fn run(options: &Options, results: &mut Results) {
    let (jobs, polled_jobs) = (fio::jobs(options.quick), fio::polled_jobs());
    for place in places(options.quick) {
        let file = tempfile::NamedTempFile::new_in(&place.directory).unwrap();
        fill(file.path());
        let bench = Bench {
            jobs: &jobs,
            place: &place,
            file: file.path(),
            milliseconds: options.milliseconds(),
            polled: false,
        };
        let polled = Bench { jobs: &polled_jobs, polled: true, ..bench };
        for repetition in 0..options.repetitions {
            eprintln!(
                "file {}, repetition {} of {}",
                place.name,
                repetition + 1,
                options.repetitions
            );
            bench.host(results);
            for monitor in Monitor::all() {
                bench.guest(monitor, repetition == 0, results);
                polled.guest(monitor, repetition == 0, results);
                // Should the lab not live to see the end.
                results.save(&results::directory().join(PART));
            }
        }
    }
}

/// One file in memory and one on disk, which in the lab is an emulated one in memory that takes 100 us a request.
fn places(quick: bool) -> Vec<Place> {
    let mut places =
        vec![Place { name: "in memory", directory: PathBuf::from("/dev/shm"), direct: false }];
    if quick {
        return places;
    }
    let mut directory =
        std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| PathBuf::from("target"), PathBuf::from);
    if std::env::var_os("MINIVMM_LAB").is_some() {
        directory = PathBuf::from("/run/bench");
        let size = (FILE_SIZE >> 20) + 64;
        let script = format!(
            "modprobe scsi_debug dev_size_mb={size} ndelay=100000 && modprobe sd_mod && udevadm settle 2>/dev/null
             until disk=$(grep -l scsi_debug /sys/block/sd*/device/model 2>/dev/null); do sleep 0.1; done
             disk=/dev/$(echo $disk | cut -d / -f 4)
             until [ -b $disk ]; do sleep 0.1; done
             mke2fs -q -t ext4 $disk && mkdir -p /run/bench && mount $disk /run/bench"
        );
        let made = Command::new("bash").args(["-c", &script]).status().unwrap();
        assert!(made.success(), "cannot make a disk in the lab");
    }
    places.push(Place { name: "on disk", directory, direct: true });
    places
}

#[derive(Clone, Copy)]
struct Bench<'a> {
    jobs: &'a [Job],
    place: &'a Place,
    file: &'a Path,
    milliseconds: u32,
    /// The guest polls one queue of each disk, for which it needs a second vCPU: its driver keeps a queue with interrupts.
    polled: bool,
}

/// What one guest's life told.
struct Life {
    to_init: f64,
    /// KiB at most: resident without the guest's memory, and the share of it.
    overhead: (f64, f64),
    peak: f64,
    scores: Vec<Score>,
    /// Seconds of processor time during each job, of all threads and without the vCPUs.
    cpu: Vec<(f64, f64)>,
    counted: Option<(Vec<Score>, Vec<[f64; EVENTS.len()]>)>,
}

impl Bench<'_> {
    fn add(&self, results: &mut Results, system: &str, row: &str, metric: &str, value: f64) {
        results.add(
            Key::new(&format!("Linux guest, file {}", self.place.name), row, system, metric),
            value,
        );
    }

    fn add_score(&self, results: &mut Results, system: &str, row: &str, score: &Score) {
        self.add(results, system, row, IOPS, score.iops);
        for (metric, latency) in LATENCIES.into_iter().zip(score.latencies) {
            self.add(results, system, row, metric, latency);
        }
    }

    fn host(&self, results: &mut Results) {
        match fio::on_host(self.jobs, self.file, self.place.direct, self.milliseconds) {
            Ok(scores) => {
                for (job, score) in self.jobs.iter().zip(scores) {
                    self.add_score(results, "host", &job.name(), &score);
                    self.add(
                        results,
                        "host",
                        &job.name(),
                        "CPU us a request, all",
                        score.cpu * 1e6 / score.requests,
                    );
                }
            }
            Err(why) => eprintln!("the host itself: {why}"),
        }
    }

    /// Runs a guest, and once more if that one was lost.
    fn guest(&self, monitor: Monitor, count: bool, results: &mut Results) {
        let name = monitor.name();
        let mut life = self.once(monitor, count);
        if let Err(why) = &life {
            eprintln!("{name}: the guest was lost ({why}): running it again");
            life = self.once(monitor, count);
        }
        let life = match life {
            Ok(life) => life,
            Err(why) => {
                return eprintln!(
                    "{name}: the guest was lost again ({why}): no values for this repetition"
                );
            }
        };
        for ((job, score), (all, ours)) in self.jobs.iter().zip(&life.scores).zip(&life.cpu) {
            let row = job.name();
            self.add_score(results, &name, &row, score);
            self.add(
                results,
                &name,
                &row,
                "CPU us a request, monitor",
                ours * 1e6 / score.requests,
            );
            self.add(results, &name, &row, "CPU us a request, all", all * 1e6 / score.requests);
        }
        if let Some((scores, counts)) = &life.counted {
            for ((job, score), counts) in self.jobs.iter().zip(scores).zip(counts) {
                for ((metric, ..), count) in EVENTS.iter().zip(counts) {
                    self.add(results, &name, &job.name(), metric, count / score.requests);
                }
            }
        }
        if self.polled {
            return;
        }
        self.add(results, &name, "exec to init", "ms", life.to_init);
        self.add(results, &name, "peak RSS", "KiB", life.peak);
        self.add(results, &name, "RSS without the guest's memory", "KiB", life.overhead.0);
        self.add(results, &name, "PSS without the guest's memory", "KiB", life.overhead.1);
        let size = monitor.binary().and_then(|path| Some(path.metadata().ok()?.len()));
        self.add(
            results,
            &name,
            "size of the binary",
            "KiB",
            size.map_or(f64::NAN, |bytes| bytes as f64 / 1024.0),
        );
    }

    fn once(&self, monitor: Monitor, count: bool) -> Result<Life, String> {
        let directory = tempfile::tempdir().unwrap();
        let (initrd, reports) = (directory.path().join("initrd"), directory.path().join("reports"));
        self.write_initrd(&initrd, count);
        fs::write(&reports, vec![0; 2 * REPORT_SIZE]).unwrap();
        let disk = |path, serial, read_only, direct| DiskSetup { path, serial, read_only, direct };
        let (kernel, tools) = (artefact(SMALL.kernel), artefact("tools.img"));
        let setup = Setup {
            kernel: &kernel,
            initrd: Some(&initrd),
            cmdline: &format!("quiet rdinit=/bench-init {}", if self.polled { POLLED } else { "" }),
            memory: MEMORY,
            // Of the lab's two processors one is for the monitor.
            cpus: if std::env::var_os("MINIVMM_LAB").is_some() && !self.polled { 1 } else { 2 },
            disks: &[
                disk(&tools, "tools", true, false),
                disk(self.file, "test", false, self.place.direct),
                disk(&reports, "reports", false, false),
            ],
        };
        let mut process = Process::start(&mut monitor.command(&setup));
        let mut life = self.watch(&mut process)?;
        let reports = fs::read(&reports).map_err(|why| why.to_string())?;
        life.scores = fio::scores(&reports[..REPORT_SIZE], self.jobs)?;
        if let Some((scores, _)) = &mut life.counted {
            *scores = fio::scores(&reports[REPORT_SIZE..], self.jobs)?;
        }
        Ok(life)
    }

    /// The system's initrd, with an init of ours and the job files.
    fn write_initrd(&self, path: &Path, count: bool) {
        let mut initrd = fs::read(artefact(SMALL.initrd)).unwrap();
        let mut append = |name: &str, content: &[u8]| {
            initrd.resize(initrd.len().next_multiple_of(4), 0);
            initrd.extend_from_slice(&cpio(name, content));
        };
        append("bench-init", INIT);
        let file = |milliseconds| fio::file(self.jobs, "/dev/test", true, milliseconds, true);
        append("timed", file(self.milliseconds).as_bytes());
        if count {
            append("counted", file(COUNTED).as_bytes());
        }
        fs::write(path, initrd).unwrap();
    }

    /// Follows what the guest says, from its start to the end of its jobs.
    fn watch(&self, process: &mut Process) -> Result<Life, String> {
        let mut life = Life {
            to_init: f64::NAN,
            overhead: (0.0, 0.0),
            peak: 0.0,
            scores: Vec::new(),
            cpu: vec![(0.0, 0.0); self.jobs.len()],
            counted: None,
        };
        let mut cpu: Vec<Option<(f64, f64)>> = vec![None; self.jobs.len()];
        let mut counts: Vec<Option<[f64; EVENTS.len()]>> = vec![None; self.jobs.len()];
        let mut counters: Option<Counters> = None;
        let mut last = "nothing".to_owned();
        loop {
            let (time, line) =
                process.line(SILENCE).map_err(|why| format!("{why}; last it said {last}"))?;
            last = format!("{line:?}");
            // The console may hold the kernel's words, too.
            let mut words = line.split_whitespace();
            let (word, argument) =
                (words.next().unwrap_or_default(), words.next().unwrap_or_default());
            let number = argument.parse::<usize>().ok().filter(|number| *number < self.jobs.len());
            match (word, number) {
                ("INIT", _) => life.to_init = time.as_secs_f64() * 1e3,
                ("PHASE", _) => {
                    let (rss, pss) = process.overhead_kib(u64::from(MEMORY) << 20);
                    life.overhead = (life.overhead.0.max(rss), life.overhead.1.max(pss));
                    if argument == "counted" {
                        counters = Some(Counters::open(&process.threads()));
                        life.counted =
                            Some((Vec::new(), vec![[f64::NAN; EVENTS.len()]; self.jobs.len()]));
                    }
                    // The guest waits for it: to begin to count takes a while.
                    process.enter();
                }
                // With two jobs the first begin and the last end count.
                ("BEGIN", Some(job)) => match &counters {
                    None => {
                        cpu[job].get_or_insert_with(|| process.cpu());
                    }
                    Some(counters) => {
                        counts[job].get_or_insert_with(|| counters.read());
                    }
                },
                ("END", Some(job)) => match (&counters, &mut life.counted) {
                    (Some(counters), Some((_, differences))) => {
                        let (now, before) =
                            (counters.read(), counts[job].ok_or("a job ended before it began")?);
                        differences[job] = std::array::from_fn(|event| now[event] - before[event]);
                    }
                    _ => {
                        let (now, before) =
                            (process.cpu(), cpu[job].ok_or("a job ended before it began")?);
                        life.cpu[job] = (now.0 - before.0, now.1 - before.1);
                    }
                },
                ("DONE", _) => {
                    life.peak = process.peak_kib();
                    return Ok(life);
                }
                _ => {}
            }
        }
    }
}
