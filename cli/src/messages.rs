//! Messages on standard error: one line each, after minivmm's name. Only `cli` prints: the other crates return errors or log
//! through `tracing`, and [`start_log`] prints what they log.

use std::fmt;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, fstat};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;

use crate::boot_timing::{self, Moment, Phases};
use crate::trace::{IsOn, TraceLayer};

pub(crate) fn print_message(line: &str) {
    let _ = Stderr.write_all(format!("minivmm: {}\n", OneLine(line)).as_bytes());
}

/// Text with its control characters as escapes: a path or a name may have newlines and a terminal's sequences.
struct OneLine<'a>(&'a str);

impl fmt::Display for OneLine<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for part in self.0.split_inclusive(char::is_control) {
            match part.chars().next_back().filter(|last| last.is_control()) {
                Some(last) => {
                    f.write_str(&part[..part.len() - last.len_utf8()])?;
                    write!(f, "{}", last.escape_default())?;
                }
                None => f.write_str(part)?,
            }
        }
        Ok(())
    }
}

/// Prints the output that the user asked for to standard output, and returns whether all of it was written. It is no error if the reader
/// closes the pipe, as head(1) does.
pub(crate) fn print_text(text: &str) -> bool {
    let mut output = io::stdout().lock();
    was_taken(output.write_all(text.as_bytes()).and_then(|()| output.flush()))
}

/// Whether the output was written. Prints the error if it was not.
pub(crate) fn was_taken(printed: io::Result<()>) -> bool {
    match printed {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            print_message(&format!("standard output: {error}"));
            false
        }
        _ => true,
    }
}

/// Prints what the other crates log from now on: warnings and errors, and with `verbose` everything. Prints the phases of the boot if
/// `boot_timing` has the time at which `main` began. `trace` records trace events.
pub(crate) fn start_log(verbose: bool, boot_timing: Option<Moment>, trace: Option<TraceLayer>) {
    let phases = boot_timing.map(|main| {
        let (phases, row) = Phases::begin(main);
        print_message(&row);
        Mutex::new(phases)
    });
    let boot_level = if phases.is_some() { LevelFilter::INFO } else { LevelFilter::OFF };
    let debug = if verbose { LevelFilter::DEBUG } else { LevelFilter::OFF };
    let filter = Targets::new()
        .with_default(if verbose { Level::DEBUG } else { Level::WARN })
        .with_target(boot_timing::TARGET, boot_level)
        // What a debugger's packets cause, without a limit; the server says in its own words why it disconnects one.
        .with_target("gdbstub", debug)
        // qcow2's library tells its caller what to do after a failed write; the disk reports the failure in its own words.
        .with_target("imago", debug);
    let lines = tracing_subscriber::fmt::layer().with_writer(|| Stderr).event_format(Line(phases));
    match trace {
        None => tracing_subscriber::registry().with(lines).with(filter).init(),
        Some(trace) => tracing_subscriber::registry()
            .with(lines.with_filter(filter))
            .with(trace.with_filter(IsOn))
            .init(),
    }
}

/// If the reader does not accept a line within this time, the line is dropped.
const READER_TIMEOUT: Duration = Duration::from_millis(100);

/// Standard error, opened once more.
static NONBLOCKING: OnceLock<File> = OnceLock::new();

/// From now on no message waits for its reader. Called before the process is confined.
///
/// To poll before a write is not enough: a terminal with room for one byte is ready, but a longer line would block, and another process
/// may fill a pipe. So a terminal or a pipe is opened once more, with O_NONBLOCK. On the inherited descriptor, this flag would affect all
/// processes that share it. A terminal of another user cannot be opened.
pub(crate) fn never_wait() {
    let kind = fstat(rustix::stdio::stderr()).map(|stat| FileType::from_raw_mode(stat.st_mode));
    if matches!(kind, Ok(FileType::CharacterDevice | FileType::Fifo)) {
        let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
        let opened = File::options().write(true).custom_flags(flags).open("/proc/self/fd/2");
        if let Ok(file) = opened {
            let _ = NONBLOCKING.set(file);
        }
    }
}

/// Standard error. Its reader may have ended (`2>&1 | head`) or stopped reading (`2>&1 | less`, a broken network). That must neither end
/// nor delay the VM, so a line that the reader does not accept in time is dropped. Each write is one line.
pub(crate) struct Stderr;

impl Write for Stderr {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let stderr = io::stderr();
        let mut ready = [PollFd::new(&stderr, PollFlags::OUT)];
        if poll(&mut ready, Timespec::try_from(READER_TIMEOUT).ok().as_ref()).is_ok()
            && ready[0].revents().contains(PollFlags::OUT)
        {
            // Locked in both cases: lines of several threads do not mix.
            let mut stderr = stderr.lock();
            match NONBLOCKING.get() {
                Some(file) => write_in_time(file, line),
                None => drop(stderr.write_all(line)),
            }
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Writes to a non-blocking descriptor, as much as its reader accepts in time.
fn write_in_time(mut file: &File, mut line: &[u8]) {
    let began = Instant::now();
    while !line.is_empty() && began.elapsed() < READER_TIMEOUT {
        match file.write(line) {
            Ok(count) => line = &line[count..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let mut ready = [PollFd::new(&file, PollFlags::OUT)];
                let left = READER_TIMEOUT.saturating_sub(began.elapsed());
                let _ = poll(&mut ready, Timespec::try_from(left).ok().as_ref());
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}

/// `minivmm: warning: MESSAGE FIELDS`, or the row of a boot phase.
struct Line(Option<Mutex<Phases>>);

impl<S: Subscriber + for<'a> LookupSpan<'a>, N: for<'a> FormatFields<'a> + 'static>
    FormatEvent<S, N> for Line
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut out: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        if event.metadata().target() == boot_timing::TARGET
            && let Some(Ok(mut phases)) = self.0.as_ref().map(Mutex::lock)
        {
            let mut name = String::new();
            context.field_format().format_fields(Writer::new(&mut name), event)?;
            return phases.over(&name).iter().try_for_each(|row| writeln!(out, "minivmm: {row}"));
        }
        let level = match *event.metadata().level() {
            Level::ERROR => "error: ",
            Level::WARN => "warning: ",
            _ => "",
        };
        let mut text = String::new();
        context.field_format().format_fields(Writer::new(&mut text), event)?;
        writeln!(out, "minivmm: {level}{}", OneLine(&text))
    }
}

#[cfg(test)]
mod tests {
    use super::OneLine;

    #[test]
    fn text_from_elsewhere_is_one_line_and_moves_no_cursor() {
        for (text, shown) in [
            ("", ""),
            ("a\nb\r", "a\\nb\\r"),
            ("\x1b[31mred\x7f\u{9b}", "\\u{1b}[31mred\\u{7f}\\u{9b}"),
            ("gr\u{fc}n 'quoted' \\n", "gr\u{fc}n 'quoted' \\n"),
        ] {
            assert_eq!(OneLine(text).to_string(), shown);
        }
    }
}
