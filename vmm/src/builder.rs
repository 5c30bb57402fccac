//! From a configuration to a paused machine: a recipe in numbered steps.
//!
//! `cli` calls [`build`]. Only this file knows every part of the machine: all others get what they need as arguments.
//!
//! Everything that the user named is opened and checked before anything is changed. Files of earlier runs are emptied last,
//! when nothing can be refused any more. Each step ends with an event of the `boot` trace (`--boot-timing`).

use std::collections::BTreeMap;
use std::sync::Arc;

use arch::Structure;
use arch::cmdline::{self, Root};
use arch::layout;
use arch::machine_layout::{MachineLayout, MachineSpec};
use devices::block;
use devices::bus::Bus;
use devices::disk::{self, Disk};
use devices::spawn::{DiskThreads, Spawn};
use kvm_ioctls::Kvm;

use crate::attach::DiskAttacher;
use crate::boot_image::{BootFile, BootImage};
use crate::config::{DiskConfig, VmConfig};
use crate::error::Error;
use crate::event_loop::EventLoop;
use crate::events::event_channel;
use crate::gdb::Gdb;
use crate::halt_watch::HaltWatch;
use crate::job_thread::JobThread;
use crate::kernel_pages::{self, KernelPages};
use crate::machine::{Hardware, Machine, PowerOn, Reports};
use crate::output_files::OutputFiles;
use crate::sandbox::Kind;
use crate::signals::Signals;
use crate::snapshot::{Incoming, PanicDump, generation_id};
use crate::sources::Source;
use crate::timeout::Timeout;
use crate::vcpu::{VcpuSetup, VcpuStart, VcpuThread, install_kick_handler};
use crate::{
    affinity, attach, binary_pages, boot_image, console, disk_faults, exec, host_cpu, hugepages,
    kvm, memory, register_pages, trace,
};

