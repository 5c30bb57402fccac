//! One trace event as a value of fixed size: the thread that emits it allocates nothing.

use std::cell::Cell;
use std::fmt::{self, Write};
use std::time::Instant;

use tracing::field::{Field, Visit};
use tracing::{Event, Metadata};

/// Most fields of an event. Further ones are left out.
const FIELDS: usize = 8;
/// Most bytes of a text. Further ones are cut off.
const TEXT: usize = 22;

/// A short text.
#[derive(Clone, Copy, Default)]
pub(super) struct Text {
    length: u8,
    bytes: [u8; TEXT],
}

impl Text {
    pub(super) fn as_str(&self) -> &str {
        // Cut between characters, so that it is valid.
        str::from_utf8(&self.bytes[..self.length.into()]).unwrap_or_default()
    }
}

impl Write for Text {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let start = usize::from(self.length);
        let mut end = text.len().min(TEXT - start);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        self.bytes[start..start + end].copy_from_slice(&text.as_bytes()[..end]);
        self.length += end as u8;
        Ok(())
    }
}

#[derive(Clone, Copy)]
pub(super) enum Value {
    Number(u64),
    Text(Text),
}

/// The thread that emitted an event.
#[derive(Clone, Copy, Default)]
pub(super) struct ThreadId {
    /// The host's number of the thread, as in `/proc/PID/task`.
    pub(super) id: u32,
    pub(super) name: Text,
}

thread_local! {
    static THREAD: Cell<Option<ThreadId>> = const { Cell::new(None) };
}

impl ThreadId {
    fn current() -> Self {
        THREAD.get().unwrap_or_else(|| {
            let id = rustix::thread::gettid().as_raw_nonzero().get().cast_unsigned();
            let mut name = Text::default();
            let _ = name.write_str(std::thread::current().name().unwrap_or("?"));
            THREAD.set(Some(Self { id, name }));
            Self { id, name }
        })
    }
}

/// An event, when it happened and where.
#[derive(Clone, Copy)]
pub(super) struct Record {
    pub(super) time: Instant,
    pub(super) thread: ThreadId,
    /// Its index in [`vmm::trace::EVENTS`].
    pub(super) event: usize,
    metadata: &'static Metadata<'static>,
    values: [Option<Value>; FIELDS],
}

impl Record {
    /// Makes a record of `event`. `None`: it is no trace event, or the event is off.
    pub(super) fn of(event: &Event<'_>) -> Option<Self> {
        let (time, metadata) = (Instant::now(), event.metadata());
        let mut record =
            Self { time, thread: ThreadId::current(), event: 0, metadata, values: [None; FIELDS] };
        event.record(&mut record);
        record.event = vmm::trace::find(metadata.target(), record.text("kind"))?;
        vmm::trace::is_on(record.event).then_some(record)
    }

    /// Its fields, in the order in which the code emits them.
    pub(super) fn fields(&self) -> impl Iterator<Item = (&'static str, Value)> {
        let names = self.metadata.fields().iter().map(|field| field.name());
        names.zip(self.values).filter_map(|(name, value)| Some((name, value?)))
    }

    pub(super) fn number(&self, name: &str) -> Option<u64> {
        match self.values.get(self.metadata.fields().field(name)?.index())? {
            Some(Value::Number(number)) => Some(*number),
            _ => None,
        }
    }

    pub(super) fn text(&self, name: &str) -> Option<&str> {
        match self.values.get(self.metadata.fields().field(name)?.index())? {
            Some(Value::Text(text)) => Some(text.as_str()),
            _ => None,
        }
    }

    fn set(&mut self, field: &Field, value: Value) {
        if let Some(place) = self.values.get_mut(field.index()) {
            *place = Some(value);
        }
    }
}

impl Visit for Record {
    fn record_u64(&mut self, field: &Field, value: u64) {
        self.set(field, Value::Number(value));
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.set(field, Value::Number(value.into()));
    }

    fn record_bytes(&mut self, field: &Field, value: &[u8]) {
        let number = |number, byte: &u8| number << 8 | u64::from(*byte);
        self.set(field, Value::Number(value.iter().take(8).rev().fold(0, number)));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        let mut text = Text::default();
        let _ = text.write_str(value);
        self.set(field, Value::Text(text));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let mut text = Text::default();
        let _ = write!(text, "{value:?}");
        self.set(field, Value::Text(text));
    }
}
