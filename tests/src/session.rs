//! A running minivmm: what it prints, what it is sent, how it ends.

use std::fmt;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};

use crate::transcript::Transcript;

/// A program with its standard streams in our hands. Dropping it kills it.
#[derive(Debug)]
pub struct Session {
    child: Child,
    pidfd: OwnedFd,
    command: String,
    input: Option<File>,
    /// The output is a terminal, which has no end while we hold it open ourselves.
    on_terminal: bool,
    /// Its standard output, or its terminal.
    pub output: Transcript,
    /// Its standard error.
    pub errors: Transcript,
}

/// How a program ended, with all that it said.
#[derive(Debug)]
pub struct Ended {
    /// Its status.
    pub status: ExitStatus,
    /// Its standard output; empty for a terminal.
    pub output: Vec<u8>,
    /// Its standard error.
    pub errors: String,
}

/// The terminal that a program runs on.
#[derive(Debug)]
pub struct Terminal {
    slave: File,
    original: Termios,
}

impl Session {
    /// Starts `command` on pipes.
    pub fn start(command: &mut Command) -> Self {
        let mut child =
            spawn(command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()));
        let input = OwnedFd::from(child.stdin.take().unwrap()).into();
        let output = Transcript::of(child.stdout.take().unwrap());
        Self::watch(command, child, Some(input), output)
    }

    /// Starts `command` with standard input and output as the caller set them (standard error on a pipe): it has no
    /// `output` and takes no `send`.
    pub fn start_on(command: &mut Command) -> Self {
        let child = spawn(command.stderr(Stdio::piped()));
        Self::watch(command, child, None, Transcript::of(std::io::empty()))
    }

    /// Starts `command` with pipes, but for standard error, which it has as the caller set it: there are no `errors`.
    pub fn start_with_errors_elsewhere(command: &mut Command) -> Self {
        let mut child = spawn(command.stdin(Stdio::piped()).stdout(Stdio::piped()));
        let input = OwnedFd::from(child.stdin.take().unwrap()).into();
        let output = Transcript::of(child.stdout.take().unwrap());
        Self::watch(command, child, Some(input), output)
    }

    /// Starts `command` on a new pseudo-terminal (standard error on a pipe). The text is the terminal's settings before.
    pub fn start_on_terminal(command: &mut Command) -> (Self, Terminal, String) {
        let (master, terminal) = Terminal::new();
        let slave = &terminal.slave;
        let (input, output) = (slave.try_clone().unwrap(), slave.try_clone().unwrap());
        let before = terminal.settings();
        let child = spawn(command.stdin(input).stdout(output).stderr(Stdio::piped()));
        let transcript = Transcript::of(master.try_clone().unwrap());
        let mut session = Self::watch(command, child, Some(master), transcript);
        session.on_terminal = true;
        (session, terminal, before)
    }

    fn watch(command: &Command, mut child: Child, input: Option<File>, output: Transcript) -> Self {
        let errors = match child.stderr.take() {
            Some(errors) => Transcript::of(errors),
            None => Transcript::of(std::io::empty()),
        };
        let pidfd = pidfd_open(Pid::from_child(&child), PidfdFlags::empty()).unwrap();
        Self {
            child,
            pidfd,
            command: format!("{command:?}"),
            input,
            on_terminal: false,
            output,
            errors,
        }
    }

    /// Waits for `text` in the output; returns what came since the last one.
    pub fn expect(&self, text: &str, bound: Duration) -> String {
        self.output.expect(text, bound).unwrap_or_else(|why| self.fail(&why))
    }

    /// Waits for `text` on standard error; returns what came since the last one.
    pub fn expect_error(&self, text: &str, bound: Duration) -> String {
        self.errors.expect(text, bound).unwrap_or_else(|why| self.fail(&why))
    }

    /// Types `bytes`.
    pub fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.input.as_mut().expect("the input is open").write_all(bytes.as_ref()).unwrap();
    }

    /// Ends the input.
    pub fn close_input(&mut self) {
        self.input = None;
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// The process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits for the end. The input stays open until then, as a user's does.
    pub fn wait(self, bound: Duration) -> Ended {
        if !self.ends_within(bound) {
            self.fail(&format!("it did not end within {bound:?}"));
        }
        self.collect(bound)
    }

    /// As [`Self::wait`], but a program that does not end within `bound` is killed, and there is no result.
    pub fn wait_within(self, bound: Duration) -> Option<Ended> {
        self.ends_within(bound).then(|| self.collect(bound))
    }

    /// Waits for the end, up to `bound`; whether it has come.
    pub fn ends_within(&self, bound: Duration) -> bool {
        let limit = Timespec { tv_sec: i64::try_from(bound.as_secs()).unwrap(), tv_nsec: 0 };
        let mut pidfd = [PollFd::from_borrowed_fd(self.pidfd.as_fd(), PollFlags::IN)];
        poll(&mut pidfd, Some(&limit)).unwrap() > 0
    }

    /// The status and all output of a program that has ended.
    fn collect(mut self, bound: Duration) -> Ended {
        let status = self.child.wait().unwrap();
        self.input = None;
        let output = if self.on_terminal { Ok(Vec::new()) } else { self.output.to_end(bound) };
        let output = output.unwrap_or_else(|why| panic!("standard output: {why}"));
        let errors =
            self.errors.to_end(bound).unwrap_or_else(|why| panic!("standard error: {why}"));
        Ended { status, output, errors: String::from_utf8_lossy(&errors).into_owned() }
    }

    fn fail(&self, why: &str) -> ! {
        panic!("{}: {why}", self.command)
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // Fails only when it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
        // A failure, here or in a client: the last output may show its cause.
        if std::thread::panicking() {
            eprintln!(
                "{}\n{}\nstandard error: {}",
                self.command,
                self.output.tail(),
                self.errors.tail()
            );
        }
    }
}

