//! Moves the console's input from the host to the UART, as a source of the main loop.
//!
//! A capability, with `input`, `escape` and `ends`: the guest prints without it. `ports` adds it to the main loop's sources.
//!
//! The UART's receive FIFO holds 64 bytes. While it is full, the host is polled only for the end of the input. The UART writes to an eventfd
//! when the guest has made room. The states of polling:
//!
//! | state | event | next state |
//! |---|---|---|
//! | `Absent` | a client connects | `Polled`, or `AlwaysReady` if epoll refuses the file |
//! | `Polled` | the FIFO is full | `Full` |
//! | `Full` | the guest makes room | `Polled` |
//! | `Polled`, `AlwaysReady` | the input ends | `Absent`, and the next client may connect |
//! | `Polled` | a terminal's input is for another process | `InBackground` |
//! | `InBackground` | a key can be read | `Polled` |
//! | `Full` | the client hangs up | `Full`: its input is kept, and the next client may connect |
//!
//! A terminal that hangs up ends the VM as SIGHUP does.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex};

use devices::legacy::SerialDevice;
use event_manager::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::ends::ConsoleEnds;
use super::escape::{HELP, Typed};
use super::input::ReadEnd;
use crate::lock;
use crate::machine::{Machine, Outcome};
use crate::sources::{Poller, Source};

// The descriptors' numbers in the main loop.
const INPUT: u8 = 0;
const INPUT_DRAINED: u8 = 1;
const CLIENTS: u8 = 2;

/// How the VM ends when the terminal hangs up: as by SIGHUP. The kernel sends that signal only to the session's leader, and if that is
/// make(1), it does not pass the signal on.
const HUNG_UP: Outcome = Outcome::Signal(libc::SIGHUP);

#[derive(Clone, Copy, PartialEq, Eq)]
enum Polling {
    Absent,
    Polled,
    Full,
    /// A terminal, of which minivmm is in the background.
    InBackground,
    /// A regular file: epoll refuses it (EPERM), and it is always readable.
    AlwaysReady,
}

/// The console and the UART that it belongs to.
pub(crate) struct SerialConsole {
    ends: ConsoleEnds,
    serial: Arc<Mutex<SerialDevice>>,
    input_drained: EventFd,
    polling: Polling,
    /// Called for each key by which the user ends the VM.
    outcomes: Vec<Outcome>,
}

impl SerialConsole {
    /// Connects the host's `ends` to the UART, which writes to `input_drained` when it takes input again.
    pub(crate) fn new(
        ends: ConsoleEnds,
        serial: Arc<Mutex<SerialDevice>>,
        input_drained: EventFd,
    ) -> Self {
        Self { ends, serial, input_drained, polling: Polling::Absent, outcomes: Vec::new() }
    }

    /// Moves input to the guest until the UART is full or the host has no more for now.
    fn move_input(&mut self, poller: &mut Poller<'_, '_>) {
        loop {
            let room = self.fill_uart();
            let wanted = self.ends.input.wanted(room);
            if wanted == 0 {
                return self.poll_for_end_only(poller);
            }
            let mut help = false;
            let read = self.ends.input.read(wanted, |typed| match typed {
                Typed::Byte(_) => {}
                Typed::Help => help = true,
                Typed::Quit => self.outcomes.push(Outcome::Quit),
                Typed::HungUp => self.outcomes.push(HUNG_UP),
            });
            self.fill_uart();
            if help {
                let _ = self.ends.output.writer().write_all(HELP.as_bytes());
            }
            match read {
                ReadEnd::Ended => {
                    self.close_input(poller);
                    self.listen(poller);
                }
                ReadEnd::NotOurs => self.poll_for_edges(poller),
                ReadEnd::Open => self.poll_again(poller),
            }
            // A polled source becomes ready again when there is more.
            if !self.outcomes.is_empty() || self.polling != Polling::AlwaysReady {
                return;
            }
        }
    }

    /// Passes input to the UART, as much as it has room for. Returns the remaining room. If it is 0, the UART later writes to
    /// `input_drained`.
    fn fill_uart(&mut self) -> usize {
        let mut serial = lock(&self.serial);
        let room = serial.input_room();
        serial.enqueue(&self.ends.input.take(room));
        serial.input_room()
    }

