//! What the debugger's requests act on: vCPUs that stand still, and guest memory as they see it.
//!
//! The machine owns its vCPUs. For the length of a call the server moves them in here, so that the protocol's state may outlive
//! the call. Starting and stopping is the server's: a request to go on only prepares the vCPUs and sets [`Target::goes_on`].

use std::mem;

use gdbstub::common::{Signal, Tid};
use gdbstub::stub::MultiThreadStopReason;
use gdbstub::target::ext::base::BaseOps;
use gdbstub::target::ext::base::multithread::{
    MultiThreadBase, MultiThreadResume, MultiThreadResumeOps, MultiThreadSchedulerLocking,
    MultiThreadSchedulerLockingOps, MultiThreadSingleStep, MultiThreadSingleStepOps,
};
use gdbstub::target::ext::breakpoints::{
    self as ext, BreakpointsOps, HwBreakpointOps, HwWatchpointOps, SwBreakpointOps, WatchKind,
};
use gdbstub::target::{TargetError, TargetResult};
use gdbstub_arch::x86::X86_64_SSE;
use gdbstub_arch::x86::reg::X86_64CoreRegs;
use kvm_bindings::{
    KVM_EXIT_DEBUG, KVM_EXIT_INTERNAL_ERROR, KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_INJECT_BP,
    KVM_GUESTDBG_USE_SW_BP, kvm_debug_exit_arch,
};
use vm_memory::{Bytes, GuestAddress};

use super::breakpoints::{Breakpoints, HardwareBreakpoint, INT3, Met, SoftwareBreakpoint};
use super::registers;
use crate::GuestMemory;
use crate::error::Error;
use crate::vcpu::{Vcpu, VcpuThread};

const PAGE_SIZE: u64 = 0x1000;

/// Bytes of memory that a packet may ask for: their digits fill the longest reply. `gdbstub` has no limit, so that a short request
/// would take twice as much memory of the host as the guest has, and hold the main loop for as long.
const READ_MAX: usize = 2048;

/// More than a person sets, and few enough to search at each stop.
const SOFTWARE_BREAKPOINTS_MAX: usize = 1024;

pub(super) type Reason = MultiThreadStopReason<u64>;

/// What the debugger wants of a vCPU when the machine goes on.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Action {
    /// What it wants of all: to go on, or to stay, if it locks the scheduler.
    Default,
    Continue,
    Step,
}

pub(super) struct Target {
    /// The machine's during a call, none otherwise.
    pub(super) vcpus: Vec<VcpuThread>,
    memory: GuestMemory,
    breakpoints: Breakpoints,
    actions: Vec<Action>,
    /// Only the vCPUs that have an action go on.
    locked: bool,
    /// The debugger wants the machine to go on, and the vCPUs are prepared.
    pub(super) goes_on: bool,
    /// The vCPU of the last stop: it translates addresses that come without a thread.
    current: usize,
    /// KVM can keep interrupts away from a single step.
    blocks_interrupts: bool,
    /// Bytes of memory that the packet at hand has asked for.
    pub(super) read: usize,
}

/// The thread of a vCPU: numbers begin with 1.
fn thread(vcpu: usize) -> Tid {
    Tid::MIN.saturating_add(vcpu)
}

impl Target {
    pub(super) fn new(memory: GuestMemory, vcpus: usize, blocks_interrupts: bool) -> Self {
        Self {
            vcpus: Vec::new(),
            memory,
            breakpoints: Breakpoints::default(),
            actions: vec![Action::Default; vcpus],
            locked: false,
            goes_on: false,
            current: 0,
            blocks_interrupts,
            read: 0,
        }
    }

    /// The machine is reset: its memory has no INT3 of ours any more.
    pub(super) fn forget_software_breakpoints(&mut self) {
        self.breakpoints.software.clear();
    }

    /// The vCPU of the last stop has got this signal.
    pub(super) fn signal(&self, signal: Signal) -> Reason {
        Reason::SignalWithThread { tid: thread(self.current), signal }
    }

