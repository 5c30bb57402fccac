//! A file that gets its name only when it is complete.
//!
//! Until then it has no name, or a hidden one in the target's directory. So at every moment there is no file at the target's path, the
//! old file, or a complete new one. A process that is killed may leave a hidden file, which [`remove_unfinished`] removes unless its
//! process exists: the number in the name and the lock on the file show that.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::fs::{
    AtFlags, CWD, FlockOperation, Mode, OFlags, flock, fstat, linkat, openat, renameat, statat,
    unlinkat,
};
use rustix::path::Arg;
use rustix::process::{Pid, getpid, test_kill_process};

use crate::sandbox;

/// A new file without its final name. If it is dropped before [`NewFile::publish`], nothing remains of it.
pub struct NewFile {
    path: PathBuf,
    directory: File,
    file: File,
    /// Its hidden name in the target's directory, if it has one.
    hidden: Option<OsString>,
}

impl NewFile {
    /// An empty file with mode 0600 on the file system of `path`.
    ///
    /// # Errors
    /// The directory does not allow it, or a confined process may not write there.
    pub fn create(path: &Path) -> io::Result<Self> {
        let path = std::path::absolute(path)?;
        let parent = path.parent().ok_or(io::ErrorKind::IsADirectory)?;
        let confined = sandbox::check_save(parent)?;
        let directory = File::open(parent)?;
        let mode = Mode::RUSR | Mode::WUSR;
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        // A confined process could not give a name to a nameless file later.
        let nameless = match confined {
            true => Err(rustix::io::Errno::OPNOTSUPP),
            false => openat(&directory, ".", flags | OFlags::TMPFILE, mode),
        };
        let (file, hidden) = match nameless {
            Ok(file) => {
                // It has a hidden name for a moment in `publish`.
                let _ = lock(&file);
                (File::from(file), None)
            }
            Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::ISDIR) => {
                let create = |name: &OsStr| {
                    openat(&directory, name, flags | OFlags::CREATE | OFlags::EXCL, mode)
                };
                let (file, name) = create_hidden(&directory, &path, create)?;
                (file, Some(name))
            }
            Err(error) => return Err(error.into()),
        };
        // The mode does not depend on the umask, because guest memory may hold secrets.
        file.set_permissions(fs::Permissions::from_mode(0o600))?;
        Ok(Self { path, directory, file, hidden })
    }

    /// The file, open for reading and writing.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The target's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Gives the file its name, and replaces a file that has it now. The caller has synced its data before.
    ///
    /// # Errors
    /// The host's, from giving the name or from writing the directory to the medium.
    pub fn publish(mut self) -> io::Result<()> {
        let hidden = match self.hidden.take() {
            Some(hidden) => hidden,
            None => {
                let hidden = hidden_name(&self.path)?;
                // By its descriptor, linkat(2) needs a capability.
                let file = format!("/proc/self/fd/{}", self.file.as_raw_fd());
                linkat(CWD, file, &self.directory, &*hidden, AtFlags::SYMLINK_FOLLOW)?;
                hidden
            }
        };
        let hidden = self.hidden.insert(hidden);
        let name = self.path.file_name().ok_or(io::ErrorKind::IsADirectory)?;
        renameat(&self.directory, &**hidden, &self.directory, name)?;
        self.hidden = None;
        self.directory.sync_all()
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if let Some(hidden) = &self.hidden {
            let _ = unlinkat(&self.directory, &**hidden, AtFlags::empty());
        }
    }
}

const SUFFIX: &str = ".saving";

/// The hidden name `.NAME.NUMBER.PID.saving`. It is unique: a save that was canceled may still have its file when the next one to the same
/// target begins.
fn hidden_name(path: &Path) -> io::Result<OsString> {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let mut hidden = OsString::from(".");
    hidden.push(path.file_name().ok_or(io::ErrorKind::IsADirectory)?);
    hidden.push(format!(".{number}.{}{SUFFIX}", std::process::id()));
    Ok(hidden)
}

/// How many hidden names are tried.
const ATTEMPTS: usize = 16;

