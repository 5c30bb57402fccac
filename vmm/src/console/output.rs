//! Guest output on its way to the host: a bounded buffer between the vCPUs, which never wait, and the thread `console`,
//! which may wait for a slow reader as long as it takes.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};

/// How much output may wait for its reader, in bytes. A guest that prints more than this to a reader that has stopped
/// loses the newest bytes, counted and said once the reader is back; it cannot make us grow.
const CAPACITY: usize = 4 << 20;

/// How long the last output may take to reach its reader when the VM ends.
const FINISH_BOUND: Duration = Duration::from_secs(2);

/// The owner's end.
#[derive(Debug)]
pub(crate) struct Output {
    shared: Arc<Shared>,
    thread: JoinHandle<()>,
}

/// The UART's end: `write` never blocks and never fails.
#[derive(Clone, Debug)]
pub(crate) struct OutputWriter {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// Signalled when there is something for the thread to do, and when it has finished.
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    waiting: VecDeque<u8>,
    lost: u64,
    sink: Option<Arc<OwnedFd>>,
    /// The sink may go away and another one come (a socket's clients): keep the output for the next.
    reconnects: bool,
    finishing: bool,
    finished: bool,
}

impl Shared {
    // A panic while the lock is held cannot leave the plain data behind it inconsistent.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Write for OutputWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut state = self.shared.lock();
        let room = CAPACITY.saturating_sub(state.waiting.len());
        let (kept, lost) = bytes.split_at(bytes.len().min(room));
        let was_idle = state.waiting.is_empty();
        state.waiting.extend(kept);
        state.lost += lost.len() as u64;
        if was_idle {
            self.shared.changed.notify_all();
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Output {
    /// Starts the thread. Without a `sink` the output waits for `connect`.
    ///
    /// # Errors
    /// When the host has no thread left.
    pub(crate) fn spawn(sink: Option<OwnedFd>, reconnects: bool) -> io::Result<Self> {
        let state = State {
            waiting: VecDeque::new(),
            lost: 0,
            sink: sink.map(Arc::new),
            reconnects,
            finishing: false,
            finished: false,
        };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() });
        let thread_shared = Arc::clone(&shared);
        let thread = thread::Builder::new().name("console".to_owned()).spawn(move || move_output(&thread_shared))?;
        Ok(Self { shared, thread })
    }

    /// An end for the UART, or for our own words.
    pub(crate) fn writer(&self) -> OutputWriter {
        OutputWriter { shared: Arc::clone(&self.shared) }
    }

    /// A client is there: it gets what waits and what follows.
    pub(crate) fn connect(&self, sink: OwnedFd) {
        self.shared.lock().sink = Some(Arc::new(sink));
        self.shared.changed.notify_all();
    }

    /// The client has gone: output waits for the next one.
    pub(crate) fn disconnect(&self) {
        self.shared.lock().sink = None;
    }

    /// Waits, within a bound, until the reader has everything, then ends the thread. A reader that does not read leaves the
    /// thread behind for the process to end.
    pub(crate) fn finish(self) {
        let deadline = Instant::now() + FINISH_BOUND;
        let mut state = self.shared.lock();
        state.finishing = true;
        self.shared.changed.notify_all();
        while !state.finished {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            state = self.shared.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        drop(state);
        let _ = self.thread.join();
    }
}

/// The thread: takes what waits, writes it, until told to finish.
fn move_output(shared: &Shared) {
    let mut chunk = Vec::new();
    while let Some(sink) = next_chunk(shared, &mut chunk) {
        if let Err(unwritten) = write_all(&sink, &chunk) {
            lose_sink(shared, &sink, &chunk[unwritten..]);
        }
        chunk.clear();
    }
    shared.lock().finished = true;
    shared.changed.notify_all();
}

/// Waits for output and a sink, and takes the output. `None`: finishing, and nothing more can be written.
fn next_chunk(shared: &Shared, chunk: &mut Vec<u8>) -> Option<Arc<OwnedFd>> {
    let mut state = shared.lock();
    loop {
        match &state.sink {
            Some(sink) if !state.waiting.is_empty() => {
                let sink = Arc::clone(sink);
                chunk.extend(state.waiting.drain(..));
                if state.lost > 0 {
                    let lost = std::mem::take(&mut state.lost);
                    chunk.extend_from_slice(
                        format!("\r\n[minivmm: {lost} bytes of output lost: the reader was too slow]\r\n").as_bytes(),
                    );
                }
                return Some(sink);
            }
            _ if state.finishing => return None,
            _ => state = shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
        }
    }
}

/// Writes all of `bytes`, waiting as long as it takes.
///
/// # Errors
/// How much was written before the reader went away.
fn write_all(sink: &OwnedFd, bytes: &[u8]) -> Result<(), usize> {
    let mut written = 0;
    while written < bytes.len() {
        match rustix::io::write(sink, &bytes[written..]) {
            Ok(0) => return Err(written),
            Ok(count) => written += count,
            Err(rustix::io::Errno::INTR) => {}
            // Somebody who shares our standard output made it non-blocking.
            Err(rustix::io::Errno::AGAIN) => {
                let _ = poll(&mut [PollFd::from_borrowed_fd(sink.as_fd(), PollFlags::OUT)], None);
            }
            Err(_) => return Err(written),
        }
    }
    Ok(())
}

/// The sink broke. Where another one may come, the output waits for it; otherwise it is dropped from now on.
fn lose_sink(shared: &Shared, broken: &Arc<OwnedFd>, unwritten: &[u8]) {
    let mut state = shared.lock();
    if state.reconnects {
        if state.sink.as_ref().is_some_and(|sink| Arc::ptr_eq(sink, broken)) {
            state.sink = None;
        }
        let room = CAPACITY.saturating_sub(state.waiting.len());
        for &byte in unwritten.iter().take(room).rev() {
            state.waiting.push_front(byte);
        }
    } else if let Ok(null) = std::fs::File::options().write(true).open("/dev/null") {
        state.sink = Some(Arc::new(null.into()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    #[test]
    fn output_reaches_the_sink_in_order() {
        let (mut reader, sink) = UnixStream::pair().unwrap();
        let output = Output::spawn(Some(sink.into()), false).unwrap();
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
        let output = Output::spawn(None, true).unwrap();
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
        let output = Output::spawn(Some(sink.into()), false).unwrap();
        let mut writer = output.writer();
        let line = [b'x'; 1 << 16];
        for _ in 0..(3 * CAPACITY / line.len()) {
            writer.write_all(&line).unwrap();
        }
        assert!(output.shared.lock().waiting.len() <= CAPACITY);
        assert!(output.shared.lock().lost > 0);
        let drained = thread::spawn(move || {
            let mut all = Vec::new();
            reader.read_to_end(&mut all).unwrap();
            all
        });
        output.finish();
        drop(writer);
        let all = drained.join().unwrap();
        assert!(String::from_utf8_lossy(&all).contains("bytes of output lost"));
    }
}
