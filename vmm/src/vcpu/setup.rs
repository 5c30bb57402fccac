//! Applies the register images of `arch::cpu` to a new vCPU.

use std::sync::Arc;

use arch::boot::Entry;
use arch::cpu;
use devices::bus::Bus;
use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};

use super::exits::Exits;
use super::initial::{InitialState, write_msrs};
use crate::error::Error;
use crate::events::EventSender;
use crate::timing::BootTiming;

/// A vCPU that is ready to run but belongs to no thread yet.
pub(crate) struct Vcpu {
    /// Its number, APIC id, and index in the guest's tables.
    pub index: u32,
    pub(super) fd: VcpuFd,
    initial: InitialState,
    legacy_pic: bool,
    pub(super) port_io: Arc<Bus>,
    pub(super) mmio: Arc<Bus>,
    pub(super) events: Arc<EventSender>,
    pub(super) exits: Arc<Exits>,
    /// Told of the first entry into the guest.
    pub(super) timing: Option<BootTiming>,
}

/// What all vCPUs of a VM share while they are made.
pub(crate) struct VcpuSetup<'a> {
    /// /dev/kvm.
    pub kvm: &'a Kvm,
    /// The VM, with its interrupt controllers.
    pub vm: &'a VmFd,
    /// How many vCPUs there will be.
    pub count: u32,
    /// The guest uses the 8259s: without ACPI.
    pub legacy_pic: bool,
    /// Port I/O devices.
    pub port_io: Arc<Bus>,
    /// Memory-mapped devices.
    pub mmio: Arc<Bus>,
    /// Where exits that end the VM are reported.
    pub events: Arc<EventSender>,
    /// Told when the boot vCPU first enters the guest.
    pub timing: &'a BootTiming,
}

impl VcpuSetup<'_> {
    /// Makes vCPU `index`, ready to start at `entry`.
    ///
    /// # Errors
    /// When KVM refuses an image.
    pub(crate) fn create(&self, index: u32, entry: &Entry) -> Result<Vcpu, Error> {
        let fd = self.vm.create_vcpu(u64::from(index)).map_err(Error::kvm("create a vCPU"))?;
        self.set_cpuid(&fd, index)?;
        let vcpu = Vcpu {
            index,
            initial: InitialState::of(self.kvm, &fd)?,
            legacy_pic: self.legacy_pic,
            fd,
            port_io: Arc::clone(&self.port_io),
            mmio: Arc::clone(&self.mmio),
            events: Arc::clone(&self.events),
            exits: Arc::default(),
            timing: (index == 0).then(|| self.timing.clone()),
        };
        vcpu.start_at(entry)?;
        Ok(vcpu)
    }

    fn set_cpuid(&self, fd: &VcpuFd, index: u32) -> Result<(), Error> {
        let supported =
            self.kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(Error::kvm("read the supported CPUID"))?;
        // KVM without a known TSC frequency says so by an error; the guest then measures it.
        let tsc_khz = fd.get_tsc_khz().ok().filter(|&khz| khz != 0);
        let tsc_deadline = self.kvm.check_extension(Cap::TscDeadlineTimer);
        let vcpu = cpu::cpuid::Vcpu { id: index, count: self.count, tsc_khz, tsc_deadline };
        let entries = cpu::cpuid::for_vcpu(supported.as_slice(), &vcpu);
        let cpuid = CpuId::from_entries(&entries).map_err(|_| Error::KvmLacks("room for our CPUID leaves"))?;
        fd.set_cpuid2(&cpuid).map_err(Error::kvm("set the CPUID"))
    }
}

impl Vcpu {
    /// Starts over: everything as when it was made.
    ///
    /// # Errors
    /// When KVM refuses.
    pub(super) fn reset(&self, entry: &Entry) -> Result<(), Error> {
        self.initial.restore(&self.fd)?;
        self.start_at(entry)
    }

    /// The boot vCPU (0) starts at `entry`; the others wait for the guest's INIT-SIPI-SIPI, for which KVM resets them
    /// itself (SDM 3A 9.4).
    fn start_at(&self, entry: &Entry) -> Result<(), Error> {
        let fd = &self.fd;
        write_msrs(fd, &cpu::msrs::boot())?;
        if self.index != 0 {
            return Ok(());
        }
        let (regs, sregs) = cpu::regs::boot(entry, self.initial.sregs);
        fd.set_sregs(&sregs).map_err(Error::kvm("set the special registers"))?;
        fd.set_regs(&regs).map_err(Error::kvm("set the registers"))?;
        fd.set_fpu(&cpu::regs::fpu()).map_err(Error::kvm("set the FPU"))?;
        let lapic = cpu::lapic::boot(self.initial.lapic, self.legacy_pic);
        fd.set_lapic(&lapic).map_err(Error::kvm("set the local APIC"))
    }
}
