//! The values of options as people write them: sizes, durations, CPU lists, switches, paths.
//!
//! Each parser returns a [`ValueError`] that says what to write instead. [`text`] and [`os_text`] turn a parser into one that
//! clap calls; clap adds the option's name and the value to the error, and [`super::usage_error`] prints them.

use std::ffi::{OsStr, OsString};
use std::net::SocketAddr;
use std::num::{IntErrorKind, ParseIntError};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::builder::{OsStringValueParser, TypedValueParser};
use devices::disk::UnknownWord;
use devices::disk::injected_faults::BadFault;
use vmm::{ConsoleConfig, GdbConfig, SandboxMode};

/// What is wrong with a value, and what to write instead. Its `Display` follows the option and the value in the line.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ValueError {
    #[error("not valid UTF-8; only a path may be any bytes")]
    NotUtf8,
    /// The reason if it is not plain, and what to write.
    #[error("{0}")]
    Write(&'static str),
    #[error("too large; write {0} at most")]
    TooLarge(&'static str),
    #[error("a guest needs at least {0}M of memory; write {0}M or more")]
    MemoryTooSmall(u64),
    #[error("memory is made of whole pages; write a multiple of 4K")]
    MemoryNotWholePages,
    #[error("the path is missing; write PATH[,KEY=VALUE]...")]
    NoPath,
    #[error("the path stands first, without a key; leave out {0}=")]
    PathWithKey(String),
    #[error("{0}: a key without a value; write {0}={1}")]
    KeyWithoutValue(String, &'static str),
    #[error("{0}: not a key; write KEY=VALUE, or a comma in the path twice")]
    NotAKey(String),
    #[error("a comma without a key behind it; leave it out, or write a comma in the path twice")]
    NoKey,
    #[error("{0}=: given twice; give it once")]
    KeyTwice(String),
    #[error("{key}={value}")]
    Key { key: String, value: String, source: Box<ValueError> },
    #[error("unknown key; did you mean {0}?")]
    MeantKey(String),
    #[error("unknown key; `minivmm --help` lists them")]
    UnknownKey,
    #[error("cyls=, heads= and secs= belong together; give all three or none")]
    Geometry,
    #[error("heads= and secs= are at most 255")]
    GeometryRange,
    #[error("{0}: no trace event has this name; `minivmm --trace help` lists them")]
    NoEvent(String),
    #[error("{0}=: unknown key; write enable=PATTERN, file=PATH or format=FORMAT")]
    TraceKey(String),
    #[error(transparent)]
    Fault(#[from] BadFault),
    #[error(transparent)]
    Word(#[from] UnknownWord),
}

pub(crate) fn text<T: Clone + Send + Sync + 'static>(
    parse: fn(&str) -> Result<T, ValueError>,
) -> impl TypedValueParser<Value = T> {
    OsStringValueParser::new()
        .try_map(move |value| value.to_str().ok_or(ValueError::NotUtf8).and_then(parse))
}

/// A clap parser for values with a path in them, which may be any bytes.
pub(crate) fn os_text<T: Clone + Send + Sync + 'static>(
    parse: fn(&OsStr) -> Result<T, ValueError>,
) -> impl TypedValueParser<Value = T> {
    OsStringValueParser::new().try_map(move |value: OsString| parse(&value))
}

/// Guest memory in bytes, from `512M`, `1.5G`, `65536K`, or a plain number of MiB as QEMU's `-m` has it.
pub(crate) fn memory(text: &str) -> Result<u64, ValueError> {
    const MIN: u64 = 16 << 20;
    let bytes =
        size(text, 20).ok_or(ValueError::Write("not a size; write 512M, 1.5G or 65536K"))?;
    match bytes {
        ..MIN => Err(ValueError::MemoryTooSmall(MIN >> 20)),
        _ if !bytes.is_multiple_of(PAGE) => Err(ValueError::MemoryNotWholePages),
        _ => Ok(bytes),
    }
}

/// Bytes from `10G`, `1.5M`, `4K`, or a plain number of bytes. Out of the range of `T`, the value is refused.
pub(crate) fn bytes<T: TryFrom<u64>>(text: &str) -> Result<T, ValueError> {
    let bytes = size(text, 0).and_then(|bytes| T::try_from(bytes).ok());
    bytes.ok_or(ValueError::Write("not a size in range; write 10G, 4K or a number of bytes"))
}

pub(crate) fn number<T: FromStr<Err = ParseIntError>>(text: &str) -> Result<T, ValueError> {
    /// The largest numbers of 64, 32 and 16 bits.
    const LARGEST: [&str; 3] = ["18446744073709551615", "4294967295", "65535"];
    let fits = |text: &&str| text.parse::<T>().is_ok();
    text.parse().map_err(|error: ParseIntError| match error.kind() {
        IntErrorKind::Zero => ValueError::Write("write 1 or more"),
        IntErrorKind::PosOverflow => {
            ValueError::TooLarge(LARGEST.into_iter().find(fits).unwrap_or("255"))
        }
        _ => ValueError::Write("not a whole number; write digits only"),
    })
}

const PAGE: u64 = 4096;

/// A number and its unit, a power of 1024; without a unit, times two to the power of `plain`. A fraction from M on is cut to whole pages, of
/// which at least one is left: 1.1G is no whole number of bytes. In smaller units, it has to be one. 0 often means no limit, so that
/// nothing else may become 0.
fn size(text: &str, plain: u32) -> Option<u64> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match text[digits.len()..].to_ascii_uppercase().as_str() {
        "" => plain,
        "K" | "KB" | "KIB" => 10,
        "M" | "MB" | "MIB" => 20,
        "G" | "GB" | "GIB" => 30,
        "T" | "TB" | "TIB" => 40,
        _ => return None,
    };
    let Some((whole, fraction)) = digits.split_once('.') else {
        let count: u64 = digits.parse().ok()?;
        return count.checked_shl(shift).filter(|bytes| bytes >> shift == count);
    };
    let scaled: u128 = format!("{whole}{fraction}").parse().ok()?;
    let divisor = 10_u128.checked_pow(u32::try_from(fraction.len()).ok()?)?;
    let scaled = scaled.checked_mul(1 << shift)?;
    let bytes = u64::try_from(scaled / divisor).ok()?;
    let cut = if shift < 20 { bytes } else { bytes - bytes % PAGE };
    let fits = if shift < 20 { scaled.is_multiple_of(divisor) } else { cut > 0 || scaled == 0 };
    (fits && !whole.is_empty() && !fraction.is_empty()).then_some(cut)
}

/// A duration from `60s`, `1m30s`, `1500ms`, `1h`, or a plain number of seconds. Zero is refused.
pub(crate) fn duration(text: &str) -> Result<Duration, ValueError> {
    let usage = ValueError::Write("not a time above 0; write 60s, 1m30s, 1500ms or 1h");
    let mut milliseconds = Some(0_u64);
    let mut rest = text;
    while !rest.is_empty() {
        let number = rest.trim_start_matches(|c: char| c.is_ascii_digit());
        let after = number.trim_start_matches(|c: char| c.is_ascii_alphabetic());
        let unit = match &number[..number.len() - after.len()] {
            "ms" => Some(1),
            "s" => Some(1000),
            // Only a number that stands alone needs no unit.
            "" if rest == text => Some(1000),
            "m" => Some(60_000),
            "h" => Some(3_600_000),
            _ => None,
        };
        let count = rest[..rest.len() - number.len()].parse::<u64>().ok();
        milliseconds = count
            .zip(unit)
            .and_then(|(count, unit)| count.checked_mul(unit)?.checked_add(milliseconds?));
        rest = if milliseconds.is_some() { after } else { "" };
    }
    milliseconds.filter(|total| *total > 0).map(Duration::from_millis).ok_or(usage)
}

/// The number of vCPUs. What this host's KVM allows may be less.
pub(crate) fn cpus(text: &str) -> Result<u32, ValueError> {
    let count = text.parse().ok().filter(|count| (1..=255).contains(count));
    count.ok_or(ValueError::Write("write 1 to 255"))
}

/// CPU numbers of the host in the order given, as taskset and libvirt write them: `0,2-3`.
pub(crate) fn cpu_list(text: &str) -> Result<Vec<usize>, ValueError> {
    const MAX: usize = 8192;
    let usage = || ValueError::Write("not a list of CPUs; write numbers and ranges: 0,2-3");
    let number =
        |text: &str| text.parse::<usize>().ok().filter(|number| *number < MAX).ok_or_else(usage);
    let mut cpus = Vec::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let range = number(first)?..=number(last)?;
        if range.is_empty() {
            return Err(usage());
        }
        cpus.extend(range);
    }
    Ok(cpus)
}

