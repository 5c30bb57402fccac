//! `--disk PATH[,key=value]...` with QEMU's keys.

use std::fmt::Display;
use std::str::FromStr;

use devices::block::{BlockOptions, ErrorPolicy, Geometry, Limit};
use devices::disk::OpenOptions;
use vmm::DiskConfig;

use crate::size;

/// What `--help` says about the keys.
pub(crate) const HELP: &str = "Disk keys, with QEMU's names:
  format=raw|qcow2              never guessed from the content [raw]
  readonly=on|off               the guest cannot write [off]
  snapshot=on|off               writes go to a temporary overlay and vanish [off]
  id=NAME                       what control clients call the disk, and no other [vda, vdb, ...]
  serial=TEXT                   up to 20 characters, in the guest's /sys/block/vda/serial
  cache=writeback|none|writethrough|directsync|unsafe    [writeback]
  aio=io_uring|threads          how requests reach the host [io_uring]
  discard=unmap|ignore          whether the guest's discards free space in the image [unmap]
  detect-zeroes=off|on|unmap    turn writes of zeroes into cheaper operations [off]
  locking=on|off                keep a second writer from the image [on]
  rerror=report|ignore|stop     what follows a failed read: tell the guest, tell it that all is well, or stop the VM until
                                a control client continues it and the read is tried again [report]
  werror=report|ignore|stop|enospc    the same for writes; enospc stops when the host is full and reports all else
                                [enospc with --qmp, report without]
  backing=on|off                a qcow2 image may open its backing files [off]
  scsi=on|off                   pass the guest's SCSI commands on to the host's SCSI disk at PATH [off]
  num-queues=N                  request queues [one for each vCPU]
  queue-size=N                  descriptors in each queue [256]
  logical-block-size=, physical-block-size=, min-io-size=, opt-io-size=BYTES    [the host's]
  throttling.bps-total=, throttling.iops-total=N    limits a second, also -read and -write; each with -max=N for a
                                burst and -max-length=SECONDS for how long it may last [none]
  throttling.iops-size=BYTES    a longer request counts as several operations [never]
  cyls=, heads=, secs=N         the geometry; all three or none
A comma in PATH or TEXT is written twice.";

/// One `--disk`.
#[derive(Clone, Debug)]
pub(crate) struct DiskOption {
    image: OpenOptions,
    /// The device's options, but for what depends on the disk's place: its name, and its queues unless they were given.
    device: BlockOptions,
    num_queues: Option<u16>,
    id: Option<String>,
    /// `rerror=` and `werror=`, where given.
    read_errors: Option<ErrorPolicy>,
    write_errors: Option<ErrorPolicy>,
}

/// What a disk has to know of the machine that it is in.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Surroundings {
    /// Number of vCPUs.
    pub(crate) cpus: u32,
    /// Someone can resume the VM after a disk has stopped it.
    pub(crate) control: bool,
}

impl DiskOption {
    /// The disk at place `index` of a machine.
    ///
    /// # Errors
    /// What does not work in this machine.
    pub(crate) fn into_config(self, index: usize, machine: Surroundings) -> Result<DiskConfig, String> {
        let Self { image, mut device, num_queues, id, read_errors, write_errors } = self;
        // As in QEMU, unless the VM would stop for ever.
        let full = if machine.control { ErrorPolicy::Enospc } else { ErrorPolicy::Report };
        device.read_errors = read_errors.unwrap_or(ErrorPolicy::Report);
        device.write_errors = write_errors.unwrap_or(full);
        for (key, policy) in [("rerror", device.read_errors), ("werror", device.write_errors)] {
            let word = match policy {
                ErrorPolicy::Stop => "stop",
                ErrorPolicy::Enospc => "enospc",
                ErrorPolicy::Report | ErrorPolicy::Ignore => continue,
            };
            if !machine.control {
                let path = image.path.display();
                return Err(format!(
                    "--disk {path}: {key}={word} stops the VM, and nobody can resume it; add --qmp unix:PATH"
                ));
            }
        }
        device.name = name(index);
        device.num_queues = num_queues.unwrap_or_else(|| u16::try_from(machine.cpus).unwrap_or(u16::MAX));
        device.write_cache = image.cache.writeback();
        Ok(DiskConfig { id: id.unwrap_or_else(|| device.name.clone()), image, device })
    }
}

/// The name that Linux gives the disk at place `index`: vda to vdz, then vdaa.
fn name(index: usize) -> String {
    let letter = |value: usize| char::from(b'a' + (value % 26) as u8);
    match index / 26 {
        0 => format!("vd{}", letter(index)),
        wraps => format!("vd{}{}", letter(wraps - 1), letter(index)),
    }
}

