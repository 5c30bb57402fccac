//! `--dump-on-panic FILE`: the machine as a file, for `gdb` and `crash`, when its guest panics.
//!
//! A source of the main loop, which the builder makes. With it, a panic does not end the machine, but sends an event. The dump then
//! begins, and the machine ends after it, whether it succeeded or not.
//!
//! The file is opened before the process is confined. A new file is empty until the guest panics, and an older dump stays until then. A
//! run that is refused leaves no new file (`OutputFiles`).

use std::fs::File;
use std::io::{self, Read, Seek};
use std::path::{Path, PathBuf};

use super::core_file::is_core;
use super::page_map::open_page_map;
use super::save::{self, Destination, Progress};
use super::saved::{Purpose, SavedConfig};
use crate::config::VmConfig;
use crate::error::{Error, WithCauses};
use crate::machine::{Machine, MachineEvent};
use crate::output_files::OutputFiles;
use crate::sources::{Poller, Source};

/// The source of `--dump-on-panic`.
pub(crate) struct PanicDump {
    path: PathBuf,
    file: Option<File>,
    config: SavedConfig,
    /// The dump under way: its number, and the panic.
    job: Option<(u64, &'static str)>,
}

impl PanicDump {
    /// Opens the file, if `config` names one.
    ///
    /// # Errors
    /// The file cannot be opened, or is something else than a dump.
    pub(crate) fn open(
        config: &VmConfig,
        outputs: &mut OutputFiles,
    ) -> Result<Option<Box<dyn Source>>, Error> {
        let Some(path) = &config.dump_on_panic else { return Ok(None) };
        let refused = |source| {
            let value = path.display().to_string();
            Error::Argument { option: "--dump-on-panic", value, source }
        };
        let file = Some(open(path, outputs).map_err(refused)?);
        open_page_map();
        let (path, config) = (path.clone(), SavedConfig::of(config));
        Ok(Some(Box::new(Self { path, file, config, job: None })))
    }

    fn begin(&mut self, machine: &mut Machine) -> Result<u64, Error> {
        let file = self.file.take().ok_or(Error::Ending)?;
        let destination = Destination::Given(self.path.clone(), file);
        let progress = Progress::default();
        save::begin(machine, self.config.clone(), destination, &progress, Purpose::LastDump)
    }

    fn warn(&self, error: &Error) {
        let (path, error) = (self.path.display(), WithCauses(error));
        tracing::warn!("--dump-on-panic {path}: the dump could not be written: {error}");
    }
}

/// An empty file or an old dump, for reading and writing.
fn open(path: &Path, outputs: &mut OutputFiles) -> io::Result<File> {
    let mut file = outputs.open(File::options().read(true).write(true), path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is not a regular file; give another path"));
    }
    let mut start = Vec::new();
    (&file).take(64).read_to_end(&mut start)?;
    file.rewind()?;
    if start.is_empty() || is_core(&start) {
        Ok(file)
    } else {
        Err(io::Error::other("it exists and is no dump; give another path"))
    }
}

impl Source for PanicDump {
    fn watch(&mut self, _: &mut Poller<'_, '_>) -> event_manager::Result<()> {
        Ok(())
    }

    fn process(&mut self, _: u8, _: &mut Poller<'_, '_>, _: &mut Machine) {}

    fn on_events(
        &mut self,
        events: &[MachineEvent],
        _: &mut Poller<'_, '_>,
        machine: &mut Machine,
    ) -> bool {
        let mut over = None;
        for event in events {
            match event {
                MachineEvent::PanicHeld(how) => match self.begin(machine) {
                    Ok(job) => self.job = Some((job, how)),
                    Err(error) => {
                        self.warn(&error);
                        over = Some(*how);
                    }
                },
                MachineEvent::Done(job, result) => {
                    if let Some((_, how)) = self.job.take_if(|(dump, _)| dump == job) {
                        match result {
                            Ok(()) => tracing::warn!(
                                "--dump-on-panic {}: the guest panicked; this file has its memory",
                                self.path.display()
                            ),
                            Err(error) => self.warn(error),
                        }
                        over = Some(how);
                    }
                }
                _ => {}
            }
        }
        if let Some(how) = over {
            machine.end_by_panic(how, true);
        }
        over.is_some()
    }
}
