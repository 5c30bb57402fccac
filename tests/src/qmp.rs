//! A control client, as small as one can be: one JSON message a line.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::BOUND;

/// A connection to a control socket.
#[derive(Debug)]
pub struct Qmp {
    reader: BufReader<UnixStream>,
    /// What came unasked, oldest first.
    pub events: Vec<Value>,
}

impl Qmp {
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

    /// The socket, for those who send something else.
    pub fn stream(&mut self) -> &mut UnixStream {
        self.reader.get_mut()
    }

    /// The next message; `None` at the end of the connection.
    pub fn receive(&mut self) -> Option<Value> {
        let mut line = String::new();
        match self.reader.read_line(&mut line) {
            Ok(0) => None,
            Ok(_) => Some(serde_json::from_str(&line).unwrap_or_else(|error| panic!("{line}: {error}"))),
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
            let message = self.receive().unwrap_or_else(|| panic!("{command}: the connection ended"));
            if message.get("event").is_some() {
                self.events.push(message);
                continue;
            }
            assert_eq!(message["id"], command, "{message}");
            let error = |key: &str| message["error"][key].as_str().unwrap().to_owned();
            return message.get("return").cloned().ok_or_else(|| (error("class"), error("desc")));
        }
    }

    /// Executes a command without arguments that cannot fail.
    pub fn query(&mut self, command: &str) -> Value {
        self.execute(command, json!({})).unwrap_or_else(|error| panic!("{command}: {error:?}"))
    }

    /// Waits for the event `name`, which may have come already, and gives its data. Forgets those before it.
    pub fn event(&mut self, name: &str) -> Value {
        loop {
            for event in std::mem::take(&mut self.events) {
                if event["event"] == name {
                    return event["data"].clone();
                }
            }
            let message = self.receive().unwrap_or_else(|| panic!("no event {name}: the connection ended"));
            self.events.push(message);
        }
    }
}