impl FromStr for DiskOption {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = split(text).into_iter();
        let path = parts.next().unwrap_or_default();
        if path.is_empty() {
            return Err("the path is missing; write --disk PATH[,key=value]...".to_owned());
        }
        let mut disk = Self {
            image: OpenOptions::new(path),
            device: BlockOptions::new(""),
            num_queues: None,
            id: None,
            read_errors: None,
            write_errors: None,
        };
        let mut geometry = [None; 3];
        for part in parts {
            let (key, value) = part.split_once('=').ok_or_else(|| format!("'{part}' is not of the form key=value"))?;
            disk.set(key, value, &mut geometry).map_err(|reason| format!("{key}={value}: {reason}"))?;
        }
        disk.device.throttling.check().map_err(|reason| format!("throttling.{reason}"))?;
        disk.device.geometry = match geometry {
            [None, None, None] => None,
            [Some(cylinders), Some(heads), Some(sectors)] => Some(Geometry {
                cylinders,
                heads: u8::try_from(heads).map_err(|_| format!("heads={heads}: at most 255"))?,
                sectors: u8::try_from(sectors).map_err(|_| format!("secs={sectors}: at most 255"))?,
            }),
            _ => return Err("cyls=, heads= and secs= make sense only together".to_owned()),
        };
        Ok(disk)
    }
}

impl DiskOption {
    fn set(&mut self, key: &str, value: &str, geometry: &mut [Option<u16>; 3]) -> Result<(), String> {
        match key {
            "format" => self.image.format = word(value)?,
            "readonly" => self.image.read_only = switch(value)?,
            "snapshot" => self.image.snapshot = switch(value)?,
            "cache" => self.image.cache = word(value)?,
            "aio" => self.image.aio = word(value)?,
            "discard" if value == "on" => self.image.discard = word("unmap")?,
            "discard" if value == "off" => self.image.discard = word("ignore")?,
            "discard" => self.image.discard = word(value)?,
            "detect-zeroes" => self.image.detect_zeroes = word(value)?,
            "locking" => self.image.locking = switch(value)?,
            "backing" => self.image.backing = switch(value)?,
            "scsi" => self.image.scsi = switch(value)?,
            "id" if value.is_empty() => return Err("write a name".to_owned()),
            "id" => self.id = Some(value.to_owned()),
            "rerror" => self.read_errors = Some(policy(value, false)?),
            "werror" => self.write_errors = Some(policy(value, true)?),
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
            _ => match key.strip_prefix("throttling.").and_then(|limit| self.limit(limit)) {
                Some(limit) => *limit = if in_bytes(key) { bytes(value)? } else { number(value)? },
                None => return Err(unknown(key)),
            },
        }
        Ok(())
    }
}

impl DiskOption {
    /// The number behind `throttling.KEY`.
    fn limit(&mut self, key: &str) -> Option<&mut u64> {
        let throttling = &mut self.device.throttling;
        if key == "iops-size" {
            return Some(&mut throttling.operation_size);
        }
        for (limit, rate) in Limit::ALL.into_iter().zip(&mut throttling.rates) {
            match key.strip_prefix(limit.option()) {
                Some("") => return Some(&mut rate.average),
                Some("-max") => return Some(&mut rate.max),
                Some("-max-length") => return Some(&mut rate.max_length),
                _ => {}
            }
        }
        None
    }
}

/// The keys that `HELP` names. Suffixes, which begin with a dash there, are not among them.
fn keys() -> impl Iterator<Item = &'static str> {
    let keys = HELP.split_whitespace().filter_map(|word| word.split_once('=')).map(|(key, _)| key);
    keys.filter(|key| !key.starts_with('-'))
}

/// Suggests a key that `HELP` names, or a limit, as clap does it for options.
fn unknown(key: &str) -> String {
    let limits = Limit::ALL
        .into_iter()
        .flat_map(|limit| ["", "-max", "-max-length"].map(|suffix| format!("throttling.{}{suffix}", limit.option())));
    let scored = keys()
        .map(str::to_owned)
        .chain(limits)
        .map(|known| (strsim::jaro(key, &known), known))
        .filter(|(score, _)| *score > 0.7);
    match scored.max_by(|(one, _), (other, _)| one.total_cmp(other)) {
        Some((_, meant)) => format!("unknown key; did you mean '{meant}'?"),
        None => "unknown key; minivmm --help lists them".to_owned(),
    }
}

/// Whether the limit `key` counts bytes.
fn in_bytes(key: &str) -> bool {
    (key.contains(".bps") && !key.ends_with("-length")) || key.ends_with("-size")
}

/// Splits at commas; a doubled comma stands for one.
fn split(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut characters = text.chars().peekable();
    while let Some(character) = characters.next() {
        if character == ',' && characters.next_if_eq(&',').is_none() {
            parts.push(String::new());
        } else if let Some(last) = parts.last_mut() {
            last.push(character);
        }
    }
    parts
}

fn switch(value: &str) -> Result<bool, String> {
    match value {
        "on" | "yes" | "true" | "y" => Ok(true),
        "off" | "no" | "false" | "n" => Ok(false),
        _ => Err("write on or off".to_owned()),
    }
}

fn policy(value: &str, write: bool) -> Result<ErrorPolicy, String> {
    match value {
        "report" => Ok(ErrorPolicy::Report),
        "ignore" => Ok(ErrorPolicy::Ignore),
        "stop" => Ok(ErrorPolicy::Stop),
        "enospc" if write => Ok(ErrorPolicy::Enospc),
        _ => Err(format!("write report, ignore{} or stop", if write { ", enospc" } else { "" })),
    }
}

