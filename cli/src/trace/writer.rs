//! The thread `trace`: takes records out of the queue, and writes them to the file or to standard error.
//!
//! Threads that emit events never wait for it: if the queue is full, an event is counted as lost. Nor does it wait for the file. If a
//! write fails or is short, the rest is tried again with the next events, and events that do not fit into the buffer meanwhile are lost,
//! too.

use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::ops::Deref;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use super::format::Formatter;
use super::record::Record;

/// Most records in the queue. Each has some 300 bytes.
pub(super) const QUEUE: usize = 16384;
/// How often the writer reads the queue. If each event woke the writer, each would cost a system call.
const INTERVAL: Duration = Duration::from_millis(10);
/// Most bytes in the buffer while the file accepts none.
const BUFFER: usize = 4 << 20;
/// How long the last events may take to reach the file at the end.
const FINISH_TIMEOUT: Duration = Duration::from_secs(2);

/// The destination of a trace.
pub(super) enum Sink {
    Stderr(Box<dyn Write + Send>),
    /// A descriptor on which writes do not block.
    File(File, String),
}

impl Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Stderr(stderr) => stderr.write(bytes),
            Self::File(file, _) => file.write(bytes),
        }
    }
}

/// What the threads that emit events, the writer and the end share.
#[derive(Default)]
pub(super) struct Shared {
    pub(super) lost: AtomicU64,
    finishing: AtomicBool,
    /// Whether there is a writer that may still write.
    pending: Mutex<bool>,
    changed: Condvar,
    writer: OnceLock<Thread>,
}

impl Shared {
    /// Puts a record into the queue.
    pub(super) fn send(&self, queue: &SyncSender<Record>, record: Record) {
        if queue.try_send(record).is_err() {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Makes the writer write the remaining records, and waits for that for a limited time.
    pub(super) fn finish(&self) {
        self.finishing.store(true, Ordering::Release);
        self.writer.get().inspect(|writer| writer.unpark());
        let pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
        drop(self.changed.wait_timeout_while(pending, FINISH_TIMEOUT, |pending| *pending));
    }
}

/// A writer. It exists until it has written as much as it could, or until it is dropped because the run was refused.
pub(super) struct PendingWriter(Arc<Shared>);

impl PendingWriter {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        *shared.pending.lock().unwrap_or_else(PoisonError::into_inner) = true;
        Self(shared)
    }
}

impl Deref for PendingWriter {
    type Target = Shared;

    fn deref(&self) -> &Shared {
        &self.0
    }
}

impl Drop for PendingWriter {
    fn drop(&mut self) {
        *self.0.pending.lock().unwrap_or_else(PoisonError::into_inner) = false;
        self.0.changed.notify_all();
    }
}

/// What the writer has.
pub(super) struct Writer<'a> {
    shared: &'a Shared,
    sink: Sink,
    formatter: Formatter,
    /// Prints a message for the user.
    warn: fn(&str),
    /// Lines to write. A part of the first one may have been written already.
    buffer: Vec<u8>,
    /// Number of lost events (as counted by threads) that the trace reports already.
    seen: u64,
    /// Events that did not fit into the buffer.
    dropped: u64,
    total: u64,
    failed: bool,
}

impl<'a> Writer<'a> {
    pub(super) fn new(
        shared: &'a Shared,
        sink: Sink,
        formatter: Formatter,
        warn: fn(&str),
    ) -> Self {
        Self {
            shared,
            sink,
            formatter,
            warn,
            buffer: Vec::new(),
            seen: 0,
            dropped: 0,
            total: 0,
            failed: false,
        }
    }

    /// Writes until the end.
    pub(super) fn run(mut self, queue: &Receiver<Record>) {
        let _ = self.shared.writer.set(thread::current());
        self.formatter.begin(&mut self.buffer);
        while !self.shared.finishing.load(Ordering::Acquire) {
            self.take(queue);
            self.flush();
            thread::park_timeout(INTERVAL);
        }
        let deadline = Instant::now() + FINISH_TIMEOUT / 2;
        self.take(queue);
        self.formatter.end(&mut self.buffer);
        self.flush();
        while !self.buffer.is_empty() && !self.failed && Instant::now() < deadline {
            thread::park_timeout(INTERVAL);
            self.flush();
        }
        self.report();
    }

    /// Formats what the queue has.
    fn take(&mut self, queue: &Receiver<Record>) {
        let mut lost = self.shared.lost.load(Ordering::Relaxed) - self.seen;
        self.seen += lost;
        // A queue that never gets empty must not keep the file waiting.
        for record in queue.try_iter().take(QUEUE) {
            if self.buffer.len() < BUFFER {
                self.formatter.record(&record, &mut self.buffer);
            } else {
                self.dropped += 1;
            }
        }
        if self.buffer.len() < BUFFER {
            lost += std::mem::take(&mut self.dropped);
        }
        if lost > 0 {
            self.total += lost;
            self.formatter.lost(lost, &mut self.buffer);
        }
    }

    /// Writes as much as the file accepts.
    fn flush(&mut self) {
        while !self.buffer.is_empty() {
            match self.sink.write(&self.buffer) {
                Ok(0) => return,
                Ok(count) => drop(self.buffer.drain(..count)),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) => {
                    if !std::mem::replace(&mut self.failed, true)
                        && let Sink::File(_, path) = &self.sink
                    {
                        (self.warn)(&format!(
                            "warning: --trace file={path}: events may be lost: {error}; the VM goes on, and the file as soon as it can be written"
                        ));
                    }
                    return;
                }
            }
        }
        self.failed = false;
    }

    /// Prints at the end how many events the trace lacks.
    fn report(&self) {
        let lost = self.total + self.dropped;
        if lost > 0 || !self.buffer.is_empty() {
            let bytes = self.buffer.len();
            (self.warn)(&format!(
                "warning: --trace: {lost} events were lost, and {bytes} bytes were not written; trace fewer events, or to a faster file"
            ));
        }
    }
}
