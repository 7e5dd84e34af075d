//! What is counted of a disk, by each worker for itself.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use blockd_api::{LatencyInfo, Percentiles};

use crate::histogram::{Histogram, Snapshot};

/// One worker's counts. Written by that worker only, but for `longest`.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct WorkerCounters {
    /// Reads completed.
    pub reads: AtomicU64,
    /// Writes and write zeroes completed.
    pub writes: AtomicU64,
    /// Flushes completed.
    pub flushes: AtomicU64,
    /// Discards completed.
    pub discards: AtomicU64,
    /// Bytes read.
    pub read_bytes: AtomicU64,
    /// Bytes written.
    pub written_bytes: AtomicU64,
    /// Requests that failed.
    pub errors: AtomicU64,
    /// The longest request since it was last taken, in nanoseconds.
    pub longest: AtomicU64,
    /// From taking a read to its completion.
    pub read_latency: Histogram,
    /// From taking a write to its completion.
    pub write_latency: Histogram,
}

/// All workers' counts.
#[derive(Debug)]
pub struct Counters(Vec<Arc<WorkerCounters>>);

impl Counters {
    /// For so many workers.
    pub fn new(workers: usize) -> Self {
        Self((0..workers).map(|_| Arc::default()).collect())
    }

    /// One worker's.
    pub fn worker(&self, index: usize) -> Arc<WorkerCounters> {
        self.0[index].clone()
    }

    /// Takes the longest request since the last call, in microseconds.
    pub fn take_longest_us(&self) -> u64 {
        self.0.iter().map(|w| w.longest.swap(0, Ordering::Relaxed)).max().unwrap_or(0) / 1000
    }

    /// How long all reads and writes took so far.
    pub fn latencies(&self) -> Snapshot {
        let mut all = Snapshot::default();
        for w in &self.0 {
            all.add(&w.read_latency.snapshot());
            all.add(&w.write_latency.snapshot());
        }
        all
    }

    /// The sum of all.
    pub fn stats(&self) -> DiskStats {
        let sum = |field: fn(&WorkerCounters) -> &AtomicU64| {
            self.0.iter().map(|w| field(w).load(Ordering::Relaxed)).sum()
        };
        let mut stats = DiskStats {
            reads: sum(|w| &w.reads),
            writes: sum(|w| &w.writes),
            flushes: sum(|w| &w.flushes),
            discards: sum(|w| &w.discards),
            read_bytes: sum(|w| &w.read_bytes),
            written_bytes: sum(|w| &w.written_bytes),
            errors: sum(|w| &w.errors),
            ..DiskStats::default()
        };
        for w in &self.0 {
            stats.read_latency.add(&w.read_latency.snapshot());
            stats.write_latency.add(&w.write_latency.snapshot());
        }
        stats
    }
}

/// What was counted of a disk since it was attached.
#[derive(Debug, Clone, Default)]
pub struct DiskStats {
    /// Reads completed.
    pub reads: u64,
    /// Writes and write zeroes completed.
    pub writes: u64,
    /// Flushes completed.
    pub flushes: u64,
    /// Discards completed.
    pub discards: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Bytes written.
    pub written_bytes: u64,
    /// Requests that failed.
    pub errors: u64,
    /// From taking a read to its completion.
    pub read_latency: Snapshot,
    /// From taking a write to its completion.
    pub write_latency: Snapshot,
}

impl DiskStats {
    /// The latencies as the API tells them.
    pub fn latency_us(&self) -> LatencyInfo {
        let of = |s: &Snapshot| Percentiles {
            p50: s.quantile_us(0.5),
            p99: s.quantile_us(0.99),
            p999: s.quantile_us(0.999),
            max: s.max_ns as f64 / 1000.0,
        };
        LatencyInfo { read: of(&self.read_latency), write: of(&self.write_latency) }
    }
}