    fn poll_for_end_only(&mut self, poller: &mut Poller<'_, '_>) {
        if self.polling == Polling::Polled
            && let Some(fd) = self.ends.input.fd()
        {
            let _ = poller.modify(fd, INPUT, EventSet::empty());
            self.polling = Polling::Full;
        }
    }

    /// Polls for edges. Input that another process has yet to read must not wake the loop again and again.
    fn poll_for_edges(&mut self, poller: &mut Poller<'_, '_>) {
        if self.polling == Polling::Polled
            && let Some(fd) = self.ends.input.fd()
        {
            let _ = poller.modify(fd, INPUT, EventSet::IN | EventSet::EDGE_TRIGGERED);
            self.polling = Polling::InBackground;
        }
    }

    fn poll_again(&mut self, poller: &mut Poller<'_, '_>) {
        if self.polling == Polling::InBackground
            && let Some(fd) = self.ends.input.fd()
        {
            let _ = poller.modify(fd, INPUT, EventSet::IN);
            self.polling = Polling::Polled;
        }
    }

    fn listen(&self, poller: &mut Poller<'_, '_>) {
        if let Some(clients) = &self.ends.clients {
            self.ends.output.disconnect();
            let _ = poller.add_edges(&**clients, CLIENTS);
        }
    }

    fn open_input(&mut self, poller: &mut Poller<'_, '_>) {
        let Some(fd) = self.ends.input.fd() else { return };
        // It may still be polled for its end.
        let polled =
            poller.add(fd, INPUT).or_else(|_| poller.modify(fd, INPUT, EventSet::IN)).is_ok();
        self.polling = if polled { Polling::Polled } else { Polling::AlwaysReady };
        if !polled {
            self.move_input(poller);
        }
    }

    fn close_input(&mut self, poller: &mut Poller<'_, '_>) {
        if let Some(fd) = self.ends.input.fd() {
            poller.stop_polling(fd);
        }
        self.polling = Polling::Absent;
        self.ends.input.source = None;
    }

    /// Accepts a client. Further clients wait in the socket's backlog.
    fn accept(&mut self, poller: &mut Poller<'_, '_>) {
        let Some(clients) = &self.ends.clients else { return };
        let Some(client) = clients.accept() else { return };
        let Ok(output) = client.try_clone() else { return };
        poller.stop_polling(clients.as_raw_fd());
        // The last client's input, which the guest did not take.
        self.close_input(poller);
        self.ends.output.connect(output);
        self.ends.input.source = Some(File::from(client));
        self.open_input(poller)
    }
}

impl Source for SerialConsole {
    fn watch(&mut self, poller: &mut Poller<'_, '_>) -> event_manager::Result<()> {
        poller.add(self.input_drained.as_raw_fd(), INPUT_DRAINED)?;
        if let Some(clients) = &self.ends.clients {
            poller.add_edges(&**clients, CLIENTS)?;
        }
        self.open_input(poller);
        Ok(())
    }

    fn process(&mut self, number: u8, poller: &mut Poller<'_, '_>, machine: &mut Machine) {
        match (number, self.polling) {
            (INPUT, Polling::Full) => {
                if let Some(fd) = self.ends.input.fd() {
                    poller.stop_polling(fd);
                }
                self.listen(poller);
                if self.ends.input.ends_by_hang_up {
                    self.outcomes.push(HUNG_UP);
                }
            }
            (INPUT, _) => self.move_input(poller),
            (INPUT_DRAINED, polling) => {
                let _ = self.input_drained.read();
                self.fill_uart();
                match polling {
                    Polling::Full => self.open_input(poller),
                    Polling::AlwaysReady => self.move_input(poller),
                    Polling::Absent | Polling::Polled | Polling::InBackground => {}
                }
            }
            _ => self.accept(poller),
        }
        self.outcomes.drain(..).for_each(|outcome| machine.end_by_user(outcome));
    }

    fn finish(self: Box<Self>) {
        self.ends.output.finish();
    }
}
