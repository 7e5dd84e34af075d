//! Tables, goals and charts of copies.

use crate::finding::Finding;
use crate::plot::{Chart, Group};
use crate::size::{GIB, show_size};
use crate::spread::{Bound, Goal, Spread, maybe_spread};
use crate::table::Table;
use crate::thin::PIECES;

use super::turns::{Copied, Who};
use super::{Copying, LARGE, SMALL};

/// A ratio that is to be reached.
struct Compared {
    group: &'static str,
    what: &'static str,
    label: &'static str,
    ours: Who,
    theirs: Who,
    bound: Bound,
}

const FULL: &str = "VHDX to VHDX, full";
const SPEED: [Compared; 4] = [
    Compared {
        group: FULL,
        what: "MB/s, live move ÷ min(fio read, fio write)",
        label: "live ÷ disk",
        ours: Who::Live,
        theirs: Who::Fio,
        bound: Bound::AtLeast(0.95),
    },
    Compared {
        group: FULL,
        what: "MB/s, offline move ÷ qemu-img convert",
        label: "offline ÷\nqemu-img convert",
        ours: Who::Offline,
        theirs: Who::Convert,
        bound: Bound::AtLeast(1.0),
    },
    Compared {
        group: FULL,
        what: "MB/s, live move ÷ qemu-storage-daemon",
        label: "live ÷\nqemu-storage-daemon",
        ours: Who::Live,
        theirs: Who::Rival,
        bound: Bound::None,
    },
    Compared {
        group: FULL,
        what: "MB/s, live move ÷ qemu-img convert",
        label: "live ÷\nqemu-img convert",
        ours: Who::Live,
        theirs: Who::Convert,
        bound: Bound::None,
    },
];
const COST: [Compared; 2] = [
    Compared {
        group: FULL,
        what: "CPU time per GiB, blockd ÷ qemu-storage-daemon",
        label: "CPU time, live ÷\nqemu-storage-daemon",
        ours: Who::Live,
        theirs: Who::Rival,
        bound: Bound::AtMost(0.5),
    },
    Compared {
        group: FULL,
        what: "CPU time per GiB, offline move ÷ qemu-img convert",
        label: "CPU time, offline ÷\nqemu-img convert",
        ours: Who::Offline,
        theirs: Who::Convert,
        bound: Bound::None,
    },
];

/// What one has to know to read the tables.
pub fn describe(finding: &mut Finding, what: Copying) {
    finding.notes.push(format!(
        "{} rounds; in each, everybody copies once, in turns, a dynamic VHDX of {} that is full of random bytes to a new one in \
         the same folder. No guest is connected. Before each turn the source's page cache is given back and all is synced; the \
         copy is removed after it.",
        what.rounds,
        show_size(what.size)
    ));
    finding.notes.push(
        "fio reads the same file and writes a new one at the same time: io_uring, past the page cache, 1 MiB, eight in flight each; \
         who is through first ends both. It syncs nothing, while a move ends only when the copy is durable. qemu-img convert: \
         `-W -m 16 -t none -T none`. qemu-storage-daemon: `blockdev-mirror`, `sync=full`, `cache.direct=on`, `aio=io_uring`, then \
         `job-complete`. blockctl: `move --keep-source --verify none`. blockd: `POST /v1/moves`, source kept."
            .into(),
    );
    finding.notes.push(
        "MB/s are the disk's bytes by the time from the order to the end of the job, or of the program. `equal` is the time until both \
         images were equal (blockd: `synced`, qemu-storage-daemon: READY). Processor time is the process's own, with the \
         kernel's threads that work for it. Each copy of the first round was compared with the source, sector by sector."
            .into(),
    );
}

/// Shows the copies of the full disk.
pub fn add_full(finding: &mut Finding, size: u64, who: &[Who], rounds: &[Vec<Copied>]) {
    let header = ["copied by", "MB/s", "seconds until equal", "seconds in all", "CPU s per GiB"];
    let mut table = Table::new(1, header);
    for (who, rounds) in who.iter().zip(rounds) {
        if *who == Who::Fio {
            for (side, name) in ["fio, reader", "fio, writer"].into_iter().enumerate() {
                let rates = rounds.iter().filter_map(|copied| Some(copied.fio?[side] / 1e6));
                let rate = maybe_spread(Spread::of(rates));
                table.row([name.to_owned(), rate, "–".into(), "–".into(), "–".into()]);
            }
        }
        table.row([
            who.name().to_owned(),
            maybe_spread(Spread::of(rounds.iter().map(|copied| size as f64 / 1e6 / copied.seconds))),
            spread_of(rounds, |copied| copied.equal_s),
            spread_of(rounds, |copied| (*who != Who::Fio).then_some(copied.seconds)),
            spread_of(rounds, |copied| per_gib(copied, size)),
        ]);
    }
    finding.tables.push((format!("A full VHDX of {}", show_size(size)), table));
    let find = |wanted: Who| who.iter().position(|who| *who == wanted).map(|index| rounds[index].as_slice());
    let rate = |copied: &Copied| Some(size as f64 / copied.seconds);
    add_ratios(finding, &SPEED, find, rate, "Copying a full VHDX", "ratio of MB/s, more is better");
    let cost = |copied: &Copied| per_gib(copied, size);
    add_ratios(finding, &COST, find, cost, "Cost of copying a full VHDX", "ratio, less is better");
}

