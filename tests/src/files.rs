//! Files that tests make, and whether they changed.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

/// Every name below a directory with what it is and holds. Equal before and after: nothing was created or changed.
#[derive(Debug, PartialEq, Eq)]
pub struct Listing(BTreeMap<PathBuf, Content>);

#[derive(Debug, PartialEq, Eq)]
enum Content {
    Directory,
    /// Mode, length in bytes, and a hash of the content; holes are not read.
    File {
        mode: u32,
        length: u64,
        hash: u64,
    },
    Other,
}

impl Listing {
    /// Looks at everything below `directory`.
    pub fn of(directory: &Path) -> Self {
        let mut entries = BTreeMap::new();
        let mut rest = vec![directory.to_owned()];
        while let Some(directory) = rest.pop() {
            for entry in fs::read_dir(&directory).unwrap() {
                let path = entry.unwrap().path();
                let content = content(&path);
                if content == Content::Directory {
                    rest.push(path.clone());
                }
                entries.insert(path, content);
            }
        }
        Self(entries)
    }
}

fn content(path: &Path) -> Content {
    let metadata = fs::symlink_metadata(path).unwrap();
    let kind = metadata.file_type();
    if kind.is_dir() {
        return Content::Directory;
    }
    if !kind.is_file() {
        assert!(kind.is_symlink() || kind.is_fifo() || kind.is_socket(), "{}", path.display());
        return Content::Other;
    }
    // Large files of these tests are all hole.
    let hash = if metadata.blocks() == 0 { 0 } else { hash(path) };
    Content::File { mode: metadata.mode(), length: metadata.len(), hash }
}

/// A hash of a file's content, or 0 for a file that we may not read.
pub fn hash(path: &Path) -> u64 {
    use std::hash::{DefaultHasher, Hasher};
    let mut hasher = DefaultHasher::new();
    hasher.write(&fs::read(path).unwrap_or_default());
    hasher.finish()
}

/// A sparse file of `length` bytes.
pub fn sparse(path: &Path, length: u64) {
    File::create(path).unwrap().set_len(length).unwrap();
}

/// A fresh directory on a file system that writes to a device, where making data durable means something: unlike tmpfs,
/// which is all that the lab has for us to write to, and perhaps /tmp elsewhere.
#[derive(Debug)]
pub struct Durable {
    directory: TempDir,
    mounted: bool,
}

impl Durable {
    /// `None` where there is no way to one: says why.
    pub fn new() -> Option<Self> {
        if let Ok(directory) = tempfile::tempdir_in("/var/tmp")
            && !on_tmpfs(directory.path())
        {
            return Some(Self { directory, mounted: false });
        }
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("ext4");
        sparse(&image, 64 << 20);
        let run = |program: &str, arguments: &[&OsStr]| {
            let output = Command::new(program).args(arguments).output();
            output.map_err(|why| why.to_string()).and_then(|output| {
                output
                    .status
                    .success()
                    .then_some(())
                    .ok_or_else(|| String::from_utf8_lossy(&output.stderr).into_owned())
            })
        };
        // In the lab the loop device is a module.
        let _ = run("modprobe", &["loop".as_ref()]);
        let mounted =
            run("mke2fs", &["-q".as_ref(), "-text4".as_ref(), image.as_ref()]).and_then(|()| {
                run("mount", &["-oloop".as_ref(), image.as_ref(), directory.path().as_ref()])
            });
        match mounted {
            Ok(()) => Some(Self { directory, mounted: true }),
            Err(why) => {
                let why = why.trim();
                crate::skip(&format!(
                    "there is only tmpfs here, and mounting an ext4 fails: {why}"
                ));
                None
            }
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }
}

impl Drop for Durable {
    fn drop(&mut self) {
        if self.mounted {
            // What fails here stays until the lab ends.
            let _ = Command::new("umount").arg(self.path()).status();
        }
    }
}

fn on_tmpfs(directory: &Path) -> bool {
    /// TMPFS_MAGIC of statfs(2).
    const TMPFS: i64 = 0x0102_1994;
    rustix::fs::statfs(directory).unwrap().f_type == TMPFS
}

/// Bytes that the file occupies on the host.
pub fn allocated(path: &Path) -> u64 {
    fs::metadata(path).unwrap().blocks() * 512
}
