//! Clones of a booted Linux: one is saved at its prompt, and many go on from the file at once, each woken by a line. On a CPU with
//! hardware virtualization or in the lab.

use std::fs;
use std::time::{Duration, Instant};

use minivmm_tests::linux::{BOOT_BOUND, CLOUD, Guest};
use minivmm_tests::minivmm;

use crate::Options;
use crate::process::Process;
use crate::results::{Key, Results};
use crate::saved::{memory, save_to};

/// The name of this part's results.
pub(crate) const PART: &str = "clones.json";
const GROUP: &str = "clones of a booted Linux";
const CLONES: usize = 100;
const CLONES_QUICK: usize = 20;
/// A lab's only processor runs all of them.
const SILENCE: Duration = Duration::from_secs(1800);
const SCRIPT: &str = "fact ready; while read -r line; do fact awake; done";

pub(crate) fn run(options: &Options, results: &mut Results) {
    let count = if options.quick { CLONES_QUICK } else { CLONES };
    let guest = Guest::new(CLOUD, SCRIPT).with("--memory 256M --qmp unix:qmp --save-directory .");
    let source = Process::start(&mut guest.command());
    wait_for(&source, "fact: ready", BOOT_BOUND);
    let saved = guest.path("saved");
    let milliseconds = save_to(&guest.path("qmp"), &saved);
    drop(source);
    let blocks = std::os::unix::fs::MetadataExt::blocks(&fs::metadata(&saved).unwrap());

    let began = Instant::now();
    let mut clones = Vec::new();
    for _ in 0..count {
        // Nested, memory would be copied: a page that is mapped costs an exit through both hypervisors.
        let mut command = minivmm(["--incoming", "file:saved,map=on"]);
        let mut clone = Process::start(command.current_dir(guest.path(".")));
        clone.enter();
        clones.push(clone);
    }
    clones.iter().for_each(|clone| wait_for(clone, "fact: awake", SILENCE));
    let elapsed = began.elapsed().as_secs_f64() * 1e3;
    let each: Vec<_> = clones.iter().map(memory).collect();
    let mean = |total: f64| total / count as f64;
    let row = format!("{count} clones at once");
    for (row, metric, value) in [
        ("save", "ms", milliseconds),
        ("file", "KiB", blocks as f64 / 2.0),
        (&row, "ms", elapsed),
        (&row, "KiB", mean(each.iter().map(|(private, _)| private).sum())),
        (&row, "KiB with its share", mean(each.iter().map(|(_, share)| share).sum())),
    ] {
        results.add(Key::new(GROUP, row, "minivmm", metric), value);
    }
}

fn wait_for(process: &Process, text: &str, bound: Duration) {
    loop {
        match process.line(bound) {
            Ok((_, line)) if line.contains(text) => return,
            Ok(_) => {}
            Err(why) => panic!("no {text:?}: {why}"),
        }
    }
}
