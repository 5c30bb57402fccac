//! What minivmm says on standard error: one line each, after its name.

use std::fmt;
use std::io::{self, Write};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

/// One line for the user.
pub(crate) fn say(line: &str) {
    let _ = Stderr.write_all(format!("minivmm: {line}\n").as_bytes());
}

/// Sends the library's log to standard error: warnings and errors, and everything with `verbose`.
pub(crate) fn start(verbose: bool) {
    tracing_subscriber::fmt()
        .with_max_level(if verbose { Level::DEBUG } else { Level::WARN })
        .with_writer(|| Stderr)
        .event_format(Line)
        .init();
}

/// How long a line may wait for its reader.
const PATIENCE: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };

/// Standard error, whose reader may have gone (`2>&1 | head`) or stopped (`2>&1 | less`): that must not end or hold up the
/// VM, so a line that it does not take is dropped. Each write is one line.
struct Stderr;

impl Write for Stderr {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let stderr = io::stderr();
        let mut ready = [PollFd::new(&stderr, PollFlags::OUT)];
        // A pipe that is ready takes 4096 bytes at once (pipe(7)).
        if poll(&mut ready, Some(&PATIENCE)).is_ok() && ready[0].revents().contains(PollFlags::OUT) {
            let _ = stderr.lock().write_all(line);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// `minivmm: warning: MESSAGE FIELDS`.
struct Line;

impl<S: Subscriber + for<'a> LookupSpan<'a>, N: for<'a> FormatFields<'a> + 'static> FormatEvent<S, N> for Line {
    fn format_event(&self, context: &FmtContext<'_, S, N>, mut out: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let level = match *event.metadata().level() {
            Level::ERROR => "error: ",
            Level::WARN => "warning: ",
            _ => "",
        };
        write!(out, "minivmm: {level}")?;
        context.field_format().format_fields(out.by_ref(), event)?;
        writeln!(out)
    }
}
