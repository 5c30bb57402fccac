//! The control socket as a source of the main loop. It accepts connections and serves each in turn.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::path::Path;
use std::sync::Arc;

use devices::spawn::Spawn;
use event_manager::EventSet;
use serde_json::Value;

use super::client::{Client, Gone};
use super::event_limit::EventLimit;
use super::migration::Migration;
use crate::config::{SandboxMode, VmConfig};
use crate::error::Error;
use crate::events::EventSender;
use crate::listener::Listener;
use crate::machine::{Machine, MachineEvent};
use crate::snapshot::SaveThread;
use crate::sources::{Poller, Source};

/// Connections at a time. One more takes the place of the client that has been silent longest.
pub(super) const CLIENTS_MAX: usize = 16;

// The source's numbers for its descriptors. A client's number is its index in `clients`.
const LISTENER: u8 = u8::MAX;
const EVENT_LIMIT: u8 = u8::MAX - 1;

/// The listening socket and its clients. A client's index is also its number in the main loop's epoll set, and stays the same until
/// the client is disconnected.
pub(crate) struct ControlServer {
    listener: Listener,
    clients: [Option<Client>; CLIENTS_MAX],
    event_limit: EventLimit,
    migration: Migration,
    /// Counts activities of clients, to find the one that has been silent longest.
    activity: u64,
}

impl ControlServer {
    /// Listens at `path`; `migration` saves the machine when a client asks for it.
    ///
    /// # Errors
    /// When the path is taken or cannot be made.
    pub(crate) fn bind(path: &Path, migration: Migration) -> io::Result<Self> {
        Ok(Self {
            listener: Listener::bind(path)?,
            clients: Default::default(),
            event_limit: EventLimit::new()?,
            migration,
            activity: 0,
        })
    }

    /// Accepts a client before there is a machine.
    pub(super) fn accept_first(&self) -> Option<Client> {
        self.listener.accept().map(Client::new)
    }

    /// Takes over clients that connected before there was a machine.
    pub(super) fn adopt(&mut self, clients: Vec<Client>) {
        self.clients.iter_mut().zip(clients).for_each(|(place, client)| *place = Some(client));
    }

    pub(super) fn listener_fd(&self) -> RawFd {
        self.listener.as_raw_fd()
    }

    pub(super) fn migration(&mut self) -> &mut Migration {
        &mut self.migration
    }

    /// Makes this a source of the main loop. If `config` allows child processes, `spawn` starts the thread of background saves.
    ///
    /// # Errors
    /// When the host has no thread left.
    pub(crate) fn into_source(
        mut self,
        config: &VmConfig,
        spawn: &Spawn,
        main_loop: &Arc<EventSender>,
    ) -> Result<Box<dyn Source>, Error> {
        if config.spawn || config.sandbox == SandboxMode::Off {
            self.migration.save_thread = Some(SaveThread::start(spawn, Arc::clone(main_loop))?);
        }
        Ok(Box::new(self))
    }

    fn accept(&mut self, poller: &mut Poller<'_, '_>) {
        while let Some(mut client) = self.listener.accept().map(Client::new) {
            let Some(place) = self.place_for_client() else { continue };
            self.disconnect(place, poller);
            self.activity += 1;
            client.last_active = self.activity;
            if poller.add(client.as_raw_fd(), place as u8).is_ok() {
                self.clients[place] = Some(client);
            }
        }
    }

    /// A free index, or that of the client that has been silent longest. `None`: every client waits for an answer.
    fn place_for_client(&self) -> Option<usize> {
        let silent = |place: &usize| self.clients[*place].as_ref().is_none_or(Client::is_idle);
        let last_active = |place: &usize| self.clients[*place].as_ref().map(|c| c.last_active);
        (0..CLIENTS_MAX).filter(silent).min_by_key(last_active)
    }

    /// Polls a client only for the directions that the server can use now. Readiness for another one would wake the loop without end.
    fn poll_client(&self, place: usize, poller: &mut Poller<'_, '_>) {
        let Some(client) = &self.clients[place] else { return };
        let mut events = EventSet::empty();
        events.set(EventSet::IN, client.wants_input());
        events.set(EventSet::OUT, client.wants_output());
        if let Err(error) = poller.poll_for(client.as_raw_fd(), place as u8, events) {
            tracing::warn!("--qmp: a client cannot be served: {error}");
        }
    }

    fn disconnect(&mut self, place: usize, poller: &mut Poller<'_, '_>) {
        if let Some(client) = self.clients[place].take() {
            poller.stop_polling(client.as_raw_fd());
        }
    }

    fn notify_of_migration(&mut self) {
        self.migration.take_messages().iter().for_each(|message| self.notify(message));
    }

    fn notify(&mut self, message: &Value) {
        self.clients.iter_mut().flatten().for_each(|client| client.notify(message));
    }
}

impl Source for ControlServer {
    fn watch(&mut self, poller: &mut Poller<'_, '_>) -> event_manager::Result<()> {
        poller.add_edges(&self.listener, LISTENER)?;
        poller.add_edges(&self.event_limit.timer, EVENT_LIMIT)
    }

    fn process(&mut self, number: u8, poller: &mut Poller<'_, '_>, _: &mut Machine) {
        match self.clients.get_mut(usize::from(number)) {
            None if number == EVENT_LIMIT => {
                self.event_limit.expire().iter().for_each(|message| self.notify(message));
            }
            None => self.accept(poller),
            Some(None) => {}
            Some(Some(client)) => {
                self.activity += 1;
                client.last_active = self.activity;
                if client.read() == Err(Gone) {
                    self.disconnect(number.into(), poller);
                }
            }
        }
    }

    /// Sends the events first. Then, for each client, answers its command if the events report that as done, and executes at most one
    /// more command.
    fn on_events(
        &mut self,
        events: &[MachineEvent],
        poller: &mut Poller<'_, '_>,
        machine: &mut Machine,
    ) -> bool {
        self.notify_of_migration();
        for event in events {
            // Messages that were held back are sent before the last event.
            if matches!(event, MachineEvent::Shutdown(_)) {
                self.event_limit.expire().iter().for_each(|message| self.notify(message));
            }
            if let Some(message) = self.event_limit.admit(event) {
                self.notify(&message);
            }
        }
        self.migration.advance(events);
        self.notify_of_migration();
        let mut executed = false;
        for place in 0..CLIENTS_MAX {
            let Some(client) = &mut self.clients[place] else { continue };
            client.answer(events);
            match client.write().and_then(|()| client.execute_next(machine, &mut self.migration)) {
                Ok(true) => executed = true,
                Ok(false) if client.write().is_ok() && !client.is_done() => {
                    self.poll_client(place, poller)
                }
                Ok(false) | Err(Gone) => self.disconnect(place, poller),
            }
        }
        executed
    }

    /// Sends the last events, as far as each client takes them at once.
    fn finish(mut self: Box<Self>) {
        for client in self.clients.iter_mut().flatten() {
            let _ = client.write();
        }
        self.migration.end();
    }
}