fn per_gib(copied: &Copied, bytes: u64) -> Option<f64> {
    Some(copied.cpu_s? * GIB as f64 / bytes as f64)
}

/// Of what every round has; a dash when one has it not.
fn spread_of(rounds: &[Copied], figure: impl Fn(&Copied) -> Option<f64>) -> String {
    let values: Option<Vec<f64>> = rounds.iter().map(figure).collect();
    maybe_spread(values.and_then(Spread::of))
}

fn add_ratios<'a>(
    finding: &mut Finding,
    compared: &[Compared],
    find: impl Fn(Who) -> Option<&'a [Copied]>,
    figure: impl Fn(&Copied) -> Option<f64>,
    title: &str,
    axis: &str,
) {
    let figures = |who| -> Option<Vec<f64>> { find(who)?.iter().map(&figure).collect() };
    let mut groups = Vec::new();
    for Compared { group, what, label, ours, theirs, bound } in compared {
        let ratio = figures(*ours).zip(figures(*theirs)).and_then(|(a, b)| Spread::of_ratios(&a, &b));
        finding.goals.extend(Goal::ratio(*group, *what, ratio, *bound));
        groups.push(Group { label: (*label).into(), bars: vec![ratio], bound: *bound });
    }
    finding.charts.extend(Chart::new(title, axis, vec!["blockd".into()], groups));
}

/// Shows the moves of the small and the large thin disk.
pub fn add_thin(finding: &mut Finding, held: u64, rounds: &[Vec<Copied>; 2]) {
    let sizes = [held * SMALL, LARGE];
    let mut table = Table::new(1, ["disk", "seconds in all", "CPU s"]);
    for (size, rounds) in sizes.iter().zip(rounds) {
        table.row([
            show_size(*size),
            spread_of(rounds, |copied| Some(copied.seconds)),
            spread_of(rounds, |copied| copied.cpu_s),
        ]);
    }
    let heading = format!(
        "Dynamic VHDX that hold {} in {PIECES} pieces, with blocks of one size, moved live by blockd (verify none)",
        show_size(held)
    );
    finding.tables.push((heading, table));
    let seconds = rounds.each_ref().map(|rounds| rounds.iter().map(|copied| copied.seconds).collect());
    let [small, large]: [Vec<f64>; 2] = seconds;
    let ratio = Spread::of_ratios(&large, &small);
    let what = format!("time of the move, {} ÷ {}", show_size(sizes[1]), show_size(sizes[0]));
    let group = format!("{} held", show_size(held));
    finding.goals.extend(Goal::ratio(group, what, ratio, Bound::AtMost(1.1)));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_to_be_reached_stands_beside_what_was() {
        let copied = |seconds, cpu_s| Copied { seconds, equal_s: None, cpu_s: Some(cpu_s), fio: None };
        let who = [Who::Offline, Who::Convert, Who::Live, Who::Rival];
        let rounds: Vec<_> =
            [(2.0, 1.0), (3.0, 1.5), (2.0, 0.5), (4.0, 2.0)].map(|(s, c)| vec![copied(s, c)]).into();
        let mut finding = Finding::new("copy", "Copying");
        add_full(&mut finding, GIB, &who, &rounds);
        add_thin(&mut finding, GIB, &[vec![copied(2.0, 1.0)], vec![copied(3.0, 1.0)]]);
        let found: Vec<_> =
            finding.goals.iter().filter_map(|goal| Some((goal.found.median, goal.is_met()?))).collect();
        // Without fio there is no figure of the disk to hold the live move against.
        assert_eq!(found, [(1.5, true), (0.25, true), (1.5, false)]);
        assert!(finding.to_string().contains("1 TiB ÷ 2 GiB"), "{finding}");
    }
}
