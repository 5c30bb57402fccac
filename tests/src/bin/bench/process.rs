//! What a running monitor uses: processor time and memory, from /proc; and the one way to start and end one.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::ops::Range;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, Sender};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// A monitor at work. Dropping it ends it.
pub(crate) struct Process {
    child: Child,
    started: Instant,
    lines: Receiver<(Instant, String)>,
}

impl Process {
    /// Starts it, to read its console.
    pub(crate) fn start(command: &mut Command) -> Self {
        Self::spawn(command.stdout(Stdio::piped()).stderr(Stdio::inherit()))
    }

    /// Starts it, to read its standard error.
    pub(crate) fn start_on_errors(command: &mut Command) -> Self {
        Self::spawn(command.stdout(Stdio::null()).stderr(Stdio::piped()))
    }

    fn spawn(command: &mut Command) -> Self {
        let started = Instant::now();
        let child = command.stdin(Stdio::piped()).spawn();
        let mut child = child.unwrap_or_else(|why| panic!("cannot start {command:?}: {why}"));
        let (console, errors) = (child.stdout.take(), child.stderr.take());
        let output: Box<dyn Read + Send> = match console {
            Some(console) => Box::new(console),
            None => Box::new(errors.unwrap()),
        };
        let output = BufReader::new(output);
        let (sender, lines) = mpsc::channel();
        std::thread::spawn(move || read_lines(output, &sender));
        Self { child, started, lines }
    }

    /// The next line of its console, and when after exec its first byte came.
    ///
    /// # Errors
    /// It has ended, or says nothing for `bound`.
    pub(crate) fn line(&self, bound: Duration) -> Result<(Duration, String), String> {
        match self.lines.recv_timeout(bound) {
            Ok((when, line)) => Ok((when - self.started, line)),
            Err(mpsc::RecvTimeoutError::Timeout) => Err(format!("silent for {bound:?}")),
            Err(mpsc::RecvTimeoutError::Disconnected) => Err("ended early".to_owned()),
        }
    }

    /// Presses Enter on its console.
    pub(crate) fn enter(&mut self) {
        // Fails only when it has ended, which the next line tells.
        let _ = self.child.stdin.as_mut().map(|input| input.write_all(b"\n"));
    }

    /// Keeps it as it is, without processor time.
    pub(crate) fn pause(&self) {
        kill_process(Pid::from_child(&self.child), Signal::STOP).unwrap();
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Its threads, by id, with their names.
    pub(crate) fn threads(&self) -> Vec<(u32, String)> {
        threads(self.id())
    }

    /// Seconds of processor time so far: of all threads (a guest's time is its vCPU thread's), and of those that are no vCPUs.
    pub(crate) fn cpu(&self) -> (f64, f64) {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.id())).unwrap_or_default();
        // Behind the name, which may hold anything: proc(5) counts utime as field 14, stime as 15, in ticks of 10 ms.
        let fields: Vec<f64> = stat
            .rsplit(')')
            .next()
            .unwrap_or_default()
            .split_whitespace()
            .map(|word| word.parse().unwrap_or(0.0))
            .collect();
        let all = fields.get(11..13).map_or(0.0, |times| times.iter().sum::<f64>() / 100.0);
        let vcpus = self
            .threads()
            .into_iter()
            .filter(|(_, name)| name.starts_with("vcpu") || name.starts_with("CPU "));
        let vcpus = vcpus.filter_map(|(id, _)| {
            // Documentation/scheduler/sched-stats.rst: nanoseconds on the processor come first.
            let stat =
                fs::read_to_string(format!("/proc/{}/task/{id}/schedstat", self.id())).ok()?;
            stat.split(' ').next()?.parse::<f64>().ok()
        });
        (all, all - vcpus.sum::<f64>() / 1e9)
    }

    /// KiB at peak, guest memory included.
    pub(crate) fn peak_kib(&self) -> f64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.id())).unwrap_or_default();
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        peak.and_then(|line| line.trim().trim_end_matches(" kB").parse().ok()).unwrap_or(f64::NAN)
    }

    /// KiB resident now, and the process's share of them (proportional set size), without the `guest` bytes of the guest's
    /// memory.
    pub(crate) fn overhead_kib(&self, guest: u64) -> (f64, f64) {
        let maps =
            mappings(&fs::read_to_string(format!("/proc/{}/smaps", self.id())).unwrap_or_default());
        let memory = guest_memory(&maps, guest);
        let rest = maps.iter().filter(|map| !memory.contains(&map.start));
        rest.fold((0.0, 0.0), |(rss, pss), map| (rss + map.rss, pss + map.pss))
    }
}

/// A process's threads, by id, with their names.
pub(crate) fn threads(process: u32) -> Vec<(u32, String)> {
    let tasks = fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten().flatten();
    let ids = tasks.filter_map(|task| task.file_name().to_str()?.parse().ok());
    let name = |id| {
        Some((
            id,
            fs::read_to_string(format!("/proc/{process}/task/{id}/comm")).ok()?.trim().to_owned(),
        ))
    };
    ids.filter_map(name).collect()
}

/// An entry of /proc/PID/smaps; sizes in KiB.
#[derive(Default)]
struct Mapping {
    start: u64,
    end: u64,
    writable: bool,
    rss: f64,
    pss: f64,
}

fn mappings(smaps: &str) -> Vec<Mapping> {
    let mut maps: Vec<Mapping> = Vec::new();
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let (name, value) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let range = name.split_once('-').and_then(|(start, end)| {
            Some((u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?))
        });
        match (range, maps.last_mut()) {
            (Some((start, end)), _) => maps.push(Mapping {
                start,
                end,
                writable: value.starts_with("rw"),
                ..Mapping::default()
            }),
            (None, Some(map)) if name == "Rss:" => map.rss = value.parse().unwrap_or(0.0),
            (None, Some(map)) if name == "Pss:" => map.pss = value.parse().unwrap_or(0.0),
            _ => {}
        }
    }
    maps
}

/// The addresses that are the guest's memory: neighbouring mappings (the kernel's file may lie among them) which are together
/// exactly as long; or, where the last one has grown together with its neighbour, a little longer.
fn guest_memory(maps: &[Mapping], length: u64) -> Range<u64> {
    let runs = maps.iter().enumerate().filter_map(|(first, Mapping { start, .. })| {
        let mut end = *start;
        for next in maps[first..].iter().take_while(|next| next.writable) {
            if next.start != end || end - start >= length {
                break;
            }
            end = next.end;
        }
        (end - start >= length).then_some(*start..end)
    });
    runs.min_by_key(|run| run.end - run.start).unwrap_or_default()
}

fn read_lines(mut output: impl BufRead, sender: &Sender<(Instant, String)>) {
    while let Ok([_, ..]) = output.fill_buf() {
        let (first_byte, mut line) = (Instant::now(), Vec::new());
        let read = output.read_until(b'\n', &mut line);
        let line = String::from_utf8_lossy(&line).trim_end().to_owned();
        if read.is_err() || sender.send((first_byte, line)).is_err() {
            break;
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Fails only when it has ended already. A monitor that does not listen is killed.
        for signal in [Signal::TERM, Signal::CONT] {
            let _ = kill_process(Pid::from_child(&self.child), signal);
        }
        let bound = Instant::now() + Duration::from_secs(10);
        while Instant::now() < bound && matches!(self.child.try_wait(), Ok(None)) {
            std::thread::sleep(Duration::from_millis(5));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
