//! What the demo tells at its end.

use blockd_api::Job;
use serde::Serialize;

use super::guest::{Faults, Measured};
use super::latency::Latencies;
use crate::render::{self, Facts, Table};
use crate::watch;

/// The result, as `--json` prints it.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    /// Whether every byte was right and every request done.
    pub(super) ok: bool,
    /// Size of the disk.
    pub(super) size_bytes: u64,
    /// The same seed writes the same content.
    pub(super) seed: u64,
    /// Written at first through vhost-user.
    pub(super) filled_bytes: u64,
    /// How fast.
    pub(super) fill_bytes_per_s: u64,
    /// The move as it ended.
    #[serde(rename = "move")]
    pub(super) job: Job,
    /// Reads and writes of the guest around the move.
    pub(super) guest: GuestReport,
    /// Read back through vhost-user after the move.
    pub(super) verified_bytes: u64,
    /// How fast.
    pub(super) verify_bytes_per_s: u64,
    /// Blocks of 4 KiB that did not hold what they must, through vhost-user and in the target's file.
    pub(super) mismatches: u64,
    /// Requests that the disk failed.
    pub(super) errors: u64,
    /// Whether the source is gone from its folder.
    pub(super) source_deleted: bool,
    /// Whether the target's file was checked, sound, and held every byte after the disk was detached.
    pub(super) target_sound: bool,
    /// The first things that were wrong.
    pub(super) faults: Vec<String>,
}

/// Reads and writes around the move.
#[derive(Debug, Serialize)]
pub(super) struct GuestReport {
    /// Before the move.
    pub(super) before: MomentReport,
    /// While it ran.
    pub(super) during: MomentReport,
    /// Once the target was the disk.
    pub(super) after: MomentReport,
    /// Bytes written, all in all.
    pub(super) written_bytes: u64,
}

/// Latencies as the guest saw them, in microseconds.
#[derive(Debug, Serialize)]
pub(super) struct MomentReport {
    requests: u64,
    p50_us: f64,
    p99_us: f64,
    longest_us: f64,
}

impl MomentReport {
    fn new(latencies: &Latencies) -> Self {
        let us = |share| latencies.percentile(share).as_secs_f64() * 1e6;
        Self {
            requests: latencies.count(),
            p50_us: us(0.5),
            p99_us: us(0.99),
            longest_us: latencies.longest().as_secs_f64() * 1e6,
        }
    }
}

impl GuestReport {
    /// From what the guest has measured.
    pub(super) fn new(measured: &Measured) -> Self {
        let [before, during, after] = &measured.by_moment;
        Self {
            before: MomentReport::new(before),
            during: MomentReport::new(during),
            after: MomentReport::new(after),
            written_bytes: measured.written_bytes,
        }
    }
}

impl Report {
    /// Takes over what went wrong, seen `through` the guest's disk or the target's file.
    pub(super) fn add_faults(&mut self, through: &str, faults: &Faults) {
        self.mismatches += faults.mismatches;
        self.errors += faults.errors;
        let told = faults.examples.iter().map(|m| format!("{through}, at byte {}: {}", m.offset, m.message));
        self.faults.extend(told);
    }

    /// Decides whether all went well.
    pub(super) fn conclude(&mut self) {
        if !self.source_deleted {
            self.faults.push("the source is still in its folder".into());
        }
        if !self.target_sound {
            self.faults.push("the target's file is damaged or does not hold every byte".into());
        }
        self.ok = self.mismatches == 0 && self.errors == 0 && self.source_deleted && self.target_sound;
    }

    /// For people.
    pub(super) fn render(&self) -> String {
        let mut table = Table::new(&["GUEST", ">REQUESTS", ">P50", ">P99", ">LONGEST"]);
        let moments = [
            ("before", &self.guest.before),
            ("during the move", &self.guest.during),
            ("after", &self.guest.after),
        ];
        for (name, moment) in moments {
            let [p50, p99, longest] = [moment.p50_us, moment.p99_us, moment.longest_us].map(render::micros);
            table.row([name.into(), moment.requests.to_string(), p50, p99, longest]);
        }
        let mut facts = Facts::new();
        watch::add_summary(&mut facts, &self.job);
        facts
            .add(
                "read back",
                format!("{} at {}", render::size(self.verified_bytes), render::rate(self.verify_bytes_per_s)),
            )
            .add("mismatches", self.mismatches.to_string())
            .add("failed requests", self.errors.to_string())
            .add(
                "target's file",
                if self.target_sound { "sound, every byte right" } else { "NOT AS IT SHOULD BE" },
            );
        let mut text = format!("\n{}\n{}\n", facts.render(), table.render());
        for fault in &self.faults {
            text.push_str(&format!("WRONG: {fault}\n"));
        }
        text.push_str(if self.ok {
            "The disk moved while it was in use, and not a byte was lost.\n"
        } else {
            "Something is wrong: see above, and please report it.\n"
        });
        text
    }
}
