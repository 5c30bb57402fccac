//! The main thread's loop: signals, the time limit, the guest's events, the console's input, and control commands.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use devices::block::BlockEvent;
use devices::legacy::{GuestEvent, SerialDevice};
use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use vmm_sys_util::eventfd::EventFd;

use crate::attach::{self, SerialEnds};
use crate::console::{Console, HELP, Typed};
use crate::control::{Event, Operator, Server, Source as Cause};
use crate::error::Error;
use crate::events::{EventReceiver, VmEvent};
use crate::machine::{Life, Machine};
use crate::signals::{KERNEL_FILE_WANTED, Signals};

/// Why the VM ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The guest switched itself off.
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// The guest panicked; the text says how we know.
    Panicked(&'static str),
    /// The guest wrote this to the debug-exit port.
    DebugExit(u8),
    /// The user typed `Ctrl-A x`.
    Quit,
    /// We got this signal.
    Signal(i32),
    /// The time limit passed.
    Timeout,
    /// A control client ended the VM.
    ControlQuit,
    /// A thread of ours failed; the text says why.
    Failed(String),
}

impl Outcome {
    fn cause(&self) -> Cause {
        match self {
            Self::PowerOff | Self::DebugExit(_) => Cause::GUEST_SHUTDOWN,
            Self::Reset => Cause::GUEST_RESET,
            Self::Panicked(_) => Cause::GUEST_PANIC,
            Self::Quit => Cause::USER,
            // The time limit is a SIGTERM that comes by itself.
            Self::Signal(_) | Self::Timeout => Cause::SIGNAL,
            Self::ControlQuit => Cause::QMP_QUIT,
            Self::Failed(_) => Cause::HOST_ERROR,
        }
    }
}

/// Which descriptor an event is about.
#[derive(Clone, Copy)]
#[repr(u32)]
enum Source {
    Signal,
    Timer,
    VmEvent,
    Input,
    InputDrained,
    Listener,
}

const SOURCES: [Source; 6] =
    [Source::Signal, Source::Timer, Source::VmEvent, Source::Input, Source::InputDrained, Source::Listener];

/// The control socket and its clients count from here.
pub(crate) const CONTROL_BASE: u32 = 64;

/// What is left when the loop has ended.
pub(crate) struct Ended {
    /// Why it ended.
    pub outcome: Outcome,
    /// The machine, possibly still running.
    pub machine: Machine,
    /// The console, with output that has yet to reach the host.
    pub console: Console,
    /// The control socket.
    pub control: Option<Server>,
}

/// The machine, and everything that the main thread listens to.
pub(crate) struct MainLoop {
    machine: Machine,
    control: Option<Server>,
    signals: Signals,
    timer: Option<OwnedFd>,
    events: EventReceiver,
    console: Console,
    serial: Arc<Mutex<SerialDevice>>,
    input_drained: EventFd,
    input: InputState,
    outcome: Option<Outcome>,
}

/// Whether the console's input is polled.
#[derive(Clone, Copy, PartialEq, Eq)]
enum InputState {
    /// There is nothing to poll.
    Absent,
    /// Polled: read when readable.
    Polled,
    /// Polled for its end only, until the guest makes room in the UART's FIFO.
    Full,
    /// A regular file, which epoll refuses (EPERM): always readable.
    AlwaysReady,
}

impl MainLoop {
    /// A loop that is about to run.
    ///
    /// # Errors
    /// When the host has no timer left.
    pub(crate) fn new(
        machine: Machine,
        control: Option<Server>,
        signals: Signals,
        timeout: Option<Duration>,
        events: EventReceiver,
        console: Console,
        SerialEnds { serial, input_drained }: SerialEnds,
    ) -> Result<Self, Error> {
        let timer = timeout.map(start_timer).transpose().map_err(Error::host("start the --timeout timer"))?;
        let input = InputState::Absent;
        Ok(Self { machine, control, signals, timer, events, console, serial, input_drained, input, outcome: None })
    }

    /// Lets the guest enter its kernel.
    pub(crate) fn start(&mut self) {
        self.machine.resume();
    }

    /// Spares the guest's reads of the disks' registers their exits, while it may be running.
    pub(crate) fn map_registers(&self) {
        if let Err(error) = attach::map_registers(&self.machine.parts.vm, &self.machine.parts.disks) {
            tracing::warn!(%error, "the guest's reads of disk registers exit");
        }
    }

    /// Runs until the VM has a reason to end.
    ///
    /// # Errors
    /// When the host's event polling fails.
    pub(crate) fn run(self) -> Result<Ended, Error> {
        let failed = |error: event_manager::Error| Error::Stopped(format!("the main loop failed: {error:?}"));
        let mut manager = EventManager::new().map_err(failed)?;
        let main_loop = Arc::new(Mutex::new(self));
        let id = manager.add_subscriber(Arc::clone(&main_loop));
        let outcome = loop {
            manager.run().map_err(failed)?;
            let mut state = main_loop.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            if let Some(outcome) = state.outcome.take() {
                break outcome;
            }
        };
        drop(manager.remove_subscriber(id));
        let main_loop = Arc::into_inner(main_loop).ok_or_else(|| Error::Stopped("the main loop leaked".to_owned()))?;
        let main_loop = main_loop.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
        let MainLoop { machine, console, control, .. } = main_loop;
        Ok(Ended { outcome, machine, console, control })
    }