/// Has `create` make a file of a hidden name, and locks it. In another PID namespace, a VM with the number of this process may have a
/// file of that name, or may have removed the new one before it was locked. Then the next name is tried.
fn create_hidden(
    directory: &File,
    path: &Path,
    create: impl Fn(&OsStr) -> rustix::io::Result<OwnedFd>,
) -> io::Result<(File, OsString)> {
    for _ in 0..ATTEMPTS {
        let name = hidden_name(path)?;
        match create(&name) {
            Ok(file) => {
                // On a file system without locks, the number of the process in the name protects the file.
                let is_free = lock(&file) != Err(rustix::io::Errno::WOULDBLOCK);
                if is_free && is_named(directory, &name, &file) {
                    return Ok((file.into(), name));
                }
            }
            Err(rustix::io::Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Err(io::ErrorKind::AlreadyExists.into())
}

fn lock(file: impl AsFd) -> rustix::io::Result<()> {
    flock(file, FlockOperation::NonBlockingLockExclusive)
}

/// Whether the name is that of the file.
fn is_named(directory: impl AsFd, name: impl Arg, file: impl AsFd) -> bool {
    let named = statat(directory, name, AtFlags::SYMLINK_NOFOLLOW);
    matches!((named, fstat(file)), (Ok(named), Ok(file))
        if (named.st_dev, named.st_ino) == (file.st_dev, file.st_ino))
}

/// The number of the process that has made a file of this name. `None`: it is no hidden name of a save.
fn maker(name: &OsStr) -> Option<Pid> {
    let name = name.to_str()?.strip_prefix('.')?.strip_suffix(SUFFIX)?;
    Pid::from_raw(name.rsplit_once('.')?.1.parse().ok()?)
}

/// Removes the files of saves whose processes were killed, from `directory`. Errors are ignored.
pub(crate) fn remove_unfinished(directory: &Path) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        // A container gives each life of a VM the same number: what this process has not begun yet is of an earlier one.
        let has_ended = |maker| {
            maker == getpid() || matches!(test_kill_process(maker), Err(rustix::io::Errno::SRCH))
        };
        let is_file = entry.file_type().is_ok_and(|kind| kind.is_file());
        if is_file && maker(&entry.file_name()).is_some_and(has_ended) {
            // The process may exist in another PID namespace. Then it has a lock on the file.
            let file = File::options().read(true).custom_flags(libc::O_NOFOLLOW).open(entry.path());
            // The file stays open, and so locked, until it is removed.
            if let Ok(file) = file
                && lock(&file).is_ok()
                && is_named(CWD, entry.path(), &file)
            {
                let _ = fs::remove_file(entry.path());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_save_to_the_target_of_one_that_is_not_over_has_a_file_of_its_own() {
        let path = Path::new("directory/saved");
        let [first, second] = [(); 2].map(|()| hidden_name(path).unwrap());
        assert_ne!(first, second);
        for name in [first, second] {
            let maker = maker(&name).unwrap();
            assert_eq!(maker.as_raw_nonzero().get() as u32, std::process::id(), "{name:?}");
        }
    }

    /// A new file that another process removes, or locks to remove it, before it is locked.
    #[test]
    fn a_file_that_is_removed_before_it_is_locked_is_made_again() {
        let directory = tempfile::tempdir().unwrap();
        let opened = File::open(directory.path()).unwrap();
        let (tries, locked) = (std::cell::Cell::new(0), std::cell::OnceCell::new());
        let create = |name: &OsStr| {
            let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
            let file = openat(&opened, name, flags, Mode::RUSR | Mode::WUSR)?;
            match tries.replace(tries.get() + 1) {
                0 => remove_unfinished(directory.path()),
                1 => {
                    let other = File::open(directory.path().join(name)).unwrap();
                    lock(&other).unwrap();
                    locked.set(other).unwrap();
                }
                2 => return Err(rustix::io::Errno::EXIST),
                _ => {}
            }
            Ok(file)
        };
        let (file, name) = create_hidden(&opened, Path::new("saved"), create).unwrap();
        assert_eq!(tries.get(), 4);
        remove_unfinished(directory.path());
        assert!(is_named(&opened, &name, &file), "{name:?} was removed");
        drop(file);
        remove_unfinished(directory.path());
        assert!(!directory.path().join(name).exists());
    }

    /// The file that the remover has locked must be the one that it removes.
    #[test]
    fn a_name_belongs_to_the_file_that_has_it_now() {
        let directory = tempfile::tempdir().unwrap();
        let opened = File::open(directory.path()).unwrap();
        let path = directory.path().join("name");
        let [first, second] = [(); 2].map(|()| {
            let _ = fs::remove_file(&path);
            File::create(&path).unwrap()
        });
        assert!(!is_named(&opened, "name", &first));
        assert!(is_named(&opened, "name", &second));
        assert!(is_named(CWD, &path, &second));
    }
}
