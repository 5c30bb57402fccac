//! A vCPU's thread as its owner sees it: started paused, told to run, paused again, and joined, each with a bound.

use std::cell::Cell;
use std::io;
use std::os::unix::thread::JoinHandleExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel, sync_channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use arch::boot::Entry;
use kvm_bindings::kvm_run;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use super::exits::Exits;
use super::setup::Vcpu;
use crate::error::Error;
use crate::events::VmEvent;

/// How long a vCPU may take to leave the guest and finish the device access it is in. A device access waits for the
/// host's disk only while the driver resets the device.
const LEAVE_BOUND: Duration = Duration::from_secs(10);

/// What the owner asks of a vCPU thread. When the channel closes, the thread ends.
enum Command {
    /// Enter the guest, until `attention` is set and the thread kicked.
    Run,
    /// Say so: whatever came before is over, and the vCPU is outside the guest.
    Acknowledge,
    /// Start over at this entry.
    Reset { entry: Entry, reply: SyncSender<Result<(), Error>> },
}

/// The thread `vcpu-N`.
#[derive(Debug)]
pub(crate) struct VcpuHandle {
    index: u32,
    thread_id: i32,
    exits: Arc<Exits>,
    thread: JoinHandle<()>,
    commands: Sender<Command>,
    /// The vCPU is to leave the guest and look at its commands. Written by the owner alone.
    attention: Arc<AtomicBool>,
    /// One for each `Command::Acknowledge`; closed when the thread is done.
    acknowledged: Receiver<()>,
}

impl VcpuHandle {
    /// Gives `vcpu` a thread, which waits for `resume`.
    ///
    /// # Errors
    /// When the host has no thread left.
    pub(crate) fn spawn(vcpu: Vcpu) -> Result<Self, Error> {
        let index = vcpu.index;
        let attention = Arc::new(AtomicBool::new(false));
        let (commands, received) = channel();
        let (acknowledge, acknowledged) = channel();
        let (tell_id, id) = channel();
        let flag = Arc::clone(&attention);
        let exits = Arc::clone(&vcpu.exits);
        let thread = thread::Builder::new()
            .name(format!("vcpu-{index}"))
            .spawn(move || {
                let _ = tell_id.send(rustix::thread::gettid().as_raw_nonzero().get());
                serve(vcpu, &received, &flag, &acknowledge);
            })
            .map_err(Error::host("start a vCPU thread"))?;
        let thread_id = id.recv().unwrap_or_default();
        Ok(Self { index, thread_id, exits, thread, commands, attention, acknowledged })
    }

    /// The host's number for the thread, as in `/proc/PID/task`.
    pub(crate) fn thread_id(&self) -> i32 {
        self.thread_id
    }

    /// How often the guest came back to us, so far.
    pub(crate) fn exits(&self) -> &Exits {
        &self.exits
    }

    /// Lets the vCPU enter the guest.
    pub(crate) fn resume(&self) {
        self.attention.store(false, Ordering::Release);
        self.send(Command::Run);
    }

    /// Asks the vCPU to leave the guest until `resume`; `wait_paused` waits for it.
    pub(crate) fn pause(&self) {
        self.send(Command::Acknowledge);
        self.attention.store(true, Ordering::Release);
        self.kick();
    }

    /// Waits until the vCPU has done what `pause` asked for. Its registers are then whole: no device access is half done.
    ///
    /// # Errors
    /// It does not leave within a bound.
    pub(crate) fn wait_paused(&self) -> Result<(), Error> {
        match self.acknowledged.recv_timeout(LEAVE_BOUND) {
            // A thread that has ended reported that itself, and is outside the guest.
            Ok(()) | Err(RecvTimeoutError::Disconnected) => Ok(()),
            Err(RecvTimeoutError::Timeout) => Err(self.stuck()),
        }
    }

