//! What people see: sizes, durations, tables, progress bars, and the rule that `--json` leaves standard output to JSON.

use std::fmt::Write as _;
use std::io::{self, IsTerminal as _, Write as _};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;

use crate::failure::Failure;

/// Where a command's results go.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Screen {
    json: bool,
    live: bool,
}

impl Screen {
    /// For `--json`, or for people; a live display needs a terminal on standard error.
    pub(crate) fn new(json: bool) -> Self {
        Self { json, live: io::stderr().is_terminal() }
    }

    /// Whether results are printed as JSON.
    pub(crate) fn is_json(self) -> bool {
        self.json
    }

    /// Whether progress is drawn rather than reported line by line.
    pub(crate) fn is_live(self) -> bool {
        self.live
    }

    /// Whether progress is reported line by line.
    pub(crate) fn tells_lines(self) -> bool {
        !self.live && !self.json
    }

    /// Prints `value` with `--json`, else what `human` makes of it.
    pub(crate) fn show<T: Serialize>(
        self,
        value: &T,
        human: impl FnOnce(&T) -> String,
    ) -> Result<(), Failure> {
        if self.json { self.json_line(value) } else { self.text(&human(value)) }
    }

    /// Prints one JSON object on a line of its own.
    pub(crate) fn json_line<T: Serialize>(self, value: &T) -> Result<(), Failure> {
        let mut line = serde_json::to_vec(value)
            .map_err(|e| Failure::new("internal", format!("the result can't be written as JSON: {e}")))?;
        line.push(b'\n');
        write_out(&line)
    }

    /// Prints a text for people; nothing with `--json`.
    pub(crate) fn text(self, text: &str) -> Result<(), Failure> {
        if self.json || text.is_empty() {
            return Ok(());
        }
        let mut text = text.to_owned();
        if !text.ends_with('\n') {
            text.push('\n');
        }
        write_out(text.as_bytes())
    }

    /// A line of progress for those who have no terminal; nothing where a bar is drawn.
    pub(crate) fn note(self, text: &str) -> Result<(), Failure> {
        if self.live { Ok(()) } else { self.text(text) }
    }

    /// A progress bar in bytes, drawn on standard error where that is a terminal.
    pub(crate) fn bar(self, total: u64) -> ProgressBar {
        let target = if self.live { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(Some(total), target);
        let template = "{prefix:10} [{bar:32}] {binary_bytes:>11} of {binary_total_bytes:<11} {msg}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("=> "));
        }
        bar
    }
}

/// Writes to standard output; a reader that has gone away (`| head`) ends the command, quietly.
pub(crate) fn write_out(bytes: &[u8]) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Err(Failure::reader_gone()),
        Err(e) => Err(Failure::io("standard output", &e)),
    }
}

/// One sentence on standard error.
pub(crate) fn complain(message: &str) {
    // Where even standard error is gone, the exit code has to do.
    let _ = writeln!(io::stderr().lock(), "blockctl: {message}");
}

/// `1.5 GiB`; exact below 1 KiB and where the unit divides it.
pub(crate) fn size(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let power = ((63 - bytes.leading_zeros()) / 10).min(6);
    let unit = 1u64 << (10 * power);
    let name = UNITS[power as usize - 1];
    if bytes.is_multiple_of(unit) {
        return format!("{} {name}", bytes / unit);
    }
    format!("{:.1} {name}", bytes as f64 / unit as f64)
}

/// `10 GiB (10737418240 bytes)`.
pub(crate) fn size_exact(bytes: u64) -> String {
    if bytes < 1024 { format!("{bytes} bytes") } else { format!("{} ({bytes} bytes)", size(bytes)) }
}

/// `210.4 MiB/s`.
pub(crate) fn rate(bytes_per_s: u64) -> String {
    format!("{}/s", size(bytes_per_s))
}

/// `40 ms`, `1.4 s`, `12 s`, `3 min 20 s`, `2 h 5 min`.
pub(crate) fn duration(time: Duration) -> String {
    let s = time.as_secs();
    match s {
        _ if time.is_zero() => "0 s".into(),
        0 => format!("{} ms", time.as_millis().max(1)),
        1..10 => format!("{:.1} s", time.as_secs_f64()),
        10..60 => format!("{s} s"),
        60..3600 => format!("{} min {} s", s / 60, s % 60),
        _ => format!("{} h {} min", s / 3600, s % 3600 / 60),
    }
}

