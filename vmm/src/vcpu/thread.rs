//! The thread of a vCPU, and the handle by which the machine controls it.
//!
//! The machine gives an order and does not wait. The thread carries the order out, and wakes the main loop when the vCPU has left the
//! guest. While the vCPU is paused, the [`Vcpu`] lies in the shared state, where the main thread can read and change it
//! ([`VcpuThread::with_paused`]). `Machine` has the deadline for leaving the guest.
//!
//! | state | order or event | next state |
//! |---|---|---|
//! | `Paused` | `resume` | `Running` |
//! | `Running` | `pause` and the kick | `Paused`: the device access that the guest was in is complete |
//! | `Running` | triple fault, KVM error, panic: reported as a `VmEvent` | `Finished` |
//! | `Paused`, `Running` | `finish` | `Finished` |
//!
//! An order to leave the guest sets `Shared::leave`, sends the kick (a signal) if the vCPU is `Running`, and unparks the thread. So the
//! thread notices the order wherever it is:
//!
//! - before `run`: `run` reads `leave` after the kick's handler knows the kvm_run page, and sets `immediate_exit`;
//! - outside KVM_RUN: the handler sets `immediate_exit`, and the next KVM_RUN returns EINTR at once;
//! - inside KVM_RUN: the signal makes it return EINTR;
//! - waiting for a device's drain: the thread is unparked, reads `leave`, and makes KVM_RUN complete the write without entering the
//!   guest.
//!
//! After each EINTR, `run` reads `leave`.

use std::cell::{Cell, LazyCell};
use std::io;
use std::os::unix::thread::JoinHandleExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use devices::spawn::Spawn;
use kvm_bindings::kvm_run;
use vmm_sys_util::signal::{register_signal_handler, unblock_signal};

use super::exits::Exits;
use super::setup::Vcpu;
use crate::error::{Error, VcpuError};
use crate::events::VmEvent;
use crate::lock;

/// The signal that takes a vCPU out of KVM_RUN. A standard signal is delivered even if the user's limit of queued signals
/// (RLIMIT_SIGPENDING) is reached. Processes ignore this one by default, so it does no harm if another process sends it.
const KICK: libc::c_int = libc::SIGURG;

enum ThreadState {
    Paused(Box<Vcpu>),
    Running,
    /// It cannot run any more. The vCPU can be read until the thread ends.
    Finished(Option<Box<Vcpu>>),
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Order {
    Pause,
    Run,
    Finish,
}

struct Shared {
    state: Mutex<(ThreadState, Order)>,
    /// Whether the order is not `Run`. The vCPU's loop reads it without the lock, before KVM_RUN and after a kick.
    leave: AtomicBool,
}

/// A vCPU and its thread, `vcpu-N`. Every method but [`VcpuThread::finish`] returns at once. The lock of the state is not held while
/// the vCPU is in the guest or while a kick is sent.
pub(crate) struct VcpuThread {
    index: u32,
    /// The host's number for the thread, as in `/proc/PID/task`. The first use waits until the thread has begun.
    pub(crate) id: LazyCell<i32, Box<dyn FnOnce() -> i32>>,
    pub(crate) exits: Arc<Exits>,
    pub(super) thread: JoinHandle<()>,
    shared: Arc<Shared>,
    /// A debugger holds this vCPU: it stays outside the guest when the machine goes on.
    pub(crate) held: bool,
}

impl VcpuThread {
    /// Starts the thread with `vcpu` paused on it.
    ///
    /// # Errors
    /// When the host cannot start a thread.
    pub(crate) fn spawn(vcpu: Vcpu, spawn: &Spawn) -> Result<Self, Error> {
        let (index, exits) = (vcpu.index, Arc::clone(&vcpu.exits));
        let shared = Arc::new(Shared {
            state: Mutex::new((ThreadState::Paused(Box::new(vcpu)), Order::Pause)),
            leave: AtomicBool::new(true),
        });
        let (send_id, id) = std::sync::mpsc::channel();
        let on_thread = Arc::clone(&shared);
        let body = move || {
            let _ = send_id.send(rustix::thread::gettid().as_raw_nonzero().get());
            serve(&on_thread);
        };
        let thread = spawn(format!("vcpu-{index}"), Box::new(body))
            .map_err(Error::host("start a vCPU thread"))?;
        let id = LazyCell::new(Box::new(move || id.recv().unwrap_or_default()) as Box<_>);
        Ok(Self { index, id, exits, thread, shared, held: false })
    }

    pub(crate) fn resume(&self) {
        if !self.held {
            self.order(Order::Run);
        }
    }

    /// Tells the vCPU to leave the guest. `has_left` is true when it has.
    pub(crate) fn pause(&self) {
        self.order(Order::Pause);
    }

    /// Whether the vCPU is outside the guest, and has completed its last device access, so that its registers can be read.
    pub(crate) fn has_left(&self) -> bool {
        !matches!(lock(&self.shared.state).0, ThreadState::Running)
    }

