//! A trace of `format=json`, event by event: for pictures, and for `minivmm replay`.

use std::io::{self, BufRead, Read};
use std::ops::RangeInclusive;

use serde_json::Value;

/// Bytes of a line: an event that interrupts for 1024 requests has some 20 KiB.
const LINE_MAX: u64 = 64 << 10;
/// Microseconds since the start: up to some 30 years.
const TIMES: RangeInclusive<f64> = 0.0..=1e15;

/// Why a file cannot be read as a trace.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LineError {
    #[error("{0}")]
    File(#[from] io::Error),
    #[error("line {0} is no event; record the trace with format=json")]
    Line(usize),
}

/// Calls `event` with the name, the time in microseconds and the fields of each event. Of a file without lines, such as a device, only
/// the first bytes are read.
///
/// # Errors
/// The host's, or the first line that is no event.
pub(crate) fn each(
    mut file: impl BufRead,
    mut event: impl FnMut(&str, f64, &Value),
) -> Result<(), LineError> {
    let mut line = Vec::new();
    for number in 1.. {
        line.clear();
        if (&mut file).take(LINE_MAX).read_until(b'\n', &mut line)? == 0 {
            break;
        }
        let fields: Value = serde_json::from_slice(&line).map_err(|_| LineError::Line(number))?;
        let time = fields["time_us"].as_f64().filter(|time| TIMES.contains(time));
        let (Some(name), Some(time)) = (fields["event"].as_str(), time) else {
            return Err(LineError::Line(number));
        };
        event(name, time, &fields);
    }
    Ok(())
}
