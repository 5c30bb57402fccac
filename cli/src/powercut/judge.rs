//! Lets a command look at states, several at once, and finds the smallest of a failing kind.
//!
//! Each job has a [`Medium`] of its own, and a file for the command's output. A state passes if the command exits with 0.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::FileExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use devices::spawn::STACK;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, kill_process_group, pidfd_open};

use super::choice::{Choice, Presence};
use super::error::PowercutError;
use super::history::History;
use super::medium::Medium;
use super::plan::Plan;

/// How much of a command's output is kept: its end.
const OUTPUT_MAX: u64 = 4 << 10;
/// How many states are looked at to make one smaller.
const TRIALS_MAX: usize = 400;
/// How often the main thread looks for signals, and others whether it has seen one.
const LOOK: Duration = Duration::from_millis(100);
/// How often others look whether their command has ended, on a host that does not tell them (before Linux 5.3, or in some containers).
const LOOK_WITHOUT_PIDFD: Duration = Duration::from_millis(5);
/// What a command has from SIGTERM to SIGKILL: time for a VM to flush its disks.
const GRACE: Duration = Duration::from_secs(10);
/// The status of a command that took too long, as of timeout(1).
const TIMED_OUT: i32 = 124;

/// What the states are made of and looked at by.
pub(super) struct Judge<'a> {
    pub(super) history: &'a History,
    pub(super) base: &'a File,
    /// With `{}` for the file.
    pub(super) command: &'a [OsString],
    /// For how long it may run.
    pub(super) timeout: Option<Duration>,
    /// Where the files are made.
    pub(super) directory: &'a Path,
}

/// Why a state fails.
#[derive(Clone, Debug)]
pub(super) struct Failure {
    pub(super) choice: Choice,
    /// `None`: a signal killed the command. [`TIMED_OUT`]: it took too long.
    pub(super) status: Option<i32>,
    pub(super) signal: Option<i32>,
    /// The end of the command's output.
    pub(super) output: String,
}

/// What became of the states.
#[derive(Default)]
pub(super) struct Verdict {
    pub(super) states: usize,
    pub(super) failures: Vec<Failure>,
}

/// One job's files.
struct Bench<'a> {
    judge: &'a Judge<'a>,
    medium: Medium<'a>,
    output: File,
}

