//! From a configuration to a paused machine, step by step.

use std::fs::File;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use arch::boot::{Entry, Kernel, UnpackError};
use arch::cmdline::{self, Defaults, Root};
use arch::layout;
use devices::block::{BlockDevice, BlockOptions};
use devices::bus::Bus;
use devices::disk::{self, Disk};
use kvm_ioctls::{Kvm, VmFd};

use crate::GuestMemory;
use crate::chips::Chips;
use crate::config::{DiskConfig, VmConfig};
use crate::console::Console;
use crate::control::Server;
use crate::error::Error;
use crate::event_loop::{CONTROL_BASE, MainLoop};
use crate::events::{EventSender, event_channel};
use crate::firmware::{Firmware, in_file, windows};
use crate::machine::{Machine, MachineDisk, Parts};
use crate::signals::Signals;
use crate::vcpu::{VcpuHandle, VcpuSetup, prepare_kick_signal};
use crate::vm::Vm;
use crate::{affinity, attach, kvm, memory};

/// Builds the machine. Its vCPUs have threads but have not entered the guest: [`Vm::run`] starts them.
///
/// Everything the user named is opened and checked before anything is created.
///
/// # Errors
/// One line that tells the user what to do.
pub fn build(config: &VmConfig, signals: Signals) -> Result<Vm, Error> {
    // 1. The user's files, checked.
    let kernel_file = open_regular("--kernel", &config.kernel)?;
    let kernel = Kernel::identify(kernel_file).map_err(in_file("--kernel", &config.kernel))?;
    // Each of those exits would cost a hundred times what it costs on bare metal.
    let kernel = if kvm::is_nested() { kernel.copied() } else { kernel };
    let initrd = config.initrd.as_deref().map(|path| open_regular("--initrd", path)).transpose()?;
    let images = open_images(&config.disks)?;
    affinity::check("--vcpu-affinity", &config.vcpu_affinity)?;
    affinity::check("--io-affinity", &config.io_affinity)?;
    let cmdline = kernel_command_line(config)?;
    let kernel = unpacked(kernel, config, &cmdline);
    config.timing.over("files opened");

    // 2. Guest memory, with the kernel in it.
    let memory = memory::allocate(config.memory, config.hugepages)?;

    // 3. KVM: a VM with interrupt controllers and memory slots.
    let kvm_fd = kvm::open()?;
    check_cpus(&kvm_fd, config.cpus)?;
    let vm = Arc::new(kvm::create_vm(&kvm_fd)?);
    let chips = Chips::of(&vm)?;
    kvm::register_memory(&vm, &memory)?;
    config.timing.over("VM and memory");

    // 4. The machine described, the kernel loaded, its start structures written.
    let firmware = Firmware { config: config.clone(), kernel, initrd, cmdline };
    let entry = firmware.load(&memory)?;
    config.timing.over("kernel loaded");

    // 5. Devices on their buses.
    let (events, receiver) = event_channel().map_err(Error::host("make an eventfd"))?;
    let events = Arc::new(events);
    let (mut port_io, mut mmio) = (Bus::new(), Bus::new());
    let trap_registers = config.trap_registers || !kvm::has_read_only_memory(&kvm_fd);
    let poll = polling_window();
    let disks = affinity::start_on(&config.io_affinity, || {
        attach_disks(&vm, &mut mmio, &memory, &events, config, &images, trap_registers, poll)
    })?;
    // Last of what may be refused, since it may empty a file.
    let console = Console::open(&config.console)?;
    let ends = attach::legacy(&vm, &mut port_io, console.output.writer(), &events, config)?;
    let power_button = attach::irqfd(&vm, layout::POWER_BUTTON_GSI)?;
    config.timing.over("devices");

    // 6. vCPUs, each waiting on its thread.
    prepare_kick_signal().map_err(Error::host("install the vCPU signal"))?;
    let (port_io, mmio) = (Arc::new(port_io), Arc::new(mmio));
    let buses = [Arc::clone(&port_io), Arc::clone(&mmio)];
    let setup = VcpuSetup {
        kvm: &kvm_fd,
        vm: &vm,
        count: config.cpus,
        legacy_pic: !config.acpi,
        port_io,
        mmio,
        events,
        timing: &config.timing,
    };
    let vcpus = start_vcpus(&setup, &entry, &config.vcpu_affinity)?;
    config.timing.over("vCPUs");

    // 7. The main loop that will hear of everything else.
    let control = config.qmp.as_deref().map(listen).transpose()?;
    let machine = Machine::new(Parts { vcpus, disks, buses, memory, vm, chips, firmware, power_button });
    let main_loop = MainLoop::new(machine, control, signals, config.timeout, receiver, console, ends)?;
    Ok(Vm { main_loop, paused: config.paused, map_registers: !trap_registers })
}