pub(crate) fn switch(text: &str) -> Result<bool, ValueError> {
    match text {
        "on" | "yes" | "true" | "y" => Ok(true),
        "off" | "no" | "false" | "n" => Ok(false),
        _ => Err(ValueError::Write("write on or off")),
    }
}

/// Whether idle vCPUs stay in the guest: the one key of QEMU's option that means something here.
pub(crate) fn overcommit(text: &str) -> Result<bool, ValueError> {
    let value = text.strip_prefix("cpu-pm=").ok_or(ValueError::Write(OVERCOMMIT))?;
    switch(value).map_err(|_| ValueError::Write(OVERCOMMIT))
}

const OVERCOMMIT: &str = "write cpu-pm=on or cpu-pm=off";

/// The mode, and whether the process may start a child process.
pub(crate) fn sandbox(text: &str) -> Result<(SandboxMode, bool), ValueError> {
    let (mode, spawn) = match text.split_once(',') {
        None => (text, false),
        Some((mode, "spawn=allow")) => (mode, true),
        Some((mode, "spawn=deny")) => (mode, false),
        _ => return Err(ValueError::Write("after the comma write spawn=allow, or leave it out")),
    };
    let mode = match (mode, switch(mode)) {
        ("log", _) => SandboxMode::Log,
        (_, Ok(true)) => SandboxMode::On,
        (_, Ok(false)) => SandboxMode::Off,
        _ => return Err(ValueError::Write("write on, off or log")),
    };
    Ok((mode, spawn))
}

