//! The machine in its operator's hands: its vCPUs, disks and clock, and the one place that knows whether it runs.

use std::sync::{Arc, Mutex, PoisonError};

use devices::block::{BlockHandle, IoStatus};
use devices::bus::Bus;
use devices::disk::{Disk, Operation, Transfer};
use devices::virtio::mmio::MmioTransport;
use kvm_bindings::kvm_clock_data;
use kvm_ioctls::VmFd;
use serde_json::Value;
use vmm_sys_util::eventfd::EventFd;

use crate::GuestMemory;
use crate::chips::Chips;
use crate::config::DiskConfig;
use crate::control::{Event, Source};
use crate::error::Error;
use crate::firmware::{self, Firmware, in_file};
use crate::vcpu::VcpuHandle;

/// Whether the machine runs, and if not, why. The words are QMP's RunState.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Life {
    /// Not yet started.
    Prelaunch,
    /// Stopped by its operator.
    Paused,
    /// Running.
    Running,
    /// Stopped by a disk's error policy.
    IoError,
}

/// A disk of the machine.
pub(crate) struct MachineDisk {
    /// As the user asked for it.
    pub config: DiskConfig,
    /// The device's control end.
    pub handle: BlockHandle,
    /// The opened image.
    pub image: Arc<dyn Disk>,
    /// The device behind its registers.
    pub transport: Arc<Mutex<MmioTransport>>,
}

/// What a machine is made of.
pub(crate) struct Parts {
    /// By index.
    pub vcpus: Vec<VcpuHandle>,
    /// In order: `/dev/vda` first.
    pub disks: Vec<MachineDisk>,
    /// All devices, those disks included.
    pub buses: [Arc<Bus>; 2],
    /// Guest RAM.
    pub memory: GuestMemory,
    /// KVM's side of the VM, which lives as long as its descriptors.
    pub vm: Arc<VmFd>,
    /// Its chips' state at power-on.
    pub chips: Chips,
    /// What the guest starts from.
    pub firmware: Firmware,
    /// An edge on the ACPI power button's interrupt line.
    pub power_button: EventFd,
}

/// Owns every thread and resource of the machine but the console.
pub(crate) struct Machine {
    /// What it is made of.
    pub parts: Parts,
    life: Life,
    /// The guest's clock while the machine is paused.
    clock: Option<kvm_clock_data>,
    /// Messages for control clients, oldest first.
    news: Vec<Value>,
}

impl Machine {
    /// A machine that has not run yet.
    pub(crate) fn new(parts: Parts) -> Self {
        Self { parts, life: Life::Prelaunch, clock: None, news: Vec::new() }
    }

    /// Whether the machine runs.
    pub(crate) fn life(&self) -> Life {
        self.life
    }

    /// Lets the guest run. Disks first, with the requests that the error policy kept: nothing the guest does may overtake
    /// them.
    pub(crate) fn resume(&mut self) {
        if self.life != Life::Running {
            self.run();
            self.announce(&Event::Resume);
        }
    }

    fn run(&mut self) {
        if let Some(clock) = self.clock.take() {
            // The guest's clock goes on where it stood (`api.rst` 4.30 KVM_SET_CLOCK).
            let clock = kvm_clock_data { clock: clock.clock, ..Default::default() };
            if let Err(error) = self.parts.vm.set_clock(&clock) {
                tracing::warn!(%error, "the guest's clock could not be set back");
            }
        }
        for disk in &self.parts.disks {
            disk.handle.resume();
        }
        for vcpu in &self.parts.vcpus {
            vcpu.resume();
        }
        self.life = Life::Running;
    }

    /// Stops the guest for the reason `life`. On return all vCPUs are out of the guest and no request is in flight: the
    /// machine's state stands still, in memory and on the disks.
    ///
    /// # Errors
    /// A vCPU does not leave the guest; the VM cannot go on.
    pub(crate) fn pause(&mut self, life: Life) -> Result<(), Error> {
        if self.life != Life::Running {
            return Ok(());
        }
        self.pause_vcpus()?;
        self.clock = self.parts.vm.get_clock().ok();
        for disk in &self.parts.disks {
            disk.handle.pause();
        }
        self.life = life;
        self.announce(&Event::Stop);
        Ok(())
    }

    fn pause_vcpus(&self) -> Result<(), Error> {
        self.parts.vcpus.iter().for_each(VcpuHandle::pause);
        self.parts.vcpus.iter().try_for_each(VcpuHandle::wait_paused)
    }

