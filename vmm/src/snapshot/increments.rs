//! Increments: a saved machine that has only what changed since another one, its *base*.
//!
//! A capability. A save with [`Purpose::Increment`](super::Purpose) writes an increment. A restore reads a [`Chain`] of files.
//!
//! minivmm keeps no list of changed pages. RAM is a private mapping of the file from which the machine was restored (`incoming`). The
//! host's kernel copies a page before it changes, and the page map shows which pages are copies ([`PageMap::changed`]). So that file is
//! always the base. It may be an increment, too: then there is a *chain* of up to [`BASES_MAX`] bases below the newest file.
//!
//! An increment names its base by size and checksum. The checksum covers the base's notes, which have the checksums of its RAM and the
//! identity of its own base. So a chain is either as it was saved, or refused.
//!
//! Anyone may be the author of a file. So a base is searched in the directory of the file above it, and at the path that this file names
//! only if the user trusts its paths. It has to be a regular file.

use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use arch::boot::FileRange;

use super::SnapshotError;
use super::core_file::CoreFile;
use super::description::{check, parse};
use super::new_file::NewFile;
use super::page_map::{self, FileMapping, PageMap};
use super::page_set::PageSet;
use super::pages;
use super::saved::{SavedBase, SavedMachine, printable};
use crate::GuestMemory;
use crate::error::Error;
use crate::kernel_pages::{self, Lease};
use crate::lock;

/// Most files below the newest one. Each one is open, under a lease, and may add mappings.
const BASES_MAX: usize = 16;

/// The base of this process's machine: the file from which its RAM is mapped.
#[derive(Clone)]
pub(super) struct Base {
    pub(super) saved: SavedBase,
    /// Device and inode.
    id: (u64, u64),
    /// Number of bases that the file has itself.
    depth: usize,
    /// This process's file mappings at the restore, when RAM was as in the file.
    pub(super) mapped: Vec<FileMapping>,
}

static BASE: Mutex<Option<Base>> = Mutex::new(None);

fn id(file: &Metadata) -> (u64, u64) {
    (file.dev(), file.ino())
}

impl Base {
    /// The base of this process's machine.
    ///
    /// # Errors
    /// It has no base, the base was renamed or replaced, or the chain is as long as allowed.
    pub(super) fn of_machine() -> Result<Self, SnapshotError> {
        let base = lock(&BASE).clone().ok_or(SnapshotError::NoBase)?;
        let path = &base.saved.path;
        if !fs::metadata(path).is_ok_and(|now| id(&now) == base.id) {
            return Err(SnapshotError::BaseMoved(path.clone()));
        }
        if base.depth == BASES_MAX {
            return Err(SnapshotError::DeepIncrement(BASES_MAX));
        }
        Ok(base)
    }
}

/// A saved machine's file, and those below it if it is an increment.
pub(super) struct Chain {
    top: CoreFile,
    path: PathBuf,
    /// The newest first.
    bases: Vec<(PathBuf, CoreFile)>,
    /// Device and inode of each file.
    ids: Vec<(u64, u64)>,
}

impl Chain {
    /// Opens and checks all files of the chain, except for RAM. With `trust_paths`, a base may be at the path that the file above it names.
    ///
    /// # Errors
    /// A file cannot be read, is damaged, or is not the one on which the file above it is based.
    pub(super) fn open(
        path: &Path,
        top: CoreFile,
        saved: &SavedMachine,
        trust_paths: bool,
    ) -> Result<Self, SnapshotError> {
        let ids = vec![id(&top.file.metadata()?)];
        let mut chain = Self { top, path: path.to_owned(), bases: Vec::new(), ids };
        let mut next = saved.base.clone();
        while let Some(base) = next {
            if chain.bases.len() == BASES_MAX {
                return Err(SnapshotError::ManyBases(BASES_MAX));
            }
            let above = chain.bases.last().map_or(path, |(path, _)| path);
            let (path, file) = base.find(above, trust_paths)?;
            let name = printable(path.display());
            let file_id = id(&file.metadata()?);
            if chain.ids.contains(&file_id) {
                return Err(SnapshotError::BasesInACircle(name));
            }
            chain.ids.push(file_id);
            let (core, below) = base.read(file).map_err(|error| error.below(&path))?;
            let ranges = |core: &CoreFile| -> Vec<_> {
                core.segments.iter().map(|range| (range.address, range.length)).collect()
            };
            if ranges(&core) != ranges(&chain.top) {
                return Err(SnapshotError::Damaged("the ranges of memory").below(&path));
            }
            chain.bases.push((path, core));
            next = below;
        }
        Ok(chain)
    }

    /// Device and inode of each file.
    pub(super) fn ids(&self) -> &[(u64, u64)] {
        &self.ids
    }

    fn files(&self) -> impl Iterator<Item = &CoreFile> {
        std::iter::once(&self.top).chain(self.bases.iter().map(|(_, core)| core))
    }

    /// Copies the content of the files into RAM, which is all zero, and compares it with the checksums. Without `memory` it only
    /// compares.
    ///
    /// # Errors
    /// The host cannot read a file, or one is damaged; RAM has some of the data then.
    pub(super) fn copy(&self, memory: Option<&GuestMemory>) -> Result<(), SnapshotError> {
        let mut newer = PageSet::default();
        pages::read(memory, &self.top, &newer)?;
        let mut above = &self.top;
        for (path, core) in &self.bases {
            above.pages.iter().for_each(|pages| newer.add(pages));
            pages::read(memory, core, &newer).map_err(|error| error.below(path))?;
            above = core;
        }
        Ok(())
    }

