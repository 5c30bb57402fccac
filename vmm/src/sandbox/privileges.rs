//! What a thread gives up beside system calls: privileges by execve(2), capabilities, and every path.

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
use rustix::process::{Gid, Uid};
use rustix::thread::{
    CapabilitySet, CapabilitySets, set_capabilities, set_no_new_privs, set_thread_groups,
    set_thread_res_gid, set_thread_res_uid,
};

/// The newest Landlock that this asks for. A host with an older one gives what it has.
const LANDLOCK: ABI = ABI::V6;

/// A ruleset that allows nothing but to remove files from the directories of `sockets`, and to save to `save`. `None`: this host
/// has no Landlock.
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
        let directory = socket.parent().filter(|path| !path.as_os_str().is_empty());
        // A directory that cannot be opened keeps its socket's file.
        if let Ok(directory) = PathFd::new(directory.unwrap_or(Path::new("."))) {
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

/// The host's error, if it is only short of something.
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
    // Directly: the crate would need another descriptor for each thread.
    // SAFETY: no argument is a pointer.
    match unsafe { libc::syscall(libc::SYS_landlock_restrict_self, ruleset.as_raw_fd(), 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Makes the calling thread another user's, without further groups. Other threads stay what they are: a call of libc's would change
/// all at once, by a signal that the filters do not know.
///
/// # Errors
/// The process may not: it is not root's.
pub(super) fn become_user((user, group): (u32, u32)) -> Result<(), Errno> {
    let (user, group) = (Uid::from_raw(user), Gid::from_raw(group));
    set_thread_groups(&[])?;
    set_thread_res_gid(group, group, group)?;
    set_thread_res_uid(user, user, user)
}

/// The calling thread gets no privileges by execve(2) any more, and loses its capabilities. Those of other threads stay.
///
/// # Errors
/// The host refuses.
pub(super) fn drop_privileges() -> Result<(), Errno> {
    let none = CapabilitySet::empty();
    let none = CapabilitySets { effective: none, permitted: none, inheritable: none };
    set_no_new_privs(true).and(set_capabilities(None, none))
}

/// One heap for all threads. glibc's heaps of other threads look at files now and then (`arena_get2` and `shrink_heap` in
/// malloc/), which a confined thread must not; and what runs in a steady state allocates nothing, so that the threads do not
/// get into each other's way. To be called before there is a second thread.
pub(super) fn use_one_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: no argument is a pointer.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}
