//! Passes the guest's output to the host, by a bounded buffer. The vCPUs never wait, and the thread `console` waits for a slow reader
//! without a limit.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use devices::spawn::Spawn;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use crate::error::Error;
use crate::lock;

/// Bytes of output that may wait for the reader. If the guest prints more, the newest bytes are dropped and counted. The count is printed
/// when the reader goes on.
const CAPACITY: usize = 4 << 20;

/// A sink that fails, such as a file on a full disk, is tried again after this time.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);

/// How long the last output may take to reach its reader when the VM ends.
const FINISH_TIMEOUT: Duration = Duration::from_secs(2);

/// The buffer and the thread that empties it, `console`. The thread takes bytes out under the lock and writes them
/// without it, so that a slow reader never holds up a vCPU.
#[derive(Debug)]
pub(crate) struct Output {
    buffer: Arc<Buffer>,
    thread: Option<JoinHandle<()>>,
}

/// The UART's handle. `write` never blocks and never fails: a guest that prints must not stall its vCPU or end the VM. Bytes that do not
/// fit are dropped and counted.
#[derive(Clone, Debug)]
pub(crate) struct OutputWriter {
    buffer: Arc<Buffer>,
}

#[derive(Debug)]
struct Buffer {
    state: Mutex<State>,
    /// Signalled when there is something for the thread to do, and when it has finished.
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    waiting: VecDeque<u8>,
    begun: bool,
    lost: u64,
    sink: Option<Arc<OwnedFd>>,
    /// The sink may be replaced by another one (a socket's clients): output is kept for the next.
    reconnects: bool,
    /// No reader will come back: output is dropped.
    sink_is_gone: bool,
    /// Bytes that may still be written, with `max=`.
    limit: Option<u64>,
    finishing: bool,
    finished: bool,
}

