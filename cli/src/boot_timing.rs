//! `--boot-timing`: the library's trace of boot phases (events of the target `boot`), each with the time since the last one.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// The target of the events. Each event names a phase that has ended.
pub(crate) const TARGET: &str = "boot";

/// After these phases the time since exec is printed, too: the guest is entered, and it prints.
const MILESTONES: [&str; 2] = ["first KVM_RUN", "first console byte"];

/// A point in time: by the wall clock, and by the CPU time that this process has used since exec.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Moment {
    wall: Duration,
    cpu: Duration,
}

impl Moment {
    pub(crate) fn now() -> Self {
        // Neither clock is ever negative.
        let read = |clock| Duration::try_from(clock_gettime(clock)).unwrap_or_default();
        Self { wall: read(ClockId::Monotonic), cpu: read(ClockId::ProcessCPUTime) }
    }
}

/// The phases so far.
#[derive(Debug)]
pub(crate) struct Phases {
    main: Moment,
    last: Moment,
}

impl Phases {
    /// `main` is when `main` began. The text is the first row: the time of exec is not known, and until `main` the wall clock is
    /// taken to advance as fast as the CPU time.
    pub(crate) fn begin(main: Moment) -> (Self, String) {
        (Self { main, last: main }, row("exec to main", main.cpu, main.cpu))
    }

    /// The phase `name` is over now: the row or rows to print.
    pub(crate) fn over(&mut self, name: &str) -> Vec<String> {
        let (now, last) = (Moment::now(), self.last);
        self.last = now;
        let (wall, cpu) = (now.wall.saturating_sub(last.wall), now.cpu.saturating_sub(last.cpu));
        let mut rows = vec![row(name, wall, cpu)];
        if MILESTONES.contains(&name) {
            let since_main = now.wall.saturating_sub(self.main.wall);
            rows.push(row("since exec", since_main + self.main.cpu, now.cpu));
        }
        rows
    }
}

fn row(name: &str, wall: Duration, cpu: Duration) -> String {
    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    format!("boot: {name:<20}{:>9.2} ms, {:>8.2} ms of CPU", ms(wall), ms(cpu))
}
