//! Sizes and durations as people write them.

use std::time::Duration;

/// Bytes from `512M`, `5G`, `65536K`, `1T` or plain `N`, which counts MiB as QEMU's `-m` does. Powers of two.
///
/// # Errors
/// One line that says what would work.
pub(crate) fn memory(text: &str) -> Result<u64, String> {
    let usage = || format!("'{text}' is not a size; write 512M, 2G or 65536K");
    let bytes = parse(text, 20).ok_or_else(usage)?;
    if bytes < MIN_MEMORY {
        return Err(format!("a guest needs at least {}M of memory", MIN_MEMORY >> 20));
    }
    if bytes % PAGE != 0 {
        return Err("memory comes in whole pages: write a multiple of 4K".to_owned());
    }
    Ok(bytes)
}

/// Bytes from `10G`, `512M`, `4K`, or plain `N`, which counts bytes. `None`: it is no size.
pub(crate) fn bytes(text: &str) -> Option<u64> {
    parse(text, 0)
}

/// A number with a unit, or times two to the power of `plain`.
fn parse(text: &str, plain: u32) -> Option<u64> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match text[digits.len()..].to_ascii_uppercase().as_str() {
        "" => plain,
        "K" | "KB" | "KIB" => 10,
        "M" | "MB" | "MIB" => 20,
        "G" | "GB" | "GIB" => 30,
        "T" | "TB" | "TIB" => 40,
        _ => return None,
    };
    let count: u64 = digits.parse().ok()?;
    count.checked_shl(shift).filter(|bytes| bytes >> shift == count)
}

/// Enough for the boot structures and a small kernel.
const MIN_MEMORY: u64 = 16 << 20;
const PAGE: u64 = 4096;

/// A duration from `60s`, `1500ms`, `5m`, `1h` or plain seconds.
///
/// # Errors
/// One line that says what would work.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let usage = || format!("'{text}' is not a duration; write 60s, 1500ms, 5m or 1h");
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let count: u64 = digits.parse().map_err(|_| usage())?;
    let milliseconds: u64 = match &text[digits.len()..] {
        "ms" => 1,
        "" | "s" => 1000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => return Err(usage()),
    };
    match count.checked_mul(milliseconds) {
        Some(0) => Err("a time limit of 0 leaves the guest no time".to_owned()),
        Some(total) => Ok(Duration::from_millis(total)),
        None => Err(usage()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_binary() {
        assert_eq!(memory("512M"), Ok(512 << 20));
        assert_eq!(memory("512"), Ok(512 << 20));
        assert_eq!(memory("5g"), Ok(5 << 30));
        assert_eq!(memory("65536K"), Ok(64 << 20));
    }

    #[test]
    fn nonsense_memory_is_refused() {
        for text in ["", "0", "12Q", "M", "-1", "1.5G", "99999999999T", "20000001K", "64k", "18446744073709551615"] {
            assert!(memory(text).is_err(), "{text}");
        }
    }

    #[test]
    fn durations() {
        assert_eq!(duration("60s"), Ok(Duration::from_secs(60)));
        assert_eq!(duration("2"), Ok(Duration::from_secs(2)));
        assert_eq!(duration("1500ms"), Ok(Duration::from_millis(1500)));
        assert_eq!(duration("5m"), Ok(Duration::from_secs(300)));
        for text in ["", "0", "s", "1d", "-1s", "18446744073709551615h"] {
            assert!(duration(text).is_err(), "{text}");
        }
    }
}
