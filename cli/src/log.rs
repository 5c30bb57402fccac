//! What minivmm says on standard error: one line each, after its name.

use std::fmt;

use tracing::{Event, Level, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

/// One line for the user.
pub(crate) fn say(line: &str) {
    eprintln!("minivmm: {line}");
}

/// Sends the library's log to standard error: warnings and errors, and everything with `verbose`.
pub(crate) fn start(verbose: bool) {
    tracing_subscriber::fmt()
        .with_max_level(if verbose { Level::DEBUG } else { Level::WARN })
        .with_writer(std::io::stderr)
        .event_format(Line)
        .init();
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
