//! What the rounds are held against, and how they are shown.

use crate::drive::{Access, Wait};
use crate::finding::Finding;
use crate::plot::{Chart, Group};
use crate::spread::{Bound, Goal, Spread, maybe_spread};
use crate::table::{Table, number};

use super::contender::{Round, Who};
use super::{Line, Set};

impl Line {
    fn each(&self, figure: impl Fn(&Round) -> f64) -> Vec<f64> {
        self.rounds.iter().map(figure).collect()
    }

    fn latency(&self, index: usize) -> Vec<f64> {
        self.rounds.iter().filter_map(|round| round.latency_us.map(|latency| latency[index])).collect()
    }

    fn is(&self, who: Who, format: &str) -> bool {
        self.who == who && self.format == format
    }
}

impl Set {
    fn line(&self, who: Who, format: &str) -> Option<&Line> {
        self.lines.iter().find(|line| line.is(who, format))
    }

    fn formats(&self) -> impl Iterator<Item = &'static str> {
        self.lines.iter().filter(|line| line.who == Who::Blockd).map(|line| line.format)
    }

    /// blockd's figure for a format by another's.
    fn ratio(
        &self,
        format: &str,
        other: (Who, &str),
        figure: impl Fn(&Round) -> f64 + Copy,
    ) -> Option<Spread> {
        let (ours, theirs) = (self.line(Who::Blockd, format)?, self.line(other.0, other.1)?);
        Spread::of_ratios(&ours.each(figure), &theirs.each(figure))
    }

    /// Requests a second by those of fio on the same file, or on another one.
    fn fio_ratio(&self, format: &str) -> Option<Spread> {
        let same = self.ratio(format, (Who::Fio, format), Round::rate);
        same.or_else(|| self.ratio(format, (Who::Fio, "raw"), Round::rate))
    }

    fn latency_ratio(&self, format: &str, index: usize) -> Option<Spread> {
        let (ours, theirs) = (self.line(Who::Blockd, format)?, self.line(Who::Rival, format)?);
        Spread::of_ratios(&ours.latency(index), &theirs.latency(index))
    }

    fn is_deep_random(&self) -> bool {
        self.pattern.random && self.pattern.depth > 1
    }

    /// A short name for the plot, as in `4K read d32 poll`.
    fn short(&self) -> String {
        let access = if self.pattern.access == Access::Read { "read" } else { "write" };
        let (kib, depth) = (self.pattern.block >> 10, self.pattern.depth);
        format!("{kib}K {access}\nd{depth} {}", self.wait.name())
    }

    /// What qemu-storage-daemon's rate is to be multiplied by.
    fn rate_bound(&self) -> Bound {
        match (self.is_deep_random(), self.pattern.random) {
            (true, _) if self.wait == Wait::Poll => Bound::AtLeast(2.0),
            (_, false) => Bound::AtLeast(1.0),
            _ => Bound::None,
        }
    }
}

/// Adds tables, goals and charts.
pub fn judge(finding: &mut Finding, sets: &[Set], on_disk: bool) {
    for set in sets {
        finding.tables.push((set.name(), table(set)));
        finding.goals.extend(if on_disk { disk_goals(set) } else { memory_goals(set) });
    }
    finding.charts = if on_disk { disk_charts(sets) } else { memory_charts(sets) };
}

