//! The debugger's connection as a source of the main loop. It reads and writes, and stops and resumes the machine.
//!
//! There is one debugger at a time. A second connection is closed at once. The states of a connection:
//!
//! | state | event | next state |
//! |---|---|---|
//! | none (no `client`) | a client connects: the machine is stopped | attaching (`protocol` is `None`) |
//! | attaching | the machine stands still | attached: requests are read from now on |
//! | attached | detach, or the connection is lost | none. Breakpoints are removed when the machine stands still |
//! | any | kill | the machine ends |
//!
//! While a client is attached, the protocol is idle (the machine stands still) or running. Every stop, also one by a client of the control
//! socket, is reported to a debugger that waits for a stop. Replies that the client has not read are kept, and nothing more is read
//! from it meanwhile. So the buffer has at most the replies to one read.

use std::io;
use std::mem;
use std::os::fd::{AsRawFd, OwnedFd};

use devices::log_limit::LogLimit;
use event_manager::EventSet;
use gdbstub::common::Signal;
use gdbstub::conn::Connection;
use gdbstub::stub::state_machine::GdbStubStateMachine;
use gdbstub::stub::{DisconnectReason, GdbStub};
use kvm_bindings::{KVM_CAP_SET_GUEST_DEBUG, KVM_CAP_SET_GUEST_DEBUG2, KVM_GUESTDBG_BLOCKIRQ};
use kvm_ioctls::VmFd;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{SendFlags, send};

use super::listener::DebugListener;
use super::packets::{Packets, Piece};
use super::target::{Reason, Target};
use crate::GuestMemory;
use crate::config::GdbConfig;
use crate::error::Error;
use crate::machine::{Machine, MachineEvent, Outcome, RunState};
use crate::sources::{Poller, Source};

/// The source's numbers for its descriptors.
const LISTENER: u8 = 0;
const CLIENT: u8 = 1;

/// Bytes of one read: the length of the longest packet.
const READ_SIZE: usize = 4096;

type Protocol = GdbStubStateMachine<'static, Target, Replies>;
/// An error of the protocol or of KVM.
type Failure = Box<dyn std::error::Error>;

/// Replies that were not written to the socket yet.
#[derive(Default)]
pub(super) struct Replies(Vec<u8>);

impl Connection for Replies {
    type Error = io::Error;

