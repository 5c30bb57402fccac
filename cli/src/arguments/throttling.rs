//! The `throttling.` keys of `--disk`, with QEMU's names. Each limit is a rate per second, with a higher one for a burst and the
//! seconds that the burst may last. `devices` checks what the limits mean together.

use devices::block::{Limit, Throttling};

use super::value::{ValueError, bytes, number};

/// The endings of a limit's keys: its average, the rate of a burst, the length of a burst.
const SUFFIXES: [&str; 3] = ["", "-max", "-max-length"];

pub(super) fn keys() -> impl Iterator<Item = String> {
    Limit::ALL
        .into_iter()
        .flat_map(|limit| SUFFIXES.map(|suffix| format!("throttling.{}{suffix}", limit.option())))
}

/// Sets the limit that `key` names. Returns whether that key exists.
pub(super) fn set(throttling: &mut Throttling, key: &str, value: &str) -> Result<bool, ValueError> {
    let Some(key) = key.strip_prefix("throttling.") else { return Ok(false) };
    if key == "iops-size" {
        throttling.operation_size = bytes(value)?;
        return Ok(true);
    }
    for (limit, rate) in Limit::ALL.into_iter().zip(&mut throttling.rates) {
        let parse = if key.starts_with("bps") { bytes } else { number };
        match key.strip_prefix(limit.option()) {
            Some("") => rate.average = parse(value)?,
            Some("-max") => rate.max = parse(value)?,
            Some("-max-length") => rate.max_length = number(value)?,
            _ => continue,
        }
        return Ok(true);
    }
    Ok(false)
}
