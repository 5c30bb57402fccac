//! Connects devices to the machine: addresses to the buses, interrupts to KVM, notifications to the disks' own threads.

mod legacy;

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use arch::layout::MmioDevice;
use devices::block::{BlockDevice, BlockOptions, EventSink};
use devices::bus::Bus;
use devices::disk::Disk;
use devices::irq::InterruptLine;
use devices::legacy::SerialDevice;
use devices::spawn::DiskThreads;
use devices::virtio::mmio::MmioTransport;
use devices::virtio::spec::mmio::QUEUE_NOTIFY_OFFSET;
use kvm_ioctls::{IoEventAddress, VmFd};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

pub(crate) use self::legacy::legacy;
use crate::GuestMemory;
use crate::config::DiskConfig;
use crate::error::Error;
use crate::events::EventSender;
use crate::job_thread::JobThread;
use crate::lock;
use crate::machine::{DiskState, MachineDisk};

/// Puts a serial port on the port I/O bus. The eventfd is readable after the guest has emptied the receive FIFO.
///
/// # Errors
/// When the host or KVM refuses a resource.
pub(crate) fn serial(
    vm: &Arc<VmFd>,
    port_io: &mut Bus,
    (port, gsi): (u16, u32),
    output: impl Write + Send + 'static,
) -> Result<(Arc<Mutex<SerialDevice>>, EventFd), Error> {
    let input_drained = new_eventfd()?;
    let drained = input_drained.try_clone().map_err(Error::host("duplicate an eventfd"))?;
    let serial = SerialDevice::new(line(vm, gsi), Box::new(output), drained);
    let serial = Arc::new(Mutex::new(serial));
    port_io.insert(port.into(), SerialDevice::SIZE, Arc::clone(&serial) as _)?;
    Ok((serial, input_drained))
}

/// What the disks of a machine have in common.
pub(crate) struct DiskAttacher<'a> {
    pub vm: &'a Arc<VmFd>,
    pub memory: &'a GuestMemory,
    pub events: &'a Arc<EventSender>,
    /// Where the disks report errors.
    pub disk_events: EventSink,
    /// How long a worker may poll before it sleeps.
    pub poll: Duration,
    pub threads: DiskThreads,
    /// The interrupt lines so far, by number: disks may share a line.
    pub lines: BTreeMap<u32, Arc<dyn InterruptLine>>,
}

impl DiskAttacher<'_> {
    /// Makes the device and the threads of a disk, and puts it on the MMIO bus at its `window`. From here on, KVM turns a notification
    /// of a queue into a write to the eventfd that the queue's worker waits for, and KVM_RUN does not return for it.
    ///
    /// # Errors
    /// The disk's options do not fit its image, or the host or KVM refuses a resource.
    pub(crate) fn attach(
        &mut self,
        mmio: &mut Bus,
        config: &DiskConfig,
        image: &Arc<dyn Disk>,
        window: MmioDevice,
    ) -> Result<MachineDisk, Error> {
        let (events, image) = (Arc::clone(&self.disk_events), Arc::clone(image));
        let options = BlockOptions { poll: self.poll, ..config.device.clone() };
        let device =
            BlockDevice::new(options, Arc::clone(&image), self.memory, events, &self.threads)
                .map_err(|source| Error::DiskOptions { path: config.image.path.clone(), source })?;
        let handle = device.handle();
        let line = self.lines.entry(window.gsi).or_insert_with(|| line(self.vm, window.gsi));
        let transport = MmioTransport::new(Box::new(device), self.memory.clone(), Arc::clone(line))
            .map_err(Error::host("make a virtio-mmio device"))?;
        for (queue, kick) in (0u32..).zip(transport.kicks()) {
            let notify = IoEventAddress::Mmio(window.base.0 + QUEUE_NOTIFY_OFFSET);
            self.vm
                .register_ioevent(kick, &notify, queue)
                .map_err(Error::kvm("register a queue notification"))?;
        }
        let transport = Arc::new(Mutex::new(transport));
        mmio.insert(window.base.0, window.size, Arc::clone(&transport) as _)?;
        let (state, config, resizes) = (DiskState::Running, config.clone(), Vec::new());
        let name = format!("disk-{}-job", config.device.name);
        let job_thread = JobThread::spawn(&self.threads.io, name, Arc::clone(self.events))?;
        Ok(MachineDisk { config, handle, image, window, transport, state, job_thread, resizes })
    }
}

/// A line of the guest's interrupt controllers. A pulse is two calls of KVM_IRQ_LINE, up and down, on the calling thread.
///
/// An irqfd would be slower: for an interrupt that is not message-signaled, KVM wakes a kernel thread (virt/kvm/eventfd.c,
/// `irqfd_wakeup`), which takes a CPU from the disk's thread. Until that thread has run, a save would also miss the interrupt.
struct KvmLine {
    vm: Arc<VmFd>,
    gsi: u32,
    /// Held during a pulse. The queues of a disk share the line, and disks may share it. A second pulse while the line is up would be
    /// no edge.
    pulse: Mutex<()>,
}

/// Makes the line `gsi`. Make one value for each line: devices that share the line share the value.
pub(crate) fn line(vm: &Arc<VmFd>, gsi: u32) -> Arc<dyn InterruptLine> {
    Arc::new(KvmLine { vm: Arc::clone(vm), gsi, pulse: Mutex::new(()) })
}

impl InterruptLine for KvmLine {
    fn pulse(&self) -> io::Result<()> {
        tracing::trace!(target: "irq_pulse", gsi = self.gsi);
        let _pulse = lock(&self.pulse);
        for level in [true, false] {
            self.vm.set_irq_line(self.gsi, level).map_err(io::Error::from)?;
        }
        Ok(())
    }
}

pub(crate) fn new_eventfd() -> Result<EventFd, Error> {
    EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map_err(Error::host("make an eventfd"))
}
