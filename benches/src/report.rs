//! What a run found: figures to keep (JSON) and tables to read (Markdown).

use serde::Serialize;

use crate::server::{Contender, Told};
use crate::size::{GIB, MIB, show_size};
use crate::table::{Table, maybe, number};

/// Requests of one phase of a move.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Phase {
    /// `before`, `copying`, `mirroring`, `verify`, `ready`, `switch` or `after`.
    pub phase: String,
    /// How long it took.
    pub seconds: f64,
    /// Requests.
    pub requests: u64,
    /// Requests a second.
    pub rate: f64,
    /// Reads that returned what was not there.
    pub mismatches: u64,
    /// Requests that the device failed.
    pub errors: u64,
    /// Half of the requests took at most this, in milliseconds.
    pub p50_ms: f64,
    /// 99 of 100 took at most this.
    pub p99_ms: f64,
    /// The longest wait.
    pub longest_ms: f64,
}

/// A row of figures: its name, and how it is found.
type Row<'a, T> = (&'a str, &'a dyn Fn(&Moved) -> T);

/// An image's file.
#[derive(Debug, Clone, Default, Serialize)]
pub struct ImageFile {
    /// Its length in bytes.
    pub length: u64,
    /// Bytes that it takes on the disk.
    pub allocated: u64,
    /// Whether the server reads and writes the guest's data past the page cache.
    pub direct: Option<bool>,
}

/// One move by one contender.
#[derive(Debug, Clone, Serialize)]
pub struct Moved {
    /// Who.
    pub contender: Contender,
    /// Bytes of the disk.
    pub disk_bytes: u64,
    /// Bytes of data that the disk held when the move began.
    pub held_bytes: u64,
    /// MB (10^6) a second at which the disk was filled.
    pub fill_mb_per_s: f64,
    /// The guest's requests by phase; none when there was no load.
    pub phases: Vec<Phase>,
    /// From the order to move until both images were equal for the first time, in seconds.
    pub equal_s: f64,
    /// From the order to move until it was over.
    pub total_s: f64,
    /// Processor seconds of the server until both images were equal, the guest's requests included.
    pub cpu_equal_s: f64,
    /// The same for the whole move.
    pub cpu_total_s: f64,
    /// What the server told.
    pub told: Told,
    /// The source before the move.
    pub source: ImageFile,
    /// The target after it.
    pub target: ImageFile,
    /// Everything that was wrong; empty for a sound move.
    pub faults: Vec<String>,
    /// What was checked and found right.
    pub checks: Vec<String>,
}

impl Moved {
    /// MB (10^6) a second of the disk's data, until both images were equal.
    pub fn copy_mb_per_s(&self) -> f64 {
        self.held_bytes as f64 / 1e6 / self.equal_s
    }

    fn cpu_per_gib(&self, cpu_s: f64) -> f64 {
        cpu_s * GIB as f64 / self.held_bytes.max(1) as f64
    }

    fn phase(&self, name: &str) -> Option<&Phase> {
        self.phases.iter().find(|phase| phase.phase == name)
    }

    fn longest_ms(&self) -> Option<f64> {
        let during = self.phases.iter().filter(|phase| !matches!(phase.phase.as_str(), "before" | "after"));
        during.map(|phase| phase.longest_ms).reduce(f64::max)
    }
}

/// A move by each contender.
#[derive(Debug, Clone, Serialize)]
pub struct Comparison {
    /// What was asked, as a sentence.
    pub question: String,
    /// blockd's move.
    pub blockd: Moved,
    /// The rival's, when there is one and it got through.
    pub rival: Option<Moved>,
    /// Why there is none.
    pub no_rival: Option<String>,
}

impl Comparison {
    /// Whether nothing was wrong on blockd's side: what the rival does is its own affair.
    pub fn is_sound(&self) -> bool {
        self.blockd.faults.is_empty()
    }

    fn both(&self) -> impl Iterator<Item = &Moved> {
        std::iter::once(&self.blockd).chain(&self.rival)
    }

    fn is_same_disk(&self) -> bool {
        let disk = |moved: &Moved| (moved.disk_bytes, moved.held_bytes);
        self.rival.as_ref().is_none_or(|rival| disk(rival) == disk(&self.blockd))
    }

