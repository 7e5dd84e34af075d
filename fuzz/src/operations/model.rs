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

/// Some contents; mostly there is one, which takes no memory of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Tags {
    first: Tag,
    more: Vec<Tag>,
}

impl Tags {
    fn one(first: Tag) -> Self {
        Self { first, more: Vec::new() }
    }

    fn iter(&self) -> impl Iterator<Item = Tag> {
        std::iter::once(self.first).chain(self.more.iter().copied())
    }

    fn has(&self, tag: Tag) -> bool {
        self.iter().any(|t| t == tag)
    }

    fn add(&mut self, tag: Tag) {
        if !self.has(tag) {
            self.more.push(tag);
        }
    }

    fn is(&self, tag: Tag) -> bool {
        self.first == tag && self.more.is_empty()
    }
}

#[derive(Debug, Clone)]
struct Possible {
    /// What it may hold right now.
    now: Tags,
    /// What it may hold after a power cut.
    safe: Tags,
    /// What it may have held before changes that failed since it was last changed well or flushed.
    undone: Vec<Tag>,
}

impl Possible {
    fn zero() -> Self {
        Self { now: Tags::one(Tag::ZERO), safe: Tags::one(Tag::ZERO), undone: Vec::new() }
    }

    fn is_zero(&self) -> bool {
        self.now.is(Tag::ZERO) && self.safe.is(Tag::ZERO)
    }

