//! A virtio device in one file: the entropy device (virtio 1.2 §5.4), which fills the driver's buffers with random bytes.
//!
//! No option of minivmm offers it; it shows what a new kind of device consists of. The transport does registers, negotiation
//! and the validation of queues, `SplitQueue` does the rings. What is left is the work on a chain, and the thread that does
//! it. No call waits: a stop asks the thread to end, and the thread finishes the drain.

#![expect(clippy::unwrap_used, reason = "an example that cannot run has nothing better to do")]

use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use devices::GuestMemory;
use devices::clock::Instant;
use devices::virtio::device::{Activation, ActiveQueue, RingIndices, VirtioDevice};
use devices::virtio::drain::Drain;
use devices::virtio::interrupt::Interrupt;
use devices::virtio::queue::{ChainBuffers, QueueError, SplitQueue};
use rustix::rand::{GetRandomFlags, getrandom};
use vm_memory::Bytes;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

/// The device. Its thread exists while the driver has the queue enabled.
#[derive(Default)]
pub(crate) struct Entropy {
    context: Option<(GuestMemory, Interrupt)>,
    server: Option<Arc<Server>>,
}

struct Server {
    memory: GuestMemory,
    interrupt: Interrupt,
    kick: Arc<EventFd>,
    queue: Mutex<SplitQueue>,
    stopping: AtomicBool,
    /// Done when the thread has ended.
    drain: Drain,
}

impl Server {
    /// The thread: once around for what the driver queued before the start, and once for each kick.
    fn run(&self, kicks: &Epoll) {
        while !self.stopping.load(Ordering::Acquire) {
            if let Err(error) = self.serve() {
                tracing::warn!(%error, "the guest broke the entropy device's ring");
                return self.interrupt.device_needs_reset();
            }
            let _ = kicks.wait(-1, &mut [EpollEvent::default()]);
        }
    }

    /// Serves the ring until it stays empty after the driver was asked to notify.
    fn serve(&self) -> Result<(), QueueError> {
        let mut queue = self.queue.lock().unwrap();
        let mut buffers = ChainBuffers::default();
        loop {
            for _ in 0..queue.available(&self.memory)? {
                let chain = queue.pop(&self.memory)?;
                if let Err(error) = queue.walk(&self.memory, &chain, false, &mut buffers) {
                    queue.abandon(chain);
                    return Err(error.into());
                }
                let written = self.fill(&buffers);
                queue.complete(&self.memory, chain, written)?;
            }
            queue.publish(&self.memory, Instant::now());
            if queue.take_interrupt() {
                self.interrupt.used_buffer();
            }
            if self.stopping.load(Ordering::Acquire) || !queue.enable_notifications(&self.memory)? {
                return Ok(());
            }
        }
    }

    /// Fills the start of the chain's buffers and returns the number of bytes.
    fn fill(&self, buffers: &ChainBuffers) -> u32 {
        // The device may use less of a buffer than there is (§5.4.6).
        let (mut random, mut written) = ([0; 4096], 0);
        let count = getrandom(&mut random, GetRandomFlags::empty()).unwrap_or(0);
        for range in buffers.writable() {
            let end = count.min(written + range.length as usize);
            let _ = self.memory.write_slice(&random[written..end], range.address);
            written = end;
        }
        written as u32
    }
}

impl VirtioDevice for Entropy {
    fn device_id(&self) -> u32 {
        4
    }

    fn name(&self) -> String {
        "entropy device".to_owned()
    }

    fn features(&self) -> u64 {
        0 // Not INDIRECT_DESC, nor EVENT_IDX: `walk` and `SplitQueue::new` hear of that, too.
    }

    fn queue_sizes(&self) -> &[u16] {
        &[64]
    }

    fn start(&mut self, activation: Activation) -> io::Result<()> {
        self.context = Some((activation.memory, activation.interrupt));
        activation.queues.into_iter().try_for_each(|queue| self.start_queue(queue))
    }

    fn start_queue(&mut self, queue: ActiveQueue) -> io::Result<()> {
        let (memory, interrupt) = self.context.clone().ok_or(io::ErrorKind::NotConnected)?;
        let ActiveQueue { queue, kick, .. } = queue;
        // Edge-triggered, so that the eventfd need never be read.
        let (kicks, edges) = (Epoll::new()?, EventSet::IN | EventSet::EDGE_TRIGGERED);
        kicks.ctl(ControlOperation::Add, kick.as_raw_fd(), EpollEvent::new(edges, 0))?;
        let queue = Mutex::new(SplitQueue::new(queue, false, false));
        let (stopping, drain) = (AtomicBool::default(), Drain::new(1));
        let server = Arc::new(Server { memory, interrupt, kick, queue, stopping, drain });
        let served = Arc::clone(&server);
        std::thread::Builder::new().name("entropy".to_owned()).spawn(move || {
            served.run(&kicks);
            served.drain.finish([]);
        })?;
        self.server = Some(server);
        Ok(())
    }

    fn reset(&mut self) -> Drain {
        self.reset_queue(0)
    }

    fn reset_queue(&mut self, _index: u16) -> Drain {
        let Some(server) = self.server.take() else { return Drain::new(0) };
        server.stopping.store(true, Ordering::Release);
        let _ = server.kick.write(1);
        server.drain.clone()
    }

    fn ring_indices(&self) -> Vec<RingIndices> {
        let Some(server) = &self.server else { return Vec::new() };
        let (next_available, next_used) = server.queue.lock().unwrap().ring_indices();
        vec![RingIndices { queue: 0, next_available, next_used }]
    }
}

impl Drop for Entropy {
    fn drop(&mut self) {
        self.reset();
    }
}

fn main() {
    println!("virtio device type {}; tests/entropy.rs drives it", Entropy::default().device_id());
}
