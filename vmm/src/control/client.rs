//! One connection: its input and output buffers, and its state in the protocol.

use std::fs::File;
use std::io::{ErrorKind, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;

use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use serde_json::{Value, json};

use super::commands;
use super::framing::{Frame, Framer};
use super::migration::Migration;
use super::protocol::{Answer, Failure, Request, answer, greeting};
use crate::machine::{Machine, MachineEvent};

/// Bytes of output from which on a client's next command waits until the client has read some.
const OUTPUT_ENOUGH: usize = 64 << 10;
/// Bytes of unread events above which a client is disconnected. Answers do not count. The number of disks and vCPUs bounds the
/// size of one, and `OUTPUT_ENOUGH` bounds how many are unread.
const EVENTS_MAX: usize = 1 << 20;
/// Bytes that are read from one client before the next client's turn.
const INPUT_CHUNK: usize = 4096;

/// The connection has failed, or the client has exceeded a limit: the server has to disconnect it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Gone;

#[derive(Debug)]
struct Pending {
    id: Option<Value>,
    answer: Result<Answer, Failure>,
}

/// A client of the control socket, from the greeting to the end of its connection. Its commands are executed in order, each after the
/// answer to the one before. No call blocks, and both buffers are bounded.
#[derive(Debug)]
pub(super) struct Client {
    stream: UnixStream,
    input: Framer,
    output: Vec<u8>,
    /// Bytes of events since the output was last empty.
    events: usize,
    /// It has negotiated capabilities. Only then it may send commands and gets events.
    ready: bool,
    ended: bool,
    /// Its next command waits until the client has read some output.
    stalled: bool,
    /// The command that was executed and not yet answered.
    pending: Option<Pending>,
    /// The descriptor that was received last (SCM_RIGHTS), for `getfd`.
    received: Option<File>,
    /// The server's count of activity when this client was last active.
    pub(super) last_active: u64,
}

impl Client {
    /// Greets a new client. `stream` is non-blocking.
    pub(super) fn new(stream: UnixStream) -> Self {
        let mut client = Self {
            stream,
            input: Framer::default(),
            output: Vec::new(),
            events: 0,
            ready: false,
            ended: false,
            stalled: false,
            pending: None,
            received: None,
            last_active: 0,
        };
        client.send(&greeting());
        client
    }

    /// Reads once from the client, unless it has to read output first or waits for an answer.
    pub(super) fn read(&mut self) -> Result<(), Gone> {
        let mut chunk = [0; INPUT_CHUNK];
        loop {
            if !self.wants_input() {
                return Ok(());
            }
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut chunk_slice = [IoSliceMut::new(&mut chunk)];
            let flags = RecvFlags::CMSG_CLOEXEC;
            let count = match recvmsg(&self.stream, &mut chunk_slice, &mut control, flags) {
                Ok(message) => message.bytes,
                Err(Errno::INTR) => continue,
                Err(Errno::WOULDBLOCK) => return Ok(()),
                Err(_) => return Err(Gone),
            };
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(files) = message {
                    // The buffer has space for one descriptor, which is all that a command needs. The kernel closes any others.
                    self.received = files.last().map(File::from);
                }
            }
            self.ended = count == 0;
            self.input.push(&chunk[..count]);
            return Ok(());
        }
    }

    /// The next command to execute. Answers requests that need no machine first. `None`: no command can be executed now.
    pub(super) fn next_request(&mut self) -> Result<Option<Request>, Gone> {
        loop {
            self.stalled = self.output.len() >= OUTPUT_ENOUGH;
            if self.stalled || self.pending.is_some() {
                return Ok(None);
            }
            let request = match self.input.next() {
                None => return Ok(None),
                Some(Frame::TooLong) => return Err(Gone),
                Some(Frame::Garbage) => {
                    Err((None, Failure::generic("JSON parse error, expecting an object")))
                }
                Some(Frame::Value(bytes)) => Request::parse(bytes),
            };
            match request {
                Ok(request) if request.command == "qmp_capabilities" => {
                    let result = self.negotiate(&request);
                    self.reply(request.id, result);
                }
                Ok(request) if self.ready => return Ok(Some(request)),
                Ok(request) => {
                    let unready = "Expecting capabilities negotiation with 'qmp_capabilities'";
                    self.reply(request.id, Err(Failure::command_not_found(unready)));
                }
                Err((id, failure)) => self.reply(id, Err(failure)),
            }
        }
    }

    fn negotiate(&mut self, request: &Request) -> Result<Value, Failure> {
        if self.ready {
            let done = "Capabilities negotiation is already complete, command ignored";
            return Err(Failure::command_not_found(done));
        }
        match request.arguments.get("enable") {
            None => {}
            Some(Value::Array(none)) if none.is_empty() => {}
            Some(_) => {
                return Err(Failure::generic(
                    "Parameter 'enable' names a capability that is not offered",
                ));
            }
        }
        if let Some(unknown) = request.arguments.keys().find(|key| *key != "enable") {
            return Err(Failure::generic(format!("Parameter '{unknown}' is unexpected")));
        }
        self.ready = true;
        Ok(json!({}))
    }

    /// Executes the client's next command, if it has sent one and waits for no answer. Returns whether it did. A query is answered at
    /// once, another command after the events that it causes (`answer`).
    pub(super) fn execute_next(
        &mut self,
        machine: &mut Machine,
        migration: &mut Migration,
    ) -> Result<bool, Gone> {
        let Some(Request { command, arguments, id }) = self.next_request()? else {
            return Ok(false);
        };
        migration.received = if command == "getfd" { self.received.take() } else { None };
        let answer = commands::execute(machine, migration, &command, &arguments);
        self.answer_query_or_defer(&command, id, answer);
        Ok(true)
    }

    /// Answers a query at once, since it causes no events and its answer is about this moment. After later events, a client would read
    /// `completed` and then `active`, and wait for the end of the save for ever. Other commands are answered after the events that they
    /// cause.
    fn answer_query_or_defer(
        &mut self,
        command: &str,
        id: Option<Value>,
        answer: Result<Answer, Failure>,
    ) {
        let is_query = command.starts_with("query-") || command.starts_with("x-query-");
        match answer {
            Ok(Answer::Now(value)) if is_query => self.reply(id, Ok(value)),
            Err(failure) if is_query => self.reply(id, Err(failure)),
            answer => self.pending = Some(Pending { id, answer }),
        }
    }

    /// Answers the command that was executed and deferred. If it began a job, nothing is sent until `events` report the job as done.
    pub(super) fn answer(&mut self, events: &[MachineEvent]) {
        let Some(Pending { id, answer }) = self.pending.take() else { return };
        let result = match answer {
            Ok(Answer::Now(value)) => Ok(value),
            Err(failure) => Err(failure),
            Ok(Answer::WhenDone(job)) => {
                let result = events.iter().find_map(|event| match event {
                    MachineEvent::Done(done, result) if *done == job => Some(result),
                    _ => None,
                });
                let Some(result) = result else {
                    self.pending = Some(Pending { id, answer: Ok(Answer::WhenDone(job)) });
                    return;
                };
                result.as_ref().map(|()| json!({})).map_err(|error| Failure::of(error))
            }
        };
        self.reply(id, result);
    }

    pub(super) fn reply(&mut self, id: Option<Value>, result: Result<Value, Failure>) {
        self.send(&answer(id, result));
    }

    /// Sends an event to a client that has negotiated.
    pub(super) fn notify(&mut self, event: &Value) {
        if self.ready {
            let before = self.output.len();
            self.send(event);
            self.events += self.output.len() - before;
        }
    }

    fn send(&mut self, message: &Value) {
        self.output.extend_from_slice(message.to_string().as_bytes());
        self.output.extend_from_slice(b"\r\n");
    }

    pub(super) fn write(&mut self) -> Result<(), Gone> {
        while !self.output.is_empty() {
            match self.stream.write(&self.output) {
                Ok(count) => {
                    self.output.drain(..count);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(_) => return Err(Gone),
            }
        }
        if self.output.is_empty() {
            self.events = 0;
        }
        if self.events > EVENTS_MAX { Err(Gone) } else { Ok(()) }
    }

    /// Whether the client waits for no answer.
    pub(super) fn is_idle(&self) -> bool {
        self.pending.is_none()
    }

    /// Whether the client has closed its side, and every answer is sent.
    pub(super) fn is_done(&self) -> bool {
        self.ended && !self.wants_output() && self.pending.is_none()
    }

    /// Whether the server reads from the client: it has not closed its side, has little unread output, and waits for no answer.
    pub(super) fn wants_input(&self) -> bool {
        !self.ended && self.output.len() < OUTPUT_ENOUGH && self.pending.is_none()
    }

    /// Whether there is output to write, or a command waits until output was written.
    pub(super) fn wants_output(&self) -> bool {
        !self.output.is_empty() || self.stalled
    }
}

impl AsRawFd for Client {
    fn as_raw_fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};

    use super::*;

    /// The messages that a client receives if `command` is executed, and an event happens before the server's next turn.
    fn received(command: &str) -> Vec<String> {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut client = Client::new(ours);
        client.ready = true;
        client.answer_query_or_defer(command, None, Ok(Answer::Now(json!({ "status": "active" }))));
        client.notify(&json!({ "event": "MIGRATION", "data": { "status": "completed" } }));
        client.answer(&[]);
        client.write().unwrap();
        drop(client);
        BufReader::new(theirs).lines().skip(1).map(Result::unwrap).collect()
    }

    #[test]
    fn a_query_is_answered_before_the_events_that_follow_it() {
        for command in ["query-migrate", "x-query-metrics"] {
            let [answer, event] = &received(command)[..] else { panic!("two messages") };
            assert!(answer.contains("return") && event.contains("event"), "{answer} {event}");
        }
    }

    #[test]
    fn a_command_is_answered_after_the_events_that_it_causes() {
        let [event, answer] = &received("stop")[..] else { panic!("two messages") };
        assert!(answer.contains("return") && event.contains("event"), "{event} {answer}");
    }
}
