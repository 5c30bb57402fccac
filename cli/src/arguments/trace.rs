//! `--trace [enable=]PATTERN[,...][,file=PATH][,format=FORMAT]`, as QEMU's `-trace` takes it.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use super::disk::split;
use super::usage_error::UsageError;
use super::value::ValueError;
use crate::trace::TraceOptions;
use crate::trace::format::Format;

/// Reads one `--trace`. A pattern behind `-` switches events off.
///
/// # Errors
/// A pattern matches nothing, or a key or its value does not work.
pub(super) fn parse(text: &OsStr) -> Result<TraceOptions, ValueError> {
    let mut options = TraceOptions::default();
    for part in split(text.as_bytes()) {
        if let Some(path) = part.strip_prefix(b"file=") {
            if path.is_empty() {
                return Err(ValueError::Write("file= needs a path; write file=PATH"));
            }
            options.file = Some(OsString::from_vec(path.to_owned()).into());
            continue;
        }
        let part = String::from_utf8(part).map_err(|_| ValueError::NotUtf8)?;
        match part.split_once('=') {
            Some(("format", word)) => options.format = Some(format(word)?),
            Some(("enable", pattern)) => options.changes.push(change(pattern)?),
            Some((key, _)) => return Err(ValueError::TraceKey(key.to_owned())),
            None => options.changes.push(change(&part)?),
        }
    }
    Ok(options)
}

fn format(word: &str) -> Result<Format, ValueError> {
    match word {
        "text" => Ok(Format::Text),
        "json" => Ok(Format::Json),
        "perfetto" => Ok(Format::Perfetto),
        _ => Err(ValueError::Write("unknown format; write format=text, json or perfetto")),
    }
}

fn change(pattern: &str) -> Result<(String, bool), ValueError> {
    let (pattern, on) = pattern.strip_prefix('-').map_or((pattern, true), |rest| (rest, false));
    match vmm::trace::matching(pattern).next() {
        Some(_) => Ok((pattern.to_owned(), on)),
        None => Err(ValueError::NoEvent(pattern.to_owned())),
    }
}

/// What all `--trace` together ask for. `None`: there is none.
///
/// # Errors
/// They name two files or formats, or a format that needs a file without one.
pub(super) fn merge(all: Vec<TraceOptions>) -> Result<Option<TraceOptions>, UsageError> {
    let mut merged: Option<TraceOptions> = None;
    for TraceOptions { changes, file, format } in all {
        let merged = merged.get_or_insert_default();
        merged.changes.extend(changes);
        if file.is_some() && merged.file.is_some() {
            return Err(UsageError::TraceTwice("file"));
        }
        if format.is_some() && merged.format.is_some() {
            return Err(UsageError::TraceTwice("format"));
        }
        merged.file = merged.file.take().or(file);
        merged.format = merged.format.or(format);
    }
    match &merged {
        Some(TraceOptions {
            file: None, format: Some(Format::Json | Format::Perfetto), ..
        }) => Err(UsageError::TraceFile),
        _ => Ok(merged),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(all: &[&str]) -> TraceOptions {
        let all = all.iter().map(|text| parse(OsStr::new(text)).unwrap()).collect();
        merge(all).unwrap().unwrap()
    }

    #[test]
    fn patterns_add_up() {
        let on = |pattern: &str| (pattern.to_owned(), true);
        let options = parsed(&["virtio_*,enable=kvm_*", "file=a,,b,format=json", "-irq_pulse"]);
        let off = ("irq_pulse".to_owned(), false);
        assert_eq!(options.changes, [on("virtio_*"), on("kvm_*"), off]);
        assert_eq!(options.file, Some("a,b".into()));
        assert_eq!(options.format, Some(Format::Json));
        assert_eq!(merge(Vec::new()), Ok(None));
        assert_eq!(parsed(&["*"]).file, None);
    }
}