    /// Starts the guest over, as the reset button does: disks drained, all devices, chips and vCPUs as at power-on, RAM empty
    /// but for what the firmware puts there. A machine that stood still goes on doing that, ready to start.
    ///
    /// # Errors
    /// A vCPU does not leave the guest, KVM refuses a state, or the kernel's files cannot be read any more; the VM cannot go
    /// on.
    pub(crate) fn reset(&mut self) -> Result<(), Error> {
        let runs = self.life == Life::Running;
        if runs {
            self.pause_vcpus()?;
        }
        let Parts { vcpus, buses, memory, vm, chips, firmware, .. } = &self.parts;
        // The disks' threads leave guest memory alone after this, and nothing raises an interrupt any more.
        buses.iter().for_each(|bus| bus.reset());
        chips.restore(vm)?;
        firmware::clear_memory(memory)?;
        let entry = firmware.load(memory)?;
        vcpus.iter().try_for_each(|vcpu| vcpu.reset(&entry))?;
        // The guest's clock starts at 0 again.
        self.clock = Some(kvm_clock_data::default());
        self.life = Life::Prelaunch;
        self.announce(&Event::Reset(Source::QMP_RESET));
        if runs {
            self.run();
        }
        Ok(())
    }

    /// Lets somebody write the kernel's file, after the guest was given copies of its pages. It stands still for that.
    ///
    /// # Errors
    /// A vCPU does not leave the guest, or the host has no memory left; the VM cannot go on.
    pub(crate) fn let_kernel_file_go(&mut self) -> Result<(), Error> {
        let runs = self.life == Life::Running;
        if runs {
            self.pause_vcpus()?;
            self.parts.disks.iter().for_each(|disk| disk.handle.pause());
        }
        let Parts { firmware, memory, .. } = &self.parts;
        firmware.kernel.let_go(memory).map_err(in_file("--kernel", &firmware.config.kernel))?;
        if runs {
            self.run();
        }
        Ok(())
    }

    /// An error policy wants the machine stopped.
    pub(crate) fn disk_in_trouble(&self) -> bool {
        self.parts.disks.iter().any(|disk| disk.handle.io_status() != IoStatus::Ok)
    }

    /// What control clients call the disk that we call `name`.
    pub(crate) fn qmp_name(&self, name: &str) -> String {
        let disk = self.parts.disks.iter().find(|disk| disk.handle.name() == name);
        disk.map_or(name, |disk| &disk.config.id).to_owned()
    }

    /// Keeps `event` for the control clients.
    pub(crate) fn announce(&mut self, event: &Event) {
        self.news.push(event.message());
    }

    /// The events since the last call, oldest first.
    pub(crate) fn take_news(&mut self) -> Vec<Value> {
        std::mem::take(&mut self.news)
    }

    /// Ends the machine: stops the vCPUs, drains and flushes the disks. After this no request is in flight and everything
    /// the guest wrote is durable, as it would be on a machine that is switched off properly.
    ///
    /// # Errors
    /// A vCPU does not leave the guest, or a disk could not be flushed.
    pub(crate) fn end(self) -> Result<(), Error> {
        self.parts.vcpus.iter().for_each(VcpuHandle::pause);
        // Each is joined even when one before it fails.
        let stopped = self.parts.vcpus.into_iter().map(VcpuHandle::join).fold(Ok(()), Result::and);
        // A vCPU that is left behind still has the guest's memory.
        stopped.inspect_err(|_| std::mem::forget(self.parts.memory.clone()))?;
        for disk in &self.parts.disks {
            disk.transport.lock().unwrap_or_else(PoisonError::into_inner).stop();
        }
        for disk in self.parts.disks.iter().filter(|disk| !disk.image.read_only()) {
            flush(&disk.image, &self.parts.memory)?;
        }
        Ok(())
    }
}

fn flush(image: &Arc<dyn Disk>, memory: &GuestMemory) -> Result<(), Error> {
    let mut engine = Arc::clone(image).engine(memory.clone(), 1).map_err(Error::host("flush a disk at the end"))?;
    let mut done = Vec::with_capacity(1);
    engine.submit(Transfer { tag: 0, operation: Operation::Flush, offset: 0, length: 0, ranges: &[] });
    engine.commit();
    engine.drain(&mut done);
    match done.into_iter().find_map(|completion| completion.result.err()) {
        None => Ok(()),
        Some(error) => Err(Error::Stopped(format!("a disk could not be flushed at the end: {error}"))),
    }
}
