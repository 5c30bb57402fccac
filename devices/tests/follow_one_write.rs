//! The chapter *follow one write* ends in a program, and names every file that its write passes.

#![expect(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::sync::{Arc, Mutex};

use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

#[allow(dead_code, reason = "its main is for cargo run")]
#[path = "../examples/follow_one_write.rs"]
mod example;

const CHAPTER: &str = include_str!("../docs/follow-one-write.md");

/// The files whose waypoints were passed between the driver's kick and its interrupt, in the order of the first visit.
#[derive(Clone, Default)]
struct Trace(Arc<Mutex<Vec<&'static str>>>);

impl Subscriber for Trace {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target() == "waypoint"
    }

    fn event(&self, event: &Event<'_>) {
        let mut files = self.0.lock().unwrap();
        let file = event.metadata().file().unwrap();
        match file.strip_prefix("devices/src/") {
            // The program itself: at its second waypoint the walk is over.
            None if files.is_empty() => files.push("the driver"),
            None => files.push("the end"),
            Some(file) => {
                let walking = files.first() == Some(&"the driver") && !files.contains(&"the end");
                if walking && !files.contains(&file) {
                    files.push(file);
                }
            }
        }
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

#[test]
fn the_chapter_shows_what_its_program_prints_and_names_every_file_on_the_way() {
    let trace = Trace::default();
    tracing::subscriber::set_global_default(trace.clone()).unwrap();
    let printed = example::follow();
    let (_, shown) = CHAPTER.rsplit_once("```text\n").unwrap();
    let (shown, _) = shown.split_once("```").unwrap();
    assert_eq!(printed, shown.lines().collect::<Vec<_>>());

    let passed = trace.0.lock().unwrap().clone();
    // The numbered sections name the files in backquotes, each where the walk first passes it.
    let (_, walk) = CHAPTER.split_once("\n## 2.").unwrap();
    let (walk, _) = walk.split_once("\n## Try it").unwrap();
    let mut named: Vec<&str> = Vec::new();
    for word in walk.split('`').skip(1).step_by(2) {
        let is_source = word.ends_with(".rs") && !word.starts_with("vmm/");
        if is_source && !named.contains(&word) {
            named.push(word);
        }
    }
    assert_eq!(named, passed[1..passed.len() - 1], "the chapter beside the recorded walk");
}
