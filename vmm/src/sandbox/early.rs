//! Threads that are started and confined before there is work for them.
//!
//! To start a thread and confine it takes a tenth of a millisecond, and much longer on a busy host. So `Sandbox::prepare` starts the
//! threads that nearly every machine has. They confine themselves while the main thread builds the machine, or while the process waits
//! for a client that names a saved machine. `Sandbox::spawn` gives its work to the waiting thread of the same kind and name, and starts
//! a thread if there is none.

use std::sync::Mutex;
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;

use devices::spawn::{Body, Spawn};

use super::filters::Kind;
use crate::config::VmConfig;
use crate::{lock, thread_memory};

/// Bytes that must be free. While a thread starts, the main thread allocates less than this. If a thread finds no memory for the stack of
/// its signal handlers, the standard library ends the process.
const ROOM: usize = 64 << 20;

/// A thread that waits for its work. When it is dropped, the thread ends.
struct EarlyThread {
    kind: Kind,
    name: &'static str,
    work: Sender<Body>,
    thread: JoinHandle<()>,
}

/// The threads that have no work yet.
#[derive(Default)]
pub(super) struct EarlyThreads(Mutex<Vec<EarlyThread>>);

impl EarlyThreads {
    /// Starts the threads. If the host refuses one, or limits memory, it is started later, and the error is reported then.
    pub(super) fn start(&self, config: &VmConfig, spawn: impl Fn(Kind) -> Spawn) {
        if thread_memory::try_to_map(ROOM).is_err() {
            return;
        }
        // A new thread may run where its parent may. So a vCPU with a CPU of its own (`affinity::start_on`) is started later.
        let first = config.vcpu_affinity.is_empty().then_some((Kind::Vcpu, "vcpu-0"));
        let always = [(Kind::Console, "console"), (Kind::DiskIo, "machine-job")];
        for (kind, name) in first.into_iter().chain(always) {
            let (work, next) = channel::<Body>();
            let body = Box::new(move || next.into_iter().take(1).for_each(|body| body()));
            if let Ok(thread) = spawn(kind)(name.to_owned(), body) {
                lock(&self.0).push(EarlyThread { kind, name, work, thread });
            }
        }
    }

    /// Lets the waiting thread of this kind and name do the work.
    ///
    /// # Errors
    /// There is none, and the work is given back.
    pub(super) fn begin(&self, kind: Kind, name: &str, work: Body) -> Result<JoinHandle<()>, Body> {
        let mut threads = lock(&self.0);
        let found = threads.iter().position(|early| early.kind == kind && early.name == name);
        let Some(found) = found else { return Err(work) };
        let EarlyThread { work: sender, thread, .. } = threads.swap_remove(found);
        sender.send(work).map_err(|unsent| unsent.0)?;
        Ok(thread)
    }

    /// Ends the threads that still wait.
    pub(super) fn end(&self) {
        lock(&self.0).clear();
    }
}