impl Judge<'_> {
    pub(super) fn failed(&self, source: io::Error) -> PowercutError {
        PowercutError::Space { directory: self.directory.to_owned(), source }
    }

    fn bench(&self, name: &str) -> Result<Bench<'_>, PowercutError> {
        let path = |kind: &str| self.directory.join(format!("{kind}-{name}"));
        let make = || {
            let medium = Medium::new(self.history, self.base, path("state"))?;
            let output =
                File::options().read(true).append(true).create_new(true).open(path("output"))?;
            Ok(Bench { judge: self, medium, output })
        };
        make().map_err(|error| self.failed(error))
    }

    /// Looks at the states of `plan`. `progress` is called with the number of states so far; when it returns true, no more are begun.
    pub(super) fn run(
        &self,
        plan: Plan<'_>,
        jobs: usize,
        mut progress: impl FnMut(usize, usize) -> bool,
    ) -> Result<Verdict, PowercutError> {
        let benches: Vec<_> =
            (0..jobs).map(|job| self.bench(&job.to_string())).collect::<Result<_, _>>()?;
        let (plan, stop) = (Mutex::new(plan), AtomicBool::new(false));
        let (sender, results) = mpsc::channel();
        let mut verdict = Verdict::default();
        thread::scope(|scope| {
            let mut failed = None;
            for mut bench in benches {
                let (sender, plan, stop) = (sender.clone(), &plan, &stop);
                let job = move || {
                    // The lock is free while the command runs.
                    let next = || devices::lock(plan).next();
                    while !stop.load(Ordering::Relaxed)
                        && let Some(choice) = next()
                        && sender.send(bench.look(&choice, || stop.load(Ordering::Relaxed))).is_ok()
                    {
                    }
                };
                let started = thread::Builder::new().stack_size(STACK).spawn_scoped(scope, job);
                if let Err(source) = started {
                    stop.store(true, Ordering::Relaxed);
                    failed = Some(PowercutError::Thread { source });
                    break;
                }
            }
            drop(sender);
            loop {
                match results.recv_timeout(LOOK) {
                    Ok(Ok(Looked::Passes)) => verdict.states += 1,
                    Ok(Ok(Looked::Fails(failure))) => {
                        verdict.states += 1;
                        verdict.failures.push(failure);
                    }
                    Ok(Ok(Looked::Stopped)) => {}
                    Ok(Err(error)) => failed = failed.or(Some(error)),
                    Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => break,
                }
                if progress(verdict.states, verdict.failures.len()) || failed.is_some() {
                    stop.store(true, Ordering::Relaxed);
                }
            }
            failed.map_or(Ok(()), Err)
        })?;
        // The jobs answer in any order.
        verdict
            .failures
            .sort_by_cached_key(|failure| (failure.choice.epoch, failure.choice.to_string()));
        Ok(verdict)
    }

    /// Runs the command on the state in `file` as a user's shell would: with this program's terminal, in its process group. When
    /// its time is up, or `is_stopped` returns true, the command gets SIGTERM, and SIGKILL after [`GRACE`]. Returns its exit status, or
    /// [`TIMED_OUT`]; `None`: a signal killed it.
    pub(super) fn hand_over(
        &self,
        file: &Path,
        mut is_stopped: impl FnMut() -> bool,
    ) -> Result<Option<u8>, PowercutError> {
        let words: Vec<_> = self.command.iter().map(|word| fill(word, file)).collect();
        let mut run = || -> io::Result<Option<i32>> {
            let mut child =
                vmm::with_default_signals(Command::new(&words[0]).args(&words[1..])).spawn()?;
            let deadline = self.timeout.and_then(|timeout| Instant::now().checked_add(timeout));
            let ended = wait(&mut child, deadline, &mut is_stopped);
            let code = match &ended {
                Ok(Ended::Exited(status)) => return Ok(status.code()),
                Ok(Ended::TimedOut) => Some(TIMED_OUT),
                Ok(Ended::Stopped) | Err(_) => None,
            };
            kill_process(Pid::from_child(&child), Signal::TERM)?;
            let deadline = Instant::now() + GRACE;
            if !matches!(wait(&mut child, Some(deadline), &mut || false), Ok(Ended::Exited(_))) {
                child.kill()?;
            }
            child.wait()?;
            ended.map(|_| code)
        };
        let name = || words[0].display().to_string();
        let ended = run().map_err(|source| PowercutError::Command { command: name(), source })?;
        Ok(ended.and_then(|code| u8::try_from(code).ok()))
    }

    /// The failing state with the fewest changes dropped that is found from `failure`, whose changes it has and more.
    pub(super) fn minimize(
        &self,
        failure: Failure,
        name: &str,
        mut is_stopped: impl FnMut() -> bool,
    ) -> Result<Failure, PowercutError> {
        let mut bench = self.bench(name)?;
        let mut least = failure;
        let mut trials = 0;
        let mut size = least.choice.dropped().len();
        while size > 0 {
            let dropped = least.choice.dropped();
            let mut is_smaller = false;
            for part in dropped.chunks(size) {
                if trials == TRIALS_MAX || is_stopped() {
                    return Ok(least);
                }
                trials += 1;
                let mut choice = least.choice.clone();
                part.iter().for_each(|at| choice.parts[*at] = Presence::Whole);
                if let Looked::Fails(smaller) = bench.look(&choice, &mut is_stopped)? {
                    least = smaller;
                    is_smaller = true;
                    if size > 1 {
                        break;
                    }
                }
            }
            if !is_smaller {
                size /= 2;
            }
            size = size.min(least.choice.dropped().len());
        }
        Ok(least)
    }
}

impl Choice {
    /// Which open changes are not there as a whole, by their place.
    pub(super) fn dropped(&self) -> Vec<usize> {
        let parts = self.parts.iter().enumerate();
        parts.filter(|(_, part)| **part != Presence::Whole).map(|(at, _)| at).collect()
    }
}

impl Bench<'_> {
    /// Makes a state and has the command look at it, until `is_stopped`.
    fn look(
        &mut self,
        choice: &Choice,
        is_stopped: impl FnMut() -> bool,
    ) -> Result<Looked, PowercutError> {
        let failed = |error| self.judge.failed(error);
        self.medium.hold(choice).map_err(failed)?;
        self.output.set_len(0).map_err(failed)?;
        let Judge { command, timeout, .. } = *self.judge;
        let words: Vec<_> = command.iter().map(|word| fill(word, self.medium.path())).collect();
        let ended = run(&words, &self.output, timeout, is_stopped);
        let name = || words[0].display().to_string();
        let ended = ended.map_err(|source| PowercutError::Command { command: name(), source })?;
        let failed = |error| self.judge.failed(error);
        self.medium.looked_at().map_err(failed)?;
        let (status, signal) = match ended {
            Ended::Exited(status) if status.success() => return Ok(Looked::Passes),
            Ended::Exited(status) => (status.code(), status.signal()),
            Ended::TimedOut => (Some(TIMED_OUT), None),
            Ended::Stopped => return Ok(Looked::Stopped),
        };
        let output = end_of(&self.output).map_err(failed)?;
        Ok(Looked::Fails(Failure { choice: choice.clone(), status, signal, output }))
    }
}