impl Ended {
    /// The exit status; a signal's number plus 128 for a program that one killed, as shells say it.
    pub fn code(&self) -> i32 {
        use std::os::unix::process::ExitStatusExt;
        self.status.code().or_else(|| self.status.signal().map(|signal| 128 + signal)).unwrap()
    }

    /// Checks the exit status, and shows everything when it is another.
    #[track_caller]
    pub fn must_be(self, code: i32) -> Self {
        assert_eq!(self.code(), code, "{self}");
        self
    }
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let output = String::from_utf8_lossy(&self.output);
        write!(f, "{}\n---- output\n{output}\n---- errors\n{}\n----", self.status, self.errors)
    }
}

impl Terminal {
    /// A new pseudo-terminal, and the user's side of it.
    pub fn new() -> (File, Self) {
        let master =
            openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let name = ptsname(&master, Vec::new()).unwrap().into_string().unwrap();
        let slave = File::options().read(true).write(true).open(name).unwrap();
        (File::from(master), Self { original: tcgetattr(&slave).unwrap(), slave })
    }

    /// The program's side of it.
    pub fn file(&self) -> File {
        self.slave.try_clone().unwrap()
    }

    /// The terminal's settings, to compare.
    pub fn settings(&self) -> String {
        format!("{:?}", tcgetattr(&self.slave).unwrap())
    }

    /// Puts back the settings from before the program ran, as a shell does when the program is stopped.
    pub fn make_cooked(&self) {
        tcsetattr(&self.slave, OptionalActions::Now, &self.original).unwrap();
    }
}

/// Starts a program with SIGHUP at its default, also where the tests run under nohup(1): a monitor leaves a signal ignored
/// that it was started with ignored.
#[expect(unsafe_code, reason = "a signal's disposition is set through libc")]
fn spawn(command: &mut Command) -> Child {
    // SAFETY: a system call that changes how this process takes SIGHUP, and no memory.
    unsafe { libc::signal(libc::SIGHUP, libc::SIG_DFL) };
    command.spawn().unwrap_or_else(|why| panic!("cannot start {command:?}: {why}"))
}
