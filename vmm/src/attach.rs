//! Connects devices to the machine: addresses to the buses, interrupts to KVM, notifications to the disks' own threads.

mod legacy;

use std::io::{self, Write};
use std::sync::{Arc, Mutex};

use arch::layout::MmioDevice;
use devices::block::BlockDevice;
use devices::bus::Bus;
use devices::irq::InterruptLine;
use devices::legacy::SerialDevice;
use devices::virtio::mmio::MmioTransport;
use devices::virtio::spec::mmio::QUEUE_NOTIFY_OFFSET;
use kvm_ioctls::{IoEventAddress, VmFd};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

pub(crate) use self::legacy::legacy;
use crate::GuestMemory;
use crate::error::Error;
use crate::lock;

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

/// Puts a disk on the MMIO bus at its `window`, with the interrupt `line` of that window. From here on, KVM turns a notification of a
/// queue into a write to the eventfd that the queue's worker waits for, and KVM_RUN does not return for it.
///
/// # Errors
/// When the host or KVM refuses a resource.
pub(crate) fn disk(
    vm: &Arc<VmFd>,
    mmio: &mut Bus,
    memory: &GuestMemory,
    window: MmioDevice,
    line: Arc<dyn InterruptLine>,
    device: BlockDevice,
) -> Result<Arc<Mutex<MmioTransport>>, Error> {
    let transport = MmioTransport::new(Box::new(device), memory.clone(), line)
        .map_err(Error::host("make a virtio-mmio device"))?;
    for (queue, kick) in (0u32..).zip(transport.kicks()) {
        let notify = IoEventAddress::Mmio(window.base.0 + QUEUE_NOTIFY_OFFSET);
        vm.register_ioevent(kick, &notify, queue)
            .map_err(Error::kvm("register a queue notification"))?;
    }
    let transport = Arc::new(Mutex::new(transport));
    mmio.insert(window.base.0, window.size, Arc::clone(&transport) as _)?;
    Ok(transport)
}

/// A line of the guest's interrupt controllers. A pulse is two calls of KVM_IRQ_LINE, up and down, on the calling thread.
///
/// An irqfd would do the same, but later. When an eventfd is written, KVM can inject only message-signaled interrupts at once. It
/// hands the others to a kernel thread (virt/kvm/eventfd.c, `irqfd_wakeup`), which has to be woken and takes a CPU from the disk's
/// thread. Until that thread has run, the interrupt would also be missing from the state of a save.
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
