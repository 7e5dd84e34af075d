//! fio with io_uring on a file: what the kernel and the hardware allow without any server between.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

use crate::drive::{Access, Pattern};
use crate::process::cpu_of_children;

/// What to say where it is missing.
pub const HOW_TO_GET_IT: &str = "install it (apt-get install fio, dnf install fio) and run this again";

/// A file and how to treat it.
#[derive(Debug, Clone)]
pub struct Fio {
    /// The file, of full size already.
    pub file: PathBuf,
    /// The bytes of it that are used; all of them where it is none.
    pub range: Option<Range<u64>>,
    /// Past the page cache.
    pub direct: bool,
}

/// What it measured.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Measured {
    /// Requests completed.
    pub requests: u64,
    /// How long that took, in seconds.
    pub seconds: f64,
    /// Processor time of fio, in seconds, with the kernel's threads that work for it.
    pub cpu_s: f64,
    /// p50, p99 and the longest latency in microseconds, where they were measured.
    pub latency_us: Option<[f64; 3]>,
}

impl Fio {
    /// Runs a pattern for so long.
    ///
    /// # Errors
    /// What fio says.
    pub fn run(&self, pattern: &Pattern, time: Duration) -> Result<Measured> {
        static STARTING: OnceLock<f64> = OnceLock::new();
        let starting = match STARTING.get() {
            Some(cpu_s) => *cpu_s,
            None => *STARTING
                .get_or_init(|| self.run_once(pattern, Duration::ZERO).map_or(0.0, |(_, cpu_s)| cpu_s)),
        };
        let (measured, cpu_s) = self.run_once(pattern, time)?;
        // What fio says itself leaves out the kernel's threads of its ring, which do the copying where a file system cannot
        // promise not to block. But it is at least that.
        Ok(Measured { cpu_s: (cpu_s - starting).max(measured.cpu_s), ..measured })
    }

    /// One run, and the processor time of all its threads with starting and ending, in seconds.
    fn run_once(&self, pattern: &Pattern, time: Duration) -> Result<(Measured, f64)> {
        let mut command = Command::new("fio");
        command.args(arguments(pattern, time, self.direct)).arg(path_argument(&self.file));
        if let Some(range) = &self.range {
            command
                .arg(format!("--offset={}", range.start))
                .arg(format!("--size={}", range.end - range.start));
        }
        let before = cpu_of_children()?;
        let output = command.output().with_context(|| format!("start fio: {HOW_TO_GET_IT}"))?;
        let said = String::from_utf8_lossy(&output.stdout);
        ensure!(
            output.status.success(),
            "fio on {} failed: {}",
            self.file.display(),
            String::from_utf8_lossy(&output.stderr).trim()
        );
        // Warnings may come before the JSON.
        let json = said.find('{').map_or("", |at| &said[at..]);
        let measured =
            parse(json, pattern.access).with_context(|| format!("fio's output is not understood: {said}"))?;
        Ok((measured, cpu_of_children()? - before))
    }
}

