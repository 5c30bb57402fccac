//! Where the time goes between exec and the guest's first sign of life: `--boot-timing`.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// A moment: of the clock on the wall, and of the processor time that this process has used since exec.
#[derive(Clone, Copy, Debug)]
pub struct Moment {
    wall: Duration,
    cpu: Duration,
}

impl Moment {
    /// This one.
    pub fn now() -> Self {
        // Neither clock is ever negative.
        let read = |clock| Duration::try_from(clock_gettime(clock)).unwrap_or_default();
        Self { wall: read(ClockId::Monotonic), cpu: read(ClockId::ProcessCPUTime) }
    }
}

/// The phases of a boot, reported when the guest is first entered and when it first prints. Clones share them.
#[derive(Clone, Debug)]
pub struct BootTiming(Option<Arc<Recorder>>);

#[derive(Debug)]
struct Recorder {
    report: fn(&str),
    phases: Mutex<Phases>,
}

#[derive(Debug)]
struct Phases {
    /// When `main` began.
    main: Moment,
    /// When the last phase was over.
    last: Moment,
    /// Lines for the next report.
    lines: Vec<String>,
}

impl BootTiming {
    /// Measures nothing.
    pub fn off() -> Self {
        Self(None)
    }

    /// Measures from `main` on, and hands each line of the report to `report`.
    pub fn since(main: Moment, report: fn(&str)) -> Self {
        // Nobody tells us when exec was: until `main` the wall's clock is taken to go as fast as the processor's.
        let lines = vec![row("exec to main", main.cpu, main.cpu)];
        Self(Some(Arc::new(Recorder { report, phases: Mutex::new(Phases { main, last: main, lines }) })))
    }

    /// The phase `name` is over.
    pub fn over(&self, name: &str) {
        let Some(recorder) = &self.0 else { return };
        let now = Moment::now();
        let mut phases = recorder.lock();
        let last = std::mem::replace(&mut phases.last, now);
        phases.lines.push(row(name, now.wall.saturating_sub(last.wall), now.cpu.saturating_sub(last.cpu)));
    }

    /// Reports what has not been reported yet, and the time since exec.
    pub(crate) fn report(&self) {
        let Some(recorder) = &self.0 else { return };
        let mut phases = recorder.lock();
        let Phases { main, last, .. } = *phases;
        for line in phases.lines.drain(..) {
            (recorder.report)(&line);
        }
        (recorder.report)(&row("since exec", last.wall.saturating_sub(main.wall) + main.cpu, last.cpu));
    }

    /// `output`, whose first byte is the last phase: the guest's kernel has found its console.
    pub(crate) fn watch<W: io::Write + Send + 'static>(&self, output: W) -> Box<dyn io::Write + Send> {
        match self.0 {
            None => Box::new(output),
            Some(_) => Box::new(FirstByte { output, timing: Some(self.clone()) }),
        }
    }
}

impl Recorder {
    // A panic while the lock is held cannot leave the plain data behind it inconsistent.
    fn lock(&self) -> MutexGuard<'_, Phases> {
        self.phases.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn row(name: &str, wall: Duration, cpu: Duration) -> String {
    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    format!("boot: {name:<20}{:>9.2} ms, {:>8.2} ms of CPU", ms(wall), ms(cpu))
}

/// An output that says when it is first written to.
struct FirstByte<W> {
    output: W,
    timing: Option<BootTiming>,
}

impl<W: io::Write> io::Write for FirstByte<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Some(timing) = self.timing.take() {
            timing.over("first console byte");
            timing.report();
        }
        self.output.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.output.flush()
    }
}