fn memory_goals(set: &Set) -> Vec<Goal> {
    let deep = set.is_deep_random();
    let mut goals = Vec::new();
    let mut add = |what: String, found, bound| goals.extend(Goal::ratio(set.name(), what, found, bound));
    for format in set.formats() {
        let rival = (Who::Rival, format);
        add(format!("requests/s ÷ rival, {format}"), set.ratio(format, rival, Round::rate), set.rate_bound());
        let bound = if deep { Bound::AtLeast(3.0) } else { Bound::None };
        let found = set.ratio(format, rival, Round::per_cpu_s);
        add(format!("requests per CPU s ÷ rival, {format}"), found, bound);
        if deep {
            let cost = |round: &Round| 1.0 / round.per_cpu_s();
            let found = set.ratio(format, (Who::Fio, "raw"), cost);
            add(format!("CPU per request ÷ fio, {format}"), found, Bound::AtMost(1.3));
        }
        if set.pattern.depth == 1 {
            for (index, name) in ["p50", "p99"].into_iter().enumerate() {
                let found = set.latency_ratio(format, index);
                add(format!("{name} ÷ rival, {format}"), found, Bound::AtMost(1.0));
            }
        }
        if format != "raw" && deep {
            let bound = if format == "vhdx" { Bound::AtLeast(0.95) } else { Bound::None };
            let found = set.ratio(format, (Who::Blockd, "raw"), Round::rate);
            add(format!("requests/s, {format} ÷ raw"), found, bound);
        }
    }
    goals
}

fn disk_goals(set: &Set) -> Vec<Goal> {
    let mut goals = Vec::new();
    for format in set.formats() {
        let fio = set.fio_ratio(format);
        let rival = set.ratio(format, (Who::Rival, format), Round::rate);
        goals.extend(Goal::ratio(
            set.name(),
            format!("requests/s ÷ fio, {format}"),
            fio,
            Bound::AtLeast(0.97),
        ));
        goals.extend(Goal::ratio(set.name(), format!("requests/s ÷ rival, {format}"), rival, Bound::None));
    }
    goals
}