    /// Why the vCPUs have stopped. `None`: no vCPU met anything of the debugger's; a guest's own INT3 is delivered to it when it goes
    /// on, which [`Self::prepare`] has to come before. A second vCPU that met a breakpoint will meet it again.
    ///
    /// # Errors
    /// KVM refuses to deliver.
    pub(super) fn take_reason(&mut self) -> Result<(Option<Reason>, bool), Error> {
        let (mut reason, mut delivered) = (None, false);
        for (index, vcpu) in self.vcpus.iter_mut().enumerate() {
            vcpu.held = false;
            let tid = thread(index);
            let found = match vcpu.with_paused(|vcpu| Ok(take_exit(vcpu)))? {
                Some(Exit::Debug(exit)) => self.breakpoints.met(&exit),
                Some(Exit::NotEmulated(address)) if self.breakpoints.is_int3(address) => {
                    Some(Met::Software)
                }
                Some(Exit::NotEmulated(_)) => Some(Met::NotEmulated),
                None => continue,
            };
            let met = match found {
                Some(Met::Foreign) => {
                    vcpu.with_paused(deliver_breakpoint)?;
                    delivered = true;
                    continue;
                }
                Some(Met::Software) => Reason::SwBreak(tid),
                Some(Met::Hardware) => Reason::HwBreak(tid),
                Some(Met::Watch(addr, kind)) => Reason::Watch { tid, kind, addr },
                Some(Met::NotEmulated) => Reason::SignalWithThread { tid, signal: Signal::SIGILL },
                Some(Met::Step) | None => Reason::SignalWithThread { tid, signal: Signal::SIGTRAP },
            };
            if reason.is_none() {
                self.current = index;
                reason = Some(met);
            }
        }
        Ok((reason, delivered))
    }

    /// The debugger goes away: nothing of it is left in the guest.
    ///
    /// # Errors
    /// KVM or guest memory refuses.
    pub(super) fn clear(&mut self) -> Result<(), Error> {
        while let Some(breakpoint) = self.breakpoints.software.pop() {
            self.put_back(&breakpoint);
        }
        self.breakpoints.hardware.clear();
        self.actions.fill(Action::Default);
        self.locked = false;
        self.prepare()?;
        self.goes_on = false;
        for vcpu in &self.vcpus {
            vcpu.with_paused(|vcpu| {
                vcpu.debugged = false;
                Ok(())
            })?;
        }
        // An exit that no debugger saw.
        self.take_reason().map(drop)
    }

    /// Tells KVM what each vCPU is to stop for.
    ///
    /// # Errors
    /// KVM refuses.
    pub(super) fn prepare(&mut self) -> Result<(), Error> {
        for (vcpu, action) in self.vcpus.iter_mut().zip(&self.actions) {
            let steps = *action == Action::Step;
            let debug = self.breakpoints.guest_debug(steps, self.blocks_interrupts);
            vcpu.held = self.locked && *action == Action::Default;
            vcpu.with_paused(|vcpu| {
                vcpu.debugged = true;
                vcpu.fd.set_guest_debug(&debug).map_err(Error::kvm("set a vCPU's debug state"))
            })?;
        }
        self.goes_on = true;
        Ok(())
    }

    /// Runs `act` on the vCPU of a thread. A vCPU that is in the guest is an error that the debugger survives.
    fn with_vcpu<T>(
        &self,
        vcpu: usize,
        act: impl FnOnce(&mut Vcpu) -> Result<T, Error>,
    ) -> TargetResult<T, Self> {
        let vcpu = self.vcpus.get(vcpu).ok_or(TargetError::NonFatal)?;
        vcpu.with_paused(act).map_err(|error| {
            tracing::debug!(%error, "--gdb");
            TargetError::NonFatal
        })
    }

    /// The guest-physical address of a virtual one, and how many bytes its page has from there.
    fn translate(&self, vcpu: usize, address: u64) -> TargetResult<(GuestAddress, usize), Self> {
        let found = self.with_vcpu(vcpu, |vcpu| {
            vcpu.fd.translate_gva(address).map_err(Error::kvm("translate an address"))
        })?;
        let rest = PAGE_SIZE - address % PAGE_SIZE;
        match found.valid {
            0 => Err(TargetError::NonFatal),
            _ => Ok((GuestAddress(found.physical_address), rest as usize)),
        }
    }

    /// Returns false if there are too many.
    fn insert_int3(&mut self, address: u64) -> TargetResult<bool, Self> {
        if self.breakpoints.is_int3(address) {
            return Ok(true);
        }
        if self.breakpoints.software.len() == SOFTWARE_BREAKPOINTS_MAX {
            return Ok(false);
        }
        let (place, _) = self.translate(self.current, address)?;
        let original = self.memory.read_obj(place).map_err(|_| TargetError::NonFatal)?;
        self.memory.write_obj(INT3, place).map_err(|_| TargetError::NonFatal)?;
        let physical = place.0;
        self.breakpoints.software.push(SoftwareBreakpoint { address, physical, original });
        Ok(true)
    }