impl Write for OutputWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut state = lock(&self.buffer.state);
        if !std::mem::replace(&mut state.begun, true) {
            tracing::info!(target: "boot", "first console byte");
        }
        let room = CAPACITY.saturating_sub(state.waiting.len());
        let (kept, lost) = bytes.split_at(bytes.len().min(room));
        let was_idle = state.waiting.is_empty();
        state.waiting.extend(kept);
        state.lost += lost.len() as u64;
        if was_idle {
            self.buffer.changed.notify_all();
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Output {
    /// Without a `sink` the output waits for `connect`. No more than `limit` bytes are written.
    pub(crate) fn new(sink: Option<OwnedFd>, reconnects: bool, limit: Option<u64>) -> Self {
        let state = State {
            waiting: VecDeque::new(),
            begun: false,
            lost: 0,
            sink_is_gone: sink.is_none() && !reconnects,
            sink: sink.map(Arc::new),
            reconnects,
            limit,
            finishing: false,
            finished: false,
        };
        let buffer = Arc::new(Buffer { state: Mutex::new(state), changed: Condvar::new() });
        Self { buffer, thread: None }
    }

    /// Starts the thread. Until then all output waits.
    ///
    /// # Errors
    /// When the host has no thread left.
    pub(crate) fn start(&mut self, spawn: &Spawn) -> Result<(), Error> {
        let buffer = Arc::clone(&self.buffer);
        let thread = spawn("console".to_owned(), Box::new(move || move_output(&buffer)));
        self.thread = Some(thread.map_err(Error::host("start the console thread"))?);
        Ok(())
    }

    /// A handle for the UART, or for minivmm's own text.
    pub(crate) fn writer(&self) -> OutputWriter {
        OutputWriter { buffer: Arc::clone(&self.buffer) }
    }

    pub(crate) fn connect(&self, sink: OwnedFd) {
        lock(&self.buffer.state).sink = Some(Arc::new(sink));
        self.buffer.changed.notify_all();
    }

    /// Called when the client has disconnected: output is kept for the next one.
    pub(crate) fn disconnect(&self) {
        lock(&self.buffer.state).sink = None;
    }

    /// Waits for a limited time until the reader has all output, and ends the thread. If the reader does not read, the thread remains until
    /// the process ends.
    pub(crate) fn finish(self) {
        let mut state = lock(&self.buffer.state);
        state.finishing = true;
        self.buffer.changed.notify_all();
        let is_busy = |state: &mut State| !state.finished;
        let waited = self.buffer.changed.wait_timeout_while(state, FINISH_TIMEOUT, is_busy);
        if waited.unwrap_or_else(PoisonError::into_inner).0.finished {
            drop(self.thread.map(JoinHandle::join));
        }
    }
}

fn move_output(buffer: &Buffer) {
    let (mut chunk, mut failing) = (Vec::new(), false);
    while let Some(sink) = next_chunk(buffer, &mut chunk) {
        match write_all(&sink, &chunk) {
            Ok(()) => failing = false,
            Err((written, error)) => {
                let has_reader = !matches!(error, Errno::PIPE | Errno::CONNRESET);
                let mut state = lock(&buffer.state);
                if state.reconnects || has_reader {
                    state.put_back(&chunk[written..]);
                }
                if state.reconnects {
                    if state.sink.as_ref().is_some_and(|now| Arc::ptr_eq(now, &sink)) {
                        state.sink = None;
                    }
                } else if has_reader {
                    if !std::mem::replace(&mut failing, true) {
                        tracing::warn!("the console cannot be written: {error}; trying again");
                    }
                    if wait_to_retry(buffer, state) {
                        break;
                    }
                } else {
                    state.sink_is_gone = true;
                }
            }
        }
        chunk.clear();
    }
    lock(&buffer.state).finished = true;
    buffer.changed.notify_all();
}

impl State {
    fn put_back(&mut self, unwritten: &[u8]) {
        let room = CAPACITY.saturating_sub(self.waiting.len());
        let (kept, lost) = unwritten.split_at(unwritten.len().min(room));
        self.lost += lost.len() as u64;
        kept.iter().rev().for_each(|byte| self.waiting.push_front(*byte));
    }
}

/// Waits until the sink may take output again. Returns true when the VM ends meanwhile.
fn wait_to_retry(buffer: &Buffer, state: MutexGuard<'_, State>) -> bool {
    let waited = buffer.changed.wait_timeout_while(state, RETRY_INTERVAL, |state| !state.finishing);
    waited.unwrap_or_else(PoisonError::into_inner).0.finishing
}

/// Waits for output and a sink, and takes the output. `None`: finishing, and nothing more can be written.
fn next_chunk(buffer: &Buffer, chunk: &mut Vec<u8>) -> Option<Arc<OwnedFd>> {
    let mut state = lock(&buffer.state);
    loop {
        if state.sink_is_gone {
            state.waiting.clear();
        }
        match &state.sink {
            Some(sink) if !state.waiting.is_empty() => {
                let sink = Arc::clone(sink);
                chunk.extend(state.waiting.drain(..));
                if state.lost > 0 {
                    let lost = std::mem::take(&mut state.lost);
                    chunk.extend_from_slice(
                        format!("\r\n[minivmm: {lost} bytes of output lost: they were not taken in time]\r\n").as_bytes(),
                    );
                }
                state.keep_to_limit(chunk);
                return Some(sink);
            }
            _ if state.finishing => return None,
            _ => state = buffer.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
        }
    }
}

impl State {
    /// Cuts the output off at the limit of `max=`, with a line that says so.
    fn keep_to_limit(&mut self, chunk: &mut Vec<u8>) {
        let Some(left) = &mut self.limit else { return };
        if chunk.len() as u64 > *left {
            chunk.truncate(*left as usize);
            chunk.extend_from_slice(
                b"\r\n[minivmm: max= is reached: no more output is written]\r\n",
            );
            self.sink_is_gone = true;
        }
        *left = left.saturating_sub(chunk.len() as u64);
    }
}

/// Writes all of `bytes`. Waits for the reader without a limit.
///
/// # Errors
/// How much was written, and why no more was.
pub(crate) fn write_all(sink: &OwnedFd, bytes: &[u8]) -> Result<(), (usize, Errno)> {
    let mut written = 0;
    while written < bytes.len() {
        match rustix::io::write(sink, &bytes[written..]) {
            Ok(0) => return Err((written, Errno::PIPE)),
            Ok(count) => written += count,
            Err(Errno::INTR) => {}
            // Another process that shares this standard output made it non-blocking.
            Err(Errno::AGAIN) => {
                let _ = poll(&mut [PollFd::from_borrowed_fd(sink.as_fd(), PollFlags::OUT)], None);
            }
            Err(error) => return Err((written, error)),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use devices::spawn::plain;
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    #[test]
    fn output_reaches_the_sink_in_order() {
        let (mut reader, sink) = UnixStream::pair().unwrap();
        let mut output = Output::new(Some(sink.into()), false, None);
        output.start(&plain()).unwrap();
        let mut writer = output.writer();
        for byte in 0..=255u8 {
            writer.write_all(&[byte]).unwrap();
        }
        output.finish();
        drop(writer);
        let mut got = Vec::new();
        reader.read_to_end(&mut got).unwrap();
        assert_eq!(got, (0..=255u8).collect::<Vec<_>>());
    }

    #[test]
    fn early_output_waits_for_the_first_client_and_survives_a_lost_one() {
        let mut output = Output::new(None, true, None);
        output.start(&plain()).unwrap();
        output.writer().write_all(b"early").unwrap();
        let (mut reader, sink) = UnixStream::pair().unwrap();
        output.connect(sink.into());
        let mut got = [0; 5];
        reader.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"early");

        drop(reader);
        output.writer().write_all(b"later").unwrap();
        let (mut reader, sink) = UnixStream::pair().unwrap();
        output.connect(sink.into());
        reader.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"later");
        output.finish();
    }

    #[test]
    fn a_reader_that_stops_costs_bounded_memory_and_no_time() {
        let (mut reader, sink) = UnixStream::pair().unwrap();
        let mut output = Output::new(Some(sink.into()), false, None);
        output.start(&plain()).unwrap();
        let mut writer = output.writer();
        let line = [b'x'; 1 << 16];
        for _ in 0..(3 * CAPACITY / line.len()) {
            writer.write_all(&line).unwrap();
        }
        assert!(lock(&output.buffer.state).waiting.len() <= CAPACITY);
        let drained = std::thread::spawn(move || {
            let mut all = Vec::new();
            reader.read_to_end(&mut all).unwrap();
            all
        });
        output.finish();
        drop(writer);
        let all = drained.join().unwrap();
        assert!(String::from_utf8_lossy(&all).contains("bytes of output lost"));
    }

    #[test]
    fn output_ends_at_its_limit() {
        let (mut reader, sink) = UnixStream::pair().unwrap();
        let mut output = Output::new(Some(sink.into()), false, Some(10));
        output.start(&plain()).unwrap();
        let mut writer = output.writer();
        for _ in 0..100 {
            writer.write_all(b"0123456").unwrap();
        }
        output.finish();
        drop(writer);
        let mut got = String::new();
        reader.read_to_string(&mut got).unwrap();
        assert!(got.starts_with("0123456012\r\n[minivmm: max="), "{got}");
        assert_eq!(got.matches("0123456").count(), 1, "{got}");
    }
}