    /// Brings a paused vCPU back to its start. Once resumed it enters the guest at `entry`.
    ///
    /// # Errors
    /// When KVM refuses, or the thread has ended.
    pub(crate) fn reset(&self, entry: &Entry) -> Result<(), Error> {
        let (reply, done) = sync_channel(1);
        self.send(Command::Reset { entry: *entry, reply });
        let gone = || Error::Stopped(format!("vCPU {} cannot be reset: its thread has ended", self.index));
        done.recv().unwrap_or_else(|_| Err(gone()))
    }

    /// Ends the thread, wherever it is, and waits for that within a bound.
    ///
    /// # Errors
    /// The vCPU does not leave the guest. Its thread is left behind, and guest memory must stay mapped.
    pub(crate) fn join(self) -> Result<(), Error> {
        self.attention.store(true, Ordering::Release);
        self.kick();
        let stuck = self.stuck();
        drop(self.commands);
        loop {
            match self.acknowledged.recv_timeout(LEAVE_BOUND) {
                Ok(()) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    // A panic was already reported by the thread.
                    let _ = self.thread.join();
                    return Ok(());
                }
                Err(RecvTimeoutError::Timeout) => return Err(stuck),
            }
        }
    }

    fn stuck(&self) -> Error {
        Error::Stopped(format!("vCPU {} did not leave the guest within {LEAVE_BOUND:?}", self.index))
    }

    fn send(&self, command: Command) {
        // Fails only when the thread has ended, which it reported itself.
        let _ = self.commands.send(command);
    }

    #[expect(unsafe_code, reason = "pthread_kill has no safe wrapper")]
    fn kick(&self) {
        // SAFETY: the thread has not been joined, so its pthread_t is valid. A thread that has already ended is ESRCH.
        unsafe { libc::pthread_kill(self.thread.as_pthread_t(), kick_signal()) };
    }
}

/// The thread's body: outside the guest it waits for commands.
fn serve(mut vcpu: Vcpu, commands: &Receiver<Command>, attention: &AtomicBool, acknowledge: &Sender<()>) {
    KICKABLE.set(ptr::from_mut(vcpu.fd.get_kvm_run()));
    let mut able = true;
    while let Ok(command) = commands.recv() {
        match command {
            Command::Run if able => {
                able = catch_unwind(AssertUnwindSafe(|| vcpu.run(attention))).unwrap_or_else(|_| {
                    vcpu.events.send(VmEvent::Failed(format!("vCPU {}: its thread panicked", vcpu.index)));
                    false
                });
            }
            Command::Run => {}
            Command::Acknowledge => {
                let _ = acknowledge.send(());
            }
            Command::Reset { entry, reply } => {
                let result = vcpu.reset(&entry);
                able = result.is_ok();
                let _ = reply.send(result);
            }
        }
    }
    KICKABLE.set(ptr::null_mut());
}

thread_local! {
    /// The kvm_run page of the vCPU that this thread runs, for the signal handler.
    static KICKABLE: Cell<*mut kvm_run> = const { Cell::new(ptr::null_mut()) };
}

fn kick_signal() -> libc::c_int {
    SIGRTMIN()
}

/// Installs the handler of the signal that takes a vCPU out of KVM_RUN. Once for the process, before the first vCPU.
///
/// # Errors
/// When the host refuses the handler.
pub(crate) fn prepare_kick_signal() -> io::Result<()> {
    register_signal_handler(kick_signal(), leave_guest).map_err(io::Error::from)
}

/// The signal interrupts a KVM_RUN under way by itself; `immediate_exit` covers one that is about to begin
/// (`api.rst`, 5 "immediate_exit").
#[expect(unsafe_code, reason = "a signal handler reaches the kvm_run page by a raw pointer")]
extern "C" fn leave_guest(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let run = KICKABLE.get();
    if !run.is_null() {
        // SAFETY: the pointer is to the mapping of this thread's own vCPU and is cleared before the vCPU is dropped. KVM
        // reads the byte at its next entry; nothing in this thread holds a reference to it across a signal.
        unsafe { ptr::write_volatile(&raw mut (*run).immediate_exit, 1) };
    }
}