    /// For what has to have a debug register. Returns false if none is left.
    fn add_register(&mut self, wanted: HardwareBreakpoint) -> TargetResult<bool, Self> {
        if let Some(address) = self.breakpoints.give_up_register()
            && !matches!(self.insert_int3(address), Ok(true))
        {
            self.breakpoints.add_hardware(HardwareBreakpoint::software(address));
        }
        Ok(self.breakpoints.add_hardware(wanted))
    }

    /// Writes the byte that INT3 stands for, unless the guest has written something else over it.
    fn put_back(&self, breakpoint: &SoftwareBreakpoint) {
        let address = GuestAddress(breakpoint.physical);
        if matches!(self.memory.read_obj(address), Ok(INT3)) {
            let _ = self.memory.write_obj(breakpoint.original, address);
        }
    }

    fn set_action(&mut self, tid: Tid, action: Action) {
        if let Some(known) = self.actions.get_mut(tid.get() - 1) {
            *known = action;
        }
    }
}

/// Why a vCPU left the guest, if that is a debugger's business.
enum Exit {
    Debug(kvm_debug_exit_arch),
    /// KVM cannot emulate the instruction at this address. That may be INT3, where KVM has no hardware.
    NotEmulated(u64),
}

/// Tells each exit once.
#[expect(unsafe_code, reason = "the exit's details lie in a union of the kvm_run mapping")]
fn take_exit(vcpu: &mut Vcpu) -> Option<Exit> {
    let run = vcpu.fd.get_kvm_run();
    match mem::take(&mut run.exit_reason) {
        // SAFETY: the last exit was KVM_EXIT_DEBUG, so `debug` is the live member of the union.
        KVM_EXIT_DEBUG => Some(Exit::Debug(unsafe { run.__bindgen_anon_1.debug.arch })),
        KVM_EXIT_INTERNAL_ERROR => {
            let base = vcpu.fd.get_sregs().map_or(0, |sregs| sregs.cs.base);
            let rip = vcpu.fd.get_regs().map_or(0, |regs| regs.rip);
            Some(Exit::NotEmulated(base.wrapping_add(rip)))
        }
        _ => None,
    }
}

/// Lets the guest have the #BP of its own INT3, which KVM gave to us (`api.rst` 4.87 KVM_SET_GUEST_DEBUG).
fn deliver_breakpoint(vcpu: &mut Vcpu) -> Result<(), Error> {
    let control = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_SW_BP | KVM_GUESTDBG_INJECT_BP;
    let debug = kvm_bindings::kvm_guest_debug { control, ..Default::default() };
    vcpu.fd.set_guest_debug(&debug).map_err(Error::kvm("deliver a guest's breakpoint"))
}

impl gdbstub::target::Target for Target {
    type Arch = X86_64_SSE;
    type Error = Error;