    fn phase_table(&self) -> Table {
        let header = [
            "server",
            "phase",
            "s",
            "requests",
            "per s",
            "mismatches",
            "errors",
            "p50 ms",
            "p99 ms",
            "longest ms",
        ];
        let mut table = Table::new(2, header);
        for moved in self.both() {
            for phase in &moved.phases {
                table.row([
                    moved.contender.name().to_owned(),
                    phase.phase.clone(),
                    number(phase.seconds),
                    phase.requests.to_string(),
                    number(phase.rate),
                    phase.mismatches.to_string(),
                    phase.errors.to_string(),
                    number(phase.p50_ms),
                    number(phase.p99_ms),
                    number(phase.longest_ms),
                ]);
            }
        }
        table
    }

    fn move_table(&self) -> Table {
        let mut table = Table::new(1, ["the move", "blockd", "qemu-storage-daemon", "blockd ÷ rival"]);
        let rows: [Row<'_, Option<f64>>; 19] = [
            ("MB/s until both images are equal", &|m| Some(m.copy_mb_per_s())),
            ("seconds until both images are equal", &|m| Some(m.equal_s)),
            ("seconds in all", &|m| Some(m.total_s)),
            ("seconds in all without verification", &|m| Some(m.total_s - m.told.verify_s)),
            ("processor seconds per GiB until equal", &|m| Some(m.cpu_per_gib(m.cpu_equal_s))),
            ("processor seconds per GiB in all", &|m| Some(m.cpu_per_gib(m.cpu_total_s))),
            ("MB copied, repeats included", &|m| m.told.bytes_copied.map(|bytes| bytes as f64 / 1e6)),
            ("passes", &|m| m.told.passes.map(f64::from)),
            ("guest p50 while copying, ms", &|m| m.phase("copying").map(|p| p.p50_ms)),
            ("guest p99 while copying, ms", &|m| m.phase("copying").map(|p| p.p99_ms)),
            ("guest p99 before the move, ms", &|m| m.phase("before").map(|p| p.p99_ms)),
            ("guest's longest wait during the move, ms", &Moved::longest_ms),
            ("guest's longest wait at the switch, ms", &|m| m.phase("switch").map(|p| p.longest_ms)),
            ("switch, from the decision to its end, ms", &|m| m.phase("switch").map(|p| p.seconds * 1e3)),
            ("commit as the server tells it, ms", &|m| m.told.commit_us.map(|us| us as f64 / 1e3)),
            ("longest wait as the server tells it, ms", &|m| {
                m.told.longest_guest_wait_us.map(|us| us as f64 / 1e3)
            }),
            ("target's MiB on the disk", &|m| Some(m.target.allocated as f64 / MIB as f64)),
            ("target's length in MiB", &|m| Some(m.target.length as f64 / MIB as f64)),
            ("target on the disk, % of the source", &|m| {
                Some(m.target.allocated as f64 / m.source.allocated.max(1) as f64 * 100.0)
            }),
        ];
        for (name, figure) in rows {
            let (ours, theirs) = (figure(&self.blockd), self.rival.as_ref().and_then(figure));
            if ours.is_none() && theirs.is_none() {
                continue;
            }
            // Of different disks only shares can be compared.
            let comparable = self.is_same_disk() || name.contains('%');
            let ratio = ours.zip(theirs).filter(|(_, theirs)| comparable && *theirs != 0.0);
            let ratio = ratio.map(|(ours, theirs)| ours / theirs);
            table.row([name.to_owned(), maybe(ours), maybe(theirs), maybe(ratio)]);
        }
        let words: [Row<'_, String>; 5] = [
            ("source past the page cache", &|m| yes(m.source.direct)),
            ("target past the page cache", &|m| yes(m.target.direct)),
            ("verified before the switch", &|m| m.told.verified.clone()),
            ("source deleted", &|m| yes(Some(m.told.source_deleted))),
            ("every sector right afterwards", &|m| yes(Some(m.faults.is_empty()))),
        ];
        for (name, word) in words {
            let theirs = self.rival.as_ref().map_or_else(|| "–".into(), word);
            table.row([name.to_owned(), word(&self.blockd), theirs, String::new()]);
        }
        table
    }
}