/// What the command said of a state.
enum Looked {
    Passes,
    Fails(Failure),
    /// Nothing: it was not to run any longer.
    Stopped,
}

/// How a command ended.
enum Ended {
    Exited(ExitStatus),
    /// It was killed.
    TimedOut,
    /// The same, for a signal that minivmm got.
    Stopped,
}

/// Runs a command. It has a process group of its own, so that what it has started is killed with it.
fn run(
    words: &[OsString],
    output: &File,
    timeout: Option<Duration>,
    mut is_stopped: impl FnMut() -> bool,
) -> io::Result<Ended> {
    let mut command = Command::new(&words[0]);
    command.args(&words[1..]).process_group(0).stdin(Stdio::null());
    command.stdout(output.try_clone()?).stderr(output.try_clone()?);
    let mut child = vmm::with_default_signals(&mut command).spawn()?;
    let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
    let ended = wait(&mut child, deadline, &mut is_stopped);
    if !matches!(ended, Ok(Ended::Exited(_))) {
        kill_process_group(Pid::from_child(&child), Signal::KILL)?;
        child.wait()?;
    }
    ended
}

/// Waits for a command. It still runs if the host fails, the time is up or it is stopped.
fn wait(
    child: &mut Child,
    deadline: Option<Instant>,
    is_stopped: &mut impl FnMut() -> bool,
) -> io::Result<Ended> {
    let exit = pidfd_open(Pid::from_child(child), PidfdFlags::empty()).ok();
    let longest = if exit.is_some() { LOOK } else { LOOK_WITHOUT_PIDFD };
    loop {
        let left = deadline.map_or(longest, |at| at.saturating_duration_since(Instant::now()));
        let wait = Timespec::try_from(left.min(longest)).map_err(io::Error::other)?;
        let mut exit: Vec<_> = exit.iter().map(|exit| PollFd::new(exit, PollFlags::IN)).collect();
        // Whatever wakes it, the child is asked.
        let _ = poll(&mut exit, Some(&wait));
        match child.try_wait()? {
            Some(status) => return Ok(Ended::Exited(status)),
            None if is_stopped() => return Ok(Ended::Stopped),
            None if left.is_zero() => return Ok(Ended::TimedOut),
            None => {}
        }
    }
}

/// `word` with the path of `file` for each `{}`.
fn fill(word: &OsStr, file: &Path) -> OsString {
    let mut filled = Vec::new();
    let mut rest = word.as_bytes();
    while let Some(at) = rest.windows(2).position(|pair| pair == b"{}") {
        filled.extend_from_slice(&rest[..at]);
        filled.extend_from_slice(file.as_os_str().as_bytes());
        rest = &rest[at + 2..];
    }
    filled.extend_from_slice(rest);
    OsString::from_vec(filled)
}

fn end_of(file: &File) -> io::Result<String> {
    let length = file.metadata()?.len();
    let start = length.saturating_sub(OUTPUT_MAX);
    let mut bytes = vec![0; (length - start) as usize];
    file.read_exact_at(&mut bytes, start)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// A directory for states, which goes with its owner.
pub(super) struct Workplace(PathBuf);

impl Workplace {
    /// In TMPDIR, or else in /var/tmp, as `snapshot=on`.
    pub(super) fn new(tmpdir: Option<OsString>) -> Result<Self, PowercutError> {
        let place = tmpdir.filter(|place| !place.is_empty());
        let place = place.map_or_else(|| PathBuf::from("/var/tmp"), PathBuf::from);
        let failed = |source| PowercutError::Space { directory: place.clone(), source };
        let mut random = [0; 8];
        rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())
            .map_err(|error| failed(error.into()))?;
        let name = format!("minivmm-powercut-{:016x}", u64::from_ne_bytes(random));
        let path = std::path::absolute(place.join(name)).map_err(failed)?;
        let mut builder = fs::DirBuilder::new();
        std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
        builder.create(&path).map_err(failed)?;
        Ok(Self(path))
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Workplace {
    fn drop(&mut self) {
        // What cannot be removed stays.
        let _ = fs::remove_dir_all(&self.0);
    }
}
