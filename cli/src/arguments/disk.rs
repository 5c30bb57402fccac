//! `--disk PATH[,key=value]...` with QEMU's keys.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use devices::block::{BlockOptions, ErrorPolicy, Geometry};
use devices::disk::injected_faults::FaultRule;
use devices::disk::{DiscardMode, OpenOptions};
use vmm::DiskConfig;

use super::throttling;
use super::usage_error::UsageError;
use super::value::{ValueError, bytes, number, switch};

pub(crate) const HELP: &str = "Disk keys, with QEMU's names:
  format=raw|qcow2              the image's format; it is never guessed [raw]
  readonly=on|off               the guest cannot write [off]
  snapshot=on|off               writes go to a temporary file that is deleted at the end [off]
  id=NAME                       the disk's name for control clients [vda, vdb, ...]
  serial=TEXT                   up to 20 characters, in the guest's /sys/block/vda/serial
  cache=writeback|none|writethrough|directsync|unsafe    [writeback]
  aio=io_uring|threads          how requests reach the host [io_uring]
  discard=unmap|ignore          whether the guest's discards free space in the image [unmap]
  detect-zeroes=off|on|unmap    turn writes of zeroes into cheaper operations [off]
  locking=on|off                refuse the image if another program uses it [on]
  rerror=report|ignore|stop     after a failed read: report the error to the guest, report success, or pause the VM and
                                retry when a control client resumes it [report]
  werror=report|ignore|stop|enospc    the same for writes; enospc pauses if the host has no space left and reports any
                                other error [enospc with --qmp, report without]
  backing=on|off                allow a qcow2 image to open its backing files [off]
  fault=KIND[:WORD]...          inject faults: error, torn, lost, flip, delay, hang or misdirected; the words choose the
                                requests (an unknown word prints them all); may be repeated; with none, the disk has
                                no fault until `minivmm ctl` adds one
  log-writes=FILE               log what the guest writes, for `minivmm powercut` and xfstests' replay-log [none]
  scsi=on|off                   pass the guest's SCSI commands to the host's SCSI disk at PATH [off]
  num-queues=N                  request queues [one for each vCPU]
  queue-size=N                  descriptors in each queue [256]
  logical-block-size=, physical-block-size=, min-io-size=, opt-io-size=BYTES    [the host's]
  throttling.bps-total=, throttling.iops-total=N    limits per second, also -read and -write; each with -max=N for a
                                burst and -max-length=SECONDS for its duration [none]
  throttling.iops-size=BYTES    a longer request counts as several operations [off]
  throttling.group=NAME         disks with the same NAME share one set of limits [the disk's id]
  cyls=, heads=, secs=N         the geometry; all three or none
A comma in PATH or TEXT is written twice.";

/// Keys of QEMU and of other hypervisors that have another name here, and what to write for them.
const KEY_HINTS: &[(&str, &str)] = &[
    ("bps", "throttling.bps-total=N"),
    ("bps_rd", "throttling.bps-read=N"),
    ("bps_wr", "throttling.bps-write=N"),
    ("direct", "cache=none"),
    ("fmt", "format=raw or format=qcow2"),
    ("iops", "throttling.iops-total=N"),
    ("iops_rd", "throttling.iops-read=N"),
    ("iops_wr", "throttling.iops-write=N"),
    ("media", "readonly=on for a disk that the guest cannot write"),
    ("num_queues", "num-queues=N"),
    ("queue_size", "queue-size=N"),
    ("ro", "readonly=on"),
];

#[derive(Clone, Debug)]
pub(crate) struct DiskOption {
    image: OpenOptions,
    /// Complete but for what depends on the machine: the name, the error policies, and the queues unless given.
    device: BlockOptions,
    num_queues: Option<u16>,
    id: Option<String>,
    read_errors: Option<ErrorPolicy>,
    write_errors: Option<ErrorPolicy>,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Context {
    pub(crate) cpus: u32,
    /// A control client can resume the VM after a disk has stopped it.
    pub(crate) control: bool,
}

impl DiskOption {
    /// The configuration of the disk at place `index` of a machine.
    ///
    /// # Errors
    /// The disk would stop the VM in a machine that no control client can resume.
    pub(crate) fn into_config(
        self,
        index: usize,
        context: Context,
    ) -> Result<DiskConfig, UsageError> {
        let Self { image, mut device, num_queues, id, read_errors, write_errors } = self;
        // As in QEMU, unless the VM would stop for ever.
        let full = if context.control { ErrorPolicy::Enospc } else { ErrorPolicy::Report };
        device.read_errors = read_errors.unwrap_or(ErrorPolicy::Report);
        device.write_errors = write_errors.unwrap_or(full);
        for (key, policy) in [("rerror", device.read_errors), ("werror", device.write_errors)] {
            let stops = matches!(policy, ErrorPolicy::Stop | ErrorPolicy::Enospc);
            if stops && !context.control {
                return Err(UsageError::StopsForEver { path: image.path, key, policy });
            }
        }
        if image.scsi && image.log_writes.is_some() {
            return Err(UsageError::LogsNoScsi { path: image.path });
        }
        device.name = DiskConfig::linux_name(index);
        device.num_queues =
            num_queues.unwrap_or_else(|| u16::try_from(context.cpus).unwrap_or(u16::MAX));
        device.write_cache = image.cache.writeback();
        let id = id.unwrap_or_else(|| device.name.clone());
        if !device.throttling.is_off() {
            device.throttling.group.get_or_insert_with(|| id.clone());
        }
        Ok(DiskConfig { id, image, device })
    }
}

impl DiskOption {
    /// Reads `PATH[,key=value]...`. The path may be any bytes; everything behind it is text.
    ///
    /// # Errors
    /// The path is missing, or a key or its value does not work.
    pub(crate) fn parse(text: &OsStr) -> Result<Self, ValueError> {
        let mut parts = split(text.as_bytes()).into_iter();
        let path = parts.next().unwrap_or_default();
        if path.is_empty() {
            return Err(ValueError::NoPath);
        }
        if let Some(key @ ("file" | "path")) = key_of(&path) {
            return Err(ValueError::PathWithKey(key.to_owned()));
        }
        let mut disk = Self {
            image: OpenOptions::new(OsString::from_vec(path)),
            device: BlockOptions::new(""),
            num_queues: None,
            id: None,
            read_errors: None,
            write_errors: None,
        };
        let mut geometry = [None; 3];
        let mut given = Vec::new();
        for part in parts {
            let part = String::from_utf8(part).map_err(|_| ValueError::NotUtf8)?;
            let Some((key, value)) = part.split_once('=') else {
                return Err(without_value(part));
            };
            // Each fault= adds a rule.
            if key != "fault" && given.iter().any(|before| before == key) {
                return Err(ValueError::KeyTwice(key.to_owned()));
            }
            given.push(key.to_owned());
            disk.set(key, value, &mut geometry).map_err(|source| ValueError::Key {
                key: key.to_owned(),
                value: value.to_owned(),
                source: Box::new(source),
            })?;
        }
        disk.device.geometry = match geometry {
            [None, None, None] => None,
            [Some(cylinders), Some(heads), Some(sectors)] => {
                let byte = |value| u8::try_from(value).map_err(|_| ValueError::GeometryRange);
                Some(Geometry { cylinders, heads: byte(heads)?, sectors: byte(sectors)? })
            }
            _ => return Err(ValueError::Geometry),
        };
        Ok(disk)
    }

    fn set(
        &mut self,
        key: &str,
        value: &str,
        geometry: &mut [Option<u16>; 3],
    ) -> Result<(), ValueError> {
        match key {
            "format" => self.image.format = Some(value.parse()?),
            "readonly" => self.image.read_only = switch(value)?,
            "snapshot" => self.image.snapshot = switch(value)?,
            "cache" => self.image.cache = value.parse()?,
            "aio" => self.image.aio = value.parse()?,
            "discard" if value == "on" => self.image.discard = DiscardMode::Unmap,
            "discard" if value == "off" => self.image.discard = DiscardMode::Ignore,
            "discard" => self.image.discard = value.parse()?,
            "detect-zeroes" => self.image.detect_zeroes = value.parse()?,
            "locking" => self.image.locking = switch(value)?,
            "backing" => self.image.backing = switch(value)?,
            "fault" => {
                if value != "none" {
                    value.parse::<FaultRule>()?;
                }
                self.image.faults.push(value.to_owned());
            }
            "log-writes" if value.is_empty() => {
                return Err(ValueError::Write("write a file's path"));
            }
            "log-writes" => self.image.log_writes = Some(value.into()),
            "scsi" => self.image.scsi = switch(value)?,
            "id" if value.is_empty() => return Err(ValueError::Write("write a name")),
            "id" => self.id = Some(value.to_owned()),
            "rerror" => self.read_errors = Some(error_policy(value, false)?),
            "werror" => self.write_errors = Some(error_policy(value, true)?),
            "serial" => self.device.serial = Some(value.to_owned()),
            "num-queues" => self.num_queues = Some(number(value)?),
            "queue-size" => self.device.queue_size = number(value)?,
            "logical-block-size" => self.device.logical_block_size = Some(bytes(value)?),
            "physical-block-size" => self.device.physical_block_size = Some(bytes(value)?),
            "min-io-size" => self.device.min_io_size = Some(bytes(value)?),
            "opt-io-size" => self.device.opt_io_size = Some(bytes(value)?),
            "cyls" => geometry[0] = Some(number(value)?),
            "heads" => geometry[1] = Some(number(value)?),
            "secs" => geometry[2] = Some(number(value)?),
            _ if throttling::set(&mut self.device.throttling, key, value)? => {}
            _ => return Err(unknown(key)),
        }
        Ok(())
    }
}

/// A part of the list that is no `key=value`: perhaps of a path with a comma in its name.
fn without_value(part: String) -> ValueError {
    match part.as_str() {
        "" => ValueError::NoKey,
        key if SWITCHES.contains(&key) => ValueError::KeyWithoutValue(part, "on"),
        key if keys().any(|known| known == key) => ValueError::KeyWithoutValue(part, "VALUE"),
        _ => ValueError::NotAKey(part),
    }
}

const SWITCHES: [&str; 5] = ["readonly", "snapshot", "locking", "backing", "scsi"];

/// The keys that `HELP` names. Suffixes, which begin with a dash there, are not among them.
fn keys() -> impl Iterator<Item = &'static str> {
    let keys = HELP.split_whitespace().filter_map(|word| word.split_once('=')).map(|(key, _)| key);
    keys.filter(|key| !key.starts_with('-'))
}

/// Suggests the key that another program's `key` stands for, or the most similar one, as clap does it for options.
fn unknown(key: &str) -> ValueError {
    if let Some((_, meant)) = KEY_HINTS.iter().find(|(known, _)| *known == key) {
        return ValueError::MeantKey((*meant).to_owned());
    }
    let scored = keys()
        .map(str::to_owned)
        .chain(throttling::keys())
        .map(|known| (strsim::jaro(key, &known), known))
        .filter(|(score, _)| *score > 0.7);
    match scored.max_by(|(one, _), (other, _)| one.total_cmp(other)) {
        Some((_, meant)) => ValueError::MeantKey(meant),
        None => ValueError::UnknownKey,
    }
}

/// The parts of a list, in which a comma that belongs to a part is written twice.
pub(crate) fn split(text: &[u8]) -> Vec<Vec<u8>> {
    let mut parts = vec![Vec::new()];
    let mut bytes = text.iter().copied().peekable();
    while let Some(byte) = bytes.next() {
        if byte == b',' && bytes.next_if_eq(&b',').is_none() {
            parts.push(Vec::new());
        } else if let Some(last) = parts.last_mut() {
            last.push(byte);
        }
    }
    parts
}

fn key_of(part: &[u8]) -> Option<&str> {
    str::from_utf8(part).ok()?.split_once('=').map(|(key, _)| key)
}

fn error_policy(value: &str, write: bool) -> Result<ErrorPolicy, ValueError> {
    match value {
        "report" => Ok(ErrorPolicy::Report),
        "ignore" => Ok(ErrorPolicy::Ignore),
        "stop" => Ok(ErrorPolicy::Stop),
        "enospc" if write => Ok(ErrorPolicy::Enospc),
        _ if write => Err(ValueError::Write("write report, ignore, stop or enospc")),
        _ => Err(ValueError::Write("write report, ignore or stop")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use devices::disk::{CacheMode, Format};
    use vmm::WithCauses;

    const CONTEXT: Context = Context { cpus: 3, control: false };

    fn parse(text: &str) -> Result<DiskOption, ValueError> {
        DiskOption::parse(text.as_ref())
    }

    #[test]
    fn a_path_alone() {
        let config = parse("a.img").unwrap().into_config(0, CONTEXT).unwrap();
        assert_eq!(config.image.path.to_str(), Some("a.img"));
        assert_eq!(config.device.name, "vda");
        assert_eq!(config.device.num_queues, 3);
        assert!(config.device.write_cache);
    }

    #[test]
    fn keys_reach_their_places() {
        let text = "d,,1.img,format=qcow2,readonly=on,cache=directsync,serial=a,,b,num-queues=2,scsi=on,cyls=9,heads=16,secs=63";
        let config = parse(text).unwrap().into_config(27, CONTEXT).unwrap();
        assert_eq!(config.image.path.to_str(), Some("d,1.img"));
        assert_eq!(
            (config.image.format, config.image.cache),
            (Some(Format::Qcow2), CacheMode::DirectSync)
        );
        assert!(config.image.read_only && config.image.scsi && !config.device.write_cache);
        assert_eq!(config.device.serial.as_deref(), Some("a,b"));
        assert_eq!((config.device.name.as_str(), config.device.num_queues), ("vdab", 2));
        assert_eq!(config.device.geometry, Some(Geometry { cylinders: 9, heads: 16, sectors: 63 }));
    }

    #[test]
    fn words_and_units_that_people_use() {
        let text = "a,readonly=yes,scsi=true,backing=y,locking=no,discard=off,logical-block-size=4k,throttling.bps-read=1M";
        let DiskOption { image, device, .. } = parse(text).unwrap();
        assert!(image.read_only && image.scsi && image.backing && !image.locking);
        assert_eq!(image.discard, "ignore".parse().unwrap());
        assert_eq!(device.logical_block_size, Some(4096));
        assert!(device.throttling.rates.iter().any(|rate| rate.average == 1 << 20));
        for (word, same) in [("on", "unmap"), ("off", "ignore")] {
            let discard = |word| parse(&format!("a,discard={word}")).unwrap().image.discard;
            assert_eq!(discard(word), discard(same));
        }
    }

    #[test]
    fn suggestions_are_keys() {
        for key in keys() {
            let error = parse(&format!("a,{key}=")).err();
            let error = error.as_ref().map(|error| WithCauses(error).to_string());
            assert!(!error.as_deref().unwrap_or_default().contains("unknown"), "{error:?}");
        }
        for key in [
            "format",
            "secs",
            "detect-zeroes",
            "logical-block-size",
            "opt-io-size",
            "throttling.iops-size",
        ] {
            assert!(keys().any(|known| known == key), "{key}");
        }
        assert_eq!(keys().count(), 29);
    }

    #[test]
    fn bad_keys_are_named() {
        for (text, named) in [
            ("", "path"),
            (",readonly=on", "path"),
            ("a,readonly", "readonly"),
            ("a,readonly=maybe", "readonly=maybe"),
            ("a,chache=none", "chache=none: unknown key; did you mean cache?"),
            ("a,sreial=x", "did you mean serial?"),
            ("a,throttling.bps-totle-max=1", "did you mean throttling.bps-total-max?"),
            ("a,xyzzy=1", "unknown key; `minivmm --help` lists them"),
            ("a,logical-block-size=8G", "logical-block-size=8G"),
            ("a,throttling.iops-total=1k", "throttling.iops-total=1k"),
            (
                "a,throttling.bps-total=1M,throttling.bps-total-max-length=1k",
                "throttling.bps-total-max-length=1k",
            ),
            ("a,cache=fast", "cache=fast"),
            ("a,queue-size=-1", "queue-size=-1"),
            ("a,cyls=1", "cyls"),
            ("a,throttling.bps=1", "throttling.bps"),
            ("a,throttling.bps-total=x", "throttling.bps-total=x"),
            ("a,id=", "id="),
            ("a,scsi=Yes", "scsi=Yes"),
            ("a,cyls=1,heads=300,secs=1", "heads= and secs= are at most 255"),
        ] {
            let error = WithCauses(&parse(text).unwrap_err()).to_string();
            assert!(error.contains(named), "{text}: {error}");
        }
    }
}