fn listen(path: &Path) -> Result<Server, Error> {
    Server::bind(path, CONTROL_BASE).map_err(|source| Error::Control { path: path.to_owned(), source })
}

/// Opens a kernel or an initrd. A fifo is not waited for.
fn open_regular(option: &'static str, path: &Path) -> Result<File, Error> {
    let failed = |source| Error::Open { option, path: path.to_owned(), source };
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(failed)?;
    let kind = file.metadata().map_err(failed)?.file_type();
    let kind = match () {
        () if kind.is_file() => return Ok(file),
        () if kind.is_dir() => "a directory",
        () if kind.is_fifo() => "a fifo",
        () => "a device or socket",
    };
    Err(Error::NotAFile { option, path: path.to_owned(), kind })
}

/// The kernel inside a bzImage, where all that the guest's own unpacker would do is to unpack it: told `nokaslr`, it does not
/// move the kernel to a random address.
fn unpacked(kernel: Kernel, config: &VmConfig, cmdline: &str) -> Kernel {
    if !cmdline.split_whitespace().any(|word| word == "nokaslr") {
        return kernel;
    }
    match kernel.unpack(config.memory) {
        Ok(unpacked) => unpacked,
        Err(UnpackError::NotPacked) => kernel,
        Err(error) => {
            tracing::debug!(%error, "the kernel is left to the guest to unpack");
            kernel
        }
    }
}

fn open_images(disks: &[DiskConfig]) -> Result<Vec<Arc<dyn Disk>>, Error> {
    if disks.len() > layout::VIRTIO_MMIO_MAX {
        return Err(Error::TooManyDisks(disks.len()));
    }
    disks.iter().map(|disk| disk::open(&disk.image).map_err(Error::from)).collect()
}

fn kernel_command_line(config: &VmConfig) -> Result<String, Error> {
    let root = config.disks.first().map(|disk| if disk.image.read_only { Root::ReadOnly } else { Root::ReadWrite });
    let virtio_mmio = windows(&config.disks);
    let defaults = Defaults { serial: config.has_serial(), root, acpi: config.acpi, virtio_mmio: &virtio_mmio };
    let cmdline = cmdline::build(&defaults, &config.cmdline)?;
    tracing::debug!(cmdline, "the kernel's command line");
    Ok(cmdline)
}

fn check_cpus(kvm: &Kvm, wanted: u32) -> Result<(), Error> {
    let max = u32::try_from(kvm.get_max_vcpus()).unwrap_or(u32::MAX).min(layout::CPUS_MAX);
    if wanted > max { Err(Error::TooManyCpus { wanted, max }) } else { Ok(()) }
}

/// How long a disk may wait awake for the guest's next request: as long as KVM itself by default waits for a vCPU's
/// interrupt (`halt_poll_ns`), and twenty times that where an exit costs so much more.
fn polling_window() -> Duration {
    match std::thread::available_parallelism().map_or(1, usize::from) {
        1 => Duration::ZERO,
        _ if kvm::is_nested() => Duration::from_millis(4),
        _ => Duration::from_micros(200),
    }
}

#[expect(clippy::too_many_arguments, reason = "all that a disk is made of")]
fn attach_disks(
    vm: &Arc<VmFd>,
    mmio: &mut Bus,
    memory: &GuestMemory,
    events: &Arc<EventSender>,
    config: &VmConfig,
    images: &[Arc<dyn Disk>],
    trap_registers: bool,
    poll: Duration,
) -> Result<Vec<MachineDisk>, Error> {
    let mut disks = Vec::with_capacity(config.disks.len());
    for ((config, image), window) in config.disks.iter().zip(images).zip(windows(&config.disks)) {
        let events = Arc::clone(events);
        let sink = Arc::new(move |event| events.report(event));
        let options = BlockOptions { poll, ..config.device.clone() };
        let device = BlockDevice::new(options, Arc::clone(image), sink)
            .map_err(|source| Error::DiskOptions { path: config.image.path.clone(), source })?;
        let handle = device.handle();
        let transport = attach::disk(vm, mmio, memory, window, device, trap_registers)?;
        disks.push(MachineDisk { config: config.clone(), handle, image: Arc::clone(image), transport });
    }
    Ok(disks)
}

fn start_vcpus(setup: &VcpuSetup<'_>, entry: &Entry, processors: &[usize]) -> Result<Vec<VcpuHandle>, Error> {
    let mut processors = processors.chunks(1);
    let start = |index| {
        let vcpu = setup.create(index, entry)?;
        affinity::start_on(processors.next().unwrap_or_default(), || VcpuHandle::spawn(vcpu))
    };
    (0..setup.count).map(start).collect()
}
