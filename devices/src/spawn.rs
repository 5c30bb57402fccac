//! How threads are started: by a function that the machine passes, and which decides what a thread does before its body runs. A machine
//! that confines itself takes rights away from the thread there.

use std::sync::Arc;
use std::thread::{self, JoinHandle};

/// Bytes of each thread's stack.
pub const STACK: usize = 2 << 20;

/// What a thread does until it ends.
pub type Body = Box<dyn FnOnce() + Send>;

/// Starts a thread of this name.
pub type Spawn = Arc<dyn Fn(String, Body) -> std::io::Result<JoinHandle<()>> + Send + Sync>;

/// Starts threads as the standard library does, with all rights of the process, and [`STACK`] whatever RUST_MIN_STACK says.
pub fn plain() -> Spawn {
    Arc::new(|name, body| thread::Builder::new().name(name).stack_size(STACK).spawn(body))
}

/// How the two kinds of threads of a disk are started.
#[derive(Clone)]
pub struct DiskThreads {
    /// Workers, which serve queues.
    pub worker: Spawn,
    /// The pools of the engines, which wait for the host's disk.
    pub io: Spawn,
}

impl Default for DiskThreads {
    fn default() -> Self {
        Self { worker: plain(), io: plain() }
    }
}