pub(crate) fn user(text: &str) -> Result<(u32, u32), ValueError> {
    // The last number stands for "as it is" (setresuid(2)).
    let number = |text: &str| text.parse().ok().filter(|id| *id != u32::MAX);
    text.split_once(':')
        .and_then(|(user, group)| Some((number(user)?, number(group)?)))
        .ok_or(ValueError::Write("write two numbers, UID:GID, such as 1000:1000"))
}

/// How `--explain` shows the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ExplainFormat {
    Text,
    Svg,
}

pub(crate) fn explain(text: &str) -> Result<ExplainFormat, ValueError> {
    match text {
        "text" => Ok(ExplainFormat::Text),
        "svg" => Ok(ExplainFormat::Svg),
        _ => Err(ValueError::Write("write --explain or --explain=svg")),
    }
}

pub(crate) fn console(text: &OsStr) -> Result<ConsoleConfig, ValueError> {
    if let Some(path) = path_after(text, "file:") {
        let (path, max) = with_max(path)?;
        return Ok(ConsoleConfig::File { path, max });
    }
    if let Some(path) = path_after(text, "unix:") {
        return Ok(ConsoleConfig::Unix(path));
    }
    match text.as_bytes() {
        b"stdio" => Ok(ConsoleConfig::Stdio),
        b"stderr" => Ok(ConsoleConfig::Stderr),
        b"pty" => Ok(ConsoleConfig::Pty),
        b"none" => Ok(ConsoleConfig::None),
        _ => Err(ValueError::Write("write stdio, stderr, file:PATH, pty, unix:PATH or none")),
    }
}

/// Takes `,max=SIZE` from the end of a path. What else looks like a key there is refused: it is more likely to be a mistyped one than a part of
/// the path.
fn with_max(path: PathBuf) -> Result<(PathBuf, Option<u64>), ValueError> {
    const MAX: &[u8] = b",max=";
    const USAGE: ValueError =
        ValueError::Write("the only key is max=, once; write file:PATH,max=SIZE");
    let has_max = |text: &[u8]| text.windows(MAX.len()).any(|part| part == MAX);
    let text = path.as_os_str().as_bytes();
    let (path, value) = match last_key(text) {
        None if has_max(text) => return Err(USAGE),
        None => return Ok((path, None)),
        Some((path, b"max", value)) if !path.is_empty() && !has_max(path) => (path, value),
        Some(_) => return Err(USAGE),
    };
    let max = bytes(&String::from_utf8_lossy(value))?;
    Ok((OsStr::from_bytes(path).into(), Some(max)))
}

/// The parts of `PATH,KEY=VALUE`, with a key of lowercase letters and hyphens behind the last comma, and no directory.
fn last_key(text: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let comma = text.iter().rposition(|byte| *byte == b',')?;
    let (path, rest) = (&text[..comma], &text[comma + 1..]);
    let equals = rest.iter().position(|byte| *byte == b'=')?;
    let (key, value) = (&rest[..equals], &rest[equals + 1..]);
    let is_key = !key.is_empty() && key.iter().all(|byte| matches!(byte, b'a'..=b'z' | b'-'));
    (is_key && !value.contains(&b'/')).then_some((path, key, value))
}

pub(crate) fn socket(text: &OsStr) -> Result<PathBuf, ValueError> {
    path_after(text, "unix:").ok_or(ValueError::Write("write unix:PATH"))
}

