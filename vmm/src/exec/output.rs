//! Passes the command's output to minivmm's standard output: a bounded buffer between the vCPU that writes to the serial port and the
//! thread `job-output`.
//!
//! Unlike a console's, this output is never dropped: while the buffer is full, `port` makes the vCPU wait in its write. The status
//! becomes an event of the machine only when all output is written.

use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use devices::legacy::GuestEvent;
use devices::spawn::Spawn;
use devices::virtio::drain::Drain;

use super::frames::Frames;
use crate::console::write_all;
use crate::error::Error;
use crate::events::{EventSender, VmEvent};
use crate::lock;
use crate::sources::{Poller, Source};

/// Bytes of output in the buffer from which on the guest waits.
const CAPACITY: usize = 64 << 10;
/// How long the last output of a command without a status may take at the end of the machine.
const FINISH_TIMEOUT: Duration = Duration::from_secs(2);

struct State {
    frames: Frames,
    output: Vec<u8>,
    /// The vCPU waits for room.
    full: Option<Drain>,
    /// Standard output is closed or has failed.
    closed: bool,
    finishing: bool,
    finished: bool,
}

pub(super) struct Buffer {
    state: Mutex<State>,
    /// Signaled when there is something for the thread to do, and when it has finished.
    changed: Condvar,
}

/// The UART's side of the buffer.
pub(super) struct BufferWriter(Arc<Buffer>);

impl Write for BufferWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let state = &mut *lock(&self.0.state);
        let was_idle = state.output.is_empty();
        bytes.iter().for_each(|byte| state.frames.push(*byte, &mut state.output));
        if state.closed {
            state.output.clear();
        }
        if was_idle {
            self.0.changed.notify_all();
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Buffer {
    pub(super) fn new(mark: &str) -> Arc<Self> {
        let state = State {
            frames: Frames::new(mark),
            output: Vec::new(),
            full: None,
            closed: false,
            finishing: false,
            finished: false,
        };
        Arc::new(Self { state: Mutex::new(state), changed: Condvar::new() })
    }

    /// Called at a reset of the guest.
    pub(super) fn restart(&self) {
        lock(&self.state).frames.restart();
    }

    /// What the guest's last write has to wait for: room while the buffer is full. A write after the status waits for the end,
    /// because the guest must not end the machine in another way while its output is on the way.
    pub(super) fn draining(&self) -> Option<Drain> {
        let mut state = lock(&self.state);
        let has_room = state.output.len() < CAPACITY && state.frames.status().is_none();
        if has_room || state.closed {
            return None;
        }
        Some(state.full.get_or_insert_with(|| Drain::new(1)).clone())
    }

    pub(super) fn writer(self: &Arc<Self>) -> BufferWriter {
        BufferWriter(Arc::clone(self))
    }
}

/// The thread as a source of the main loop. It has no descriptor. At the end of the machine it waits for the thread.
pub(super) struct JobOutput {
    buffer: Arc<Buffer>,
    thread: JoinHandle<()>,
}

impl JobOutput {
    /// Starts the thread, which writes to `sink` and sends the status to `events`.
    ///
    /// # Errors
    /// When the host cannot start a thread.
    pub(super) fn spawn(
        buffer: Arc<Buffer>,
        sink: OwnedFd,
        events: Arc<EventSender>,
        spawn: &Spawn,
    ) -> io::Result<Self> {
        let on_thread = Arc::clone(&buffer);
        let body = move || {
            if let Some(event) = move_output(&on_thread, &sink) {
                events.send(event);
            }
            let mut state = lock(&on_thread.state);
            state.finished = true;
            on_thread.changed.notify_all();
        };
        Ok(Self { buffer, thread: spawn("job-output".to_owned(), Box::new(body))? })
    }
}

impl Source for JobOutput {
    fn watch(&mut self, _: &mut Poller<'_, '_>) -> event_manager::Result<()> {
        Ok(())
    }

    fn process(&mut self, _: u8, _: &mut Poller<'_, '_>, _: &mut crate::machine::Machine) {}

    fn finish(self: Box<Self>) {
        let mut state = lock(&self.buffer.state);
        if !state.frames.has_begun() {
            tracing::warn!(
                "--exec: the guest did not start the command: its root file system needs /bin/sh and /dev, its kernel \
                 the driver of serial ports (8250), and an initrd has to pass its arguments on to init"
            );
        }
        state.finishing = true;
        self.buffer.changed.notify_all();
        let finished = self
            .buffer
            .changed
            .wait_timeout_while(state, FINISH_TIMEOUT, |state| !state.finished)
            .is_ok_and(|(state, _)| state.finished);
        if finished {
            let _ = self.thread.join();
        }
    }
}

/// Writes output until the status is known or the machine ends. Returns the event for the machine.
fn move_output(buffer: &Buffer, sink: &OwnedFd) -> Option<VmEvent> {
    loop {
        let mut state = lock(&buffer.state);
        while state.output.is_empty() && state.frames.status().is_none() && !state.finishing {
            state = buffer.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        let State { frames, output, finishing, .. } = &mut *state;
        if *finishing {
            frames.finish(output);
        }
        let output = std::mem::take(output);
        if output.is_empty() {
            return frames.status().map(|status| VmEvent::Guest(GuestEvent::DebugExit(status)));
        }
        if frames.status().is_none()
            && let Some(full) = state.full.take()
        {
            full.finish([]);
        }
        drop(state);
        if let Err((_, error)) = write_all(sink, &output) {
            let mut state = lock(&buffer.state);
            state.closed = true;
            state.full.take().into_iter().for_each(|full| full.finish([]));
            return Some(VmEvent::Failed(Error::host("write the command's output")(error.into())));
        }
    }
}
