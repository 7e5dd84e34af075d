//! `/metrics`: counters in Prometheus's text format, version 0.0.4.
//!
//! Names end in their unit. Jobs that are over are told by a counter of ends, so that a year of moves does not leave
//! thousands of series behind.

use std::fmt::Write;
use std::sync::Arc;

use blockd_api::{DiskInfo, Job};

use super::Daemon;
use super::slot::Served;
use crate::disk::DiskStats;
use crate::histogram::Snapshot;

/// What the answer's header says.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Upper bounds of the latency buckets in microseconds: from what memory takes to what a failing disk does.
const BUCKETS_US: [u64; 18] = [
    10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000, 100_000, 200_000, 500_000,
    1_000_000, 5_000_000, 30_000_000,
];

const JOB_STATES: [&str; 6] = ["queued", "copying", "mirroring", "synced", "committed", "paused"];

/// Everything there is to count.
pub(super) fn render(daemon: &Daemon) -> String {
    let mut text = Exposition::default();
    disks(&mut text, &daemon.list(), &daemon.served());
    let running: Vec<_> = daemon.job_list().into_iter().filter(|job| !job.is_over()).collect();
    jobs(&mut text, &running);
    text.family("blockd_jobs_ended_total", "counter", "Moves that ended in this run of the daemon, by how.");
    for (state, ended) in daemon.jobs_ended() {
        text.sample("blockd_jobs_ended_total", &[("state", &state)], ended);
    }
    process(&mut text);
    text.0
}

fn disks(text: &mut Exposition, disks: &[DiskInfo], served: &[Arc<Served>]) {
    text.each(
        disks,
        "blockd_disk_connected",
        "gauge",
        "Whether a front end is connected and its rings run.",
        |d| u64::from(d.connected),
    );
    text.each(
        disks,
        "blockd_disk_failed",
        "gauge",
        "Whether the disk is not served or can't be written.",
        |d| u64::from(d.failed.is_some()),
    );
    text.each(disks, "blockd_disk_size_bytes", "gauge", "Size of the disk as the guest sees it.", |d| {
        d.size_bytes
    });
    text.each(disks, "blockd_disk_generation", "gauge", "Changes of the disk's image.", |d| d.generation);
    text.each(disks, "blockd_disk_read_bytes_total", "counter", "Bytes read by the guest.", |d| d.read_bytes);
    text.each(disks, "blockd_disk_written_bytes_total", "counter", "Bytes written by the guest.", |d| {
        d.written_bytes
    });
    text.each(disks, "blockd_disk_errors_total", "counter", "Requests of the guest that failed.", |d| {
        d.errors
    });
    text.family(
        "blockd_disk_requests_total",
        "counter",
        "Requests of the guest that were completed, by operation.",
    );
    for d in disks {
        for (op, count) in
            [("read", d.reads), ("write", d.writes), ("flush", d.flushes), ("discard", d.discards)]
        {
            text.sample("blockd_disk_requests_total", &[("disk", &d.id), ("op", op)], count);
        }
    }
    let name = "blockd_disk_request_duration_seconds";
    text.family(name, "histogram", "From taking a request of the guest to its completion.");
    for served in served {
        let DiskStats { read_latency, write_latency, .. } = served.disk.stats();
        text.histogram(name, &[("disk", served.id()), ("op", "read")], &read_latency);
        text.histogram(name, &[("disk", served.id()), ("op", "write")], &write_latency);
    }
}

fn jobs(text: &mut Exposition, running: &[Job]) {
    type Measure = (&'static str, &'static str, fn(&Job) -> u64);
    let bytes: [Measure; 7] = [
        ("blockd_job_total_bytes", "What there is to copy, as known so far.", |j| j.bytes_total),
        ("blockd_job_copied_bytes", "Copied so far.", |j| j.bytes_copied),
        ("blockd_job_mirrored_bytes", "Written by the guest to both images.", |j| j.bytes_mirrored),
        ("blockd_job_dirty_bytes", "Not yet equal on both images.", |j| j.bytes_dirty),
        ("blockd_job_skipped_zero_bytes", "Not copied, since there is nothing.", |j| j.bytes_skipped_zero),
        ("blockd_job_verified_bytes", "Compared on both images.", |j| j.bytes_verified),
        ("blockd_job_rate_bytes_per_second", "Copy rate of the last seconds.", |j| j.rate_bytes_per_s),
    ];
    for (name, help, value) in bytes {
        text.family(name, "gauge", help);
        for job in running {
            text.sample(name, &labels(job), value(job));
        }
    }
    text.family("blockd_job_state", "gauge", "1 for the state that a running move is in.");
    for job in running {
        let [job_label, disk_label] = labels(job);
        for state in JOB_STATES {
            let value = u64::from(job.state == state);
            text.sample("blockd_job_state", &[job_label, disk_label, ("state", state)], value);
        }
    }
}