pub(crate) fn gdb(text: &OsStr) -> Result<GdbConfig, ValueError> {
    const USAGE: ValueError = ValueError::Write("write unix:PATH or tcp:127.0.0.1:PORT");
    if let Some(path) = path_after(text, "unix:") {
        return Ok(GdbConfig::Unix(path));
    }
    let address = text.to_str().and_then(|text| text.strip_prefix("tcp:")).ok_or(USAGE)?;
    let address: SocketAddr = address.parse().map_err(|_| USAGE)?;
    if address.port() == 0 {
        return Err(ValueError::Write("port 0 is any free port; name one, such as 1234"));
    }
    if !address.ip().is_loopback() {
        return Err(ValueError::Write(
            "other hosts would control the guest; write tcp:127.0.0.1:PORT and forward the port by ssh",
        ));
    }
    Ok(GdbConfig::Tcp(address))
}

fn path_after(text: &OsStr, prefix: &str) -> Option<PathBuf> {
    let path = text.as_bytes().strip_prefix(prefix.as_bytes()).filter(|path| !path.is_empty());
    path.map(|path| OsStr::from_bytes(path).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_binary_and_whole_pages() {
        for (text, bytes) in [
            ("512M", 512 << 20),
            ("512", 512 << 20),
            ("5g", 5 << 30),
            ("65536K", 64 << 20),
            ("1.5G", 3 << 29),
            ("0.5g", 1 << 29),
            ("1.1G", ((11_u64 << 30) / 10) & !4095),
        ] {
            assert_eq!(memory(text), Ok(bytes), "{text}");
        }
        for text in [
            "",
            "0",
            "12Q",
            "M",
            "-1",
            "1.G",
            ".5G",
            "1.5.5G",
            "99999999999T",
            "20000001K",
            "64k",
            "18446744073709551615",
            "1.99999999999999999999999999999999999999999G",
        ] {
            assert!(memory(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_fraction_becomes_no_other_size_and_never_0() {
        for (text, value) in [
            ("1.5K", 1536),
            ("0.5k", 512),
            ("1.5M", 3 << 19),
            ("1.1M", 0x11_9000),
            ("0.0K", 0),
            ("0.00G", 0),
            ("2.0", 2),
        ] {
            assert_eq!(bytes::<u64>(text), Ok(value), "{text}");
        }
        for text in ["1.5", "0.5", "1.3K", "0.0001K", "0.001M", "0.000001G"] {
            assert!(bytes::<u64>(text).is_err(), "{text}");
        }
    }

    #[test]
    fn durations() {
        for (text, milliseconds) in [
            ("60s", 60_000),
            ("2", 2000),
            ("1500ms", 1500),
            ("5m", 300_000),
            ("1m30s", 90_000),
            ("1h1m1s1ms", 3_661_001),
        ] {
            assert_eq!(duration(text), Ok(Duration::from_millis(milliseconds)), "{text}");
        }
        for text in ["", "0", "s", "1d", "-1s", "18446744073709551615h", "1m30", "0s", "1 s"] {
            assert!(duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn cpu_lists() {
        assert_eq!(cpu_list("0"), Ok(vec![0]));
        assert_eq!(cpu_list("3,0-2,3"), Ok(vec![3, 0, 1, 2, 3]));
        for bad in ["", ",", "1,", "-1", "2-1", "0-", "a", "0-8192", "1 2", "18446744073709551616"]
        {
            assert!(cpu_list(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn consoles() {
        let file = |path: &str, max| ConsoleConfig::File { path: path.into(), max };
        assert_eq!(console("file:/a:b".as_ref()), Ok(file("/a:b", None)));
        assert_eq!(console("file:/a,b,max=1M".as_ref()), Ok(file("/a,b", Some(1 << 20))));
        assert_eq!(
            console("file:/rate=1,seed=3/log".as_ref()),
            Ok(file("/rate=1,seed=3/log", None))
        );
        assert_eq!(console("file:/a=b,c".as_ref()), Ok(file("/a=b,c", None)));
        for bad in [
            "file:a,max=much",
            "file:a,mx=1",
            "file:a,max=1,max=2",
            "file:a,max=1,x",
            "file:,max=1",
        ] {
            assert!(console(bad.as_ref()).is_err(), "{bad}");
        }
        assert_eq!(console("unix:s".as_ref()), Ok(ConsoleConfig::Unix("s".into())));
        for bad in ["", "tty", "file:", "unix", "stdio:"] {
            assert!(console(bad.as_ref()).is_err(), "{bad}");
        }
    }
}