    fn base_ops(&mut self) -> BaseOps<'_, Self::Arch, Self::Error> {
        BaseOps::MultiThread(self)
    }

    fn support_breakpoints(&mut self) -> Option<BreakpointsOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadBase for Target {
    fn read_registers(&mut self, regs: &mut X86_64CoreRegs, tid: Tid) -> TargetResult<(), Self> {
        *regs = self.with_vcpu(tid.get() - 1, |vcpu| registers::read(vcpu))?;
        Ok(())
    }

    fn write_registers(&mut self, regs: &X86_64CoreRegs, tid: Tid) -> TargetResult<(), Self> {
        match self.with_vcpu(tid.get() - 1, |vcpu| registers::write(vcpu, regs))? {
            true => Ok(()),
            false => Err(TargetError::NonFatal),
        }
    }

    /// Reads up to the first page that is not mapped. A request for more than a packet takes comes here in several calls, and fails.
    fn read_addrs(&mut self, start: u64, data: &mut [u8], tid: Tid) -> TargetResult<usize, Self> {
        self.read = self.read.saturating_add(data.len());
        if self.read > READ_MAX {
            return Err(TargetError::NonFatal);
        }
        let mut done = 0;
        while done < data.len() {
            let place = self.translate(tid.get() - 1, start.wrapping_add(done as u64));
            let Ok((address, rest)) = place else { break };
            let end = data.len().min(done + rest);
            if self.memory.read_slice(&mut data[done..end], address).is_err() {
                break;
            }
            done = end;
        }
        if done == 0 && !data.is_empty() { Err(TargetError::NonFatal) } else { Ok(done) }
    }

    fn write_addrs(&mut self, start: u64, data: &[u8], tid: Tid) -> TargetResult<(), Self> {
        let mut done = 0;
        while done < data.len() {
            let (address, rest) = self.translate(tid.get() - 1, start.wrapping_add(done as u64))?;
            let end = data.len().min(done + rest);
            self.memory
                .write_slice(&data[done..end], address)
                .map_err(|_| TargetError::NonFatal)?;
            done = end;
        }
        Ok(())
    }

    fn list_active_threads(&mut self, is_active: &mut dyn FnMut(Tid)) -> Result<(), Error> {
        (0..self.actions.len()).map(thread).for_each(is_active);
        Ok(())
    }

    fn support_resume(&mut self) -> Option<MultiThreadResumeOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadResume for Target {
    fn resume(&mut self) -> Result<(), Error> {
        self.prepare()
    }

    fn clear_resume_actions(&mut self) -> Result<(), Error> {
        self.actions.fill(Action::Default);
        self.locked = false;
        Ok(())
    }

    fn set_resume_action_continue(&mut self, tid: Tid, _: Option<Signal>) -> Result<(), Error> {
        self.set_action(tid, Action::Continue);
        Ok(())
    }

    fn support_single_step(&mut self) -> Option<MultiThreadSingleStepOps<'_, Self>> {
        Some(self)
    }

    fn support_scheduler_locking(&mut self) -> Option<MultiThreadSchedulerLockingOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadSingleStep for Target {
    fn set_resume_action_step(&mut self, tid: Tid, _: Option<Signal>) -> Result<(), Error> {
        self.set_action(tid, Action::Step);
        Ok(())
    }
}

impl MultiThreadSchedulerLocking for Target {
    fn set_resume_action_scheduler_lock(&mut self) -> Result<(), Error> {
        self.locked = true;
        Ok(())
    }
}

impl ext::Breakpoints for Target {
    fn support_sw_breakpoint(&mut self) -> Option<SwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_breakpoint(&mut self) -> Option<HwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_watchpoint(&mut self) -> Option<HwWatchpointOps<'_, Self>> {
        Some(self)
    }
}

impl ext::SwBreakpoint for Target {
    fn add_sw_breakpoint(&mut self, address: u64, _kind: usize) -> TargetResult<bool, Self> {
        let register = HardwareBreakpoint::software(address);
        Ok(self.breakpoints.add_hardware(register) || self.insert_int3(address)?)
    }

    fn remove_sw_breakpoint(&mut self, address: u64, _kind: usize) -> TargetResult<bool, Self> {
        let software = &mut self.breakpoints.software;
        if let Some(place) = software.iter().position(|known| known.address == address) {
            let breakpoint = software.swap_remove(place);
            self.put_back(&breakpoint);
        } else {
            // One that a reset has removed is gone already.
            self.breakpoints.remove_hardware(HardwareBreakpoint::software(address));
        }
        Ok(true)
    }
}

impl ext::HwBreakpoint for Target {
    fn add_hw_breakpoint(&mut self, address: u64, _kind: usize) -> TargetResult<bool, Self> {
        self.add_register(HardwareBreakpoint::execution(address))
    }

    fn remove_hw_breakpoint(&mut self, address: u64, _kind: usize) -> TargetResult<bool, Self> {
        Ok(self.breakpoints.remove_hardware(HardwareBreakpoint::execution(address)))
    }
}

impl ext::HwWatchpoint for Target {
    fn add_hw_watchpoint(
        &mut self,
        address: u64,
        bytes: u64,
        kind: WatchKind,
    ) -> TargetResult<bool, Self> {
        let watch = HardwareBreakpoint::watch(address, bytes, kind);
        watch.map_or(Ok(false), |watch| self.add_register(watch))
    }

    fn remove_hw_watchpoint(
        &mut self,
        address: u64,
        bytes: u64,
        kind: WatchKind,
    ) -> TargetResult<bool, Self> {
        let watch = HardwareBreakpoint::watch(address, bytes, kind);
        Ok(watch.is_some_and(|watch| self.breakpoints.remove_hardware(watch)))
    }
}