/// Reads `read` and at the same time writes `write`, which it makes, past the page cache in requests of 1 MiB, eight of each in
/// flight, `bytes` of each at most: whoever is through ends the other, so that neither is ever alone. Returns what the reader
/// and the writer reached, in bytes a second.
///
/// # Errors
/// What fio says.
pub fn read_and_write(read: &Path, write: &Path, bytes: u64) -> Result<[f64; 2]> {
    let mut command = Command::new("fio");
    command.args(["--ioengine=io_uring", "--direct=1", "--bs=1M", "--iodepth=8", "--exitall"]);
    command.args(["--group_reporting=0", "--output-format=json"]).arg(format!("--size={bytes}"));
    command.args(["--name=reader", "--rw=read", "--allow_file_create=0"]).arg(path_argument(read));
    command.args(["--name=writer", "--rw=write"]).arg(path_argument(write));
    let output = command.output().with_context(|| format!("start fio: {HOW_TO_GET_IT}"))?;
    let said = String::from_utf8_lossy(&output.stdout);
    ensure!(
        output.status.success(),
        "fio on {} and {} failed: {}",
        read.display(),
        write.display(),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    parse_both(said.find('{').map_or("", |at| &said[at..]))
        .with_context(|| format!("fio's output is not understood: {said}"))
}

fn path_argument(file: &Path) -> String {
    // A colon separates files in fio's option.
    format!("--filename={}", file.display().to_string().replace(':', "\\:"))
}

fn arguments(pattern: &Pattern, time: Duration, direct: bool) -> Vec<String> {
    let rw = match (pattern.random, pattern.access) {
        (true, Access::Read) => "randread",
        (true, Access::Write) => "randwrite",
        (false, Access::Read) => "read",
        (false, Access::Write) => "write",
    };
    let mut arguments = vec![
        "--name=trial".to_owned(),
        "--ioengine=io_uring".into(),
        "--output-format=json".into(),
        "--time_based".into(),
        "--norandommap".into(),
        "--randrepeat=0".into(),
        "--allow_file_create=0".into(),
        format!("--rw={rw}"),
        format!("--bs={}", pattern.block),
        format!("--iodepth={}", pattern.depth),
        format!("--direct={}", u8::from(direct)),
        format!("--runtime={}ms", time.as_millis().max(1)),
    ];
    if pattern.depth > 1 {
        // Clocks cost a good part of a request: where only throughput counts, fio goes without them.
        arguments.push("--gtod_reduce=1".into());
    }
    arguments
}

#[derive(Deserialize)]
struct Output {
    jobs: Vec<Job>,
}

#[derive(Deserialize)]
struct Job {
    usr_cpu: f64,
    sys_cpu: f64,
    job_runtime: f64,
    read: Side,
    write: Side,
}

#[derive(Deserialize)]
struct Side {
    total_ios: u64,
    runtime: f64,
    /// A second.
    #[serde(default)]
    bw_bytes: f64,
    clat_ns: Latency,
    lat_ns: Option<Latency>,
}

#[derive(Deserialize)]
struct Latency {
    max: f64,
    percentile: Option<std::collections::BTreeMap<String, f64>>,
}

/// Runtimes are in milliseconds, shares of processor time in per cent of a job's.
fn parse(json: &str, access: Access) -> Result<Measured> {
    let output: Output = serde_json::from_str(json)?;
    let job = output.jobs.into_iter().next().context("no job")?;
    let side = if access == Access::Read { job.read } else { job.write };
    ensure!(side.total_ios > 0, "it made no request");
    let longest = side.lat_ns.as_ref().map_or(side.clat_ns.max, |latency| latency.max);
    let percentile = |name| side.clat_ns.percentile.as_ref().and_then(|all| all.get(name)).copied();
    let latency = percentile("50.000000").zip(percentile("99.000000"));
    Ok(Measured {
        requests: side.total_ios,
        seconds: side.runtime / 1e3,
        cpu_s: (job.usr_cpu + job.sys_cpu) / 100.0 * job.job_runtime / 1e3,
        latency_us: latency.map(|(p50, p99)| [p50 / 1e3, p99 / 1e3, longest / 1e3]),
    })
}

/// Bytes a second of the first job's reads and the second job's writes.
fn parse_both(json: &str) -> Result<[f64; 2]> {
    let output: Output = serde_json::from_str(json)?;
    let [reader, writer] = output.jobs.as_slice() else { bail!("{} jobs", output.jobs.len()) };
    let rates = [reader.read.bw_bytes, writer.write.bw_bytes];
    ensure!(rates.iter().all(|rate| *rate > 0.0), "it did not both read and write");
    Ok(rates)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAID: &str = r#"{"jobs": [{"usr_cpu": 10.0, "sys_cpu": 30.0, "job_runtime": 2000,
        "read": {"total_ios": 8000, "runtime": 2001,
            "clat_ns": {"max": 9000, "percentile": {"50.000000": 1000, "99.000000": 3000}},
            "lat_ns": {"max": 9500}},
        "write": {"total_ios": 0, "runtime": 0, "clat_ns": {"max": 0}}}]}"#;

    #[test]
    fn figures_are_found_in_its_json() {
        let measured = parse(SAID, Access::Read).unwrap();
        assert_eq!((measured.requests, measured.latency_us), (8000, Some([1.0, 3.0, 9.5])));
        assert!((measured.cpu_s - 0.8).abs() < 1e-9 && (measured.seconds - 2.001).abs() < 1e-9);
        assert!(parse(SAID, Access::Write).is_err(), "no request is no figure");
        assert!(parse("{}", Access::Read).is_err());
    }

    #[test]
    fn a_reader_and_a_writer_have_a_rate_each() {
        let side = |rate: u32| {
            format!(r#"{{"total_ios": 8, "runtime": 9, "bw_bytes": {rate}, "clat_ns": {{"max": 1}}}}"#)
        };
        let job = |read: u32, write: u32| {
            let sides = format!(r#""read": {}, "write": {}"#, side(read), side(write));
            format!(r#"{{"usr_cpu": 1, "sys_cpu": 1, "job_runtime": 9, {sides}}}"#)
        };
        let said = |jobs: &[String]| format!(r#"{{"jobs": [{}]}}"#, jobs.join(","));
        assert_eq!(parse_both(&said(&[job(900, 0), job(0, 700)])).unwrap(), [900.0, 700.0]);
        assert!(parse_both(&said(&[job(900, 0), job(0, 0)])).is_err());
        assert!(parse_both(&said(&[job(900, 0)])).is_err());
    }

    #[test]
    fn latency_is_measured_where_it_counts() {
        let pattern = |depth| Pattern { random: true, access: Access::Write, block: 4096, depth };
        let has = |depth, what: &str| {
            arguments(&pattern(depth), Duration::from_secs(2), true).contains(&what.into())
        };
        assert!(has(32, "--gtod_reduce=1") && !has(1, "--gtod_reduce=1"));
        assert!(has(1, "--rw=randwrite") && has(1, "--direct=1") && has(1, "--runtime=2000ms"));
    }
}