    /// Calls `act` with the vCPU, which has left the guest, on the caller's thread.
    ///
    /// # Errors
    /// Those of `act`, or the vCPU is in the guest.
    pub(crate) fn with_paused<T>(
        &self,
        act: impl FnOnce(&mut Vcpu) -> Result<T, Error>,
    ) -> Result<T, Error> {
        match &mut lock(&self.shared.state).0 {
            ThreadState::Paused(vcpu) | ThreadState::Finished(Some(vcpu)) => act(vcpu),
            ThreadState::Running => Err(self.failed(VcpuError::Running)),
            ThreadState::Finished(None) => Err(self.failed(VcpuError::Ended)),
        }
    }

    /// Ends the thread of a vCPU that has left the guest, and waits for it.
    pub(crate) fn finish(self) {
        self.order(Order::Finish);
        // The thread reports its own panic.
        let _ = self.thread.join();
    }

    pub(crate) fn failed(&self, source: VcpuError) -> Error {
        Error::Vcpu { index: self.index, source }
    }

    fn order(&self, order: Order) {
        let leave = order != Order::Run;
        self.shared.leave.store(leave, Ordering::Release);
        lock(&self.shared.state).1 = order;
        if leave && !self.has_left() {
            self.kick();
        }
        // It may wait for an order, or for a device's drain (`Vcpu::run_once`).
        self.thread.thread().unpark();
    }

    #[expect(unsafe_code, reason = "pthread_kill has no safe wrapper that reports its error")]
    fn kick(&self) {
        // SAFETY: the thread has not been joined, so its pthread_t is valid.
        let error = unsafe { libc::pthread_kill(self.thread.as_pthread_t(), KICK) };
        if error != 0 {
            let error = io::Error::from_raw_os_error(error);
            tracing::error!("vCPU {} cannot be taken out of the guest: {error}", self.index);
        }
    }
}

/// The thread's body: carries out the orders until `Finish`.
fn serve(shared: &Shared) {
    // The parent process may have blocked the signal, and threads inherit the mask. The call fails only for numbers that are
    // no signals.
    let _ = unblock_signal(KICK);
    while let Some(mut vcpu) = next_run(shared) {
        let (index, events) = (vcpu.index, Arc::clone(&vcpu.events));
        KVM_RUN_PAGE.set(ptr::from_mut(vcpu.fd.get_kvm_run()));
        let ran = catch_unwind(AssertUnwindSafe(|| vcpu.run(&shared.leave)));
        KVM_RUN_PAGE.set(ptr::null_mut());
        let can_go_on = ran.unwrap_or_else(|_| {
            events.send(VmEvent::Failed(Error::Vcpu { index, source: VcpuError::Panicked }));
            false
        });
        lock(&shared.state).0 =
            if can_go_on { ThreadState::Paused(vcpu) } else { ThreadState::Finished(Some(vcpu)) };
        events.wake();
    }
    lock(&shared.state).0 = ThreadState::Finished(None);
}

/// Waits for the order to run, and takes the vCPU. `None`: the thread is to end.
fn next_run(shared: &Shared) -> Option<Box<Vcpu>> {
    loop {
        let mut state = lock(&shared.state);
        match state.1 {
            Order::Finish => return None,
            Order::Pause => {}
            Order::Run => match std::mem::replace(&mut state.0, ThreadState::Running) {
                ThreadState::Paused(vcpu) => return Some(vcpu),
                // The vCPU cannot run any more. The thread waits for `Finish`.
                other => state.0 = other,
            },
        }
        drop(state);
        std::thread::park();
    }
}

thread_local! {
    /// The kvm_run page of the vCPU that this thread is running, for the signal handler.
    static KVM_RUN_PAGE: Cell<*mut kvm_run> = const { Cell::new(ptr::null_mut()) };
}

/// Installs the handler of the signal that takes a vCPU out of KVM_RUN. Once for the process, before the first vCPU.
///
/// # Errors
/// When the host refuses the handler.
pub(crate) fn install_kick_handler() -> io::Result<()> {
    register_signal_handler(KICK, leave_guest).map_err(io::Error::from)
}

/// The handler of the kick. The signal itself makes a KVM_RUN that is under way return EINTR. One that is about to begin returns at once
/// by `immediate_exit` (`api.rst`, 5 "immediate_exit").
#[expect(unsafe_code, reason = "a signal handler reaches the kvm_run page by a raw pointer")]
extern "C" fn leave_guest(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let page = KVM_RUN_PAGE.get();
    if !page.is_null() {
        // SAFETY: the pointer is to the mapping of the vCPU that this thread is running, and is cleared before the vCPU is
        // given away or dropped. KVM reads the byte at its next entry; nothing in this thread holds a reference to it across
        // a signal.
        unsafe { ptr::write_volatile(&raw mut (*page).immediate_exit, 1) };
    }
}