fn yes(value: Option<bool>) -> String {
    value.map_or("–", |yes| if yes { "yes" } else { "no" }).into()
}

impl std::fmt::Display for Comparison {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "## {}\n", self.question)?;
        if self.both().any(|moved| !moved.phases.is_empty()) {
            writeln!(f, "{}", self.phase_table())?;
        }
        writeln!(f, "{}", self.move_table())?;
        for moved in self.both() {
            let name = moved.contender.name();
            let held = show_size(moved.held_bytes);
            writeln!(f, "* {name}: filled {held} at {} MB/s", number(moved.fill_mb_per_s))?;
            if let Some(note) = &moved.told.note {
                writeln!(f, "* {name}: {note}")?;
            }
            for check in &moved.checks {
                writeln!(f, "* {name}: {check}")?;
            }
            for fault in &moved.faults {
                writeln!(f, "* {name}: **WRONG: {fault}**")?;
            }
        }
        if let Some(why) = &self.no_rival {
            writeln!(f, "* no figures of qemu-storage-daemon: {why}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn moved(contender: Contender, seconds: f64) -> Moved {
        Moved {
            contender,
            disk_bytes: GIB,
            held_bytes: GIB,
            fill_mb_per_s: 100.0,
            phases: vec![Phase {
                phase: "switch".into(),
                seconds: 0.001,
                requests: 5,
                rate: 5000.0,
                mismatches: 0,
                errors: 0,
                p50_ms: 0.1,
                p99_ms: 0.5,
                longest_ms: 2.0,
            }],
            equal_s: seconds,
            total_s: seconds * 2.0,
            cpu_equal_s: 1.0,
            cpu_total_s: 2.0,
            told: Told { verified: "full".into(), ..Told::default() },
            source: ImageFile { length: GIB, allocated: GIB, direct: Some(true) },
            target: ImageFile { length: GIB, allocated: GIB / 2, direct: None },
            faults: vec![],
            checks: vec![],
        }
    }

    #[test]
    fn ratios_stand_beside_the_figures_that_they_compare() {
        let comparison = Comparison {
            question: "How fast?".into(),
            blockd: moved(Contender::Blockd, 1.0),
            rival: Some(moved(Contender::Rival, 4.0)),
            no_rival: None,
        };
        let text = comparison.to_string();
        let line = |start: &str| text.lines().find(|line| line.starts_with(start)).unwrap().replace(' ', "");
        assert_eq!(line("| seconds in all "), "|secondsinall|2.00|8.00|0.25|");
        assert_eq!(line("| target on the disk, %"), "|targetonthedisk,%ofthesource|50.0|50.0|1.00|");
        assert_eq!(line("| source past"), "|sourcepastthepagecache|yes|yes||");
        assert!(!text.contains("passes"), "a figure that nobody has needs no row");
        assert!(comparison.is_sound());
    }

    #[test]
    fn of_different_disks_only_shares_are_compared() {
        let mut rival = moved(Contender::Rival, 4.0);
        rival.disk_bytes *= 2;
        let blockd = moved(Contender::Blockd, 1.0);
        let comparison =
            Comparison { question: "How thin?".into(), blockd, rival: Some(rival), no_rival: None };
        let text = comparison.to_string().replace(' ', "");
        assert!(text.contains("|secondsinall|2.00|8.00|–|"));
        assert!(text.contains("|targetonthedisk,%ofthesource|50.0|50.0|1.00|"));
    }

    #[test]
    fn a_missing_rival_and_a_fault_are_told() {
        let mut blockd = moved(Contender::Blockd, 1.0);
        blockd.faults.push("sector 7 holds rubbish".into());
        let no_rival = Some("it is not installed".into());
        let comparison = Comparison { question: "How fast?".into(), blockd, rival: None, no_rival };
        assert!(!comparison.is_sound());
        let text = comparison.to_string();
        assert!(text.contains("**WRONG: sector 7 holds rubbish**") && text.contains("it is not installed"));
    }
}