fn memory_charts(sets: &[Set]) -> Vec<Chart> {
    let rival = |figure: fn(&Round) -> f64| {
        move |set: &Set, format: &str| set.ratio(format, (Who::Rival, format), figure)
    };
    let all: Vec<&Set> = sets.iter().collect();
    let deep: Vec<&Set> = sets.iter().filter(|set| set.is_deep_random()).collect();
    let shallow: Vec<&Set> = sets.iter().filter(|set| set.pattern.depth == 1).collect();
    let cost =
        |set: &Set, format: &str| set.ratio(format, (Who::Fio, "raw"), |round| 1.0 / round.per_cpu_s());
    let p99 = |set: &Set, format: &str| set.latency_ratio(format, 1);
    [
        chart(
            "In memory: requests per second, blockd ÷ qemu-storage-daemon",
            "more is better",
            &all,
            rival(Round::rate),
            Set::rate_bound,
        ),
        chart(
            "In memory: requests per second of the daemon's CPU time, blockd ÷ qemu-storage-daemon",
            "more is better",
            &all,
            rival(Round::per_cpu_s),
            |set| if set.is_deep_random() { Bound::AtLeast(3.0) } else { Bound::None },
        ),
        chart(
            "In memory: CPU time per request, blockd ÷ fio on a raw file",
            "less is better",
            &deep,
            cost,
            |_| Bound::AtMost(1.3),
        ),
        chart(
            "In memory: p99 latency at depth 1, blockd ÷ qemu-storage-daemon",
            "less is better",
            &shallow,
            p99,
            |_| Bound::AtMost(1.0),
        ),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn disk_charts(sets: &[Set]) -> Vec<Chart> {
    let all: Vec<&Set> = sets.iter().collect();
    let fio = |set: &Set, format: &str| set.fio_ratio(format);
    let title = "On the real disk: requests per second, blockd ÷ fio on a raw file";
    chart(title, "more is better", &all, fio, |_| Bound::AtLeast(0.97)).into_iter().collect()
}

fn chart(
    title: &str,
    axis: &str,
    sets: &[&Set],
    ratio: impl Fn(&Set, &str) -> Option<Spread>,
    bound: impl Fn(&Set) -> Bound,
) -> Option<Chart> {
    let series: Vec<&str> = sets.first()?.formats().collect();
    let group = |set: &&Set| Group {
        label: set.short(),
        bars: series.iter().map(|format| ratio(set, format)).collect(),
        bound: bound(set),
    };
    let groups: Vec<Group> = sets.iter().map(group).collect();
    let series = series.into_iter().map(str::to_owned).collect();
    Chart::new(title, format!("ratio, {axis}"), series, groups)
}

fn table(set: &Set) -> Table {
    let header = [
        "server",
        "format",
        "requests/s",
        "MB/s",
        "CPU s per million",
        "requests per CPU s",
        "p50 µs",
        "p99 µs",
        "max µs",
    ];
    let mut table = Table::new(2, header);
    for line in &set.lines {
        let rate = Spread::of(line.each(Round::rate));
        let mb = rate.map(|rate| rate.times(set.pattern.block as f64 / 1e6));
        let per_million = Spread::of(line.each(|round| 1e6 / round.per_cpu_s()));
        let latency = |index| Spread::of(line.latency(index));
        let longest = latency(2).map_or_else(|| "–".into(), |spread| number(spread.most));
        table.row([
            line.who.name().to_owned(),
            line.format.into(),
            maybe_spread(rate),
            maybe_spread(mb),
            maybe_spread(per_million),
            maybe_spread(Spread::of(line.each(Round::per_cpu_s))),
            maybe_spread(latency(0)),
            maybe_spread(latency(1)),
            longest,
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::drive::Pattern;

    fn line(who: Who, format: &'static str, rates: &[u64]) -> Line {
        let round = |requests: &u64| Round {
            requests: *requests,
            seconds: 1.0,
            cpu_s: 0.5,
            latency_us: (who != Who::Fio).then_some([10.0, 20.0, 30.0]),
        };
        Line { who, format, rounds: rates.iter().map(round).collect() }
    }

    fn set(depth: usize) -> Set {
        Set {
            pattern: Pattern { random: true, access: Access::Read, block: 4096, depth },
            wait: Wait::Poll,
            lines: vec![
                line(Who::Rival, "raw", &[100, 200, 100]),
                line(Who::Blockd, "raw", &[300, 600, 250]),
                line(Who::Blockd, "vhdx", &[270, 540, 225]),
                line(Who::Fio, "raw", &[600, 600, 600]),
            ],
        }
    }

    fn goal(goals: &[Goal], what: &str) -> Goal {
        goals.iter().find(|goal| goal.what == what).unwrap_or_else(|| panic!("{what} in {goals:?}")).clone()
    }

    #[test]
    fn deep_random_patterns_are_held_against_rival_fio_and_raw() {
        let goals = memory_goals(&set(32));
        let rate = goal(&goals, "requests/s ÷ rival, raw");
        assert_eq!((rate.found.median, rate.found.least, rate.is_met()), (3.0, 2.5, Some(true)));
        let cost = goal(&goals, "CPU per request ÷ fio, raw");
        assert_eq!((cost.found.median, cost.is_met()), (2.0, Some(false)));
        assert_eq!(goal(&goals, "requests/s, vhdx ÷ raw").is_met(), Some(false));
        assert!(!goals.iter().any(|goal| goal.what.contains("rival, vhdx")), "the rival has no vhdx here");
        assert!(goals.iter().all(|goal| !goal.what.starts_with("p99")));
    }

    #[test]
    fn shallow_patterns_are_held_against_the_rivals_latency() {
        let goals = memory_goals(&set(1));
        assert_eq!(goal(&goals, "p99 ÷ rival, raw").is_met(), Some(true));
        assert_eq!(goal(&goals, "requests/s ÷ rival, raw").is_met(), None);
    }

    #[test]
    fn on_a_disk_fio_is_the_measure() {
        let goals = disk_goals(&set(32));
        assert_eq!(goal(&goals, "requests/s ÷ fio, vhdx").is_met(), Some(false));
        assert_eq!(goal(&goals, "requests/s ÷ rival, raw").is_met(), None);
    }
}
