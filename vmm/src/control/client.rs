//! One connection: what it sent, what it has yet to read, and whether it has said hello.

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;

use serde_json::{Value, json};

use super::framing::{Frame, Framer};
use super::protocol::{Failure, Request, answer, greeting};

/// Bytes of output above which a client's next command waits until it has read some.
const OUTPUT_ENOUGH: usize = 64 << 10;
/// Bytes of output, events included, above which a client that does not read is disconnected.
const OUTPUT_MAX: usize = 1 << 20;
/// Bytes taken from a client at a time: others want their turn.
const INPUT_CHUNK: usize = 4096;

/// The client is gone or beyond help: disconnect it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Gone;

/// A client of the control socket. Nothing blocks, and both buffers are bounded.
#[derive(Debug)]
pub(super) struct Client {
    stream: UnixStream,
    input: Framer,
    output: Vec<u8>,
    /// It negotiated capabilities: commands are open to it and events come.
    ready: bool,
    /// It will send nothing more.
    ended: bool,
    /// Commands may wait until it has read more.
    stalled: bool,
}

impl Client {
    /// Greets a client.
    ///
    /// # Errors
    /// When the host refuses a non-blocking socket.
    pub(super) fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        let (input, output) = (Framer::default(), Vec::new());
        let mut client = Self { stream, input, output, ready: false, ended: false, stalled: false };
        client.send(&greeting());
        Ok(client)
    }

    /// Takes what the client sent, unless it is behind with reading.
    pub(super) fn read(&mut self) -> Result<(), Gone> {
        let mut chunk = [0; INPUT_CHUNK];
        loop {
            if !self.wants_input() {
                return Ok(());
            }
            return match self.stream.read(&mut chunk) {
                Ok(0) => {
                    self.ended = true;
                    Ok(())
                }
                Ok(count) => {
                    self.input.push(&chunk[..count]);
                    Ok(())
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(()),
                Err(_) => Err(Gone),
            };
        }
    }

    /// The next command to execute. What can be answered here was answered. `None`: nothing more for now.
    pub(super) fn next_request(&mut self) -> Result<Option<Request>, Gone> {
        loop {
            self.stalled = self.output.len() >= OUTPUT_ENOUGH;
            if self.stalled {
                return Ok(None);
            }
            let request = match self.input.next() {
                None => return Ok(None),
                Some(Frame::TooLong) => return Err(Gone),
                Some(Frame::Garbage) => Err((None, Failure::generic("JSON parse error, expecting an object"))),
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
            Some(_) => return Err(Failure::generic("Parameter 'enable' names a capability that is not offered")),
        }
        if let Some(unknown) = request.arguments.keys().find(|key| *key != "enable") {
            return Err(Failure::generic(format!("Parameter '{unknown}' is unexpected")));
        }
        self.ready = true;
        Ok(json!({}))
    }

    /// Answers a request.
    pub(super) fn reply(&mut self, id: Option<Value>, result: Result<Value, Failure>) {
        self.send(&answer(id, result));
    }

    /// Tells the client of an event, if it wants to know.
    pub(super) fn notify(&mut self, event: &Value) {
        if self.ready {
            self.send(event);
        }
    }

    fn send(&mut self, message: &Value) {
        self.output.extend_from_slice(message.to_string().as_bytes());
        self.output.extend_from_slice(b"\r\n");
    }

    /// Sends what the client takes.
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
        if self.output.len() > OUTPUT_MAX { Err(Gone) } else { Ok(()) }
    }

    /// The client sent all it wanted, and has all the answers.
    pub(super) fn is_done(&self) -> bool {
        self.ended && !self.wants_output()
    }

    /// The client may be read from: it is not behind with reading.
    pub(super) fn wants_input(&self) -> bool {
        !self.ended && self.output.len() < OUTPUT_ENOUGH
    }

    /// There is something to be written to the client, or to be done once it has read.
    pub(super) fn wants_output(&self) -> bool {
        !self.output.is_empty() || self.stalled
    }
}

impl AsRawFd for Client {
    fn as_raw_fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }
}