    /// The first reason wins.
    fn end(&mut self, outcome: Outcome) {
        if self.outcome.is_some() {
            return;
        }
        match outcome {
            Outcome::Panicked(_) => {
                self.machine.announce(&Event::GuestPanicked);
                // As in QEMU, which says STOP here. A vCPU that does not leave the guest is reported at the end.
                let _ = self.machine.pause(Life::Paused);
            }
            Outcome::Reset => self.machine.announce(&Event::Reset(outcome.cause())),
            _ => {}
        }
        self.machine.announce(&Event::Shutdown(outcome.cause()));
        self.outcome = Some(outcome);
    }

    fn vm_events(&mut self) {
        self.events.clear();
        for report in self.events.reports() {
            let event = match report {
                BlockEvent::IoError { device, operation, action, nospace, reason } => {
                    let device = self.machine.qmp_name(&device);
                    Event::BlockIoError { device, operation, action, nospace, reason }
                }
                BlockEvent::WriteThreshold { device, exceeded, threshold } => {
                    let device = self.machine.qmp_name(&device);
                    Event::BlockWriteThreshold { device, exceeded, threshold }
                }
                // Came as `VmEvent::Failed`.
                BlockEvent::WorkerFailed { .. } => continue,
            };
            self.machine.announce(&event);
        }
        if self.machine.life() == Life::Running
            && self.machine.disk_in_trouble()
            && let Err(error) = self.machine.pause(Life::IoError)
        {
            self.end(Outcome::Failed(error.to_string()));
        }
        while let Some(event) = self.events.next() {
            match event {
                VmEvent::Guest(GuestEvent::PowerOff) => self.end(Outcome::PowerOff),
                VmEvent::Guest(GuestEvent::Reset) => {
                    let panicked = arch::cmdline::panicked(&self.machine.parts.memory);
                    let after_panic = Outcome::Panicked("it reset itself after a kernel panic");
                    self.end(if panicked { after_panic } else { Outcome::Reset });
                }
                VmEvent::Guest(GuestEvent::Panicked) => self.end(Outcome::Panicked("it said so at the pvpanic port")),
                // A crash kernel takes over and ends the machine in its own time.
                VmEvent::Guest(GuestEvent::CrashLoaded) => {
                    tracing::warn!("the guest panicked and boots its crash kernel");
                    self.machine.announce(&Event::GuestCrashloaded);
                }
                VmEvent::Guest(GuestEvent::DebugExit(status)) => self.end(Outcome::DebugExit(status)),
                VmEvent::TripleFault => self.end(Outcome::Panicked("triple fault")),
                VmEvent::Failed(why) => self.end(Outcome::Failed(why)),
            }
        }
    }

    /// Moves input to the guest until the UART is full or the input has nothing more for now.
    fn input(&mut self, ops: &mut EventOps<'_>) {
        loop {
            let room = self.feed();
            let appetite = self.console.input.appetite(room);
            if appetite == 0 {
                self.pause_input(ops);
                return;
            }
            let (mut quit, mut help) = (false, false);
            let open = self.console.input.read(appetite, |typed| match typed {
                Typed::Byte(_) => {}
                Typed::Help => help = true,
                Typed::Quit => quit = true,
            });
            self.feed();
            if help {
                let _ = io::Write::write_all(&mut self.console.output.writer(), HELP.as_bytes());
            }
            if quit {
                self.end(Outcome::Quit);
            }
            if !open {
                self.close_input(ops);
                return;
            }
            // A polled source says itself when there is more.
            if quit || self.input == InputState::Polled {
                return;
            }
        }
    }

    /// Gives the UART what waits for it, as far as it has room. Returns how much more it would take; when that is 0, it says
    /// when to come again.
    fn feed(&mut self) -> usize {
        let mut serial = self.serial.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let room = serial.input_room();
        serial.enqueue(&self.console.input.take(room));
        serial.input_room()
    }

    fn pause_input(&mut self, ops: &mut EventOps<'_>) {
        if self.input == InputState::Polled
            && let Some(fd) = self.console.input.fd()
        {
            let _ = ops.modify(Events::with_data_raw(fd, Source::Input as u32, EventSet::empty()));
            self.input = InputState::Full;
        }
    }

    /// The other end was closed while the guest takes no input: what it sent is kept, but a next client may come.
    fn input_hung_up(&mut self, ops: &mut EventOps<'_>) {
        if let Some(fd) = self.console.input.fd() {
            let _ = ops.remove(Events::empty_raw(fd));
        }
        self.listen(ops);
    }

