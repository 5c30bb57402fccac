//! Confinement: a guest that takes over a thread of minivmm can do little more with it than the thread does itself.
//!
//! Before the guest's first instruction, every thread gives up these rights for good:
//!
//! - Privileges: it has no capability and gains nothing by execve(2) (`privileges`). With `--user` it runs as that user.
//! - Paths: Landlock does not let it open, create or list any file, or connect to anything. All that the machine uses is open by then.
//!   There are two exceptions: it may remove files in the directories of the machine's own sockets, and save to `--save-directory`.
//! - System calls: each kind of thread has a seccomp filter (`filters`). A call that is not on the list ends the VM (`violation`).
//! - Inspection: other processes of the same user cannot read its memory, because the process is not dumpable.
//!
//! The builder plugs this in. `snapshot::new_file` asks where it may save ([`check_save`]), and `explain` for the lists
//! ([`system_calls`]). The functions that [`Sandbox::spawn`] returns start threads, which confine themselves before their body runs. The
//! first threads start early, and wait for their bodies (`early`). [`Sandbox::source`] is the last source that the main loop begins to
//! watch before the guest runs: it waits until all other threads are confined, and then confines the main thread. If the host lacks a
//! part of this, one warning names it, and the other parts are used.

mod early;
mod filters;
mod inputs;
mod ioctls;
mod privileges;
mod violation;

#[cfg(test)]
pub(crate) mod tests;

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};

use devices::spawn::{self, Body, Spawn};
use rustix::io::Errno;
use rustix::process::{DumpableBehavior, set_dumpable_behavior};
use seccompiler::{BpfProgram, SeccompAction};

use self::early::EarlyThreads;
pub(crate) use self::filters::Kind;
use self::inputs::{Inputs, Needs, sockets};
use self::violation::Violations;
pub use self::violation::on_violation;
use crate::config::{SandboxMode, VmConfig};
use crate::error::{Cause, Error};
use crate::sources::Source;
use crate::{lock, thread_memory};

