//! The QMP commands that save the machine (QEMU, qapi/migration.json). In QEMU's terms, a save is a migration to a file.
//!
//! `server` has the one [`Migration`] and passes it every event of the machine. A save stops the guest. After a success the guest stays
//! stopped, in the state `postmigrate`; after a failure or a cancel it goes on. During a background save it goes on when the status
//! becomes `active`.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::Instant;

use serde_json::{Map, Value, json};

use super::arguments::{Argument, ArgumentKind, Arguments, optional, required};
use super::event_messages::stamped;
use super::protocol::{Answer, Failure};
use super::schema::{CAPABILITY_NAMES, CommandTypes, STATUSES};
use crate::error::{Error, WithCauses};
use crate::machine::{Machine, MachineEvent};
use crate::snapshot::{
    self, BackgroundSave, Destination, Progress, Purpose, SaveThread, SavedConfig,
    begin_in_background, generation_id,
};

const SETUP: &str = STATUSES[1];
const ACTIVE: &str = STATUSES[2];
const COMPLETED: &str = STATUSES[3];
const FAILED: &str = STATUSES[4];
const CANCELLING: &str = STATUSES[5];
const CANCELLED: &str = STATUSES[6];

pub(super) struct MigrationCommand {
    pub(super) types: CommandTypes,
    run: fn(&mut Migration, &mut Machine, &Arguments<'_>) -> Result<Answer, Failure>,
}

const fn command(
    name: &'static str,
    arguments: &'static [Argument],
    returns: &'static str,
    run: fn(&mut Migration, &mut Machine, &Arguments<'_>) -> Result<Answer, Failure>,
) -> MigrationCommand {
    MigrationCommand { types: CommandTypes { name, arguments, returns }, run }
}

pub(super) const COMMANDS: &[MigrationCommand] = &[
    command("getfd", FD, "", |migration, _, arguments| {
        let (file, name) =
            (migration.received.take(), arguments.text("fdname").unwrap_or_default());
        migration.keep(name, file).map(|()| Answer::empty())
    }),
    command("closefd", FD, "", |migration, _, arguments| {
        let name = arguments.text("fdname").unwrap_or_default();
        migration.given(name).map(|_| Answer::empty())
    }),
    command("migrate", MIGRATE, "", |migration, machine, arguments| {
        let destination = match arguments.text("uri").and_then(|uri| uri.strip_prefix("fd:")) {
            Some(name) => migration.given(name)?,
            None => Destination::Path(target(arguments)?),
        };
        migration.begin(machine, destination).map(|()| Answer::empty())
    }),
    command("dump-guest-memory", DUMP, "", |migration, machine, arguments| {
        let destination = match arguments.text("protocol").and_then(|uri| uri.split_once(':')) {
            Some(("fd", name)) => migration.given(name)?,
            Some(("file", path)) if !path.is_empty() => Destination::Path(path.into()),
            _ => {
                return Err(Failure::generic(
                    "Invalid parameter 'protocol': minivmm dumps to file:PATH or fd:NAME",
                ));
            }
        };
        if arguments.boolean("paging") == Some(true) {
            return Err(Failure::generic(
                "minivmm dumps memory by guest-physical address; set 'paging' to false",
            ));
        }
        let (config, progress) = (migration.config.clone(), Progress::default());
        let job = snapshot::begin(machine, config, destination, &progress, Purpose::Dump);
        job.map(Answer::WhenDone).map_err(|error| Failure::of(&error))
    }),
    command("migrate-incoming", MIGRATE, "", |_, _, _| {
        Err(Failure::generic(
            "the machine exists already; migrate-incoming needs a VM that was started with --incoming defer",
        ))
    }),
    command("migrate_cancel", &[], "", |migration, _, _| {
        migration.cancel();
        Ok(Answer::empty())
    }),
    command("query-migrate", &[], "MigrationInfo", |migration, _, _| {
        Ok(Answer::Now(migration.info()))
    }),
    command("query-vm-generation-id", &[], "GuidInfo", |migration, machine, _| {
        if !migration.config.acpi {
            return Err(Failure::generic("VM Generation ID device not found"));
        }
        let id = generation_id::read(&machine.hardware.memory);
        let failed = |error| Failure::of(&Error::host("read the VM generation ID")(error));
        id.map(|id| Answer::Now(json!({ "guid": id }))).map_err(failed)
    }),
    command("migrate-set-capabilities", CAPABILITIES, "", |migration, _, arguments| {
        migration.set_capabilities(arguments).map(|()| Answer::empty())
    }),
    command("query-migrate-capabilities", &[], "[MigrationCapabilityStatus]", |migration, _, _| {
        let states = [migration.events, true, migration.in_background, migration.is_incremental];
        let states = CAPABILITY_NAMES.iter().zip(states);
        let states = states.map(|(name, state)| json!({ "capability": name, "state": state }));
        Ok(Answer::Now(states.collect()))
    }),
];

const FD: &[Argument] = &[required("fdname", ArgumentKind::Text)];
const MIGRATE: &[Argument] =
    &[optional("uri", ArgumentKind::Text), optional("channels", ArgumentKind::Any)];
const DUMP: &[Argument] =
    &[required("paging", ArgumentKind::Boolean), required("protocol", ArgumentKind::Text)];
const CAPABILITIES: &[Argument] = &[required("capabilities", ArgumentKind::Any)];

/// The file that `migrate-incoming` names.
pub(super) fn source(arguments: &Map<String, Value>) -> Result<PathBuf, Failure> {
    target(&Arguments::check(MIGRATE, arguments)?)
}

/// The file that a client names, by a URI or as QEMU's `MigrationChannel`.
fn target(arguments: &Arguments<'_>) -> Result<PathBuf, Failure> {
    let refuse = |why: &str| Err(Failure::generic(why));
    match (arguments.text("uri"), arguments.any("channels")) {
        (Some(uri), None) => match uri.strip_prefix("file:") {
            Some(path) if !path.is_empty() => Ok(path.into()),
            _ => refuse("unknown migration protocol: minivmm saves to file:PATH or fd:NAME"),
        },
        (None, Some(Value::Array(channels))) => match &channels[..] {
            [channel] => {
                let address = &channel["addr"];
                let at_start = address["offset"].as_u64().unwrap_or(0) == 0;
                match (&address["transport"], address["filename"].as_str()) {
                    (Value::String(transport), Some(path)) if transport == "file" && at_start => {
                        Ok(path.into())
                    }
                    _ => refuse("minivmm saves to a channel of transport 'file' at offset 0"),
                }
            }
            _ => refuse("Channel list must have one entry"),
        },
        (None, Some(_)) => refuse("Invalid parameter type for 'channels', expected: array"),
        _ => refuse("need either 'uri' or 'channels' argument"),
    }
}

/// The last save, or the one under way.
struct Save {
    /// The number in the machine's `Done` event.
    job: u64,
    status: &'static str,
    progress: Progress,
    began: Instant,
    milliseconds: u64,
    error: Option<String>,
    /// How long the guest stood still, in milliseconds. `None` until it goes on.
    downtime: Option<u64>,
    /// The background save under way. Kept after a cancel, because its thread may still have to remove the file.
    background: Option<BackgroundSave>,
}

/// The settings for saves, and the state of the last save.
pub(crate) struct Migration {
    config: SavedConfig,
    /// Send MIGRATION events (the capability `events`).
    events: bool,
    /// The guest goes on while it is saved (the capability `background-snapshot`).
    in_background: bool,
    /// A save has only the pages that changed since the base (the capability `x-minivmm-incremental`).
    is_incremental: bool,
    /// The thread that starts child processes. `None`: the sandbox allows none.
    pub(super) save_thread: Option<SaveThread>,
    save: Option<Save>,
    /// MIGRATION events that were not sent yet.
    messages: Vec<Value>,
    /// The descriptor that came with the command that is being executed.
    pub(super) received: Option<File>,
    /// Files that clients handed over by `getfd`, by name.
    files: BTreeMap<String, File>,
}

const NO_CHILD: &str = "a background save needs a child process, which the sandbox of this VM does not allow; start it with --sandbox on,spawn=allow, or save it without --background (QMP: background-snapshot)";

/// Most files that clients can pass by `getfd` before they use them.
const FILES_MAX: usize = 16;

impl Migration {
    /// Saves a machine that was built by `config`.
    pub(crate) fn new(config: SavedConfig) -> Self {
        snapshot::open_page_map();
        Self {
            config,
            events: false,
            in_background: false,
            is_incremental: false,
            save_thread: None,
            save: None,
            messages: Vec::new(),
            received: None,
            files: BTreeMap::new(),
        }
    }

    /// Executes a command of this module. `None`: there is none of that name.
    pub(super) fn execute(
        &mut self,
        machine: &mut Machine,
        name: &str,
        arguments: &Map<String, Value>,
    ) -> Option<Result<Answer, Failure>> {
        let command = COMMANDS.iter().find(|command| command.types.name == name)?;
        let checked = Arguments::check(command.types.arguments, arguments);
        Some(checked.and_then(|arguments| (command.run)(self, machine, &arguments)))
    }

    /// Sets the configuration, which `migrate-incoming` has completed.
    pub(super) fn set_config(&mut self, config: SavedConfig) {
        self.config = config;
    }

    /// Executes a command before there is a machine.
    pub(super) fn execute_without_machine(
        &mut self,
        name: &str,
        arguments: &Map<String, Value>,
    ) -> Result<Value, Failure> {
        match name {
            "query-migrate" => Ok(self.info()),
            "migrate-set-capabilities" => {
                let arguments = Arguments::check(CAPABILITIES, arguments)?;
                self.set_capabilities(&arguments).map(|()| json!({}))
            }
            _ => Err(Failure::generic("there is no machine yet; send migrate-incoming first")),
        }
    }

    fn keep(&mut self, name: &str, file: Option<File>) -> Result<(), Failure> {
        if name.is_empty() || name.starts_with(|first: char| first.is_ascii_digit()) {
            let why = "Parameter 'fdname' expects a name not starting with a digit";
            return Err(Failure::generic(why));
        }
        let file =
            file.ok_or_else(|| Failure::generic("No file descriptor supplied via SCM_RIGHTS"))?;
        if self.files.len() >= FILES_MAX && !self.files.contains_key(name) {
            return Err(Failure::generic(
                "too many files that were passed by getfd are unused; close one with closefd",
            ));
        }
        self.files.insert(name.to_owned(), file);
        Ok(())
    }

    /// Takes the file that was passed by `getfd` under this name.
    fn given(&mut self, name: &str) -> Result<Destination, Failure> {
        let unknown = || Failure::generic(format!("File descriptor named '{name}' not found"));
        let file = self.files.remove(name).ok_or_else(unknown)?;
        Ok(Destination::Given(format!("fd:{name}").into(), file))
    }

    fn begin(&mut self, machine: &mut Machine, destination: Destination) -> Result<(), Failure> {
        let is_over = |save: &Save| [COMPLETED, FAILED, CANCELLED].contains(&save.status);
        if !self.save.as_ref().is_none_or(is_over) {
            return Err(Failure::generic("There's a migration process in progress"));
        }
        if self.config.runs_command {
            return Err(Failure::generic("a machine that runs --exec cannot be saved"));
        }
        let (progress, config) = (Progress::default(), self.config.clone());
        let purpose = if self.is_incremental { Purpose::Increment } else { Purpose::Save };
        let (job, saving) = match (&self.save_thread, self.in_background) {
            (_, false) => {
                let job = snapshot::begin(machine, config, destination, &progress, purpose);
                job.map(|job| (job, None))
            }
            (Some(thread), true) => {
                begin_in_background(machine, config, destination, &progress, purpose, thread)
                    .map(|(job, saving)| (job, Some(saving)))
            }
            (None, true) => return Err(Failure::generic(NO_CHILD)),
        }
        .map_err(|error| Failure::of(&error))?;
        let is_in_background = saving.is_some();
        self.save = Some(Save {
            job,
            status: SETUP,
            progress,
            began: Instant::now(),
            milliseconds: 0,
            error: None,
            downtime: None,
            background: saving,
        });
        self.set_status(SETUP);
        if !is_in_background {
            self.set_status(ACTIVE);
        }
        Ok(())
    }

    fn set_status(&mut self, status: &'static str) {
        if let Some(save) = &mut self.save {
            save.status = status;
            if self.events {
                self.messages.push(stamped("MIGRATION", json!({ "status": status })));
            }
        }
    }

    fn cancel(&mut self) {
        if let Some(save) = &self.save
            && [SETUP, ACTIVE].contains(&save.status)
        {
            save.progress.cancel.store(true, Ordering::Relaxed);
            self.set_status(CANCELLING);
        }
    }

    /// Called when the machine has ended, which ends a save, too. Waits for a background save, which may have to remove its file.
    pub(super) fn end(&self) {
        if let Some(background) = self.save.as_ref().and_then(|save| save.background.as_ref()) {
            background.wait();
        }
    }

    /// The MIGRATION events for all clients since the last call.
    pub(super) fn take_messages(&mut self) -> Vec<Value> {
        std::mem::take(&mut self.messages)
    }

    /// Updates the last save from the machine's events.
    pub(super) fn advance(&mut self, events: &[MachineEvent]) {
        for event in events {
            if let MachineEvent::Done(job, result) = event
                && let Some(save) = self.save.as_mut().filter(|save| save.job == *job)
            {
                save.downtime = Some(save.began.elapsed().as_millis() as u64);
                match result {
                    // A background save: the guest goes on, and its memory of this moment is being written.
                    Ok(()) if save.background.is_some() => {
                        if save.status == SETUP {
                            self.set_status(ACTIVE);
                        }
                    }
                    result => self.finish(result),
                }
            }
        }
        if let Some(save) =
            self.save.as_mut().filter(|save| save.milliseconds == 0 && save.downtime.is_some())
            && let Some(result) = save.background.as_ref().and_then(BackgroundSave::poll)
        {
            self.finish(&result);
        }
    }

    fn finish(&mut self, result: &Result<(), Error>) {
        let Some(save) = &mut self.save else { return };
        save.milliseconds = (save.began.elapsed().as_millis() as u64).max(1);
        save.error = result.as_ref().err().map(|error| WithCauses(error).to_string());
        // Only a client's `migrate_cancel` sets this status. The machine itself cancels a save when it ends or the guest panics.
        let cancelled = save.status == CANCELLING;
        self.set_status(match result {
            Ok(()) => COMPLETED,
            Err(_) if cancelled => CANCELLED,
            Err(_) => FAILED,
        });
    }

    fn set_capabilities(&mut self, arguments: &Arguments<'_>) -> Result<(), Failure> {
        let list = arguments.any("capabilities").and_then(Value::as_array);
        let expected = "Invalid parameter type for 'capabilities', expected: array of capabilities";
        for entry in list.ok_or_else(|| Failure::generic(expected))? {
            match (entry["capability"].as_str(), entry["state"].as_bool()) {
                (Some("events"), Some(state)) => self.events = state,
                // Always on: every page of RAM has a fixed offset in the file.
                (Some("mapped-ram"), Some(_)) => {}
                (Some("background-snapshot"), Some(state)) => self.in_background = state,
                (Some("x-minivmm-incremental"), Some(state)) => self.is_incremental = state,
                (Some(name), Some(_)) => {
                    let unknown = format!("Parameter 'capability' does not accept value '{name}'");
                    return Err(Failure::generic(unknown));
                }
                _ => return Err(Failure::generic(expected)),
            }
        }
        Ok(())
    }

    fn info(&self) -> Value {
        let Some(save) = &self.save else { return json!({}) };
        let ram = &save.progress.ram;
        let [total, remaining, written, zero] =
            [&ram.total, &ram.remaining, &ram.written, &ram.zero]
                .map(|count| count.load(Ordering::Relaxed));
        let page = arch::layout::PAGE_SIZE;
        let mut info = json!({
            "status": save.status,
            "ram": {
                "transferred": written,
                "remaining": remaining,
                "total": total,
                "duplicate": zero / page,
                "normal": written / page,
                "normal-bytes": written,
                "page-size": page,
            },
        });
        if let Some(error) = &save.error {
            info["error-desc"] = json!(error);
        }
        let elapsed = save.began.elapsed().as_millis() as u64;
        info["total-time"] = json!(if save.milliseconds > 0 { save.milliseconds } else { elapsed });
        if let Some(downtime) = save.downtime {
            info["downtime"] = json!(downtime);
        }
        info
    }
}