    /// Maps the content of the files into RAM, which is new, and makes the newest file the base of later increments. `None`: the host gives
    /// no lease on a file, or the chain has too many parts to map. Then a part of RAM may be mapped.
    ///
    /// # Errors
    /// The host refuses.
    pub(super) fn map(&self, memory: &GuestMemory) -> io::Result<Option<MappedFiles>> {
        let mut files = MappedFiles { leases: Vec::new(), parts: Vec::new() };
        for core in self.files() {
            let Some(lease) = Lease::take(&core.file) else { return Ok(None) };
            files.leases.push(lease);
            // The length is compared under the lease: before it, another program may have truncated the file.
            let end = core.segments.last().map_or(0, |last| last.offset + last.length);
            if core.file.metadata()?.len() != end {
                return Ok(None);
            }
        }
        let Some(parts) = pages::parts(self.files())? else { return Ok(None) };
        for (core, parts) in self.files().zip(parts) {
            if !pages::map(memory, &core.file, &parts)? {
                return Ok(None);
            }
            files.parts.extend(parts);
        }
        *lock(&BASE) = self.as_base();
        Ok(Some(files))
    }

    /// `None`: the file has no path at which a restore could find it, or the host does not show this process's mappings.
    fn as_base(&self) -> Option<Base> {
        page_map::open_page_map();
        let path = self.path.canonicalize().ok()?;
        let id = id(&self.top.file.metadata().ok()?);
        let mapped = PageMap::read()?.files;
        let saved = SavedBase { path, identity: self.top.identity };
        Some(Base { saved, id, depth: self.bases.len(), mapped })
    }
}

impl SavedBase {
    /// Finds the base in the directory of the file `above` it or, with `trust_path`, at the path that this file names.
    fn find(&self, above: &Path, trust_path: bool) -> Result<(PathBuf, File), SnapshotError> {
        let beside = self.path.file_name().map(|name| above.with_file_name(name));
        let named =
            Some(self.path.clone()).filter(|path| trust_path && Some(path) != beside.as_ref());
        let candidates = beside.into_iter().chain(named);
        // Only regular files are opened: to open a device may have an effect.
        let mut candidates = candidates
            .filter(|path| fs::metadata(path).is_ok_and(|file| file.is_file()))
            .peekable();
        // If both files exist, the one with the right identity is taken.
        while let Some(path) = candidates.next() {
            let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(&path);
            let file = file.map_err(|error| SnapshotError::from(error).below(&path))?;
            if candidates.peek().is_none() || self.read(file.try_clone()?).is_ok() {
                return Ok((path, file));
            }
        }
        let name = self.path.file_name().unwrap_or(self.path.as_os_str());
        let (name, path) = (printable(name.display()), printable(self.path.display()));
        Err(match trust_path {
            true => SnapshotError::BaseMissing { name, path },
            false => SnapshotError::BaseNotBeside { name, path },
        })
    }

    /// Reads the file, and which base it has itself.
    fn read(&self, file: File) -> Result<(CoreFile, Option<SavedBase>), SnapshotError> {
        let core = CoreFile::read(file)?;
        if core.identity != self.identity {
            return Err(SnapshotError::BaseChanged);
        }
        let saved = parse(&core.machine)?;
        check(&saved, &core)?;
        Ok((core, saved.base))
    }
}

/// The leases on the files from which RAM is mapped, and the mapped parts.
pub(super) struct MappedFiles {
    leases: Vec<Arc<Lease>>,
    parts: Vec<FileRange>,
}

impl MappedFiles {
    /// Replaces the mapped pages by copies, and ends the leases, so that programs which wait to write to the files go on. Neither the
    /// guest nor a device uses `memory` meanwhile.
    ///
    /// # Errors
    /// The host has no memory left, or a file was truncated. The guest has lost memory then.
    pub(super) fn copy(self, memory: &GuestMemory) -> Result<(), Error> {
        // A file that is about to change can no longer be a base.
        *lock(&BASE) = None;
        let Self { leases, parts } = self;
        let copied = parts.iter().try_for_each(|part| kernel_pages::copy(memory, part));
        drop(leases);
        copied.map_err(Error::host("copy guest memory, whose file is being changed"))
    }
}

impl SnapshotError {
    /// Names the base at `path`, below the file that the user named, in an error about it.
    fn below(self, path: &Path) -> Self {
        Self::Base { path: printable(path.display()), source: Box::new(self) }
    }
}

/// Checks that an increment with the name of `new` does not replace one of its own bases.
///
/// # Errors
/// It would, or a restore from this name would not find a base.
pub fn check_new_increment(new: &NewFile) -> Result<(), Error> {
    let check = || {
        let core = CoreFile::read(new.file().try_clone()?)?;
        let saved = parse(&core.machine)?;
        let chain = Chain::open(new.path(), core, &saved, true)?;
        let replaced = fs::metadata(new.path()).ok().map(|file| id(&file));
        if replaced.is_some_and(|file| chain.ids.contains(&file)) {
            return Err(SnapshotError::ReplacesBase(new.path().to_owned()));
        }
        Ok(())
    };
    check().map_err(Error::save)
}

#[cfg(test)]
mod fuzz;
#[cfg(test)]
mod tests;
