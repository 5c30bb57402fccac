//! A connection to a VM's control socket: QMP, one command at a time.

use std::fs::File;
use std::io::{self, BufRead, BufReader, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Value, json};

use super::error::CtlError;

/// How long to wait for the greeting. A VM sends it at once, unless it has as many clients as it serves.
const GREETING_TIMEOUT: Duration = Duration::from_secs(10);
/// Most bytes of a message. Every answer of a VM is shorter.
const MESSAGE_MAX: u64 = 64 << 20;

pub(super) struct Client(BufReader<UnixStream>);

impl Client {
    pub(super) fn connect(path: &Path) -> Result<Self, CtlError> {
        let socket = UnixStream::connect(path).map_err(|error| match error.kind() {
            io::ErrorKind::ConnectionRefused => CtlError::NoListener(error),
            _ => CtlError::Connect(error),
        })?;
        socket.set_read_timeout(Some(GREETING_TIMEOUT))?;
        let mut client = Self(BufReader::new(socket));
        let greeting = match client.receive() {
            Err(CtlError::Connection(error)) if error.kind() == io::ErrorKind::WouldBlock => {
                return Err(CtlError::NoGreeting(GREETING_TIMEOUT));
            }
            other => other?,
        };
        if greeting.is_none_or(|greeting| greeting.get("QMP").is_none()) {
            return Err(CtlError::NotQmp);
        }
        // A command may take as long as the host takes.
        client.0.get_ref().set_read_timeout(None)?;
        client.execute("qmp_capabilities", json!({}))?;
        Ok(client)
    }

    /// The next message; `None` when the VM has ended.
    pub(super) fn receive(&mut self) -> Result<Option<Value>, CtlError> {
        let mut line = Vec::new();
        if (&mut self.0).take(MESSAGE_MAX).read_until(b'\n', &mut line)? == 0 {
            return Ok(None);
        }
        serde_json::from_slice(&line).map(Some).map_err(|_| CtlError::NotQmp)
    }

    /// Executes a command and returns its answer. Events that come before it are dropped.
    pub(super) fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, CtlError> {
        let request = json!({ "execute": command, "arguments": arguments });
        self.0.get_mut().write_all(request.to_string().as_bytes())?;
        self.answer()
    }

    /// Passes a file to the VM, where its name is `fd:ctl`.
    pub(super) fn hand_over(&mut self, file: &File) -> Result<(), CtlError> {
        let request = json!({ "execute": "getfd", "arguments": { "fdname": "ctl" } }).to_string();
        let files = [file.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        // There is space for one.
        control.push(SendAncillaryMessage::ScmRights(&files));
        let text = [IoSlice::new(request.as_bytes())];
        let sent = sendmsg(self.0.get_ref(), &text, &mut control, SendFlags::NOSIGNAL)
            .map_err(io::Error::from)?;
        self.0.get_mut().write_all(&request.as_bytes()[sent..])?;
        self.answer().map(drop)
    }

    fn answer(&mut self) -> Result<Value, CtlError> {
        loop {
            let mut answer = self.receive()?.ok_or(CtlError::Ended)?;
            if answer.get("event").is_some() {
                continue;
            }
            if let Some(error) = answer.get("error") {
                let reason = error["desc"].as_str().unwrap_or("the VM refused the command");
                return Err(CtlError::Refused(reason.to_owned()));
            }
            return Ok(answer["return"].take());
        }
    }
}