fn labels(job: &Job) -> [(&'static str, &str); 2] {
    [("job", &job.job), ("disk", job.disks.first().map_or("", String::as_str))]
}

/// What Prometheus's own client libraries tell of a process, under the same names.
fn process(text: &mut Exposition) {
    if let Some(seconds) = cpu_seconds() {
        text.family("process_cpu_seconds_total", "counter", "Processor time used.");
        text.sample("process_cpu_seconds_total", &[], seconds);
    }
    if let Some(bytes) = resident_bytes() {
        text.family("process_resident_memory_bytes", "gauge", "Memory in use.");
        text.sample("process_resident_memory_bytes", &[], bytes);
    }
    if let Ok(open) = std::fs::read_dir("/proc/self/fd") {
        text.family("process_open_fds", "gauge", "Open files.");
        // The folder itself is open while it is read.
        text.sample("process_open_fds", &[], open.count().saturating_sub(1));
    }
}

/// User and system time; fields 14 and 15 of proc(5)'s `stat`, counted behind the name, which may hold anything.
fn cpu_seconds() -> Option<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace().skip(11);
    let ticks = fields.next()?.parse::<u64>().ok()? + fields.next()?.parse::<u64>().ok()?;
    let per_second = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK).ok()??;
    Some(ticks as f64 / per_second as f64)
}

/// The second field of proc(5)'s `statm`.
fn resident_bytes() -> Option<u64> {
    let statm = std::fs::read_to_string("/proc/self/statm").ok()?;
    let pages: u64 = statm.split_ascii_whitespace().nth(1)?.parse().ok()?;
    let page = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE).ok()??;
    pages.checked_mul(u64::try_from(page).ok()?)
}

/// The text as it grows.
#[derive(Default)]
struct Exposition(String);

impl Exposition {
    /// The head of a metric; its samples follow.
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn each(
        &mut self,
        disks: &[DiskInfo],
        name: &str,
        kind: &str,
        help: &str,
        value: impl Fn(&DiskInfo) -> u64,
    ) {
        self.family(name, kind, help);
        for disk in disks {
            self.sample(name, &[("disk", &disk.id)], value(disk));
        }
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: impl std::fmt::Display) {
        self.0.push_str(name);
        for (n, (label, of)) in labels.iter().enumerate() {
            let _ = write!(self.0, "{}{label}=\"{}\"", if n == 0 { '{' } else { ',' }, escape(of));
        }
        let _ = writeln!(self.0, "{} {value}", if labels.is_empty() { "" } else { "}" });
    }

    fn histogram(&mut self, name: &str, labels: &[(&str, &str); 2], latency: &Snapshot) {
        let count = latency.count();
        let (bucket, [first, second]) = (format!("{name}_bucket"), *labels);
        for us in BUCKETS_US {
            let bound = (us as f64 / 1e6).to_string();
            self.sample(&bucket, &[first, second, ("le", &bound)], latency.count_up_to(us * 1000).min(count));
        }
        self.sample(&bucket, &[first, second, ("le", "+Inf")], count);
        self.sample(&format!("{name}_sum"), labels, latency.sum_ns as f64 / 1e9);
        self.sample(&format!("{name}_count"), labels, count);
    }
}

fn escape(label: &str) -> String {
    label.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::histogram::Histogram;

    #[test]
    fn buckets_are_cumulative_and_end_at_the_count() {
        let histogram = Histogram::default();
        for us in [5, 15, 150, 1_500, 70_000_000] {
            histogram.record(us * 1000);
        }
        let mut text = Exposition::default();
        text.histogram("h", &[("disk", "a"), ("op", "read")], &histogram.snapshot());
        let buckets: Vec<u64> = text
            .0
            .lines()
            .filter(|line| line.starts_with("h_bucket"))
            .map(|line| line.rsplit_once(' ').expect("a value").1.parse().expect("a number"))
            .collect();
        assert!(buckets.is_sorted(), "{buckets:?}");
        assert_eq!((buckets[0], buckets[17], buckets[18]), (1, 4, 5));
        assert!(text.0.contains("h_bucket{disk=\"a\",op=\"read\",le=\"0.00001\"} 1\n"), "{}", text.0);
        assert!(text.0.contains("h_bucket{disk=\"a\",op=\"read\",le=\"+Inf\"} 5\n"));
        assert!(text.0.contains("h_sum{disk=\"a\",op=\"read\"} 70.00167\n"), "{}", text.0);
        assert!(text.0.ends_with("h_count{disk=\"a\",op=\"read\"} 5\n"));
    }

    #[test]
    fn labels_are_escaped() {
        let mut text = Exposition::default();
        text.sample("m", &[("a", "x\"y\\z\n"), ("b", "")], 1);
        text.sample("n", &[], 2.5);
        assert_eq!(text.0, "m{a=\"x\\\"y\\\\z\\n\",b=\"\"} 1\nn 2.5\n");
    }

    #[test]
    fn the_process_is_measured() {
        assert!(cpu_seconds().expect("CPU time") >= 0.0);
        assert!(resident_bytes().expect("memory") > 1 << 20);
    }
}
