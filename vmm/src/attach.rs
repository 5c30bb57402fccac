//! Connects devices to the machine: addresses to the buses, interrupts to KVM, notifications to the disks' own threads.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use arch::layout::{self, MmioDevice};
use devices::block::BlockDevice;
use devices::bus::{Bus, BusDevice};
use devices::irq::Trigger;
use devices::legacy::{DebugExit, EventSink, GuestEvent, I8042, Pvpanic, ResetRegister, SerialDevice, SleepRegisters};
use devices::virtio::mmio::MmioTransport;
use devices::virtio::spec::mmio::{INTERRUPT_ACK_OFFSET, INTERRUPT_USED_BUFFER, QUEUE_NOTIFY_OFFSET};
use kvm_ioctls::{IoEventAddress, VmFd};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::GuestMemory;
use crate::config::VmConfig;
use crate::console::OutputWriter;
use crate::error::Error;
use crate::events::{EventSender, VmEvent};
use crate::kvm;
use crate::machine::MachineDisk;

/// The serial port's ends that the main loop uses.
pub(crate) struct SerialEnds {
    /// COM1.
    pub serial: Arc<Mutex<SerialDevice>>,
    /// Readable after the guest emptied the receive FIFO.
    pub input_drained: EventFd,
}

/// Puts the legacy devices that `config` wants on the port I/O bus.
///
/// # Errors
/// When the host or KVM refuses a resource.
pub(crate) fn legacy(
    vm: &VmFd,
    port_io: &mut Bus,
    output: OutputWriter,
    events: &Arc<EventSender>,
    config: &VmConfig,
) -> Result<SerialEnds, Error> {
    let interrupt = irqfd(vm, layout::COM1_GSI)?;
    let input_drained = new_eventfd()?;
    let drained = input_drained.try_clone().map_err(Error::host("duplicate an eventfd"))?;
    let serial = Arc::new(Mutex::new(SerialDevice::new(Arc::new(interrupt), config.timing.watch(output), drained)));
    let sink: Arc<dyn EventSink> = {
        let events = Arc::clone(events);
        Arc::new(move |event: GuestEvent| events.send(VmEvent::Guest(event)))
    };
    if config.has_serial() {
        insert(port_io, layout::COM1.into(), SerialDevice::SIZE, Arc::clone(&serial) as _)?;
    }
    insert(port_io, layout::I8042_DATA.into(), I8042::SIZE, Arc::new(Mutex::new(I8042::new(Arc::clone(&sink)))))?;
    let sleep = Arc::new(Mutex::new(SleepRegisters::new(Arc::clone(&sink))));
    insert(port_io, layout::SLEEP_CONTROL.into(), SleepRegisters::SIZE, sleep)?;
    let reset = Arc::new(Mutex::new(ResetRegister::new(Arc::clone(&sink))));
    insert(port_io, layout::RESET.into(), ResetRegister::SIZE, reset)?;
    insert(port_io, layout::PVPANIC.into(), Pvpanic::SIZE, Arc::new(Mutex::new(Pvpanic::new(Arc::clone(&sink)))))?;
    if config.debug_exit {
        let device = Arc::new(Mutex::new(DebugExit::new(sink)));
        insert(port_io, layout::DEBUG_EXIT.into(), DebugExit::SIZE, device)?;
    }
    Ok(SerialEnds { serial, input_drained })
}

/// Puts disk `index` behind its virtio-mmio window. From here on a queue notification wakes the queue's worker and
/// a completion interrupts the guest, both inside the kernel: no vCPU returns to us for either. Nor does it to acknowledge
/// an interrupt, unless `trap_registers`.
///
/// # Errors
/// When the host or KVM refuses a resource.
pub(crate) fn disk(
    vm: &Arc<VmFd>,
    mmio: &mut Bus,
    memory: &GuestMemory,
    window: MmioDevice,
    device: BlockDevice,
    trap_registers: bool,
) -> Result<Arc<Mutex<MmioTransport>>, Error> {
    let interrupt = InterruptLine { vm: Arc::clone(vm), gsi: window.gsi, pulse: Mutex::new(()) };
    let transport = MmioTransport::new(Box::new(device), memory.clone(), Arc::new(interrupt))
        .map_err(Error::host("make a virtio-mmio device"))?;
    for (queue, kick) in (0u32..).zip(transport.kicks()) {
        let notify = IoEventAddress::Mmio(window.base.0 + QUEUE_NOTIFY_OFFSET);
        vm.register_ioevent(kick, &notify, queue).map_err(Error::kvm("register a queue notification"))?;
    }
    if !trap_registers {
        // An acknowledgement of used buffers alone leads to nothing (see `Interrupt`), so nobody listens; one of a
        // configuration change does not match, and gets to the transport.
        let acknowledge = IoEventAddress::Mmio(window.base.0 + INTERRUPT_ACK_OFFSET);
        vm.register_ioevent(&new_eventfd()?, &acknowledge, INTERRUPT_USED_BUFFER)
            .map_err(Error::kvm("register an interrupt's acknowledgement"))?;
    }
    let transport = Arc::new(Mutex::new(transport));
    insert(mmio, window.base.0, window.size, Arc::clone(&transport) as _)?;
    Ok(transport)
}

/// Lets the guest read the disks' registers without an exit. For KVM that is a change of its memory map, for which it waits
/// until no vCPU can be using the old one: milliseconds for each disk, which the guest need not wait for. Until then its
/// reads exit, and find the same.
///
/// # Errors
/// When KVM refuses.
pub(crate) fn map_registers(vm: &VmFd, disks: &[MachineDisk]) -> Result<(), Error> {
    for ((index, disk), window) in (0..).zip(disks).zip((0..).map_while(layout::virtio_mmio)) {
        let page = Arc::clone(disk.transport.lock().unwrap_or_else(PoisonError::into_inner).page());
        kvm::register_read_only(vm, index, window.base, page)?;
    }
    Ok(())
}

fn insert(bus: &mut Bus, base: u64, size: u64, device: Arc<Mutex<dyn BusDevice>>) -> Result<(), Error> {
    bus.insert(base, size, device).map_err(Error::from)
}

/// An interrupt line that the disk's own thread pulls. An irqfd would do the same two steps, but not at once: KVM can inject
/// only message-signalled interrupts where an eventfd is written, and hands wired ones to a kernel thread
/// (virt/kvm/eventfd.c, `irqfd_wakeup`), which has to be woken and takes the disk's processor.
struct InterruptLine {
    vm: Arc<VmFd>,
    gsi: u32,
    /// Held during a pulse: the disk's queues share the line, and while it is up another pulse is no edge.
    pulse: Mutex<()>,
}

impl Trigger for InterruptLine {
    fn trigger(&self) -> io::Result<()> {
        let _pulse = self.pulse.lock().unwrap_or_else(PoisonError::into_inner);
        for level in [true, false] {
            self.vm.set_irq_line(self.gsi, level).map_err(io::Error::from)?;
        }
        Ok(())
    }
}

/// An eventfd that KVM turns into an edge on interrupt line `gsi`.
///
/// # Errors
/// When the host or KVM refuses.
pub(crate) fn irqfd(vm: &VmFd, gsi: u32) -> Result<EventFd, Error> {
    let eventfd = new_eventfd()?;
    vm.register_irqfd(&eventfd, gsi).map_err(Error::kvm("register an interrupt line"))?;
    Ok(eventfd)
}

fn new_eventfd() -> Result<EventFd, Error> {
    EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map_err(Error::host("make an eventfd"))
}