    fn listen(&self, ops: &mut EventOps<'_>) {
        if let Some(listener) = &self.console.listener {
            self.console.output.disconnect();
            let _ = ops.add(events(listener.as_raw_fd(), Source::Listener));
        }
    }

    fn input_drained(&mut self, ops: &mut EventOps<'_>) {
        let _ = self.input_drained.read();
        self.feed();
        match self.input {
            InputState::Full => self.open_input(ops),
            InputState::AlwaysReady => self.input(ops),
            InputState::Absent | InputState::Polled => {}
        }
    }

    fn open_input(&mut self, ops: &mut EventOps<'_>) {
        let Some(fd) = self.console.input.fd() else { return };
        // It may still be polled for its end.
        match ops.add(events(fd, Source::Input)).or_else(|_| ops.modify(events(fd, Source::Input))) {
            Ok(()) => self.input = InputState::Polled,
            Err(_) => {
                self.input = InputState::AlwaysReady;
                self.input(ops);
            }
        }
    }

    fn close_input(&mut self, ops: &mut EventOps<'_>) {
        self.forget_input(ops);
        self.listen(ops);
    }

    fn forget_input(&mut self, ops: &mut EventOps<'_>) {
        // Fails where nothing is polled: after its end, or a regular file.
        if let Some(fd) = self.console.input.fd() {
            let _ = ops.remove(Events::empty_raw(fd));
        }
        self.input = InputState::Absent;
        self.console.input.disconnect();
    }

    /// One client at a time: the next one waits in the socket's backlog.
    fn accept(&mut self, ops: &mut EventOps<'_>) {
        let Some(listener) = &self.console.listener else { return };
        let Some(client) = listener.accept().map(OwnedFd::from) else { return };
        let Ok(output) = client.try_clone() else { return };
        let _ = ops.remove(Events::empty_raw(listener.as_raw_fd()));
        // The last one may have left behind what the guest did not want.
        self.forget_input(ops);
        self.console.output.connect(output);
        self.console.input.connect(File::from(client));
        self.open_input(ops);
    }
}

impl MainLoop {
    fn control(&mut self, number: u32, ops: &mut EventOps<'_>) {
        let Some(control) = &mut self.control else { return };
        let mut operator = Operator::new(&mut self.machine);
        control.process(number, ops, &mut operator);
        if let Some(outcome) = operator.outcome() {
            self.end(outcome);
        }
    }

    /// Clients hear of everything before the loop waits again.
    fn announce(&mut self, ops: &mut EventOps<'_>) {
        let news = self.machine.take_news();
        if !news.is_empty()
            && let Some(control) = &mut self.control
        {
            control.announce(news, ops);
        }
    }
}

impl MutEventSubscriber for MainLoop {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        let mut watch = |fd: RawFd, source| {
            if let Err(error) = ops.add(events(fd, source)) {
                self.outcome = Some(Outcome::Failed(format!("cannot poll: {error:?}")));
            }
        };
        watch(self.signals.as_raw_fd(), Source::Signal);
        watch(self.events.wake_fd().as_raw_fd(), Source::VmEvent);
        watch(self.input_drained.as_raw_fd(), Source::InputDrained);
        if let Some(timer) = &self.timer {
            watch(timer.as_raw_fd(), Source::Timer);
        }
        if let Some(listener) = &self.console.listener {
            watch(listener.as_raw_fd(), Source::Listener);
        }
        if let Some(control) = &self.control
            && let Err(error) = control.init(ops)
        {
            self.outcome = Some(Outcome::Failed(format!("cannot poll: {error:?}")));
        }
        self.open_input(ops);
    }

    fn process(&mut self, event: Events, ops: &mut EventOps<'_>) {
        match SOURCES.get(event.data() as usize) {
            Some(Source::Signal) => match self.signals.read() {
                Some(KERNEL_FILE_WANTED) => {
                    if let Err(error) = self.machine.let_kernel_file_go() {
                        self.end(Outcome::Failed(error.to_string()));
                    }
                }
                Some(signal) => self.end(Outcome::Signal(signal)),
                None => {}
            },
            Some(Source::Timer) => self.end(Outcome::Timeout),
            Some(Source::VmEvent) => self.vm_events(),
            Some(Source::Input) if self.input == InputState::Full => self.input_hung_up(ops),
            Some(Source::Input) => self.input(ops),
            Some(Source::InputDrained) => self.input_drained(ops),
            Some(Source::Listener) => self.accept(ops),
            None => self.control(event.data(), ops),
        }
        self.announce(ops);
    }
}

fn events(fd: RawFd, source: Source) -> Events {
    Events::with_data_raw(fd, source as u32, EventSet::IN)
}

fn start_timer(limit: Duration) -> io::Result<OwnedFd> {
    let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC)?;
    let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
    let limit = Timespec::try_from(limit).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    timerfd_settime(&timer, TimerfdTimerFlags::empty(), &Itimerspec { it_interval: zero, it_value: limit })?;
    Ok(timer)
}
