//! What a disk may hold, sector by sector.

use std::collections::BTreeMap;

use formats::{AllocState, ByteSpan, Image, Pieces};

use crate::SECTOR;
use crate::payload::{Fence, in_file};
use crate::storage::is_zero;

/// The content of one sector: 0 for zeroes, a number that is repeated all over it, or one of the special ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Tag(u64);

const SPECIAL: u64 = 1 << 63;

impl Tag {
    const ZERO: Self = Self(0);
}

type Sector = [u8; SECTOR as usize];

#[derive(Debug, Clone)]
struct Possible {
    /// What it may hold right now.
    now: Vec<Tag>,
    /// What it may hold after a power cut.
    safe: Vec<Tag>,
}

impl Possible {
    fn zero() -> Self {
        Self { now: vec![Tag::ZERO], safe: vec![Tag::ZERO] }
    }
}

fn add(list: &mut Vec<Tag>, tag: Tag) {
    if !list.contains(&tag) {
        list.push(tag);
    }
}

/// How far a change got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    /// It was acknowledged.
    Done,
    /// It may be there in part.
    Unknown,
}

/// All sectors that were ever written; the others are zeroes.
#[derive(Debug, Clone, Default)]
pub(super) struct Model {
    sectors: BTreeMap<u64, Possible>,
    special: Vec<Sector>,
    changes: u64,
}

impl Model {
    /// What the next write to `at` shall hold: different in every sector, and from all that was there before.
    pub(super) fn fresh(&mut self, at: ByteSpan) -> Vec<Tag> {
        self.changes += 1;
        let first = at.offset / SECTOR;
        (first..first + at.len / SECTOR).map(|n| Tag(self.changes << 40 | (n & 0xff_ffff_ffff))).collect()
    }

    /// A content that looks like something.
    pub(super) fn special(&mut self, sector: Sector) -> Tag {
        if is_zero(&sector) {
            return Tag::ZERO;
        }
        self.special.push(sector);
        Tag(SPECIAL | (self.special.len() as u64 - 1))
    }

