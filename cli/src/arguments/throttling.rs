//! The `throttling.` keys of `--disk`, with QEMU's names. Each limit is a rate per second, with a higher one for a burst and the
//! seconds that the burst may last. `devices` checks what the limits mean together.

use devices::block::{Limit, Throttling};
use vmm::DiskConfig;

use super::usage_error::UsageError;
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
    match key {
        "group" if value.is_empty() => return Err(ValueError::Write("write a name")),
        "group" => throttling.group = Some(value.to_owned()),
        "iops-size" => throttling.operation_size = bytes(value)?,
        _ => return set_rate(throttling, key, value),
    }
    Ok(true)
}

/// A group has one set of limits, so that its disks may not name different ones.
///
/// # Errors
/// Two disks that do.
pub(super) fn check_groups(disks: &[DiskConfig]) -> Result<(), UsageError> {
    for (count, disk) in disks.iter().enumerate() {
        let limits = &disk.device.throttling;
        let Some(group) = &limits.group else { continue };
        let conflict = disks[..count].iter().find(|earlier| {
            let earlier = &earlier.device.throttling;
            earlier.group.as_ref() == Some(group) && earlier != limits
        });
        if let Some(other) = conflict {
            let (path, group, id) = (disk.image.path.clone(), group.clone(), other.id.clone());
            return Err(UsageError::GroupLimits { path, group, id });
        }
    }
    Ok(())
}

fn set_rate(throttling: &mut Throttling, key: &str, value: &str) -> Result<bool, ValueError> {
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
