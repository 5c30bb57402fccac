//! Host bytes for the UART: read only as many as it has room for, so that pasted text of any length arrives whole.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, RawFd};

use super::escape::Escape;

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
}

impl Input {
    /// Input from `source`; with `escapes`, `Ctrl-A` is ours.
    pub(crate) fn new(source: Option<File>, escapes: bool) -> Self {
        Self { source, escape: escapes.then(Escape::default) }
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

    /// Reads at most `room` bytes and gives what they mean to `each`. To be called when the source is readable.
    /// Returns false when the source has ended.
    pub(crate) fn read(&mut self, room: usize, mut each: impl FnMut(Typed)) -> bool {
        let Some(source) = &mut self.source else { return false };
        let mut buffer = [0; 64];
        let room = room.min(buffer.len());
        let count = match source.read(&mut buffer[..room]) {
            Ok(0) => return false,
            Ok(count) => count,
            Err(error) if matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {
                return true;
            }
            Err(_) => return false,
        };
        for &byte in &buffer[..count] {
            match &mut self.escape {
                None => each(Typed::Byte(byte)),
                Some(escape) => escape.typed(byte).into_iter().for_each(&mut each),
            }
        }
        true
    }
}