#[derive(Debug, thiserror::Error)]
#[error("bug in minivmm, please report it: the filters of --sandbox cannot be compiled")]
struct UncompiledFilter(#[source] Cause);

/// The directory that a confined process may save to. Not set: the process is not confined.
static SAVE: OnceLock<Option<PathBuf>> = OnceLock::new();

/// Checks that the process may save to `directory`. Returns whether it is confined.
///
/// # Errors
/// It is confined and may not save there.
pub(crate) fn check_save(directory: &Path) -> io::Result<bool> {
    let Some(allowed) = SAVE.get() else { return Ok(false) };
    let refused = |why| Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
    match allowed {
        None => refused(
            "the VM is confined and opens no files; use `minivmm ctl SOCKET save PATH`, hand a file over with getfd, or start the VM with --save-directory DIR"
                .to_owned(),
        ),
        Some(allowed) if allowed == directory => Ok(true),
        Some(allowed) => {
            refused(format!("the VM is confined and may save to {} only", allowed.display()))
        }
    }
}

/// The system calls that each kind of thread may make, for `--explain`. `None`: none is refused.
pub(crate) fn system_calls(config: &VmConfig) -> Option<Vec<(&'static str, Vec<String>)>> {
    let calls = |kind: Kind| {
        let calls = filters::allowed(kind, Needs::of(config)).into_iter();
        let shown = calls.map(|call| match call.condition {
            "" => call.name.to_owned(),
            condition => format!("{} ({condition})", call.name),
        });
        (kind.name(), shown.collect())
    };
    let exists = |kind: &Kind| *kind != Kind::Save || config.spawn;
    (config.sandbox == SandboxMode::On)
        .then(|| Kind::ALL.into_iter().filter(exists).map(calls).collect())
}

/// Tries on a thread of its own whether the process may become the user, and fails if not. A refusal later is only a warning.
fn try_user(user: (u32, u32)) -> Result<(), Error> {
    let thread = std::thread::Builder::new().stack_size(spawn::STACK);
    let thread = thread.spawn(move || privileges::become_user(user));
    let tried = thread.map_err(Error::host("start a thread"))?.join();
    tried.unwrap_or(Err(Errno::PERM)).map_err(|error| {
        let value = format!("{}:{}", user.0, user.1);
        let source = match error {
            Errno::PERM => {
                io::Error::other("only root becomes another user; start minivmm as root")
            }
            error => error.into(),
        };
        Error::Argument { option: "--user", value, source }
    })
}

/// The absolute path of the directory.
fn save_directory(path: &Path) -> Result<PathBuf, Error> {
    let listed = std::fs::read_dir(path).and_then(|_| std::path::absolute(path));
    listed.map_err(|source| {
        let value = path.display().to_string();
        Error::Argument { option: "--save-directory", value, source }
    })
}

/// The confinement of one process, or none with `--sandbox off`.
#[derive(Clone)]
pub(crate) struct Sandbox(Option<Arc<Rules>>);

struct Rules {
    inputs: Inputs,
    /// By `Kind`.
    filters: Vec<BpfProgram>,
    ruleset: Option<OwnedFd>,
    user: Option<(u32, u32)>,
    /// Number of threads that were started and are not confined yet.
    unconfined: Mutex<usize>,
    confined: Condvar,
    early: EarlyThreads,
    /// The parts of the confinement that this host lacks, of which a warning was printed.
    lacking: Mutex<Vec<&'static str>>,
}

impl Sandbox {
    /// Prepares the confinement that `config` asks for, and starts the first threads. Called before there is a second thread.
    ///
    /// # Errors
    /// `--user` or `--save-directory` cannot be used, the host is short of memory or descriptors, or a filter has a mistake.
    pub(crate) fn prepare(config: &VmConfig) -> Result<Self, Error> {
        let otherwise = match config.sandbox {
            SandboxMode::Off => return Ok(Self(None)),
            SandboxMode::On => SeccompAction::Trap,
            SandboxMode::Log => SeccompAction::Log,
        };
        privileges::use_one_heap();
        config.user.map_or(Ok(()), try_user)?;
        let inputs = Inputs::of(config);
        let compile = |kind: Kind| filters::compile(kind, inputs.needs, otherwise.clone());
        let filters = Kind::ALL.into_iter().map(compile).collect::<Result<_, _>>();
        let save = config.save_directory.as_deref();
        let save = save.map(save_directory).transpose()?;
        let ruleset = match privileges::no_paths(&sockets(config), save.as_deref()) {
            Ok(Some(ruleset)) => Some(ruleset),
            Ok(None) => {
                tracing::warn!("--sandbox: paths are not restricted (this host has no Landlock)");
                None
            }
            Err(error) => {
                if let Some(source) = privileges::shortage(&*error) {
                    return Err(Error::Host { what: "make a Landlock ruleset", source });
                }
                tracing::warn!(
                    "--sandbox: paths are not restricted (the host does not allow it): {error}"
                );
                None
            }
        };
        violation::install_handler();
        let _ = SAVE.set(save);
        let sandbox = Self(Some(Arc::new(Rules {
            inputs,
            filters: filters
                .map_err(|error| Error::Capability(UncompiledFilter(error.into()).into()))?,
            ruleset,
            user: config.user,
            unconfined: Mutex::new(0),
            confined: Condvar::new(),
            early: EarlyThreads::default(),
            lacking: Mutex::default(),
        })));
        let spawn = |kind| sandbox.spawn(kind);
        sandbox.0.iter().for_each(|rules| rules.early.start(config, spawn));
        Ok(sandbox)
    }

    /// Waits until the first threads are confined.
    pub(crate) fn wait(&self) {
        self.0.iter().for_each(|rules| rules.wait_for_threads());
    }

    /// Whether it is also the confinement of `config`: what it was made from may have changed while the process waited for a saved machine.
    /// The user and the paths of consoles, sockets and directories are those of the command line.
    pub(crate) fn fits(&self, config: &VmConfig) -> bool {
        self.0.as_ref().is_none_or(|rules| rules.inputs == Inputs::of(config))
    }

    /// The function that starts threads of this kind.
    pub(crate) fn spawn(&self, kind: Kind) -> Spawn {
        let plain = thread_memory::checked(spawn::plain());
        let Some(rules) = self.0.clone() else { return plain };
        Arc::new(move |name, body| {
            let body = match rules.early.begin(kind, &name, body) {
                Ok(thread) => return Ok(thread),
                Err(body) => body,
            };
            *lock(&rules.unconfined) += 1;
            let of_thread = Arc::clone(&rules);
            let confined: Body = Box::new(move || {
                of_thread.confine(kind, || ());
                of_thread.one_less();
                drop(of_thread);
                body();
            });
            plain(name, confined).inspect_err(|_| rules.one_less())
        })
    }

    /// The last source of the main loop. When the loop begins to watch it, it confines the main thread. It ends the machine after a
    /// forbidden system call. `user_has_changed` is called when the main thread has become the user of `--user`, and has no filter yet.
    ///
    /// # Errors
    /// When the host has no descriptor left.
    pub(crate) fn source(self, user_has_changed: fn()) -> Result<Option<Box<dyn Source>>, Error> {
        let Some(rules) = self.0 else { return Ok(None) };
        let confine = Box::new(move || rules.confine_main(user_has_changed));
        let violations = Violations::new(confine).map_err(Error::host("make an eventfd"))?;
        Ok(Some(Box::new(violations)))
    }
}

impl Rules {
    /// Confines the main thread, after all others are confined.
    fn confine_main(&self, user_has_changed: fn()) {
        self.early.end();
        self.wait_for_threads();
        // `cli` may have installed its handlers for the terminal since, one of them for SIGSYS.
        violation::install_handler();
        self.confine(Kind::Main, user_has_changed);
        tracing::debug!("all threads are confined");
    }

    /// Waits until all threads are confined.
    fn wait_for_threads(&self) {
        let waiting = |unconfined: &mut usize| *unconfined > 0;
        let waited = self.confined.wait_while(lock(&self.unconfined), waiting);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }

    /// Gives up all rights of the calling thread that its kind does not need.
    fn confine(&self, kind: Kind, user_has_changed: fn()) {
        violation::name_thread(kind);
        match self.user.map(privileges::become_user) {
            Some(Ok(())) => user_has_changed(),
            Some(Err(error)) => self.warn("the user stays the same", &error),
            None => {}
        }
        // The kernel changes it with the IDs (`fs.suid_dumpable` in sysctl), and the main thread is the last to change its own.
        if kind == Kind::Main
            && let Err(error) = set_dumpable_behavior(DumpableBehavior::NotDumpable)
        {
            self.warn("the process stays dumpable", &error);
        }
        if let Err(error) = privileges::drop_privileges() {
            self.warn("privileges stay", &error);
        }
        if let Some(Err(error)) = self.ruleset.as_ref().map(privileges::restrict) {
            self.warn("paths are not restricted", &error);
        }
        if let Some(filter) = self.filters.get(kind as usize)
            && let Err(error) = seccompiler::apply_filter(filter)
        {
            self.warn("system calls are not restricted", &error);
        }
    }

    /// Prints a warning once: what this host refuses to one thread, it refuses to all.
    fn warn(&self, what: &'static str, error: &dyn std::fmt::Display) {
        let mut lacking = lock(&self.lacking);
        if !lacking.contains(&what) {
            lacking.push(what);
            tracing::warn!("--sandbox: {what} (the host does not allow it): {error}");
        }
    }

    fn one_less(&self) {
        *lock(&self.unconfined) -= 1;
        self.confined.notify_all();
    }
}
