//! A control client, as small as one can be: one JSON message a line.

use std::fs::File;
use std::io::{BufRead, BufReader, IoSlice, Write};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Value, json};

use crate::guest::Program;
use crate::session::Session;
use crate::{BOUND, small_guest};

/// A connection to a control socket.
#[derive(Debug)]
pub struct Qmp {
    reader: BufReader<UnixStream>,
    /// Events that no test has asked for yet, oldest first.
    pub events: Vec<Value>,
}

/// Where [`start`] has a guest listen, in its directory.
pub const SOCKET: &str = "control.sock";

/// A small guest in `directory` that runs `program`, and a client of its control socket.
pub fn start(directory: &Path, program: Program, options: &[&str]) -> (Session, Qmp) {
    let session = Session::start(
        small_guest(directory, program).args(["--qmp", &format!("unix:{SOCKET}")]).args(options),
    );
    let qmp = Qmp::connect(&directory.join(SOCKET));
    (session, qmp)
}

impl Qmp {
    /// How many writes of the first disk have succeeded.
    pub fn writes(&mut self) -> u64 {
        self.query("query-blockstats")[0]["stats"]["wr_operations"].as_u64().expect("a number")
    }

    /// Connects as soon as there is a socket, and negotiates.
    pub fn connect(path: &Path) -> Self {
        let mut qmp = Self::greeted(path);
        qmp.execute("qmp_capabilities", json!({})).unwrap();
        qmp
    }

    /// Connects, and reads no more than the greeting.
    pub fn greeted(path: &Path) -> Self {
        let deadline = Instant::now() + BOUND;
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(error) => assert!(Instant::now() < deadline, "{}: {error}", path.display()),
            }
            thread::sleep(Duration::from_millis(5));
        };
        stream.set_read_timeout(Some(BOUND)).unwrap();
        let mut qmp = Self { reader: BufReader::new(stream), events: Vec::new() };
        let greeting = qmp.receive().expect("a greeting");
        assert!(greeting["QMP"]["version"]["qemu"]["major"].is_u64(), "{greeting}");
        qmp
    }

    /// Waits up to `bound` for each message from here on: an event may need a slow guest to do something first.
    pub fn set_bound(&mut self, bound: Duration) {
        self.stream().set_read_timeout(Some(bound)).unwrap();
    }

    /// The socket, for those who send something else.
    pub fn stream(&mut self) -> &mut UnixStream {
        self.reader.get_mut()
    }

    /// The next message; `None` at the end of the connection.
    pub fn receive(&mut self) -> Option<Value> {
        let mut line = String::new();
        match self.reader.read_line(&mut line) {
            Ok(0) => None,
            Ok(_) => {
                Some(serde_json::from_str(&line).unwrap_or_else(|error| panic!("{line}: {error}")))
            }
            // A client that was sent away with bytes unread.
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => None,
            Err(error) => panic!("the control socket: {error}"),
        }
    }

    /// Executes a command. An error is its class and description.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, (String, String)> {
        let request = json!({ "execute": command, "arguments": arguments, "id": command });
        self.stream().write_all(request.to_string().as_bytes()).unwrap();
        loop {
            let message =
                self.receive().unwrap_or_else(|| panic!("{command}: the connection ended"));
            if message.get("event").is_some() {
                self.events.push(message);
                continue;
            }
            assert_eq!(message["id"], command, "{message}");
            let error = |key: &str| message["error"][key].as_str().unwrap().to_owned();
            return message.get("return").cloned().ok_or_else(|| (error("class"), error("desc")));
        }
    }

    /// Hands `file` over under the name `name` (`getfd`).
    pub fn hand_over(&mut self, name: &str, file: &File) {
        let request = json!({ "execute": "getfd", "arguments": { "fdname": name } }).to_string();
        let files = [file.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&files)));
        let text = [IoSlice::new(request.as_bytes())];
        let sent = sendmsg(self.stream(), &text, &mut control, SendFlags::NOSIGNAL).unwrap();
        assert_eq!(sent, request.len());
        while self.receive().expect("an answer").get("return").is_none() {}
    }

    /// Executes a command without arguments that cannot fail.
    pub fn query(&mut self, command: &str) -> Value {
        self.execute(command, json!({})).unwrap_or_else(|error| panic!("{command}: {error:?}"))
    }

    /// Asks for the events of saves (MIGRATION).
    pub fn enable_migration_events(&mut self) {
        let events = json!({ "capabilities": [{ "capability": "events", "state": true }] });
        self.execute("migrate-set-capabilities", events).unwrap();
    }

    /// Waits for the event `name`, which may have come already, and gives its data. Forgets those before it.
    pub fn event(&mut self, name: &str) -> Value {
        loop {
            for event in std::mem::take(&mut self.events) {
                if event["event"] == name {
                    return event["data"].clone();
                }
            }
            let message =
                self.receive().unwrap_or_else(|| panic!("no event {name}: the connection ended"));
            self.events.push(message);
        }
    }
}
