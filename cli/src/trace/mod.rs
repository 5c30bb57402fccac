//! `--trace`: records the trace events that patterns choose, in a file or on standard error.
//!
//! A capability. [`Trace::new`] makes a layer of the `tracing` subscriber, which [`crate::messages`] adds to the one that prints messages. An
//! event that is off costs only `tracing`'s own comparison, because `tracing` asks the layer's filter once for each place in the code. An event
//! that is on becomes a [`record`] of fixed size in a queue, without allocation or waiting. The [`writer`] is a thread that the machine's
//! builder starts and confines like its own. It follows [`requests`] and makes text or JSON ([`mod@format`]). The events and their states
//! are in [`vmm::trace`].

pub(crate) mod format;
mod record;
mod requests;
mod writer;

use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::time::Instant;

use tracing::subscriber::Interest;
use tracing::{Event, Metadata, Subscriber};
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::layer::{Context, Filter, Layer};

use self::format::{Format, Formatter};
use self::record::Record;
use self::writer::{PendingWriter, QUEUE, Shared, Sink, Writer};

/// What `--trace` asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct TraceOptions {
    /// Patterns in order, each with whether it switches events on.
    pub(crate) changes: Vec<(String, bool)>,
    pub(crate) file: Option<PathBuf>,
    pub(crate) format: Option<Format>,
}

/// All events, one a line.
pub(crate) fn help() -> String {
    let lines =
        vmm::trace::EVENTS.iter().map(|event| format!("{:<28}{}\n", event.name, event.when));
    lines.collect()
}

/// Exists until the end of the process. When it is dropped, it writes the last events.
pub(crate) struct Trace {
    shared: Arc<Shared>,
    to_stderr: bool,
}

impl Trace {
    /// Begins to record, to `stderr` if no file is named. The builder opens the file. `warn` prints a message for the user.
    pub(crate) fn new(
        options: &TraceOptions,
        stderr: impl Write + Send + 'static,
        warn: fn(&str),
    ) -> (Self, TraceLayer) {
        let (queue, records) = sync_channel(QUEUE);
        let shared = Arc::new(Shared::default());
        let (of_writer, path) = (Arc::clone(&shared), options.file.clone());
        let formatter = Formatter::new(options.format.unwrap_or_default(), Instant::now());
        vmm::trace::set_writer(
            path.clone(),
            Box::new(move |file| {
                let sink = match file {
                    None => Sink::Stderr(Box::new(stderr)),
                    Some(file) => Sink::File(file, path.unwrap_or_default().display().to_string()),
                };
                let pending = PendingWriter::new(of_writer);
                Box::new(move || Writer::new(&pending, sink, formatter, warn).run(&records))
            }),
        );
        for (pattern, on) in &options.changes {
            vmm::trace::set(pattern, *on);
        }
        let to_stderr = options.file.is_none();
        (Self { shared: Arc::clone(&shared), to_stderr }, TraceLayer { queue, shared })
    }

    /// Writes the last events. If the start has failed, the file is not changed.
    pub(crate) fn finish(self) {
        self.shared.finish();
        if self.to_stderr
            && let Some(make_body) = vmm::trace::take_writer()
        {
            make_body(None)();
        }
    }
}

/// Records events.
pub(crate) struct TraceLayer {
    queue: SyncSender<Record>,
    shared: Arc<Shared>,
}

impl<S: Subscriber> Layer<S> for TraceLayer {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        if let Some(record) = Record::of(event) {
            self.shared.send(&self.queue, record);
        }
    }
}

/// The filter of events that are on. `tracing` asks it once for each place in the code, and again when events are turned on or off.
pub(crate) struct IsOn;

impl<S> Filter<S> for IsOn {
    fn enabled(&self, metadata: &Metadata<'_>, _: &Context<'_, S>) -> bool {
        vmm::trace::is_target_on(metadata.target())
    }

    fn callsite_enabled(&self, metadata: &'static Metadata<'static>) -> Interest {
        match vmm::trace::is_target_on(metadata.target()) {
            true => Interest::always(),
            false => Interest::never(),
        }
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(if vmm::trace::is_any_on() { LevelFilter::TRACE } else { LevelFilter::OFF })
    }
}
