//! What a thread gives up besides system calls: its user, capabilities, privileges by execve(2), and every path.

#![expect(unsafe_code, reason = "mallopt and landlock_restrict_self")]

use std::error::Error as StdError;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use landlock::{
    ABI, Access, AccessFs, AccessNet, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, Scope,
};
use rustix::io::Errno;
use rustix::process::{Gid, Uid, parent_process_death_signal, set_parent_process_death_signal};
use rustix::thread::{
    CapabilitySet, CapabilitySets, set_capabilities, set_no_new_privs, set_thread_groups,
    set_thread_res_gid, set_thread_res_uid,
};

/// The newest version of Landlock whose restrictions are requested. A host with an older version applies those that it has.
const LANDLOCK: ABI = ABI::V6;

/// Makes a ruleset that allows only to remove files from the directories of `sockets`, and to save to `save`. `None`: this host has no
/// Landlock.
///
/// # Errors
/// The host refuses one.
pub(super) fn no_paths(
    sockets: &[&Path],
    save: Option<&Path>,
) -> Result<Option<OwnedFd>, Box<dyn StdError>> {
    let mut ruleset = Ruleset::default()
        .handle_access(AccessFs::from_all(LANDLOCK))?
        .handle_access(AccessNet::from_all(LANDLOCK))?
        .scope(Scope::AbstractUnixSocket)?
        .create()?;
    for socket in sockets {
        let directory = directory_of(socket);
        // If the directory cannot be opened, the socket's file remains when the VM ends. If it is none, the socket cannot be made.
        if directory.is_dir()
            && let Ok(directory) = PathFd::new(directory)
        {
            ruleset = ruleset.add_rule(PathBeneath::new(directory, AccessFs::RemoveFile))?;
        }
    }
    if let Some(directory) = save {
        let make = AccessFs::MakeReg | AccessFs::RemoveFile | AccessFs::Truncate;
        let access = make | AccessFs::ReadDir | AccessFs::ReadFile | AccessFs::WriteFile;
        ruleset = ruleset.add_rule(PathBeneath::new(PathFd::new(directory)?, access))?;
    }
    Ok(ruleset.into())
}

/// The directory in which the socket is.
pub(super) fn directory_of(socket: &Path) -> &Path {
    let directory = socket.parent().filter(|path| !path.as_os_str().is_empty());
    directory.unwrap_or(Path::new("."))
}

/// The error among the causes that says that the host is short of descriptors or memory, if there is one.
pub(super) fn shortage(error: &(dyn StdError + 'static)) -> Option<io::Error> {
    let mut causes = std::iter::successors(Some(error), |error| (**error).source());
    let errno = causes.find_map(|cause| cause.downcast_ref::<io::Error>()?.raw_os_error())?;
    [libc::EMFILE, libc::ENFILE, libc::ENOMEM]
        .contains(&errno)
        .then(|| io::Error::from_raw_os_error(errno))
}

/// Restricts the calling thread, which [`drop_privileges`] has prepared.
///
/// # Errors
/// The host refuses.
pub(super) fn restrict(ruleset: &OwnedFd) -> io::Result<()> {
    // As a direct system call: the crate would need another descriptor for each thread.
    // SAFETY: no argument is a pointer.
    match unsafe { libc::syscall(libc::SYS_landlock_restrict_self, ruleset.as_raw_fd(), 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Makes the calling thread run as another user and group, without supplementary groups. libc's functions would change all threads, by a
/// signal whose handler makes system calls that the filters forbid.
///
/// # Errors
/// The process is not root's.
pub(super) fn become_user((user, group): (u32, u32)) -> Result<(), Errno> {
    let (user, group) = (Uid::from_raw(user), Gid::from_raw(group));
    // The signal that the kernel sends when the parent process ends (`setpriv --pdeathsig`), which is forgotten when the IDs change.
    let at_parents_end = parent_process_death_signal()?;
    set_thread_groups(&[])?;
    set_thread_res_gid(group, group, group)?;
    set_thread_res_uid(user, user, user)?;
    set_parent_process_death_signal(at_parents_end)
}

/// Takes the capabilities from the calling thread, and sets `no_new_privs`, after which execve(2) gives no privileges. Other threads
/// are not changed.
///
/// # Errors
/// The host refuses.
pub(super) fn drop_privileges() -> Result<(), Errno> {
    let none = CapabilitySet::empty();
    let none = CapabilitySets { effective: none, permitted: none, inheritable: none };
    set_no_new_privs(true).and(set_capabilities(None, none))
}

/// Makes all threads share one heap. For a heap of another thread, glibc sometimes opens files (`arena_get2` and `shrink_heap` in
/// malloc/), which a confined thread must not do. Sharing costs little: serving the guest allocates nothing. Called before there is a
/// second thread.
pub(super) fn use_one_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: no argument is a pointer.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}