    fn change(&mut self, tag: Tag, outcome: Outcome) {
        self.safe.add(tag);
        match outcome {
            Outcome::Done => {
                self.now = Tags::one(tag);
                self.undone.clear();
            }
            Outcome::Unknown => {
                self.undone.extend(self.now.iter());
                self.now.add(tag);
            }
        }
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

    fn put(&self, tag: Tag, sector: &mut [u8]) {
        match self.special_of(tag) {
            Some(special) => sector.copy_from_slice(special),
            None => sector.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&tag.0.to_le_bytes())),
        }
    }

    fn special_of(&self, tag: Tag) -> Option<&Sector> {
        (tag.0 & SPECIAL != 0).then(|| &self.special[(tag.0 & !SPECIAL) as usize])
    }

    /// Whether these bytes of a sector are what the tag stands for.
    fn matches(&self, tag: Tag, sector: &[u8]) -> bool {
        match self.special_of(tag) {
            Some(special) => sector == special,
            None => sector.chunks_exact(8).all(|word| word == tag.0.to_le_bytes()),
        }
    }

    /// The bytes that these tags stand for.
    pub(super) fn bytes(&self, tags: &[Tag]) -> Vec<u8> {
        let mut bytes = vec![0; tags.len() * SECTOR as usize];
        bytes.chunks_exact_mut(SECTOR as usize).zip(tags).for_each(|(sector, tag)| self.put(*tag, sector));
        bytes
    }

    /// Notes a write of these tags from `offset` on.
    pub(super) fn wrote(&mut self, offset: u64, tags: &[Tag], outcome: Outcome) {
        for (n, tag) in (offset / SECTOR..).zip(tags) {
            self.sectors.entry(n).or_insert_with(Possible::zero).change(*tag, outcome);
        }
    }

    /// Notes that a span was zeroed.
    pub(super) fn zeroed(&mut self, at: ByteSpan, outcome: Outcome) {
        let range = at.offset / SECTOR..(at.offset + at.len) / SECTOR;
        self.sectors.range_mut(range).for_each(|(_, sector)| sector.change(Tag::ZERO, outcome));
    }

    /// Notes that all of it was made durable.
    pub(super) fn flushed(&mut self) {
        for sector in self.sectors.values_mut() {
            sector.safe.clone_from(&sector.now);
            sector.undone.clear();
        }
        self.sectors.retain(|_, sector| !sector.is_zero());
    }

    /// Notes that what `earlier` held was made durable, and maybe what came later.
    pub(super) fn flushed_since(&mut self, earlier: &Self) {
        let zero = Possible::zero();
        for (n, sector) in &mut self.sectors {
            let old = earlier.sectors.get(n).unwrap_or(&zero);
            let later: Vec<Tag> = sector.safe.iter().filter(|tag| !old.safe.has(*tag)).collect();
            sector.safe.clone_from(&old.now);
            later.into_iter().chain(sector.now.iter()).for_each(|tag| sector.safe.add(tag));
        }
    }

    /// Notes a power cut.
    pub(super) fn power_was_cut(&mut self) {
        for sector in self.sectors.values_mut() {
            sector.now.clone_from(&sector.safe);
            sector.undone.clear();
        }
    }

    /// Notes the death of a daemon whose notes may have failed: what failed may be undone by it, though it was read since. A
    /// guest that was told of a failure knows nothing of the sector.
    pub(super) fn failures_may_be_undone(&mut self) {
        for sector in self.sectors.values_mut() {
            std::mem::take(&mut sector.undone).into_iter().for_each(|tag| sector.now.add(tag));
        }
    }

    /// Notes that the disk has this many sectors of 512 bytes now. What is new reads as zeroes.
    ///
    /// # Panics
    /// When content was cut off.
    pub(super) fn resized(&mut self, sectors: u64) {
        for (n, sector) in self.sectors.split_off(&sectors) {
            assert!(sector.now.is(Tag::ZERO), "sector {n} was cut off with {:x?}", sector.now);
        }
    }

    /// Compares all of the disk, and takes what it holds for what it goes on to hold.
    ///
    /// # Panics
    /// When a sector holds what it must not.
    pub(super) fn compare(&mut self, image: &dyn Image, fence: &Fence, when: &str) {
        let mut sectors = std::mem::take(&mut self.sectors);
        let mut expected = sectors.iter_mut().peekable();
        let zeroes = [0; SECTOR as usize];
        each_stored(image, fence, &mut |n, bytes| {
            while let Some((n, sector)) = expected.next_if(|(next, _)| **next < n) {
                self.pin(*n, sector, &zeroes, when);
            }
            match expected.next_if(|(next, _)| **next == n) {
                Some((_, sector)) => self.pin(n, sector, bytes, when),
                None => panic!("{when}: sector {n} was never written, and holds {:02x?}...", &bytes[..16]),
            }
        });
        expected.for_each(|(n, sector)| self.pin(*n, sector, &zeroes, when));
        self.sectors = sectors;
        self.compare_extents(image, when);
    }

    /// Of what a sector may hold it holds this, and goes on to hold it.
    fn pin(&self, n: u64, sector: &mut Possible, bytes: &[u8], when: &str) {
        let found = sector.now.iter().find(|tag| self.matches(*tag, bytes));
        match found {
            Some(tag) => sector.now = Tags::one(tag),
            None => {
                panic!("{when}: sector {n} may hold {:x?}, and holds {:02x?}...", sector.now, &bytes[..16])
            }
        }
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
                assert!(sector.now.is(Tag::ZERO), "{when}: sector {n} holds data, but lies in {extent:?}");
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
                Some(sector) => sector.now.iter().any(|tag| self.matches(tag, found)),
                None => is_zero(found),
            };
            assert!(fine, "{when}: sector {n} holds {:02x?}...", &found[..16]);
        }
    }
}

/// Calls `each` with all sectors of the disk that are not zero, in order. Skips holes of the files.
fn each_stored(image: &dyn Image, fence: &Fence, each: &mut dyn FnMut(u64, &[u8])) {
    const STEP: u64 = 64 << 10;
    let span = ByteSpan::new(0, image.geometry().virtual_size);
    let mut pieces = Pieces::new();
    image.map_read(span, &mut pieces).expect("the disk can be mapped");
    fence.watch(image, span, &pieces);
    let mut buffer = vec![0; STEP as usize];
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
                let to = (offset + (stop - offset).next_multiple_of(SECTOR)).min(end).min(from + STEP);
                let bytes = &mut buffer[..(to - from) as usize];
                file.read_at(bytes, from).expect("there is no fault");
                let first = (virtual_offset + from - offset) / SECTOR;
                for (n, sector) in (first..).zip(bytes.chunks_exact(SECTOR as usize)) {
                    if !is_zero(sector) {
                        each(n, sector);
                    }
                }
                at = to;
            }
        }
        virtual_offset += piece.len;
    }
}
