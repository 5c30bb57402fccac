//! `--disk DIRECTORY`: the directory becomes an ext4 image before the machine is built, and the disk is that image.
//!
//! `main` calls [`make`]. mke2fs copies the directory into a temporary file without a name, so that nothing
//! remains even if minivmm is killed. The guest cannot change the directory: the disk is read-only, or with `snapshot=on` its writes go to a
//! temporary file.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use devices::disk::{Format, temporary_file};
use vmm::VmConfig;

use crate::messages::print_message;

/// Why a directory cannot become a disk.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DirectoryError {
    #[error("--disk {}: a directory becomes an ext4 image; leave out format={format}", path.display())]
    Format { path: PathBuf, format: Format },
    #[error("--disk {}: cannot read the directory", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("--disk {}: cannot make an image in {} (set TMPDIR to a directory with space)", path.display(), place.display())]
    Create { path: PathBuf, place: PathBuf, source: io::Error },
    #[error("--disk {}: cannot run mke2fs (install e2fsprogs)", path.display())]
    NoTool { path: PathBuf, source: io::Error },
    #[error("--disk {}: mke2fs cannot make an image of the directory: {reason}", path.display())]
    Tool { path: PathBuf, reason: String },
}

impl DirectoryError {
    pub(crate) fn is_usage(&self) -> bool {
        matches!(self, Self::Format { .. } | Self::Read { .. })
    }
}

/// The number of files below a directory, and the bytes that they need in an image.
#[derive(Default)]
struct Content {
    files: u64,
    bytes: u64,
}

/// Makes an image of each disk of `config` that is a directory. The returned files have to stay open until the disks are opened.
pub(crate) fn make(config: &mut VmConfig) -> Result<Vec<File>, DirectoryError> {
    let mut images = Vec::new();
    for image in config.disks.iter_mut().map(|disk| &mut disk.image) {
        let path = image.path.clone();
        if !path.is_dir() {
            continue;
        }
        if let Some(format) = image.format.filter(|format| *format != Format::Raw) {
            return Err(DirectoryError::Format { path, format });
        }
        let began = Instant::now();
        let file = make_image(&path, image.snapshot)?;
        let metadata = file.metadata();
        let kib = metadata.map(|metadata| metadata.blocks() / 2).unwrap_or_default();
        print_message(&format!(
            "--disk {}: made an ext4 image of {kib} KiB in {:.1} s",
            path.display(),
            began.elapsed().as_secs_f64()
        ));
        image.path = format!("/proc/self/fd/{}", file.as_raw_fd()).into();
        image.format = Some(Format::Raw);
        image.read_only = !image.snapshot;
        images.push(file);
    }
    Ok(images)
}

fn make_image(path: &Path, writable: bool) -> Result<File, DirectoryError> {
    let content =
        measure(path).map_err(|source| DirectoryError::Read { path: path.to_owned(), source })?;
    let size = size(&content, writable);
    let (place, file) = temporary_file::create(std::env::var_os("TMPDIR"));
    let file = file.and_then(|file| file.set_len(size).map(|()| file));
    let file =
        file.map_err(|source| DirectoryError::Create { path: path.to_owned(), place, source })?;
    let mut command = Command::new("mke2fs");
    command.args(["-q", "-F", "-t", "ext4", "-m", "0", "-L", "minivmm", "-E", "root_owner=0:0"]);
    if !writable {
        command.args(["-O", "^has_journal"]);
    }
    command.arg("-N").arg((content.files * 2 + 1024).to_string());
    // A path that begins with a dash is no option.
    command.arg("-d").arg(Path::new(".").join(path));
    command.arg(format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd()));
    // Where it is installed, though a user's PATH may not have that.
    let mut search = std::env::var_os("PATH").unwrap_or_default();
    search.push(":/usr/sbin:/sbin");
    command.env("PATH", search).stdin(Stdio::null());
    let output = vmm::with_default_signals(&mut command).output();
    let output =
        output.map_err(|source| DirectoryError::NoTool { path: path.to_owned(), source })?;
    if output.status.success() {
        return Ok(file);
    }
    let text = String::from_utf8_lossy(&output.stderr);
    let line = text.lines().find(|line| !line.trim().is_empty()).unwrap_or("it failed");
    let reason = line.trim().trim_start_matches("mke2fs: ").chars().take(200).collect();
    Err(DirectoryError::Tool { path: path.to_owned(), reason })
}

/// Counts without following symbolic links.
fn measure(path: &Path) -> io::Result<Content> {
    let (mut content, mut directories) = (Content::default(), vec![path.to_owned()]);
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(&directory)? {
            let entry = entry?;
            let metadata = entry.metadata()?;
            content.files += 1;
            // A name takes room in its directory.
            let name = entry.file_name().as_bytes().len() as u64 + 64;
            let room = metadata.len().next_multiple_of(4096) + name;
            // A few sparse files can claim more bytes than 64 bits count.
            content.bytes = content.bytes.saturating_add(room);
            if metadata.is_dir() {
                directories.push(entry.path());
            }
        }
    }
    Ok(content)
}

/// Bytes of the image, which is sparse: for the content, inodes and tables, and free space. If a file cannot be that large, the host
/// refuses the length.
fn size(content: &Content, writable: bool) -> u64 {
    // 2^62 bytes and what comes on top stay below 2^64.
    let bytes = content.bytes.min(1 << 62);
    let used = bytes + bytes / 16 + (content.files.min(1 << 48) * 2 + 1024) * 256;
    let free = if writable { used + (1 << 30) } else { 0 };
    (used + free + (16 << 20)).next_multiple_of(1 << 20)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_content_is_too_large_to_count() {
        for writable in [false, true] {
            let largest = size(&Content { files: u64::MAX, bytes: u64::MAX }, writable);
            assert!(largest > 1 << 62, "{largest}");
            assert_eq!(size(&Content::default(), writable) % (1 << 20), 0);
        }
    }
}