fn word<T: FromStr<Err: Display>>(value: &str) -> Result<T, String> {
    value.parse().map_err(|error: T::Err| error.to_string())
}

fn number<T: FromStr>(value: &str) -> Result<T, String> {
    value.parse().map_err(|_| "not a number in range".to_owned())
}

/// `4K`, `10M`, or plain bytes.
fn bytes<T: TryFrom<u64>>(value: &str) -> Result<T, String> {
    let bytes = size::bytes(value).and_then(|bytes| T::try_from(bytes).ok());
    bytes.ok_or_else(|| "not a size in range; write 4K or a number of bytes".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use devices::disk::{CacheMode, Format};

    const MACHINE: Surroundings = Surroundings { cpus: 3, control: false };

    #[test]
    fn a_path_alone() {
        let config = "a.img".parse::<DiskOption>().unwrap().into_config(0, MACHINE).unwrap();
        assert_eq!(config.image.path.to_str(), Some("a.img"));
        assert_eq!(config.device.name, "vda");
        assert_eq!(config.device.num_queues, 3);
        assert!(config.device.write_cache);
    }

    #[test]
    fn keys_reach_their_places() {
        let text = "d,,1.img,format=qcow2,readonly=on,cache=directsync,serial=a,,b,num-queues=2,scsi=on,cyls=9,heads=16,secs=63";
        let config = text.parse::<DiskOption>().unwrap().into_config(27, MACHINE).unwrap();
        assert_eq!(config.image.path.to_str(), Some("d,1.img"));
        assert_eq!((config.image.format, config.image.cache), (Format::Qcow2, CacheMode::DirectSync));
        assert!(config.image.read_only && config.image.scsi && !config.device.write_cache);
        assert_eq!(config.device.serial.as_deref(), Some("a,b"));
        assert_eq!((config.device.name.as_str(), config.device.num_queues), ("vdab", 2));
        assert_eq!(config.device.geometry, Some(Geometry { cylinders: 9, heads: 16, sectors: 63 }));
    }

    /// QEMU takes them, too.
    #[test]
    fn words_and_units_that_people_use() {
        let text =
            "a,readonly=yes,scsi=true,backing=y,locking=no,discard=off,logical-block-size=4k,throttling.bps-read=1M";
        let DiskOption { image, device, .. } = text.parse().unwrap();
        assert!(image.read_only && image.scsi && image.backing && !image.locking);
        assert_eq!(image.discard, "ignore".parse().unwrap());
        assert_eq!(device.logical_block_size, Some(4096));
        assert!(device.throttling.rates.iter().any(|rate| rate.average == 1 << 20));
        for (word, same) in [("on", "unmap"), ("off", "ignore")] {
            let discard = |word| format!("a,discard={word}").parse::<DiskOption>().unwrap().image.discard;
            assert_eq!(discard(word), discard(same));
        }
    }

    #[test]
    fn suggestions_are_keys() {
        for key in keys() {
            let error = format!("a,{key}=").parse::<DiskOption>().map(|_| ()).err().unwrap_or_default();
            assert!(!error.contains("unknown"), "{error}");
        }
        for key in ["format", "secs", "detect-zeroes", "logical-block-size", "opt-io-size", "throttling.iops-size"] {
            assert!(keys().any(|known| known == key), "{key}");
        }
        assert_eq!(keys().count(), 26);
    }

    #[test]
    fn bad_keys_are_named() {
        for (text, named) in [
            ("", "path"),
            (",readonly=on", "path"),
            ("a,readonly", "readonly"),
            ("a,readonly=maybe", "readonly=maybe"),
            ("a,chache=none", "chache=none: unknown key; did you mean 'cache'?"),
            ("a,sreial=x", "did you mean 'serial'?"),
            ("a,throttling.bps-totle-max=1", "did you mean 'throttling.bps-total-max'?"),
            ("a,xyzzy=1", "unknown key; minivmm --help lists them"),
            ("a,logical-block-size=8G", "logical-block-size=8G"),
            ("a,throttling.iops-total=1k", "throttling.iops-total=1k"),
            ("a,throttling.bps-total=1M,throttling.bps-total-max-length=1k", "throttling.bps-total-max-length=1k"),
            ("a,cache=fast", "cache=fast"),
            ("a,queue-size=-1", "queue-size=-1"),
            ("a,cyls=1", "cyls"),
            ("a,throttling.bps=1", "throttling.bps"),
            ("a,throttling.bps-total=x", "throttling.bps-total=x"),
            ("a,throttling.bps-total=1,throttling.bps-read=1", "throttling.bps-total"),
            ("a,throttling.iops-read-max=1", "throttling.iops-read-max"),
            ("a,id=", "id="),
            ("a,scsi=Yes", "scsi=Yes"),
            ("a,cyls=1,heads=300,secs=1", "heads=300"),
        ] {
            let error = text.parse::<DiskOption>().unwrap_err();
            assert!(error.contains(named), "{text}: {error}");
        }
    }
}