    fn sector(&self, tag: Tag) -> Sector {
        if tag.0 & SPECIAL != 0 {
            return self.special[(tag.0 & !SPECIAL) as usize];
        }
        let mut sector = [0; SECTOR as usize];
        sector.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&tag.0.to_le_bytes()));
        sector
    }

    /// The bytes that these tags stand for.
    pub(super) fn bytes(&self, tags: &[Tag]) -> Vec<u8> {
        tags.iter().flat_map(|tag| self.sector(*tag)).collect()
    }

    /// Notes a write of these tags from `offset` on.
    pub(super) fn wrote(&mut self, offset: u64, tags: &[Tag], outcome: Outcome) {
        for (n, tag) in (offset / SECTOR..).zip(tags) {
            let sector = self.sectors.entry(n).or_insert_with(Possible::zero);
            add(&mut sector.safe, *tag);
            match outcome {
                Outcome::Done => sector.now = vec![*tag],
                Outcome::Unknown => add(&mut sector.now, *tag),
            }
        }
    }

    /// Notes that a span was zeroed.
    pub(super) fn zeroed(&mut self, at: ByteSpan, outcome: Outcome) {
        let range = at.offset / SECTOR..(at.offset + at.len) / SECTOR;
        for (_, sector) in self.sectors.range_mut(range) {
            add(&mut sector.safe, Tag::ZERO);
            match outcome {
                Outcome::Done => sector.now = vec![Tag::ZERO],
                Outcome::Unknown => add(&mut sector.now, Tag::ZERO),
            }
        }
    }

    /// Notes that all of it was made durable.
    pub(super) fn flushed(&mut self) {
        self.sectors.values_mut().for_each(|sector| sector.safe.clone_from(&sector.now));
    }

    /// Notes that what `earlier` held was made durable, and maybe what came later.
    pub(super) fn flushed_since(&mut self, earlier: &Self) {
        for (n, sector) in &mut self.sectors {
            let was = earlier.sectors.get(n).map_or(vec![Tag::ZERO], |s| s.now.clone());
            let later: Vec<Tag> = match earlier.sectors.get(n) {
                Some(old) => sector.safe.iter().filter(|tag| !old.safe.contains(tag)).copied().collect(),
                None => sector.safe.clone(),
            };
            sector.safe = was;
            later.into_iter().chain(sector.now.clone()).for_each(|tag| add(&mut sector.safe, tag));
        }
    }

    /// Notes a power cut.
    pub(super) fn power_was_cut(&mut self) {
        self.sectors.values_mut().for_each(|sector| sector.now.clone_from(&sector.safe));
    }

    /// Compares all of the disk, and takes what it holds for what it goes on to hold.
    ///
    /// # Panics
    /// When a sector holds what it must not.
    pub(super) fn compare(&mut self, image: &dyn Image, fence: &Fence, when: &str) {
        let found = stored(image, fence);
        for (n, bytes) in &found {
            assert!(
                self.sectors.contains_key(n),
                "{when}: sector {n} was never written, and holds {:02x?}...",
                &bytes[..16]
            );
        }
        let mut sectors = std::mem::take(&mut self.sectors);
        for (n, sector) in &mut sectors {
            let bytes = found.get(n).copied().unwrap_or([0; SECTOR as usize]);
            let Some(tag) = sector.now.iter().copied().find(|tag| self.sector(*tag) == bytes) else {
                panic!("{when}: sector {n} may hold {:x?}, and holds {:02x?}...", sector.now, &bytes[..16])
            };
            sector.now = vec![tag];
        }
        self.sectors = sectors;
        self.compare_extents(image, when);
    }

    fn compare_extents(&self, image: &dyn Image, when: &str) {
        let (mut at, size) = (0, image.geometry().virtual_size);
        while let Some(extent) = image.next_extent(at).expect("extents can be told") {
            assert!(
                extent.span.offset == at && extent.span.len > 0,
                "{when}: {extent:?} does not follow {at}"
            );
            at += extent.span.len;
            if extent.state == AllocState::Data {
                continue;
            }
            for (n, sector) in self.sectors.range(extent.span.offset / SECTOR..at / SECTOR) {
                assert!(sector.now == [Tag::ZERO], "{when}: sector {n} holds data, but lies in {extent:?}");
            }
        }
        assert_eq!(at, size, "{when}: the extents do not end with the disk");
    }

    /// Compares a span.
    ///
    /// # Panics
    /// When a sector holds what it must not.
    pub(super) fn compare_bytes(&self, offset: u64, bytes: &[u8], when: &str) {
        for (n, found) in (offset / SECTOR..).zip(bytes.chunks_exact(SECTOR as usize)) {
            let fine = match self.sectors.get(&n) {
                Some(sector) => sector.now.iter().any(|tag| self.sector(*tag) == found),
                None => is_zero(found),
            };
            assert!(fine, "{when}: sector {n} holds {:02x?}...", &found[..16]);
        }
    }
}

/// All sectors of the disk that are not zero. Skips holes of the files.
fn stored(image: &dyn Image, fence: &Fence) -> BTreeMap<u64, Sector> {
    let span = ByteSpan::new(0, image.geometry().virtual_size);
    let mut pieces = Pieces::new();
    image.map_read(span, &mut pieces).expect("the disk can be mapped");
    fence.watch(image, span, &pieces);
    let mut found = BTreeMap::new();
    let mut virtual_offset = 0;
    for piece in pieces.iter() {
        if let Some((file, offset)) = in_file(piece) {
            let file = &image.files()[usize::from(file.0)];
            let (mut at, end) = (offset, offset + piece.len);
            while let Some((start, stop)) =
                file.next_data(at).expect("there is no fault").filter(|(s, _)| *s < end)
            {
                // Stored in pages, which may lie off the sectors of this piece.
                let from = offset + (start.max(offset) - offset) / SECTOR * SECTOR;
                let to = (offset + (stop - offset).next_multiple_of(SECTOR)).min(end);
                let mut bytes = vec![0; (to - from) as usize];
                file.read_at(&mut bytes, from).expect("there is no fault");
                let first = (virtual_offset + from - offset) / SECTOR;
                for (n, sector) in (first..).zip(bytes.chunks_exact(SECTOR as usize)) {
                    if !is_zero(sector) {
                        found.insert(n, sector.try_into().expect("as long as a sector"));
                    }
                }
                at = to;
            }
        }
        virtual_offset += piece.len;
    }
    found
}
