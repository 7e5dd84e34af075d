//! How long guest requests took.

/// How long some guest requests took: for each duration in microseconds how many took at most that long and longer than the
/// one before, in ascending order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Latencies(Vec<(u64, u64)>);

impl FromIterator<(u64, u64)> for Latencies {
    /// From pairs of microseconds and how many requests took so long, in any order.
    fn from_iter<I: IntoIterator<Item = (u64, u64)>>(counts: I) -> Self {
        let mut latencies = Self(counts.into_iter().filter(|&(_, count)| count > 0).collect());
        latencies.tidy();
        latencies
    }
}

impl Latencies {
    fn tidy(&mut self) {
        self.0.sort_unstable_by_key(|&(us, _)| us);
        self.0.dedup_by(|later, kept| {
            let is_same = later.0 == kept.0;
            if is_same {
                kept.1 += later.1;
            }
            is_same
        });
    }

    /// The requests of both.
    pub fn add(&mut self, other: &Self) {
        self.0.extend_from_slice(&other.0);
        self.tidy();
    }

    /// Microseconds, and how many requests took that long.
    pub fn iter(&self) -> impl Iterator<Item = (u64, u64)> {
        self.0.iter().copied()
    }

    /// How many requests.
    pub fn count(&self) -> u64 {
        self.0.iter().map(|&(_, count)| count).sum()
    }

    /// How many took longer than this.
    pub fn slower_than(&self, us: u64) -> u64 {
        self.0.iter().filter(|&&(took, _)| took > us).map(|&(_, count)| count).sum()
    }

    /// What 99 of 100 did not take longer than, in microseconds (of 99 or less, the slowest); `None` of none.
    pub fn p99_us(&self) -> Option<u64> {
        let count = self.count();
        let rank = count - count / 100;
        let mut seen = 0;
        self.0.iter().find_map(|&(us, n)| {
            seen += n;
            (seen >= rank).then_some(us)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_of_a_hundred_may_be_slower_than_the_p99() {
        assert_eq!(Latencies::default().p99_us(), None);
        let of = |counts: &[(u64, u64)]| counts.iter().copied().collect::<Latencies>();
        assert_eq!(of(&[(7, 1)]).p99_us(), Some(7));
        assert_eq!(of(&[(10, 98), (900, 1)]).p99_us(), Some(900));
        assert_eq!(of(&[(900, 1), (10, 99)]).p99_us(), Some(10));
        assert_eq!(of(&[(10, 197), (500, 1), (900, 2)]).p99_us(), Some(500));
    }

    #[test]
    fn requests_are_added_up() {
        let mut all: Latencies = [(5, 2), (3, 0), (1, 4)].into_iter().collect();
        all.add(&[(5, 1), (9, 1)].into_iter().collect());
        assert_eq!(all, [(1, 4), (5, 3), (9, 1)].into_iter().collect());
        assert_eq!((all.count(), all.slower_than(1), all.slower_than(9)), (8, 4, 0));
    }
}
