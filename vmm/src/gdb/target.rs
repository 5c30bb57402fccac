//! Carries out the debugger's requests on vCPUs that stand still, and on guest memory at their virtual addresses.
//!
//! The machine owns its vCPUs. The server moves them into [`Target`] for each call, because the protocol's state outlives a call and
//! cannot borrow them. A request to go on only prepares the vCPUs and sets [`Target::goes_on`]; the server stops and resumes the machine.

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

/// Most bytes of memory that one packet may read: in hexadecimal they fill the longest reply. `gdbstub` has no limit: a short request for
/// all of guest memory would need twice as much host memory, and block the main loop.
const READ_MAX: usize = 2048;

/// More than a user sets, and few enough to search through at each stop.
const SOFTWARE_BREAKPOINTS_MAX: usize = 1024;

pub(super) type Reason = MultiThreadStopReason<u64>;

/// What a vCPU does when the machine goes on.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Action {
    /// The debugger has named no action for it: it goes on, or stays stopped if the scheduler is locked.
    Default,
    Continue,
    Step,
}

pub(super) struct Target {
    /// The machine's vCPUs during a call, and empty otherwise.
    pub(super) vcpus: Vec<VcpuThread>,
    memory: GuestMemory,
    breakpoints: Breakpoints,
    actions: Vec<Action>,
    /// Only the vCPUs that have an action go on.
    locked: bool,
    /// The debugger wants the machine to go on, and the vCPUs are prepared.
    pub(super) goes_on: bool,
    /// The vCPU of the last stop. Its page tables translate addresses that come without a thread.
    current: usize,
    /// KVM can block interrupts during a single step (KVM_GUESTDBG_BLOCKIRQ).
    blocks_interrupts: bool,
    /// Bytes of memory that the current packet has read.
    pub(super) read: usize,
}

/// The thread number of a vCPU. GDB's numbers begin with 1.
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

    /// Called at a reset of the machine: its new memory has none of the INT3s.
    pub(super) fn forget_software_breakpoints(&mut self) {
        self.breakpoints.software.clear();
    }

    /// The stop reason for a signal to the vCPU of the last stop.
    pub(super) fn signal(&self, signal: Signal) -> Reason {
        Reason::SignalWithThread { tid: thread(self.current), signal }
    }

    /// Returns why the vCPUs have stopped (`None`: not because of the debugger), and whether KVM will deliver the #BP of a guest's own
    /// INT3. In that case call [`Self::prepare`] before the guest goes on. If several vCPUs have met a breakpoint, only the first is
    /// reported: the others will meet theirs again.
    ///
    /// # Errors
    /// KVM refuses to deliver a #BP.
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

    /// Removes breakpoints, steps and locks, because the debugger has disconnected.
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
        // An exit that was not reported to a debugger may be a guest's own INT3, which has to be delivered.
        self.take_reason().map(drop)
    }

    /// Sets in KVM what each vCPU stops for, and which vCPUs stay out of the guest.
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

    /// Runs `act` on a vCPU. If the vCPU is in the guest or `act` fails, only this request of the debugger fails.
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

    /// The guest-physical address of a virtual one, and the number of bytes from there to the end of the page.
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

    /// Puts a hardware breakpoint or a watchpoint into a debug register. Returns false if none is free.
    fn add_register(&mut self, wanted: HardwareBreakpoint) -> TargetResult<bool, Self> {
        if let Some(address) = self.breakpoints.give_up_register()
            && !matches!(self.insert_int3(address), Ok(true))
        {
            self.breakpoints.add_hardware(HardwareBreakpoint::software(address));
        }
        Ok(self.breakpoints.add_hardware(wanted))
    }

    /// Writes back the byte that INT3 has replaced, unless the guest has overwritten the INT3.
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

/// Why a vCPU left the guest, for the exits that a debugger handles.
enum Exit {
    Debug(kvm_debug_exit_arch),
    /// KVM cannot emulate the instruction at this address. On a KVM without hardware virtualization, that may be an INT3.
    NotEmulated(u64),
}

/// Takes the reason of the last exit out of `kvm_run`, so that each exit is reported once.
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

/// Injects the #BP of the guest's own INT3, which KVM reported to minivmm instead (`api.rst` 4.87 KVM_SET_GUEST_DEBUG).
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

    /// Reads up to the first page that is not mapped. `gdbstub` splits a long request into several calls, which together may read
    /// [`READ_MAX`] bytes.
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
            // After a reset, an INT3 is no longer in the list.
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
