//! Host bytes for the UART: read only as many as it has room for, so that pasted text of any length arrives whole. A terminal's
//! user may be ahead of the guest: `Ctrl-A x` has to be heard also when the guest reads nothing.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, RawFd};

use super::escape::Escape;

/// Bytes that a terminal's user may have typed ahead.
const AHEAD: usize = 4096;

/// What the user typed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Typed {
    /// A byte for the guest.
    Byte(u8),
    /// `Ctrl-A h`.
    Help,
    /// `Ctrl-A x`.
    Quit,
}

/// The console's input.
#[derive(Debug)]
pub(crate) struct Input {
    source: Option<File>,
    escape: Option<Escape>,
    /// What the guest has yet to take.
    waiting: VecDeque<u8>,
}

impl Input {
    /// Input from `source`; with `escapes`, `Ctrl-A` is ours.
    pub(crate) fn new(source: Option<File>, escapes: bool) -> Self {
        Self { source, escape: escapes.then(Escape::default), waiting: VecDeque::new() }
    }

    /// A new client of the console takes the place of the last one.
    pub(crate) fn connect(&mut self, source: File) {
        self.source = Some(source);
    }

    /// The input has ended: there is nothing to poll until the next `connect`.
    pub(crate) fn disconnect(&mut self) {
        self.source = None;
    }

    /// What to poll, if there is anything.
    pub(crate) fn fd(&self) -> Option<RawFd> {
        self.source.as_ref().map(AsRawFd::as_raw_fd)
    }

    /// How many bytes to read while the UART has room for `room` that wait for it.
    pub(crate) fn appetite(&self, room: usize) -> usize {
        let limit = if self.escape.is_some() { AHEAD } else { room };
        limit.saturating_sub(self.waiting.len())
    }

    /// The next bytes for the guest, at most `room`.
    pub(crate) fn take(&mut self, room: usize) -> Vec<u8> {
        self.waiting.drain(..room.min(self.waiting.len())).collect()
    }

    /// Reads at most `count` bytes, for `take`, and gives what is meant for us to `each`. To be called when the source is
    /// readable. Returns false when the source has ended.
    pub(crate) fn read(&mut self, count: usize, mut each: impl FnMut(Typed)) -> bool {
        let Some(source) = &mut self.source else { return false };
        let mut buffer = [0; 64];
        let count = count.min(buffer.len());
        let count = match source.read(&mut buffer[..count]) {
            Ok(0) => return false,
            Ok(count) => count,
            Err(error) if matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {
                return true;
            }
            Err(_) => return false,
        };
        for &byte in &buffer[..count] {
            let typed = match &mut self.escape {
                None => Some(Typed::Byte(byte)),
                Some(escape) => escape.typed(byte),
            };
            match typed {
                Some(Typed::Byte(byte)) => self.waiting.push_back(byte),
                Some(ours) => each(ours),
                None => {}
            }
        }
        true
    }
}