/// `85 µs`, `1.2 ms`, `2.5 s`.
pub(crate) fn micros(us: f64) -> String {
    match us {
        _ if us < 1_000.0 => format!("{us:.0} µs"),
        _ if us < 1_000_000.0 => format!("{:.1} ms", us / 1_000.0),
        _ => format!("{:.1} s", us / 1_000_000.0),
    }
}

/// `yes` or `no`.
pub(crate) fn yes(value: bool) -> &'static str {
    if value { "yes" } else { "no" }
}

/// A list of names and values, aligned; empty values are left out.
#[derive(Debug, Default)]
pub(crate) struct Facts(Vec<(String, String)>);

impl Facts {
    /// An empty list.
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// Adds a line.
    pub(crate) fn add(&mut self, name: &str, value: impl Into<String>) -> &mut Self {
        let value = value.into();
        if !value.is_empty() {
            self.0.push((name.to_owned(), value));
        }
        self
    }

    /// The lines.
    pub(crate) fn render(&self) -> String {
        let width = self.0.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
        let mut text = String::new();
        for (name, value) in &self.0 {
            let _ = writeln!(text, "{:<1$}  {value}", format!("{name}:"), width + 1);
        }
        text
    }
}

/// A table with a heading; columns that begin with `>` are aligned to the right.
#[derive(Debug)]
pub(crate) struct Table {
    rows: Vec<Vec<String>>,
    right: Vec<bool>,
}

impl Table {
    /// A table with these headings.
    pub(crate) fn new(headings: &[&str]) -> Self {
        let right = headings.iter().map(|h| h.starts_with('>')).collect();
        let first = headings.iter().map(|h| h.trim_start_matches('>').to_owned()).collect();
        Self { rows: vec![first], right }
    }

    /// Adds a row, which has as many cells as there are headings.
    pub(crate) fn row<const N: usize>(&mut self, cells: [String; N]) {
        assert_eq!(N, self.right.len(), "a row must have a cell for each heading");
        self.rows.push(cells.into());
    }

    /// The lines.
    pub(crate) fn render(&self) -> String {
        let width = |column: usize| self.rows.iter().map(|r| r[column].chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..self.right.len()).map(width).collect();
        let mut text = String::new();
        for row in &self.rows {
            let mut line = String::new();
            for ((cell, width), right) in row.iter().zip(&widths).zip(&self.right) {
                let pad = " ".repeat(width - cell.chars().count());
                let _ = if *right { write!(line, "{pad}{cell}  ") } else { write!(line, "{cell}{pad}  ") };
            }
            let _ = writeln!(text, "{}", line.trim_end());
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_exact_where_the_unit_divides_them() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            (10 << 30, "10 GiB"),
            (u64::MAX, "16.0 EiB"),
        ] {
            assert_eq!(size(bytes), text);
        }
        assert_eq!(size_exact(512), "512 bytes");
        assert_eq!(size_exact(64 << 20), "64 MiB (67108864 bytes)");
    }

    #[test]
    fn durations_use_the_units_that_people_would() {
        for (ms, text) in [
            (0, "0 s"),
            (40, "40 ms"),
            (1_250, "1.2 s"),
            (12_000, "12 s"),
            (200_000, "3 min 20 s"),
            (7_500_000, "2 h 5 min"),
        ] {
            assert_eq!(duration(Duration::from_millis(ms)), text);
        }
        assert_eq!(micros(85.2), "85 µs");
        assert_eq!(micros(1_234.0), "1.2 ms");
        assert_eq!(micros(2_500_000.0), "2.5 s");
    }

    #[test]
    fn a_table_aligns_its_columns_and_leaves_no_trailing_spaces() {
        let mut table = Table::new(&["ID", ">SIZE", "JOB"]);
        table.row(["a".into(), "10 GiB".into(), String::new()]);
        table.row(["long".into(), "1 B".into(), "m1".into()]);
        assert_eq!(table.render(), "ID      SIZE  JOB\na     10 GiB\nlong     1 B  m1\n");
    }

    #[test]
    fn facts_are_aligned_and_empty_ones_left_out() {
        let mut facts = Facts::new();
        facts.add("a", "1").add("none", "").add("long name", "2");
        assert_eq!(facts.render(), "a:          1\nlong name:  2\n");
    }
}
