//! The process that would run the machine, as the host's kernel shows it: threads and descriptors.

use std::collections::BTreeMap;
use std::fs;
use std::thread;
use std::time::Duration;

use super::rows::item;

/// What a thread is for, by the beginning of its name. The longest that fits counts; the first is the main thread's.
const PURPOSES: [(&str, &str); 9] = [
    ("minivmm", "main: signals, timers, control clients, console input"),
    ("vcpu-", "vcpu: runs the guest"),
    ("console", "console: writes the guest's output"),
    ("job-output", "console: writes the output of --exec"),
    ("disk-io-", "disk-io: waits for the host's disk"),
    ("disk-", "disk: serves queues of a disk"),
    ("machine-job", "disk-io: writes saved machines"),
    ("save", "save: starts the process of a background save"),
    ("registers", "registers: maps the disks' registers, and ends"),
];

/// How often a thread that has no name yet is looked at again, and how long that takes in all: a second.
const LOOKS: u32 = 1000;
const INTERVAL: Duration = Duration::from_millis(1);

/// A thread of the process.
#[derive(Clone, Debug)]
pub struct Thread {
    /// Its name, as `ps -T` shows it.
    pub name: String,
    /// Its kind, if it is one of minivmm's, and what it is for.
    pub purpose: &'static str,
}

/// The threads, in the order of their start. KVM has some of its own.
pub(super) fn threads() -> Vec<Thread> {
    let mut ids: Vec<u32> = numbers("/proc/self/task");
    ids.sort_unstable();
    let names = ids.into_iter().filter_map(name);
    names.map(|name| Thread { purpose: purpose(&name), name }).collect()
}

pub(super) fn thread_rows(threads: &[Thread]) -> impl Iterator<Item = String> {
    let rows = threads.iter().map(|thread| item(&thread.name, thread.purpose));
    std::iter::once("Threads: name, kind and purpose".to_owned()).chain(rows)
}

/// `None`: the thread has ended. Until a thread runs for the first time it has the name of the main thread, which made it.
fn name(id: u32) -> Option<String> {
    let read = |id| fs::read_to_string(format!("/proc/self/task/{id}/comm")).ok();
    let main = std::process::id();
    let inherited = read(main)?;
    let mut looks = 0;
    loop {
        let name = read(id)?;
        if id == main || name != inherited || looks == LOOKS {
            return Some(name.trim_end().to_owned());
        }
        thread::sleep(INTERVAL);
        looks += 1;
    }
}

fn purpose(name: &str) -> &'static str {
    if name.starts_with("disk-") && name.ends_with("-job") {
        return "disk-io: flushes and resizes a disk";
    }
    let fits = PURPOSES.iter().filter(|(start, _)| name.starts_with(start));
    fits.max_by_key(|(start, _)| start.len()).map_or("the kernel's own", |(_, purpose)| purpose)
}

/// The open descriptors, by what they are of.
pub(super) fn descriptors() -> Vec<String> {
    let mut found: BTreeMap<String, Vec<u32>> = BTreeMap::new();
    for number in numbers("/proc/self/fd") {
        // The one of the directory itself is closed by now.
        if let Ok(target) = fs::read_link(format!("/proc/self/fd/{number}")) {
            found.entry(target.display().to_string()).or_default().push(number);
        }
    }
    let mut lines = vec!["Descriptors".to_owned()];
    lines.extend(found.into_iter().map(|(target, numbers)| {
        let numbers: Vec<_> = numbers.iter().map(u32::to_string).collect();
        format!("  {target}: {}", numbers.join(" "))
    }));
    lines
}

/// The names in a directory of /proc that are numbers.
fn numbers(directory: &str) -> Vec<u32> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}
