//! `--incoming file:PATH[,key=value]...` or `defer[,key=value]...`: a saved machine, and how it goes on.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use vmm::{ClockMode, IncomingConfig, MapMode};

use super::disk::split;
use super::value::ValueError;

/// Where the saved machine comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum IncomingOption {
    File(IncomingConfig),
    /// A control client names it later: there is no path yet.
    Defer(IncomingConfig),
}

pub(crate) fn parse(text: &OsStr) -> Result<IncomingOption, ValueError> {
    const USAGE: ValueError = ValueError::Write("write file:PATH or defer");
    let mut parts = split(text.as_bytes()).into_iter();
    let from = parts.next().unwrap_or_default();
    let path = match &from[..] {
        b"defer" => b"",
        from => from.strip_prefix(b"file:").filter(|path| !path.is_empty()).ok_or(USAGE)?,
    };
    let mut incoming = IncomingConfig::new(OsString::from_vec(path.to_owned()));
    for part in parts {
        let part = String::from_utf8(part).map_err(|_| ValueError::NotUtf8)?;
        let Some((key, value)) = part.split_once('=') else {
            return Err(ValueError::KeyWithoutValue(part, "VALUE"));
        };
        set(&mut incoming, key, value).map_err(|source| ValueError::Key {
            key: key.to_owned(),
            value: value.to_owned(),
            source: Box::new(source),
        })?;
    }
    Ok(if path.is_empty() {
        IncomingOption::Defer(incoming)
    } else {
        IncomingOption::File(incoming)
    })
}

fn set(incoming: &mut IncomingConfig, key: &str, value: &str) -> Result<(), ValueError> {
    match (key, value) {
        ("map", "auto") => incoming.map = MapMode::Auto,
        ("map", "on") => incoming.map = MapMode::On,
        ("map", "off") => incoming.map = MapMode::Off,
        ("map", _) => return Err(ValueError::Write("write auto, on or off")),
        ("clock", "stopped") => incoming.clock = ClockMode::Stopped,
        ("clock", "host") => incoming.clock = ClockMode::Host,
        ("clock", _) => return Err(ValueError::Write("write stopped or host")),
        ("disks", "checked") => incoming.check_disks = true,
        ("disks", "unchecked") => incoming.check_disks = false,
        ("disks", _) => return Err(ValueError::Write("write checked or unchecked")),
        ("paths", "given") => incoming.trust_paths = false,
        ("paths", "saved") => incoming.trust_paths = true,
        ("paths", _) => return Err(ValueError::Write("write given or saved")),
        _ => {
            return Err(ValueError::Write(
                "unknown key; the keys are map=, clock=, disks= and paths=",
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_reach_their_places() {
        let text = "file:/a,,b,map=off,clock=host,disks=unchecked,paths=saved";
        let given = parse(text.as_ref()).unwrap();
        let expected = IncomingConfig {
            path: "/a,b".into(),
            map: MapMode::Off,
            clock: ClockMode::Host,
            check_disks: false,
            trust_paths: true,
        };
        assert_eq!(given, IncomingOption::File(expected));
        let defer = IncomingConfig::new("");
        assert_eq!(parse("defer".as_ref()), Ok(IncomingOption::Defer(defer.clone())));
        let host = IncomingConfig { clock: ClockMode::Host, ..defer };
        assert_eq!(parse("defer,clock=host".as_ref()), Ok(IncomingOption::Defer(host)));
        for bad in [
            "",
            "/a",
            "file:",
            "defer,",
            "deferred",
            "file:a,map",
            "file:a,map=no",
            "file:a,mop=on",
            "file:a,disks=",
        ] {
            assert!(parse(bad.as_ref()).is_err(), "{bad}");
        }
    }
}
