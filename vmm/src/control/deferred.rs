//! `--incoming defer`: the control socket before there is a machine. A client names the file by `migrate-incoming`, and stays connected
//! while the machine is built from it.
//!
//! `cli` calls [`wait`]. It serves all clients at once, so none keeps another from naming the file.

use std::io;
use std::mem;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::{Value, json};

use super::client::{Client, Gone};
use super::commands;
use super::migration;
use super::protocol::{Failure, Request};
use super::server::{CLIENTS_MAX, ControlServer};
use crate::binary_pages;
use crate::chardev;
use crate::config::VmConfig;
use crate::error::Error;
use crate::host_cpu;
use crate::kvm::EmptyVm;
use crate::sandbox::Sandbox;
use crate::signals::Signals;
use crate::snapshot::{EarlyParts, Incoming, IncomingConfig, SavedConfig, remove_unfinished};

/// What ended the wait.
#[derive(Debug)]
pub enum Awaited {
    /// A client named a saved machine, and the file was checked. `config` now has the saved configuration.
    Incoming(Box<Incoming>),
    /// A client sent `quit`.
    Quit,
    /// This signal came.
    Signal(i32),
    /// The time limit of `--timeout` is over.
    Timeout,
}

/// How long the loop sleeps when a connection cannot be accepted. The connection stays in the backlog, so poll(2) would return at
/// once.
const ACCEPT_INTERVAL: Duration = Duration::from_millis(100);

/// The descriptors that poll(2) reported as ready.
struct Ready {
    signal: bool,
    listener: bool,
    /// Indices of clients, in order.
    clients: Vec<usize>,
}

enum Step {
    Continue,
    End(Awaited),
}

/// Serves the control socket of `config` until a client names a saved machine, whose path completes `options`, those of `--incoming
/// defer`.
///
/// # Errors
/// The socket cannot be made, or this host cannot run a VM.
pub fn wait(
    config: &mut VmConfig,
    options: &IncomingConfig,
    signals: &Signals,
) -> Result<Awaited, Error> {
    let path = config.qmp.clone().unwrap_or_default();
    let mut server = listen(&path, config)?;
    // All of the machine that does not depend on the file, so that the client waits less.
    let sandbox = Sandbox::prepare(config)?;
    let empty_vm = EmptyVm::new()?;
    host_cpu::read_early();
    binary_pages::release();
    sandbox.wait();
    let mut clients: Vec<Client> = Vec::new();
    let deadline = config.timeout.and_then(|limit| Instant::now().checked_add(limit));
    loop {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        if left.is_some_and(|left| left.is_zero()) {
            return Ok(Awaited::Timeout);
        }
        let ready = wait_for(signals, &server, &clients, left);
        let ready = ready.map_err(Error::host("wait for a control client"))?;
        if ready.signal
            && let Some(signal) = signals.ending()
        {
            return Ok(Awaited::Signal(signal));
        }
        // In reverse order: removing a client changes the indices after it.
        for index in ready.clients.into_iter().rev() {
            match serve(&mut clients[index], &mut server, config, options) {
                Ok(Step::End(Awaited::Incoming(mut incoming))) => {
                    server.adopt(mem::take(&mut clients));
                    server.migration().set_config(SavedConfig::of(config));
                    let (control, sandbox) = (Some(server), Some(sandbox));
                    incoming.early = EarlyParts { control, empty_vm: Some(empty_vm), sandbox };
                    // The time limit counts from the start of the process.
                    config.timeout = left.or(config.timeout);
                    return Ok(Awaited::Incoming(incoming));
                }
                Ok(Step::End(awaited)) => return Ok(awaited),
                Ok(Step::Continue) if !clients[index].is_done() => {}
                _ => drop(clients.remove(index)),
            }
        }
        if ready.listener {
            match server.accept_first() {
                Some(client) => clients.push(client),
                None => thread::sleep(ACCEPT_INTERVAL),
            }
            let first = clients.len().saturating_sub(CLIENTS_MAX);
            clients.drain(..first);
        }
    }
}

/// Listens at `path` for clients of a machine that `config` describes.
pub(crate) fn listen(path: &Path, config: &VmConfig) -> Result<ControlServer, Error> {
    // Before the process is confined.
    config.save_directory.iter().for_each(|directory| remove_unfinished(directory));
    let migration = migration::Migration::new(SavedConfig::of(config));
    chardev::add("compat_monitor0", format!("unix:{},server=on", path.display()));
    ControlServer::bind(path, migration).map_err(|source| {
        let value = format!("unix:{}", path.display());
        Error::Argument { option: "--qmp", value, source }
    })
}

/// Waits until a descriptor is ready, for at most `left`.
fn wait_for(
    signals: &Signals,
    server: &ControlServer,
    clients: &[Client],
    left: Option<Duration>,
) -> io::Result<Ready> {
    #[expect(unsafe_code, reason = "the owners have no safe borrow of their descriptors")]
    // SAFETY: each descriptor's owner outlives the call that uses it.
    let borrow = |fd: RawFd| unsafe { BorrowedFd::borrow_raw(fd) };
    let polled = |fd, wanted| PollFd::from_borrowed_fd(borrow(fd), wanted);
    let mut fds = vec![
        polled(signals.as_raw_fd(), PollFlags::IN),
        polled(server.listener_fd(), PollFlags::IN),
    ];
    fds.extend(clients.iter().map(|client| {
        let mut wanted = PollFlags::empty();
        wanted.set(PollFlags::IN, client.wants_input());
        wanted.set(PollFlags::OUT, client.wants_output());
        polled(client.as_raw_fd(), wanted)
    }));
    let left = left.and_then(|left| Timespec::try_from(left).ok());
    match poll(&mut fds, left.as_ref()) {
        Ok(_) => {}
        // poll(2) has not set the events then.
        Err(rustix::io::Errno::INTR) => fds.iter_mut().for_each(PollFd::clear_revents),
        Err(error) => return Err(error.into()),
    }
    let ready = |fd: &PollFd<'_>| !fd.revents().is_empty();
    let ready_clients = fds[2..].iter().enumerate().filter(|(_, fd)| ready(fd));
    Ok(Ready {
        signal: ready(&fds[0]),
        listener: ready(&fds[1]),
        clients: ready_clients.map(|(index, _)| index).collect(),
    })
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
            _ => server.migration().execute_without_machine(&command, &arguments),
        };
        client.reply(id, answer);
        if let Step::End(_) = step {
            // The machine's server writes what the client does not take now.
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
