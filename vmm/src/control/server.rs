//! The control socket on the main loop: connections come and go, each is served in turn.

use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

use event_manager::{EventOps, EventSet, Events};
use serde_json::{Map, Value};

use super::client::{Client, Gone};
use super::protocol::Failure;
use crate::listener::Listener;

/// Connections at a time. More wait in the socket's backlog.
const CLIENTS_MAX: usize = 8;

/// Who carries out what clients ask for.
pub(crate) trait Handler {
    /// Executes a command.
    ///
    /// # Errors
    /// Goes to the client.
    fn execute(&mut self, command: &str, arguments: &Map<String, Value>) -> Result<Value, Failure>;

    /// The events since the last call, oldest first.
    fn news(&mut self) -> Vec<Value>;
}

/// The listening socket and its clients. Its descriptors' events carry numbers from `base` on.
pub(crate) struct Server {
    listener: Listener,
    base: u32,
    /// A client's place is its number until it leaves.
    clients: [Option<Client>; CLIENTS_MAX],
}

impl Server {
    /// Listens at `path`.
    ///
    /// # Errors
    /// When the path is taken or cannot be made.
    pub(crate) fn bind(path: &Path, base: u32) -> io::Result<Self> {
        Ok(Self { listener: Listener::bind(path)?, base, clients: Default::default() })
    }

    /// Begins to listen.
    ///
    /// # Errors
    /// When the loop does not take the socket.
    pub(crate) fn init(&self, ops: &mut EventOps<'_>) -> event_manager::Result<()> {
        ops.add(Events::with_data_raw(self.listener.as_raw_fd(), self.base, EventSet::IN))
    }

    /// Something happened at the descriptor with this event number.
    pub(crate) fn process(&mut self, number: u32, ops: &mut EventOps<'_>, handler: &mut dyn Handler) {
        match number.checked_sub(self.base + 1) {
            None => self.accept(ops),
            Some(place) => {
                let place = place as usize;
                if let Some(Some(client)) = self.clients.get_mut(place) {
                    let served = client.read().and_then(|()| self.serve(place, handler));
                    if served == Err(Gone) {
                        self.disconnect(place, ops);
                    }
                }
            }
        }
        self.announce(handler.news(), ops);
    }

    /// Tells all clients what happened, and sends what waits for them.
    pub(crate) fn announce(&mut self, news: Vec<Value>, ops: &mut EventOps<'_>) {
        self.notify(&news);
        for place in 0..CLIENTS_MAX {
            let Some(client) = &mut self.clients[place] else { continue };
            match client.write() {
                Ok(()) if !client.is_done() => self.watch(place, ops),
                Ok(()) | Err(Gone) => self.disconnect(place, ops),
            }
        }
    }

    fn notify(&mut self, news: &[Value]) {
        for client in self.clients.iter_mut().flatten() {
            news.iter().for_each(|event| client.notify(event));
        }
    }

    /// Executes what a client asked for, as far as it reads the answers.
    fn serve(&mut self, place: usize, handler: &mut dyn Handler) -> Result<(), Gone> {
        loop {
            let Some(client) = &mut self.clients[place] else { return Ok(()) };
            // Answers that fit into the socket make room for further commands.
            client.write()?;
            let Some(request) = client.next_request()? else { return Ok(()) };
            let result = handler.execute(&request.command, &request.arguments);
            // What the command caused comes before its answer.
            self.notify(&handler.news());
            if let Some(client) = &mut self.clients[place] {
                client.reply(request.id, result);
            }
        }
    }

    fn accept(&mut self, ops: &mut EventOps<'_>) {
        let Some(place) = self.clients.iter().position(Option::is_none) else { return };
        let Some(Ok(client)) = self.listener.accept().map(Client::new) else { return };
        let number = self.base + 1 + place as u32;
        if ops.add(Events::with_data_raw(client.as_raw_fd(), number, EventSet::IN)).is_ok() {
            self.clients[place] = Some(client);
        }
        if self.clients.iter().all(Option::is_some) {
            let _ = ops.remove(Events::empty_raw(self.listener.as_raw_fd()));
        }
    }

    /// Polls a client for what it can use: a descriptor that is ready for something else would keep the loop awake.
    fn watch(&self, place: usize, ops: &EventOps<'_>) {
        let Some(client) = &self.clients[place] else { return };
        let mut events = EventSet::empty();
        events.set(EventSet::IN, client.wants_input());
        events.set(EventSet::OUT, client.wants_output());
        let number = self.base + 1 + place as u32;
        if let Err(error) = ops.modify(Events::with_data_raw(client.as_raw_fd(), number, events)) {
            tracing::warn!(%error, "cannot poll a control client");
        }
    }

    fn disconnect(&mut self, place: usize, ops: &mut EventOps<'_>) {
        let full = self.clients.iter().all(Option::is_some);
        if let Some(client) = self.clients[place].take() {
            // It leaves the loop before it is closed: a reused number would be refused.
            let _ = ops.remove(Events::empty_raw(client.as_raw_fd()));
        }
        if full {
            let _ = self.init(ops);
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // The last events, as far as each client takes them at once.
        for client in self.clients.iter_mut().flatten() {
            let _ = client.write();
        }
    }
}
