//! What people see.

use std::io::{IsTerminal as _, Write as _};
use std::time::Duration;

use crate::api::{MigrationInfo, STEPS, VmInfo};
use crate::machine::CompatibilityReport;

/// `64.0 MiB` and the like.
pub fn size(bytes: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{value:.1} {}", units[unit]) }
}

/// `120 us`, `3.2 ms`, `1.5 s`.
pub fn time(time: Duration) -> String {
    let us = time.as_micros();
    match us {
        0..1_000 => format!("{us} us"),
        1_000..1_000_000 => format!("{:.1} ms", us as f64 / 1e3),
        _ => format!("{:.1} s", time.as_secs_f64()),
    }
}

/// One line about a machine.
pub fn machine(info: &VmInfo) -> String {
    let devices: Vec<_> = info.devices.iter().map(|d| format!("{} {}", d.kind, d.id)).collect();
    format!(
        "{}: {}, {} of memory, {} processor{}, {}{}",
        info.name,
        info.state,
        size(info.memory_bytes),
        info.vcpus,
        if info.vcpus == 1 { "" } else { "s" },
        if devices.is_empty() { "no devices".to_owned() } else { devices.join(", ") },
        info.error.as_ref().map_or_else(String::new, |e| format!("; {e}")),
    )
}

/// What a report of differences says, a line each.
pub fn report(report: &CompatibilityReport) -> String {
    if report.findings.is_empty() {
        return "nothing stands in the way".to_owned();
    }
    let line =
        |f: &crate::machine::Finding| format!("{}: {}", if f.fatal { "no" } else { "note" }, f.message);
    report.findings.iter().map(line).collect::<Vec<_>>().join("\n")
}

/// Shows the progress of a migration: on a terminal one line that changes, else a line for each step and round.
#[derive(Debug, Default)]
pub struct Progress {
    shown: (u32, u32),
    open_line: bool,
}

impl Progress {
    /// Shows how it is now.
    pub fn show(&mut self, info: &MigrationInfo) {
        let now = (info.step, info.round);
        let changed = now != self.shown && info.step > 0;
        self.show_steps_until(info.step.saturating_sub(1));
        if std::io::stderr().is_terminal() {
            if changed && info.step != self.shown.0 {
                self.end_line();
            }
            eprint!("\r\x1b[K{}", line(info));
            self.open_line = true;
            let _ = std::io::stderr().flush();
        } else if changed {
            eprintln!("{}", line(info));
        }
        self.shown = now;
    }

    fn end_line(&mut self) {
        if std::mem::take(&mut self.open_line) {
            eprintln!();
        }
    }

    /// Steps that were over before anybody could look are shown as well.
    fn show_steps_until(&mut self, step: u32) {
        if self.shown.0 < step {
            self.end_line();
        }
        while self.shown.0 < step {
            let name = STEPS.get(self.shown.0 as usize).copied().unwrap_or("");
            self.shown.0 += 1;
            eprintln!("step {} of 8: {name}", self.shown.0);
        }
    }

    /// Shows how it ended.
    pub fn end(&mut self, info: &MigrationInfo) {
        if info.state == "done" {
            self.show_steps_until(STEPS.len() as u32);
        }
        self.end_line();
        if info.state == "done" {
            println!("{}", summary(info));
        }
    }
}

fn line(info: &MigrationInfo) -> String {
    let mut text = format!("step {} of 8: {}", info.step, info.step_name);
    if (2..=3).contains(&info.step) {
        text += &format!(
            " | round {}, {} left, {}/s, the guest writes {}/s, would stand still {} ms",
            info.round,
            size(info.dirty_bytes),
            size(info.rate_bytes_per_s),
            size(info.dirty_rate_bytes_per_s),
            info.expected_downtime_ms,
        );
        if info.throttle_percent > 0 {
            text += &format!(", slowed down by {} %", info.throttle_percent);
        }
    }
    text
}

/// A migration that is done, in two lines.
pub fn summary(info: &MigrationInfo) -> String {
    let downtime = info.downtime_us.map_or_else(|| "unknown".into(), |us| time(Duration::from_micros(us)));
    let mut text = format!(
        "the machine runs at {}: {} of memory in {} rounds and {}, {} on the wire, {} pages of zeroes not sent\n\
         it stood still for {downtime}",
        info.to,
        size(info.memory_bytes),
        info.round,
        time(Duration::from_millis(info.elapsed_ms)),
        size(info.bytes_sent),
        info.pages_zero,
    );
    if let Some([p50, p99]) = info.postcopy_wait_us {
        text += &format!(
            "\nafter that it waited for {} pages, {} each in the middle, {} at the 99th percentile",
            info.postcopy_faults,
            time(Duration::from_micros(p50)),
            time(Duration::from_micros(p99)),
        );
    }
    text
}
