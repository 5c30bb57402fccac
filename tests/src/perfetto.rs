//! A trace for Perfetto (`--trace ...,format=perfetto`), read by the rules of the Trace Event Format
//! (<https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU>): its JSON array form.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

/// What a trace draws. Times are in microseconds.
#[derive(Debug, Default)]
pub struct Trace {
    /// The names of threads, by their numbers.
    pub threads: BTreeMap<u64, String>,
    /// Complete events, in the order of the file.
    pub slices: Vec<Slice>,
    /// The arrows of each request: phases and times.
    pub flows: BTreeMap<u64, Vec<(String, f64)>>,
    /// From when to when each request was with its engine, and that engine's name.
    pub spans: BTreeMap<u64, (String, f64, f64)>,
    /// Instant events: gaps in the trace.
    pub gaps: Vec<String>,
}

/// A complete event (`"ph":"X"`).
#[derive(Debug)]
pub struct Slice {
    /// The thread's number.
    pub thread: u64,
    /// The event.
    pub name: String,
    /// When it begins.
    pub start: f64,
    /// When it ends.
    pub end: f64,
    /// Its arguments.
    pub arguments: Map<String, Value>,
}

impl Slice {
    /// The request that it is about.
    pub fn request(&self) -> Option<u64> {
        self.arguments.get("req")?.as_u64()
    }

    /// The requests that it interrupts for.
    pub fn requests(&self) -> Vec<u64> {
        let numbers = self.arguments.get("reqs").and_then(Value::as_array);
        numbers.into_iter().flatten().map(|number| number.as_u64().unwrap()).collect()
    }
}

impl Trace {
    /// Reads a trace.
    ///
    /// # Panics
    /// It breaks a rule of the format.
    pub fn read(bytes: &[u8]) -> Self {
        let events: Vec<Value> = serde_json::from_slice(bytes).expect("an array in JSON");
        let mut trace = Self::default();
        let mut open = BTreeMap::new();
        let process = number(&events[0], "pid");
        for event in &events {
            assert_eq!(number(event, "pid"), process, "{event}");
            trace.add(event, &mut open);
        }
        assert!(open.is_empty(), "these have no end: {open:?}");
        trace.check_slices();
        trace.check_flows(&events);
        trace
    }

    fn add(&mut self, event: &Value, open: &mut BTreeMap<(String, u64), f64>) {
        let name = text(event, "name").to_owned();
        match text(event, "ph") {
            "M" if name == "process_name" => assert_eq!(text(&event["args"], "name"), "minivmm"),
            "M" => {
                assert_eq!(name, "thread_name", "{event}");
                let thread = text(&event["args"], "name").to_owned();
                let before = self.threads.insert(number(event, "tid"), thread);
                assert_eq!(before, None, "a thread is named twice");
            }
            "X" => {
                assert!(!text(event, "cat").is_empty());
                let (start, length) = (time(event, "ts"), time(event, "dur"));
                let arguments = event["args"].as_object().expect("arguments").clone();
                let (thread, end) = (number(event, "tid"), start + length);
                self.slices.push(Slice { thread, name, start, end, arguments });
            }
            phase @ ("s" | "t" | "f") => {
                assert_eq!((text(event, "cat"), &name[..]), ("request", "request"));
                // It belongs to the slice around it, and not to the next one.
                assert_eq!(text(event, "bp"), "e");
                let flow = self.flows.entry(number(event, "id")).or_default();
                flow.push((phase.to_owned(), time(event, "ts")));
            }
            "b" => {
                assert_eq!(text(event, "cat"), "engine");
                let before = open.insert((name, number(event, "id")), time(event, "ts"));
                assert_eq!(before, None, "it begins twice: {event}");
            }
            "e" => {
                assert_eq!(text(event, "cat"), "engine");
                let (id, end) = (number(event, "id"), time(event, "ts"));
                let start = open.remove(&(name.clone(), id)).expect("it has begun");
                assert!(start <= end, "{event}");
                assert!(self.spans.insert(id, (name, start, end)).is_none(), "two: {event}");
            }
            "i" => {
                assert_eq!(text(event, "s"), "p");
                time(event, "ts");
                self.gaps.push(name);
            }
            other => panic!("{other} is no phase of this trace: {event}"),
        }
    }

    /// Each thread has a name, and its slices are in the order of time and apart. A wait for the host's disk is written at its end.
    fn check_slices(&self) {
        let mut last: BTreeMap<(u64, bool), f64> = BTreeMap::new();
        for slice in &self.slices {
            assert!(self.threads.contains_key(&slice.thread), "{slice:?}");
            let track = (slice.thread, slice.name == "disk_io");
            let before = last.insert(track, slice.end).unwrap_or(0.0);
            assert!(before <= slice.start, "not in order: {slice:?}");
        }
    }

    /// Each flow begins once, ends at most once, goes forward in time, and each of its events is in a slice of its thread.
    fn check_flows(&self, events: &[Value]) {
        for (request, flow) in &self.flows {
            assert!(flow.is_sorted_by_key(|(_, time)| *time), "{request}: {flow:?}");
            let phases: String = flow.iter().map(|(phase, _)| phase.as_str()).collect();
            let steps = phases.strip_prefix('s').map(|rest| rest.strip_suffix('f').unwrap_or(rest));
            let are_steps = |steps: &str| steps.bytes().all(|phase| phase == b't');
            assert!(steps.is_some_and(are_steps), "{request}: {phases}");
        }
        let mut by_thread: BTreeMap<u64, Vec<(f64, f64)>> = BTreeMap::new();
        for slice in self.slices.iter().filter(|slice| slice.name != "disk_io") {
            by_thread.entry(slice.thread).or_default().push((slice.start, slice.end));
        }
        for event in events.iter().filter(|event| event["bp"] == "e") {
            let (slices, time) = (&by_thread[&number(event, "tid")], time(event, "ts"));
            let next = slices.partition_point(|(start, _)| *start <= time);
            assert!(next > 0 && time <= slices[next - 1].1, "it is in no slice: {event}");
        }
    }
}

#[track_caller]
fn text<'a>(event: &'a Value, key: &str) -> &'a str {
    event[key].as_str().unwrap_or_else(|| panic!("{key}: {event}"))
}

#[track_caller]
fn number(event: &Value, key: &str) -> u64 {
    event[key].as_u64().unwrap_or_else(|| panic!("{key}: {event}"))
}

#[track_caller]
fn time(event: &Value, key: &str) -> f64 {
    let time = event[key].as_f64().unwrap_or_else(|| panic!("{key}: {event}"));
    assert!(time >= 0.0, "{event}");
    time
}