    fn write(&mut self, byte: u8) -> io::Result<()> {
        self.0.push(byte);
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Client {
    socket: OwnedFd,
    /// `None` while attaching, and during a call that changes it.
    protocol: Option<Protocol>,
    packets: Packets,
    /// The debugger asked for a stop.
    interrupted: bool,
}

impl Client {
    /// Whether the client has closed the connection. Bytes that it sent before may still be unread.
    fn has_gone(&self) -> bool {
        let mut descriptors = [PollFd::new(&self.socket, PollFlags::RDHUP)];
        poll(&mut descriptors, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
    }
}

/// Limits the rate of messages. A debugger, or with TCP any user of the host, can cause any number of them.
#[derive(Default)]
struct Limits {
    turned_away: LogLimit,
    disconnected: LogLimit,
    lost: LogLimit,
}

/// The source: see the module's documentation.
pub(crate) struct Gdb {
    listener: DebugListener,
    limits: Limits,
    target: Target,
    client: Option<Client>,
    /// A debugger has disconnected, and its breakpoints are still set. `Some(true)`: the machine goes on when they are removed.
    leaving: Option<bool>,
    /// The machine has to be resumed as soon as that is possible.
    resuming: bool,
    /// The number of the stop that the client waits for.
    stop: Option<u64>,
}

impl Gdb {
    /// Listens for a debugger, before the process is confined. Without `config`, there is no source.
    ///
    /// # Errors
    /// The address is in use or refused, or KVM cannot debug guests.
    pub(crate) fn listen(
        config: Option<&GdbConfig>,
        vm: &VmFd,
        memory: &GuestMemory,
        vcpus: u32,
    ) -> Result<Option<Box<dyn Source>>, Error> {
        let Some(config) = config else { return Ok(None) };
        if vm.check_extension_raw(KVM_CAP_SET_GUEST_DEBUG.into()) <= 0 {
            return Err(Error::KvmLacks("debugging of guests (KVM_CAP_SET_GUEST_DEBUG)"));
        }
        let flags = vm.check_extension_raw(KVM_CAP_SET_GUEST_DEBUG2.into());
        let blocks_interrupts = flags > 0 && flags as u32 & KVM_GUESTDBG_BLOCKIRQ != 0;
        let target = Target::new(memory.clone(), vcpus as usize, blocks_interrupts);
        let listener = DebugListener::bind(config)?;
        Ok(Some(Box::new(Self {
            listener,
            limits: Limits::default(),
            target,
            client: None,
            leaving: None,
            resuming: false,
            stop: None,
        })))
    }

    fn accept(&mut self, poller: &mut Poller<'_, '_>, machine: &mut Machine) {
        while let Some(socket) = self.listener.accept() {
            if self.client.as_ref().is_some_and(Client::has_gone) {
                self.lost(poller, machine);
            }
            if self.client.is_some() {
                self.limits.turned_away.warn(format_args!(
                    "--gdb: a second debugger was turned away; disconnect the first one"
                ));
                continue;
            }
            self.client = Some(Client {
                socket,
                protocol: None,
                packets: Packets::default(),
                interrupted: false,
            });
            self.stop(machine);
        }
    }

    fn stop(&mut self, machine: &mut Machine) {
        self.resuming = false;
        self.stop = machine.stop(RunState::Debug);
    }

    /// Reads once, and sends the replies.
    fn receive(&mut self, poller: &mut Poller<'_, '_>, machine: &mut Machine) {
        let Some(client) = &self.client else { return };
        let mut bytes = [0; READ_SIZE];
        match rustix::io::read(&client.socket, &mut bytes) {
            Ok(0) => self.lost(poller, machine),
            Ok(count) => {
                let fed = self.with_vcpus(machine, |gdb| gdb.feed(&bytes[..count]));
                self.after(fed, poller, machine);
            }
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
            Err(_) => self.lost(poller, machine),
        }
    }

    /// Passes the client's bytes to the protocol.
    fn feed(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        let Some(client) = &mut self.client else { return Ok(()) };
        let Some(mut protocol) = client.protocol.take() else { return Ok(()) };
        for byte in bytes {
            let packet = match client.packets.push(*byte) {
                Piece::Incomplete => continue,
                Piece::Damaged => {
                    replies(&mut protocol).0.push(b'-');
                    continue;
                }
                Piece::Whole(packet) => packet,
            };
            for byte in packet {
                self.target.read = 0;
                protocol = match protocol {
                    Protocol::Idle(idle) => idle.incoming_data(&mut self.target, byte)?,
                    Protocol::Running(running) => running.incoming_data(&mut self.target, byte)?,
                    other => other,
                };
                if let Protocol::CtrlCInterrupt(interrupt) = protocol {
                    protocol = interrupt.interrupt_handled(&mut self.target, None::<Reason>)?;
                    client.interrupted |= matches!(protocol, Protocol::Running(_));
                }
            }
        }
        client.protocol = Some(protocol);
        Ok(())
    }

    /// Acts on the protocol's new state: sends replies, resumes the machine, or ends the connection.
    fn after(
        &mut self,
        result: Result<(), Failure>,
        poller: &mut Poller<'_, '_>,
        machine: &mut Machine,
    ) {
        if let Err(error) = result {
            let why = format_args!("--gdb: the debugger is disconnected: {error}");
            self.limits.disconnected.warn(why);
            return self.lost(poller, machine);
        }
        self.send(poller, machine);
        self.resuming |= mem::take(&mut self.target.goes_on);
        self.resume(machine);
        let protocol = self.client.as_ref().and_then(|client| client.protocol.as_ref());
        let Some(Protocol::Disconnected(end)) = protocol else { return };
        match end.get_reason() {
            DisconnectReason::Kill => machine.end(Ok(Outcome::ControlQuit)),
            DisconnectReason::Disconnect => self.leave(true, poller, machine),
            _ => self.leave(false, poller, machine),
        }
    }

    /// Sends replies. If all are sent, polls for the client's next request and returns true.
    fn send(&mut self, poller: &mut Poller<'_, '_>, machine: &mut Machine) -> bool {
        let Some(client) = &mut self.client else { return false };
        let Some(protocol) = &mut client.protocol else { return false };
        let Replies(replies) = replies(protocol);
        while !replies.is_empty() {
            match send(&client.socket, replies, SendFlags::NOSIGNAL) {
                Ok(count) => drop(replies.drain(..count)),
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => break,
                Err(_) => {
                    self.lost(poller, machine);
                    return false;
                }
            }
        }
        let all = replies.is_empty();
        let events = if all { EventSet::IN } else { EventSet::OUT };
        if let Err(error) = poller.poll_for(client.socket.as_raw_fd(), CLIENT, events) {
            tracing::warn!("--gdb: the debugger cannot be served: {error}");
            self.lost(poller, machine);
            return false;
        }
        all
    }

    /// The connection was lost without a detach. The guest goes on if it runs, and otherwise stays stopped.
    fn lost(&mut self, poller: &mut Poller<'_, '_>, machine: &mut Machine) {
        let runs = machine.state() == RunState::Running;
        if !runs && machine.state() != RunState::Shutdown {
            self.limits.lost.warn(format_args!(
                "--gdb: the debugger went away without detaching; the guest stays stopped until one connects again"
            ));
        }
        self.leave(runs, poller, machine);
    }

    /// Closes the connection. When the machine stands still, the breakpoints are removed, and with `goes_on` the guest goes on.
    fn leave(&mut self, goes_on: bool, poller: &mut Poller<'_, '_>, machine: &mut Machine) {
        if let Some(client) = self.client.take() {
            poller.stop_polling(client.socket.as_raw_fd());
            self.leaving = Some(goes_on);
            self.stop(machine);
        }
    }

    /// Resumes the machine if the debugger has asked for that, and stops it again if the debugger has interrupted it since. Returns
    /// whether it was resumed.
    fn resume(&mut self, machine: &mut Machine) -> bool {
        // While the machine is still stopping, this fails. The next event tries again.
        let resumed = self.resuming && machine.resume().is_ok();
        self.resuming &= !resumed;
        let interrupted = self.client.as_ref().is_some_and(|client| client.interrupted);
        if interrupted && machine.state() == RunState::Running {
            self.stop(machine);
        }
        resumed
    }

    /// Called when the machine stands still. Returns whether it goes on.
    fn stopped(&mut self, poller: &mut Poller<'_, '_>, machine: &mut Machine) -> bool {
        if let Some(goes_on) = self.leaving.take() {
            if let Err(error) = self.with_vcpus(machine, |gdb| gdb.target.clear()) {
                machine.end(Err(error));
                return true;
            }
            self.resuming = goes_on && self.client.is_none();
        }
        let Some(client) = &mut self.client else { return self.resume(machine) };
        match &client.protocol {
            None => match GdbStub::new(Replies::default()).run_state_machine(&mut self.target) {
                Ok(protocol) => {
                    client.protocol = Some(protocol);
                    self.send(poller, machine);
                }
                Err(error) => self.after(Err(error.into()), poller, machine),
            },
            Some(Protocol::Running(_)) if !self.resuming => {
                let state = machine.state();
                let reported = self.with_vcpus(machine, |gdb| gdb.report(state));
                self.after(reported, poller, machine);
            }
            Some(_) => {}
        }
        self.resume(machine)
    }

    /// Reports to the debugger why the machine has stopped. An INT3 of the guest's own code is not reported: the machine goes on.
    fn report(&mut self, state: RunState) -> Result<(), Failure> {
        let Some(client) = &mut self.client else { return Ok(()) };
        let (met, delivered) = self.target.take_reason()?;
        let interrupted = mem::take(&mut client.interrupted);
        let reason = match (met, state) {
            (Some(reason), _) => reason,
            (None, RunState::Debug) if interrupted => self.target.signal(Signal::SIGINT),
            (None, RunState::Debug) if delivered => {
                return Ok(self.target.prepare()?);
            }
            (None, RunState::Debug) => self.target.signal(Signal::SIGTRAP),
            // As in QEMU.
            (None, RunState::IoError) => self.target.signal(Signal::SIGSTOP),
            (None, _) => self.target.signal(Signal::SIGINT),
        };
        self.tell(reason)
    }

    fn tell(&mut self, reason: Reason) -> Result<(), Failure> {
        let Some(client) = &mut self.client else { return Ok(()) };
        if let Some(Protocol::Running(running)) = client.protocol.take() {
            client.protocol = Some(running.report_stop(&mut self.target, reason)?);
        }
        Ok(())
    }

    /// Called when the machine ends. Reports the end to a debugger that waits for a stop.
    fn ended(
        &mut self,
        outcome: Option<&Outcome>,
        poller: &mut Poller<'_, '_>,
        machine: &mut Machine,
    ) {
        let status = match outcome {
            Some(Outcome::DebugExit(status)) => *status,
            Some(_) => 0,
            None => 1,
        };
        let waits = |client: &Client| matches!(client.protocol, Some(Protocol::Running(_)));
        if self.client.as_ref().is_some_and(waits) && self.tell(Reason::Exited(status)).is_ok() {
            self.send(poller, machine);
        }
        if let Some(client) = self.client.take() {
            poller.stop_polling(client.socket.as_raw_fd());
        }
    }

    fn with_vcpus<T>(&mut self, machine: &mut Machine, act: impl FnOnce(&mut Self) -> T) -> T {
        mem::swap(&mut self.target.vcpus, &mut machine.hardware.vcpus);
        let result = act(self);
        mem::swap(&mut self.target.vcpus, &mut machine.hardware.vcpus);
        result
    }
}

fn replies(protocol: &mut Protocol) -> &mut Replies {
    match protocol {
        Protocol::Idle(state) => state.borrow_conn(),
        Protocol::Running(state) => state.borrow_conn(),
        Protocol::CtrlCInterrupt(state) => state.borrow_conn(),
        Protocol::Disconnected(state) => state.borrow_conn(),
    }
}

/// Whether no vCPU is in the guest, and none enters it until a client resumes the machine.
fn stands_still(machine: &Machine) -> bool {
    match machine.state() {
        RunState::Prelaunch
        | RunState::Paused
        | RunState::Debug
        | RunState::IoError
        | RunState::PostMigrate => true,
        RunState::Running | RunState::FinishMigrate | RunState::Shutdown => false,
    }
}

impl Source for Gdb {
    fn watch(&mut self, poller: &mut Poller<'_, '_>) -> event_manager::Result<()> {
        poller.add_edges(&self.listener, LISTENER)
    }

    fn process(&mut self, number: u8, poller: &mut Poller<'_, '_>, machine: &mut Machine) {
        if number == LISTENER {
            return self.accept(poller, machine);
        }
        if self.send(poller, machine) {
            self.receive(poller, machine);
        }
    }

    fn on_events(
        &mut self,
        events: &[MachineEvent],
        poller: &mut Poller<'_, '_>,
        machine: &mut Machine,
    ) -> bool {
        for event in events {
            match event {
                MachineEvent::Reset { .. } => self.target.forget_software_breakpoints(),
                MachineEvent::Shutdown(outcome) => self.ended(outcome.as_ref(), poller, machine),
                MachineEvent::Done(job, Err(error)) if self.stop == Some(*job) => {
                    tracing::warn!("--gdb: the guest cannot be stopped for the debugger: {error}");
                    if let Some(client) = self.client.take_if(|client| client.protocol.is_none()) {
                        drop(client);
                    }
                }
                _ => {}
            }
        }
        stands_still(machine) && self.stopped(poller, machine)
    }
}
