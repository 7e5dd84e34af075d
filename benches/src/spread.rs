//! Figures of several rounds, and what they are to reach.
//!
//! Machines are noisy, so a figure is never one number: it is the middle of the rounds with the least and the most. A
//! ratio is made within each round first, because what else the machine did then met both sides of it.

use serde::Serialize;

use crate::table::number;

/// The median of some rounds, with the least and the most.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Spread {
    /// The middle; of an even number of rounds the mean of the two in the middle.
    pub median: f64,
    /// The least.
    pub least: f64,
    /// The most.
    pub most: f64,
    /// Rounds.
    pub rounds: usize,
}

impl Spread {
    /// Of these rounds; `None` when there are none, or one of them has no figure.
    pub fn of(rounds: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut sorted: Vec<f64> = rounds.into_iter().collect();
        if sorted.is_empty() || sorted.iter().any(|value| !value.is_finite()) {
            return None;
        }
        sorted.sort_by(f64::total_cmp);
        let count = sorted.len();
        let median = (sorted[(count - 1) / 2] + sorted[count / 2]) / 2.0;
        Some(Self { median, least: sorted[0], most: sorted[count - 1], rounds: count })
    }

    /// Of the ratios within each round.
    pub fn of_ratios(ours: &[f64], theirs: &[f64]) -> Option<Self> {
        (ours.len() == theirs.len()).then(|| Self::of(ours.iter().zip(theirs).map(|(a, b)| a / b))).flatten()
    }

    /// Multiplied by a factor, for another unit.
    pub fn times(self, factor: f64) -> Self {
        let Self { median, least, most, rounds } = self;
        Self { median: median * factor, least: least * factor, most: most * factor, rounds }
    }
}

impl std::fmt::Display for Spread {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({}–{})", number(self.median), number(self.least), number(self.most))
    }
}

/// A spread, or a dash when there is none.
pub fn maybe_spread(spread: Option<Spread>) -> String {
    spread.map_or_else(|| "–".into(), |spread| spread.to_string())
}

/// What a figure is to be.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Bound {
    /// This or more.
    AtLeast(f64),
    /// This or less.
    AtMost(f64),
    /// Nobody demands anything: it is told because it is of interest.
    None,
}

impl std::fmt::Display for Bound {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::AtLeast(bound) => write!(f, "≥ {bound}"),
            Self::AtMost(bound) => write!(f, "≤ {bound}"),
            Self::None => write!(f, "–"),
        }
    }
}

/// A figure beside what it is to be.
#[derive(Debug, Clone, Serialize)]
pub struct Goal {
    /// In which part of the plot it stands; goals of one group can be compared with each other.
    pub group: String,
    /// The bar's or row's name.
    pub what: String,
    /// The unit; `×` for ratios.
    pub unit: &'static str,
    /// What was found.
    pub found: Spread,
    /// What is demanded of the median.
    pub bound: Bound,
}

impl Goal {
    /// A ratio to something else.
    pub fn ratio(
        group: impl Into<String>,
        what: impl Into<String>,
        found: Option<Spread>,
        bound: Bound,
    ) -> Option<Self> {
        Some(Self { group: group.into(), what: what.into(), unit: "×", found: found?, bound })
    }

    /// Whether the median is what it is to be; `None` when nothing is demanded.
    pub fn is_met(&self) -> Option<bool> {
        match self.bound {
            Bound::AtLeast(bound) => Some(self.found.median >= bound),
            Bound::AtMost(bound) => Some(self.found.median <= bound),
            Bound::None => None,
        }
    }

    /// As tables show it.
    pub fn verdict(&self) -> &'static str {
        match self.is_met() {
            Some(true) => "pass",
            Some(false) => "**fail**",
            None => "–",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_middle_is_what_half_of_the_rounds_reach() {
        let spread = Spread::of([5.0, 1.0, 3.0]).unwrap();
        assert_eq!((spread.median, spread.least, spread.most, spread.rounds), (3.0, 1.0, 5.0, 3));
        assert_eq!(Spread::of([1.0, 2.0]).unwrap().median, 1.5);
        assert_eq!(Spread::of([]), None);
        assert_eq!(Spread::of([1.0, f64::NAN]), None);
    }

    #[test]
    fn ratios_are_made_within_each_round() {
        // The second round met a busy machine: both sides are slow there, and the ratio does not notice.
        let spread = Spread::of_ratios(&[100.0, 10.0, 90.0], &[50.0, 5.0, 30.0]).unwrap();
        assert_eq!((spread.median, spread.least, spread.most), (2.0, 2.0, 3.0));
        assert_eq!(Spread::of_ratios(&[1.0], &[]), None);
        assert_eq!(Spread::of_ratios(&[1.0], &[0.0]), None);
    }

    #[test]
    fn a_goal_is_met_by_its_median() {
        let goal = |bound| Goal::ratio("g", "w", Spread::of([1.0, 3.0, 2.0]), bound).unwrap();
        assert_eq!(goal(Bound::AtLeast(2.0)).is_met(), Some(true));
        assert_eq!(goal(Bound::AtMost(1.9)).is_met(), Some(false));
        assert_eq!(goal(Bound::None).is_met(), None);
        assert!(Goal::ratio("g", "w", None, Bound::None).is_none());
    }
}