/// Builds a machine that boots or, with `incoming`, one that was saved. Its vCPUs have threads, but have not entered the guest:
/// [`EventLoop::run`] starts them.
///
/// # Errors
/// What is wrong with the configuration, or what the host does not provide.
pub fn build(
    config: &VmConfig,
    mut incoming: Option<Incoming>,
    signals: Signals,
) -> Result<EventLoop, Error> {
    // Building counts for `--timeout`, too.
    let timeout = config.timeout.map(Timeout::start).transpose()?;
    // With `--exec`, the configuration also has the disk of the script.
    let (config, job) = &exec::plan(config)?;
    // A process that waited for `migrate-incoming` has made the VM, the sandbox and the control socket. Any other makes them here.
    let mut early = incoming.as_mut().map(Incoming::take_early_parts).unwrap_or_default();

    // 1. Compute the address of everything. Open and check the user's files.
    let layout = MachineLayout::new(MachineSpec {
        memory: config.memory,
        cpus: config.cpus,
        serial: config.serial,
        acpi: config.acpi,
        disks: config.disks.len(),
    });
    let first = config.disks.first().map(|disk| &disk.image);
    let root = first.map(|image| if image.read_only { Root::ReadOnly } else { Root::ReadWrite });
    let cmdline = cmdline::build(&layout, root, &config.cmdline)?;
    tracing::debug!(cmdline, "the kernel's command line");
    let generation_id = generation_id::draw(config.acpi)?;
    let boots = incoming.is_none();
    let open = || open_boot_image(config, &layout, &cmdline, generation_id.as_ref(), boots);
    let boot_image = match incoming {
        None => Some(open()?),
        // A restored machine needs the kernel only for a reset.
        Some(_) if config.kernel.as_os_str().is_empty() => None,
        Some(_) => open().inspect_err(Incoming::warn_of_reset).ok(),
    };
    let mut images = open_images(&config.disks)?;
    boot_image::describe(config, boot_image.as_ref(), &images);
    let mut outputs = OutputFiles::with_logs(&mut images, &config.disks)?;
    disk_faults::over(&mut images, &config.disks);
    affinity::check(config)?;
    early.release_binary_pages();
    tracing::info!(target: "boot", "files opened");

    // 2. Map guest memory. Start the threads that nearly every machine has. They confine themselves while the rest is made.
    let memory =
        if config.hugepages { hugepages::allocate(&layout)? } else { memory::allocate(&layout)? };
    let sandbox = early.sandbox(config)?;

    // 3. Make a VM in KVM, with memory slots. Interrupt controllers come later, because they make changes of the memory map and
    // of ioeventfds slow (`register_memory`).
    let empty_vm = early.empty_vm()?;
    let (kvm_fd, vm) = (&empty_vm.kvm, Arc::clone(&empty_vm.vm));
    check_cpus(kvm_fd, config.cpus)?;
    affinity::keep_idle_in_guest(config, kvm_fd, &vm)?;
    kvm::register_memory(&vm, &memory)?;
    tracing::info!(target: "boot", "VM and memory");

    // 4. Load kernel, initrd, tables and start structures; or what a saved machine has in its RAM.
    let (start, unmap_files) = match &incoming {
        None => {
            let image = boot_image.as_ref().ok_or(Error::NoBootImage)?;
            (VcpuStart::Boot(image.load(&memory)?), None)
        }
        Some(incoming) => incoming.load(&empty_vm, &memory, generation_id.as_ref())?,
    };
    tracing::info!(target: "boot", "kernel loaded");

    // 5. Attach devices to their buses. Their threads confine themselves when they start.
    let (events, receiver) = event_channel().map_err(Error::host("make an eventfd"))?;
    let (reports, disk_events) = Reports::new(&events, receiver, config.dump_on_panic.is_some());
    let (mut port_io, mut mmio) = (Bus::default(), Bus::default());
    let map_registers = register_pages::are_used(config, kvm_fd);
    let mut attacher = DiskAttacher {
        vm: &vm,
        memory: &memory,
        events: &events,
        disk_events,
        poll: host_cpu::polling_window(),
        threads: DiskThreads { worker: sandbox.spawn(Kind::Disk), io: sandbox.spawn(Kind::DiskIo) },
        lines: BTreeMap::new(),
    };
    let disks = config.disks.iter().zip(&images).zip(&layout.disks);
    let disks = disks.map(|((disk, image), place)| attacher.attach(&mut mmio, disk, image, *place));
    let disks: Vec<_> = affinity::start_on(&config.io_affinity, || disks.collect())?;
    block::share_limits(disks.iter().map(|disk| &disk.handle));
    if map_registers {
        register_pages::acknowledge(&vm, &disks)?;
    }
    kvm::create_irq_chips(&vm)?;
    let control = early.control(config)?;
    attach::legacy(&mut port_io, &events, config.debug_exit)?;
    let mut sources: Vec<Box<dyn Source>> = vec![Box::new(signals), Box::new(reports)];
    sources.extend(disk_faults::source(&config.disks));
    sources.extend(Gdb::listen(config.gdb.as_ref(), &vm, &memory, config.cpus)?);
    let spawn = sandbox.spawn(Kind::Console);
    trace::start(&spawn, &mut outputs)?;
    let serial =
        console::attach_ports(&vm, &mut port_io, config, &mut sources, &mut outputs, &spawn)?;
    sources.extend(exec::attach(job, &vm, &mut port_io, &events, &spawn)?);
    sources.extend(PanicDump::open(config, &mut outputs)?);
    tracing::info!(target: "boot", "devices");

    // 6. Make vCPUs, which are paused on their threads.
    install_kick_handler().map_err(Error::host("install the vCPU signal"))?;
    let (port_io, mmio) = (Arc::new(port_io), Arc::new(mmio));
    let buses = [Arc::clone(&port_io), Arc::clone(&mmio)];
    let setup = VcpuSetup {
        kvm: kvm_fd,
        supported: &empty_vm.cpuid,
        vm: &vm,
        count: config.cpus,
        legacy_pic: !config.acpi,
        nested: config.nested,
        hints: affinity::hints(config),
        port_io,
        mmio,
        events: Arc::clone(&events),
    };
    let spawn = sandbox.spawn(Kind::Vcpu);
    let vcpus = start_vcpus(&setup, &start, &config.vcpu_affinity, &spawn)?;
    let power_on = PowerOn::read(kvm_fd, &vm, &vcpus, config.nested)?;
    if let VcpuStart::Boot(entry) = &start {
        let boot = |vcpu: &VcpuThread| vcpu.with_paused(|vcpu| vcpu.set_boot_registers(entry));
        vcpus.iter().try_for_each(boot)?;
    }
    tracing::info!(target: "boot", "vCPUs");
    // After everything else that changes KVM's memory map or its buses: those changes would wait for this thread's.
    if map_registers {
        register_pages::map(&vm, &disks, &sandbox.spawn(Kind::Registers))?;
    }

    // 7. Make the machine, and the main loop with its sources.
    let hardware = Hardware {
        layout,
        vcpus,
        disks,
        buses,
        memory,
        vm,
        power_on: Box::new(move |hardware| power_on.write(hardware)),
        boot_image,
        unmap_files,
        serial,
    };
    let spawn = sandbox.spawn(Kind::DiskIo);
    let job_thread = JobThread::spawn(&spawn, "machine-job", Arc::clone(&events))?;
    let mut machine = Machine::new(hardware, Arc::clone(&events), job_thread, config.stop_timeout)?;
    let paused = match incoming {
        Some(incoming) => incoming.restore(&mut machine)? && control.is_some() || config.paused,
        None => config.paused,
    };
    sources.push(Box::new(HaltWatch::start()?));
    sources.extend(timeout.map(|timeout| Box::new(timeout) as Box<dyn Source>));
    // Nearly the last source, so that the socket is closed after the other sources have ended: clients take a closed connection
    // for the end of the VM.
    let spawn = sandbox.spawn(Kind::Save);
    let control = control.map(|control| control.into_source(config, &spawn, &events));
    sources.extend(control.transpose()?);
    sources.extend(binary_pages::source());
    // The last source: it confines the main thread when the loop begins, after all others have added their descriptors.
    sources.extend(sandbox.source(kernel_pages::user_has_changed)?);
    // Nothing can be refused any more.
    outputs.begin()?;
    Ok(EventLoop::new(machine, sources, paused))
}

