//! The workloads, as fio is given them, and what it says about them. The host and the guests run the same ones.

use std::fmt::Write;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

/// One workload.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Job {
    /// fio's `rw=`.
    pattern: &'static str,
    /// KiB.
    block: u32,
    depth: u32,
    /// An fsync(2) after each write.
    sync: bool,
    /// How many threads do it at a time.
    count: u32,
    /// The guest polls for completions.
    polled: bool,
}

impl Job {
    pub(crate) fn name(&self) -> String {
        let pattern = match self.pattern {
            "randread" => "random read",
            "randwrite" => "random write",
            other => other,
        };
        let Self { block, depth, count, polled, .. } = self;
        let how = if self.sync { "and fsync".to_owned() } else { format!("depth {depth}") };
        let jobs = if *count == 1 { String::new() } else { format!(", {count} jobs") };
        let polled = if *polled { ", polled" } else { "" };
        format!("{block}k {pattern}, {how}{jobs}{polled}")
    }
}

/// Those of one run: with one job, and also with two unless it is to be `quick`.
pub(crate) fn jobs(quick: bool) -> Vec<Job> {
    let job =
        |pattern, block, depth, sync| Job { pattern, block, depth, sync, count: 1, polled: false };
    let single = [
        job("randread", 4, 1, false),
        job("randread", 4, 32, false),
        job("randwrite", 4, 1, false),
        job("randwrite", 4, 32, false),
        job("read", 128, 4, false),
        job("write", 128, 4, false),
        job("randwrite", 4, 1, true),
    ];
    let double = single.map(|job| Job { count: 2, ..job });
    single.into_iter().chain(double.into_iter().filter(|_| !quick)).collect()
}

/// Those of a guest that polls its queues.
pub(crate) fn polled_jobs() -> Vec<Job> {
    jobs(true).into_iter().take(4).map(|job| Job { polled: true, ..job }).collect()
}

/// A job file. With `marks`, each job says on the console when it begins and ends, by its number.
pub(crate) fn file(
    jobs: &[Job],
    target: &str,
    direct: bool,
    milliseconds: u32,
    marks: bool,
) -> String {
    let mut text = format!(
        "[global]\nfilename={target}\nioengine=io_uring\ndirect={}\nthread=1\nnorandommap=1\nrandrepeat=0\ntime_based=1\n\
         runtime={milliseconds}ms\ngroup_reporting=1\nstonewall=1\nallow_file_create=0\npercentile_list=50:99:99.9\n",
        u8::from(direct)
    );
    for (number, job) in jobs.iter().enumerate() {
        let Job { pattern, block, depth, sync, count, polled } = job;
        let (sync, polled) = (u8::from(*sync), u8::from(*polled));
        write!(
            text,
            "[{number}]\nnew_group=1\nrw={pattern}\nbs={block}k\niodepth={depth}\nfsync={sync}\nnumjobs={count}\nhipri={polled}\n"
        )
        .unwrap();
        if marks {
            // fio runs these by a shell, and appends a redirection.
            text += &format!(
                "exec_prerun=(echo BEGIN {number} >/dev/console)\nexec_postrun=(echo END {number} >/dev/console)\n"
            );
        }
    }
    text
}

/// The latencies that are reported. Their first is the mean, and the others are percentiles, as fio names them.
pub(crate) const LATENCIES: [&str; 4] =
    ["mean latency, us", "p50 latency, us", "p99 latency, us", "p99.9 latency, us"];
pub(crate) const QUANTILES: [&str; 3] = [LATENCIES[1], LATENCIES[2], LATENCIES[3]];
pub(crate) const PERCENTILES: [&str; 3] = ["50.000000", "99.000000", "99.900000"];

/// What a job achieved.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Score {
    pub(crate) requests: f64,
    pub(crate) iops: f64,
    /// Microseconds, as [`LATENCIES`] names them.
    pub(crate) latencies: [f64; LATENCIES.len()],
    /// Seconds of processor time of fio itself.
    pub(crate) cpu: f64,
}

/// Reads fio's report (`--output-format=json`), job by job.
pub(crate) fn scores(report: &[u8], jobs: &[Job]) -> Result<Vec<Score>, String> {
    // Whatever a library has to say may come first.
    let start = report.iter().position(|byte| *byte == b'{').ok_or("fio said nothing")?;
    let report = serde_json::Deserializer::from_slice(&report[start..]).into_iter::<Value>().next();
    let report = report.ok_or("fio said nothing")?.map_err(|why| format!("fio's report: {why}"))?;
    let score = |(number, job): (usize, &Job)| {
        let entry = &report["jobs"][number];
        let number = |value: &Value| {
            value.as_f64().ok_or_else(|| format!("fio's report lacks {}: {entry}", job.name()))
        };
        if entry["error"] != 0 {
            return Err(format!("fio failed: {entry}"));
        }
        let side = &entry[if job.pattern.ends_with("read") { "read" } else { "write" }];
        let percentile = |latency: &Value, name| latency["percentile"][name].as_f64();
        // Some versions of fio have percentiles of the completion's latency only.
        let part = |latency: &Value, other: &Value| {
            let mut all = [number(&latency["mean"])? / 1e3; LATENCIES.len()];
            for (place, name) in all[1..].iter_mut().zip(PERCENTILES) {
                let found = percentile(latency, name).or(percentile(other, name));
                *place = found.map_or(f64::NAN, |nanoseconds| nanoseconds / 1e3);
            }
            Ok::<_, String>(all)
        };
        let mut latencies = part(&side["lat_ns"], &side["clat_ns"])?;
        if job.sync {
            // A write is over when its fsync is.
            let sync = part(&entry["sync"]["lat_ns"], &Value::Null)?;
            latencies.iter_mut().zip(sync).for_each(|(write, sync)| *write += sync);
        }
        let time = number(&entry["job_runtime"])? / 1e3;
        let cpu = (number(&entry["usr_cpu"])? + number(&entry["sys_cpu"])?) / 100.0 * time;
        let (requests, iops) = (number(&side["total_ios"])?, number(&side["iops"])?);
        Ok(Score { requests, iops, latencies, cpu })
    };
    jobs.iter().enumerate().map(score).collect()
}

/// Runs the jobs here, on the file itself.
pub(crate) fn on_host(
    jobs: &[Job],
    path: &Path,
    direct: bool,
    milliseconds: u32,
) -> Result<Vec<Score>, String> {
    let list = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(
        list.path(),
        file(jobs, &path.display().to_string(), direct, milliseconds, false),
    )
    .unwrap();
    let output = Command::new("fio")
        .arg("--output-format=json")
        .arg(list.path())
        .output()
        .map_err(|why| format!("fio: {why}"))?;
    scores(&output.stdout, jobs)
}
