//! `--incoming defer`: the control socket before there is a machine. A client names the file by `migrate-incoming`, and stays
//! connected while the machine is built from it.
//!
//! `cli` calls [`wait`]. One client at a time is served here; others wait in the socket's backlog for the machine.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::path::Path;

use rustix::event::{PollFd, PollFlags, poll};
use serde_json::{Value, json};

use super::client::{Client, Gone};
use super::commands;
use super::migration;
use super::protocol::{Failure, Request};
use super::server::ControlServer;
use crate::chardev;
use crate::config::VmConfig;
use crate::error::Error;
use crate::signals::Signals;
use crate::snapshot::{Incoming, IncomingConfig, SavedConfig};

/// What ended the wait.
#[derive(Debug)]
pub enum Awaited {
    /// A client named a file that is sound; `config` is as the saved machine was.
    Incoming(Box<Incoming>),
    /// A client sent `quit`.
    Quit,
    /// This signal came.
    Signal(i32),
}

enum Step {
    Continue,
    End(Awaited),
}

/// Serves the control socket of `config` until a client names a saved machine, which is started as `options` say: their path
/// is not used.
///
/// # Errors
/// The socket cannot be made.
pub fn wait(
    config: &mut VmConfig,
    options: &IncomingConfig,
    signals: &Signals,
) -> Result<Awaited, Error> {
    let path = config.qmp.clone().unwrap_or_default();
    let mut server = listen(&path, config)?;
    let mut client = None;
    loop {
        let ready = wait_for(signals, &server, client.as_ref());
        match ready.map_err(Error::host("wait for a control client"))? {
            [true, ..] => {
                if let Some(signal) = signals.read() {
                    return Ok(Awaited::Signal(signal));
                }
            }
            [_, true, _] => client = server.accept_first(),
            [.., true] => {
                let served =
                    client.as_mut().map(|client| serve(client, &mut server, config, options));
                match served {
                    Some(Ok(Step::End(Awaited::Incoming(mut incoming)))) => {
                        server.adopt(client.take());
                        server.migration().set_config(SavedConfig::of(config));
                        incoming.control = Some(server);
                        return Ok(Awaited::Incoming(incoming));
                    }
                    Some(Ok(Step::End(awaited))) => return Ok(awaited),
                    Some(Ok(Step::Continue)) if !client.as_ref().is_some_and(Client::is_done) => {}
                    _ => client = None,
                }
            }
            _ => {}
        }
    }
}

/// Listens for clients of a machine of that configuration.
pub(crate) fn listen(path: &Path, config: &VmConfig) -> Result<ControlServer, Error> {
    let migration = migration::Migration::new(SavedConfig::of(config));
    chardev::add("compat_monitor0", format!("unix:{},server=on", path.display()));
    ControlServer::bind(path, migration).map_err(|source| {
        let value = format!("unix:{}", path.display());
        Error::Argument { option: "--qmp", value, source }
    })
}

/// Whether a signal came, a client is there to accept, and the client sent or reads something.
fn wait_for(
    signals: &Signals,
    server: &ControlServer,
    client: Option<&Client>,
) -> io::Result<[bool; 3]> {
    #[expect(unsafe_code, reason = "the owners have no safe borrow of their descriptors")]
    // SAFETY: each descriptor's owner outlives the call that uses it.
    let borrow = |fd: RawFd| unsafe { BorrowedFd::borrow_raw(fd) };
    let (signals, listener) = (borrow(signals.as_raw_fd()), borrow(server.listener_fd()));
    let mut wanted = PollFlags::empty();
    wanted.set(PollFlags::IN, client.is_some_and(Client::wants_input));
    wanted.set(PollFlags::OUT, client.is_some_and(Client::wants_output));
    let accept = if client.is_none() { PollFlags::IN } else { PollFlags::empty() };
    let peer = client.map_or(listener, |client| borrow(client.as_raw_fd()));
    let mut fds = [
        PollFd::new(&signals, PollFlags::IN),
        PollFd::new(&listener, accept),
        PollFd::new(&peer, wanted),
    ];
    match poll(&mut fds, None) {
        Ok(_) | Err(rustix::io::Errno::INTR) => {}
        Err(error) => return Err(error.into()),
    }
    let [signal, listener, peer] = fds.map(|fd| !fd.revents().is_empty());
    Ok([signal, listener && client.is_none(), peer && client.is_some()])
}

fn serve(
    client: &mut Client,
    server: &mut ControlServer,
    config: &mut VmConfig,
    options: &IncomingConfig,
) -> Result<Step, Gone> {
    client.read()?;
    while let Some(Request { command, arguments, id }) = client.next_request()? {
        let mut step = Step::Continue;
        let answer = match command.as_str() {
            "query-status" => Ok(json!({ "running": false, "status": "inmigrate" })),
            "query-commands" => Ok(commands::names()),
            "query-version" => Ok(super::protocol::version()),
            "quit" => {
                step = Step::End(Awaited::Quit);
                Ok(json!({}))
            }
            "migrate-incoming" => open(&arguments, config, options).map(|incoming| {
                step = Step::End(Awaited::Incoming(Box::new(incoming)));
                json!({})
            }),
            _ => server.migration().prepare(&command, &arguments),
        };
        client.reply(id, answer);
        if let Step::End(_) = step {
            // What is not written here is written by the machine's server.
            client.write()?;
            return Ok(step);
        }
    }
    client.write().map(|()| Step::Continue)
}

fn open(
    arguments: &serde_json::Map<String, Value>,
    config: &mut VmConfig,
    options: &IncomingConfig,
) -> Result<Incoming, Failure> {
    let options = IncomingConfig { path: migration::source(arguments)?, ..options.clone() };
    let mut changed = config.clone();
    let incoming = Incoming::open(options, &mut changed).map_err(|error| Failure::of(&error))?;
    *config = changed;
    Ok(incoming)
}