fn open_boot_image(
    config: &VmConfig,
    layout: &MachineLayout,
    cmdline: &str,
    generation_id: Option<&Structure>,
    boots: bool,
) -> Result<BootImage, Error> {
    let kernel = BootFile::open("--kernel", &config.kernel)?;
    let initrd =
        config.initrd.as_deref().map(|path| BootFile::open("--initrd", path)).transpose()?;
    let pages = Box::new(KernelPages::of(&kernel.file, boots, config.stop_timeout));
    let mut image = BootImage::new(layout, kernel, initrd, cmdline, pages)?;
    // Part of the plan, so that a reset keeps the same ID. A restore makes a new one.
    image.plan.structures.extend(generation_id.cloned());
    Ok(image)
}

fn open_images(disks: &[DiskConfig]) -> Result<Vec<Arc<dyn Disk>>, Error> {
    if disks.len() > layout::VIRTIO_MMIO_MAX {
        return Err(Error::TooManyDisks(disks.len()));
    }
    let open = |disk: &DiskConfig| {
        disk::open(&disk.image).map_err(|error| Error::disk(&disk.image.path, error))
    };
    disks.iter().map(open).collect()
}

fn check_cpus(kvm: &Kvm, wanted: u32) -> Result<(), Error> {
    let max = u32::try_from(kvm.get_max_vcpus()).unwrap_or(u32::MAX).min(layout::CPUS_MAX);
    if wanted > max { Err(Error::TooManyCpus { wanted, max }) } else { Ok(()) }
}

/// Makes the vCPUs, each paused on a thread of its own. `processors`: the host CPUs of `--vcpu-affinity`, one for each vCPU.
fn start_vcpus(
    setup: &VcpuSetup<'_>,
    start: &VcpuStart,
    processors: &[usize],
    spawn: &Spawn,
) -> Result<Vec<VcpuThread>, Error> {
    let mut processors = processors.chunks(1);
    let start = |index| {
        let vcpu = setup.create(index, start)?;
        affinity::start_on(processors.next().unwrap_or_default(), || VcpuThread::spawn(vcpu, spawn))
    };
    (0..setup.count).map(start).collect()
}
