//! A disk with a cache: what is read back, and what a power cut may leave.

use crate::dice::Dice;

/// One sector's past.
#[derive(Debug, Clone, Default)]
struct Sector {
    /// What it may hold after a power cut: what was durable last, then all that landed since. The last one is what is
    /// read back.
    maybe: Vec<u32>,
    /// How many were dropped from the front of `maybe`.
    dropped: u32,
    /// A failed flush has lost it: later flushes do not make it durable, only another write does.
    is_lost: bool,
}

/// A simulated disk.
#[derive(Debug, Clone)]
pub struct Disk {
    sectors: Vec<Sector>,
    /// It was deleted: nothing may touch it any more.
    pub is_deleted: bool,
}

/// What a flush covers: taken when it begins.
#[derive(Debug, Clone)]
pub struct FlushMark {
    counts: Vec<u32>,
}

impl Disk {
    /// A disk of so many sectors, all zero and durable.
    pub fn new(sectors: u32) -> Self {
        let sector = Sector { maybe: vec![0], ..Sector::default() };
        Self { sectors: vec![sector; sectors as usize], is_deleted: false }
    }

    /// What is read back.
    pub fn read(&self, sector: u32) -> u32 {
        assert!(!self.is_deleted, "sector {sector} of a deleted disk is read");
        *self.sectors[sector as usize].maybe.last().expect("a sector always holds something")
    }

    /// A write's sector lands.
    pub fn land(&mut self, sector: u32, value: u32) {
        assert!(!self.is_deleted, "sector {sector} of a deleted disk is written");
        let sector = &mut self.sectors[sector as usize];
        sector.maybe.push(value);
        sector.is_lost = false;
    }

    /// A flush begins.
    pub fn flush_begins(&self) -> FlushMark {
        assert!(!self.is_deleted, "a deleted disk is flushed");
        let count = |sector: &Sector| sector.dropped + sector.maybe.len() as u32 - 1;
        FlushMark { counts: self.sectors.iter().map(count).collect() }
    }

    /// It succeeds: what had landed by its beginning is durable.
    pub fn flush_succeeds(&mut self, mark: &FlushMark) {
        for (sector, &count) in self.sectors.iter_mut().zip(&mark.counts) {
            if !sector.is_lost && count > sector.dropped {
                let gone = (count - sector.dropped) as usize;
                sector.maybe.drain(..gone);
                sector.dropped = count;
            }
        }
    }

    /// It fails: some of what was not durable will never be, whatever later flushes say.
    pub fn flush_fails(&mut self, dice: &mut Dice) {
        for sector in &mut self.sectors {
            sector.is_lost |= sector.maybe.len() > 1 && dice.one_in(2);
        }
    }

    /// Whether a power cut would leave this sector as it is read now.
    pub fn is_durable(&self, sector: u32) -> bool {
        let maybe = &self.sectors[sector as usize].maybe;
        maybe.iter().all(|value| Some(value) == maybe.last())
    }

    /// Losses that the guest was told of as its disk's own are no business of the next move.
    pub fn forget_losses(&mut self) {
        for sector in &mut self.sectors {
            sector.is_lost = false;
        }
    }

    /// All that this sector may hold after a power cut.
    pub fn after_power_cut(&self, sector: u32) -> &[u32] {
        &self.sectors[sector as usize].maybe
    }

    /// The power is cut: each sector keeps any of the things that it may hold.
    pub fn lose_power(&mut self, dice: &mut Dice) {
        for sector in &mut self.sectors {
            let kept = sector.maybe[dice.below(sector.maybe.len() as u32) as usize];
            *sector = Sector { maybe: vec![kept], ..Sector::default() };
        }
    }
}
