//! Bytes from the host for the UART. No more are read than it has room for, so that pasted text of any length arrives whole. From a
//! terminal up to 4096 bytes are read ahead, because `Ctrl-A x` must work even if the guest reads nothing.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, RawFd};

use super::escape::{Escape, Typed};
use crate::signals::is_ignored;

/// Bytes that are read ahead from a terminal.
const READ_AHEAD: usize = 4096;

/// The result of [`Input::read`].
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum ReadEnd {
    /// There may be more, now or later.
    Open,
    /// The source has ended.
    Ended,
    /// minivmm is in the background of the terminal, so the input is for another process.
    NotOurs,
}

#[derive(Debug)]
pub(crate) struct Input {
    /// `None` before a client comes, and when the input has ended. What was read ahead is kept.
    pub(super) source: Option<File>,
    escape: Option<Escape>,
    /// A hang-up of the terminal ends the VM. False if the parent process has set SIGHUP to be ignored, as nohup(1) does.
    pub(super) ends_by_hang_up: bool,
    /// Read from the host, but not yet given to the UART.
    waiting: VecDeque<u8>,
}

impl Input {
    /// Input from `source`; with `escapes`, `Ctrl-A` is the escape key.
    pub(crate) fn new(source: Option<File>, escapes: bool) -> Self {
        Self {
            source,
            escape: escapes.then(Escape::default),
            ends_by_hang_up: escapes && !is_ignored(libc::SIGHUP),
            waiting: VecDeque::new(),
        }
    }

    pub(crate) fn fd(&self) -> Option<RawFd> {
        self.source.as_ref().map(AsRawFd::as_raw_fd)
    }

    /// How many bytes to read from the host while the UART has room for `room`.
    pub(crate) fn wanted(&self, room: usize) -> usize {
        let limit = if self.escape.is_some() { READ_AHEAD } else { room };
        limit.saturating_sub(self.waiting.len())
    }

    /// The next bytes for the guest, at most `room`.
    pub(crate) fn take(&mut self, room: usize) -> Vec<u8> {
        self.waiting.drain(..room.min(self.waiting.len())).collect()
    }

    /// Reads at most `count` bytes for `take`, and passes commands of the escape key to `command`. Called when the source is readable.
    pub(super) fn read(&mut self, count: usize, mut command: impl FnMut(Typed)) -> ReadEnd {
        let Some(source) = &mut self.source else { return ReadEnd::Ended };
        let mut buffer = [0; 64];
        let count = count.min(buffer.len());
        let count = match source.read(&mut buffer[..count]) {
            Ok(0) => {
                // A raw terminal's input ends only when it hangs up.
                if self.ends_by_hang_up {
                    command(Typed::HungUp);
                }
                return ReadEnd::Ended;
            }
            Ok(count) => count,
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock
                ) =>
            {
                return ReadEnd::Open;
            }
            // The kernel answers so where SIGTTIN is ignored.
            Err(error) if self.escape.is_some() && error.raw_os_error() == Some(libc::EIO) => {
                return ReadEnd::NotOurs;
            }
            Err(_) => return ReadEnd::Ended,
        };
        for &byte in &buffer[..count] {
            let typed = match &mut self.escape {
                None => Some(Typed::Byte(byte)),
                Some(escape) => escape.typed(byte),
            };
            match typed {
                Some(Typed::Byte(byte)) => self.waiting.push_back(byte),
                Some(typed) => command(typed),
                None => {}
            }
        }
        ReadEnd::Open
    }
}
