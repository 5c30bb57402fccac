//! Decides who executes a job: the worker, io_uring, or a thread that may wait. The engine asks for each job, and for what is left of
//! one.

use crate::disk::Operation;
use crate::disk::raw::DataPlace;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Route {
    /// There is nothing to do.
    Done,
    /// The worker executes the job itself.
    Inline,
    /// io_uring. If the ring is broken, it refuses the job, and the job goes to the pool.
    Ring,
    /// A thread that may wait for the host. It can execute every job.
    Pool,
}

/// What [`route`] has to know of the engine: which routes it has, and what it has learned about the host.
#[derive(Clone, Copy, Debug)]
pub(super) struct RouteOptions {
    /// The engine has an io_uring.
    pub(super) ring: bool,
    /// The file system can read without waiting (RWF_NOWAIT).
    pub(super) reads_inline: bool,
    /// How many more buffered writes go to the pool after one has stalled.
    pub(super) backoff: u32,
    /// Flushes are executed. `false` with `cache=unsafe` and `snapshot=on`.
    pub(super) flushes: bool,
}

/// Decides who executes `length` bytes of `operation`. disk-engines.md shows the decisions as tables, and a test compares the
/// tables with this function.
pub(super) fn route(
    operation: Operation,
    length: u64,
    place: DataPlace,
    options: RouteOptions,
) -> Route {
    use Operation::{Flush, Read, Write};
    waypoint!();
    match (operation, place) {
        (Flush, _) if !options.flushes => Route::Done,
        _ if length == 0 && operation != Flush => Route::Done,
        (Read | Write { .. } | Flush, DataPlace::Memory) => Route::Inline,
        (Read | Write { .. }, DataPlace::Direct { aligned: true })
        | (Flush, DataPlace::Direct { .. } | DataPlace::PageCache)
        | (Read, DataPlace::PageCache)
            if options.ring =>
        {
            Route::Ring
        }
        (Read, DataPlace::PageCache) if options.reads_inline => Route::Inline,
        // io_uring would give buffered writes to kernel threads, one at a time for each file.
        (Write { durable: false }, DataPlace::PageCache) if options.backoff == 0 => Route::Inline,
        _ => Route::Pool,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    const CHAPTER: &str = include_str!("../../../docs/disk-engines.md");

    /// The cells of the table below `heading`, without its header and separator.
    fn table(heading: &str) -> impl Iterator<Item = Vec<&'static str>> {
        let rows = CHAPTER.split(heading).nth(1).unwrap().lines();
        let rows = rows
            .skip_while(|line| !line.starts_with('|'))
            .take_while(|line| line.starts_with('|'))
            .skip(2);
        rows.map(|line| line.trim_matches('|').split('|').map(str::trim).collect())
    }

    fn operations(row: &str) -> Vec<(Operation, bool)> {
        let zeroes = |unmap, durable| (Operation::WriteZeroes { unmap, durable }, false);
        match row {
            "read" => vec![(Operation::Read, false)],
            "write" => vec![(Operation::Write { durable: false }, false)],
            "durable write" => vec![(Operation::Write { durable: true }, false)],
            "flush" => vec![(Operation::Flush, false)],
            "flush with `cache=unsafe` or `snapshot=on`" => vec![(Operation::Flush, true)],
            "discard, write zeroes, secure erase" => vec![
                (Operation::Discard, false),
                (Operation::SecureErase, false),
                zeroes(true, true),
                zeroes(false, false),
            ],
            other => panic!("a row that this test does not know: {other}"),
        }
    }

    #[test]
    fn the_decision_tables_show_what_route_decides() {
        let places = [
            DataPlace::Memory,
            DataPlace::PageCache,
            DataPlace::Direct { aligned: true },
            DataPlace::Direct { aligned: false },
            DataPlace::Translated,
        ];
        let learned = [(true, true), (true, false), (false, true), (false, false)];
        for (heading, ring) in [("### With io_uring", true), ("### Without io_uring", false)] {
            let mut rows = 0;
            for row in table(heading) {
                rows += 1;
                for (place, cell) in places.into_iter().zip(&row[1..]) {
                    let shown: BTreeSet<&str> = cell
                        .split(|c: char| !c.is_alphanumeric() && c != '_')
                        .filter(|word| ["done", "inline", "io_uring", "pool"].contains(word))
                        .collect();
                    let mut decided = BTreeSet::new();
                    for (operation, ignored) in operations(row[0]) {
                        for (reads_inline, writes_inline) in learned {
                            let options = RouteOptions {
                                ring,
                                reads_inline,
                                backoff: u32::from(!writes_inline),
                                flushes: !ignored,
                            };
                            decided.insert(match route(operation, 512, place, options) {
                                Route::Done => "done",
                                Route::Inline => "inline",
                                Route::Ring => "io_uring",
                                Route::Pool => "pool",
                            });
                            let empty = route(operation, 0, place, options);
                            assert!(operation == Operation::Flush || empty == Route::Done);
                        }
                    }
                    assert_eq!(decided, shown, "{heading}, {}, {place:?}", row[0]);
                }
            }
            assert_eq!(rows, 6, "{heading}");
        }
    }
}
