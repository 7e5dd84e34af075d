//! Verifies the working set from the host's side, when the machine is paused.

use std::os::unix::fs::FileExt;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::layout::{self, PAGE, PAGE_WORDS};
use super::pattern::{Content, Order, page_address, slice};
use super::report::{Mismatch, MismatchKind, parameters};
use crate::memory::GuestRam;
use crate::pages::{PAGE_BYTES, PageSet};

/// Mismatches that are kept in detail.
const DETAILS_MAX: usize = 16;

/// What [`verify_from_outside`] found.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Summary {
    /// Pages of the working set, all of which were verified.
    pub pages: u64,
    /// Of these, pages that were written at least once.
    pub written: u64,
    /// Pages on which a processor was paused, which may be half of one lap and half of the next: one a processor at most.
    pub halfway: u64,
    /// Pages with a word that is wrong.
    pub mismatches: u64,
    /// The first wrong word of the first of them.
    pub first_mismatches: Vec<Mismatch>,
}

impl Summary {
    /// Whether all pages are as they should be.
    pub fn is_right(&self) -> bool {
        self.mismatches == 0
    }
}

/// Verifies every word of the working set of a paused machine against what its processors say that they have written.
///
/// # Errors
/// If there is no test guest in this memory, it cannot be read, or the guest's parameters make no sense.
pub fn verify_from_outside(ram: &GuestRam) -> Result<Summary> {
    let parameters = parameters(ram)?;
    let mut summary = Summary::default();
    for vcpu in 0..parameters.vcpus {
        Slice::new(ram, &parameters, vcpu)?.verify(&mut summary)?;
    }
    Ok(summary)
}

/// A processor's part of the working set, and how far it is.
struct Slice<'a> {
    ram: &'a GuestRam,
    parameters: &'a layout::Parameters,
    vcpu: u32,
    first: u64,
    count: u64,
    /// The lap that the processor is in, the pages that it has done of it, and the one that it is at.
    lap: u64,
    done: PageSet,
    at: Option<u64>,
}

impl<'a> Slice<'a> {
    fn new(ram: &'a GuestRam, parameters: &'a layout::Parameters, vcpu: u32) -> Result<Self> {
        use vm_memory::{Bytes, GuestAddress};
        let record: layout::VcpuRecord = ram
            .memory()
            .read_obj(GuestAddress(layout::vcpu_record_address(vcpu)))
            .context("read what a processor says")?;
        let (first, count) = slice(parameters.pages, parameters.vcpus, vcpu);
        let mut done = PageSet::empty(count);
        let (mut lap, mut at) = (0, None);
        if count > 0 && parameters.pattern != layout::PATTERN_IDLE {
            lap = record.visits / count + 1;
            let order = Order::new(parameters, vcpu, lap, count);
            (0..record.visits % count).for_each(|position| done.insert(order.page(position)));
            at = Some(order.page(record.visits % count));
        }
        Ok(Self { ram, parameters, vcpu, first, count, lap, done, at })
    }

    fn verify(&self, summary: &mut Summary) -> Result<()> {
        let mut bytes = [0; PAGE_BYTES];
        for page in 0..self.count {
            let address = page_address(self.parameters, self.first + page);
            let in_file = self
                .ram
                .page_of(address)
                .context("the test guest's parameters were overwritten: a page is no memory")?;
            // Through the file, so that pages that nobody has touched stay holes.
            self.ram
                .file()
                .read_exact_at(&mut bytes, in_file * PAGE)
                .with_context(|| format!("read the page at {address:#x}"))?;
            summary.pages += 1;
            let lap = if self.done.contains(page) { self.lap } else { self.lap.saturating_sub(1) };
            summary.written += u64::from(lap > 0);
            let halfway = self.at == Some(page);
            summary.halfway += u64::from(halfway);
            if let Some(mismatch) = self.first_wrong(&bytes, self.first + page, lap, halfway, address) {
                summary.mismatches += 1;
                if summary.first_mismatches.len() < DETAILS_MAX {
                    summary.first_mismatches.push(mismatch);
                }
            }
        }
        Ok(())
    }

    fn first_wrong(
        &self,
        bytes: &[u8; PAGE_BYTES],
        page: u64,
        lap: u64,
        halfway: bool,
        address: u64,
    ) -> Option<Mismatch> {
        let content = Content::new(self.parameters, self.vcpu, page);
        let (written, next) = (content.after(lap), content.after(lap + 1));
        (0..PAGE_WORDS).find_map(|index| {
            let (expected, found) = (written.word(index), word(bytes, index));
            let right = found == expected || halfway && found == next.word(index);
            (!right).then(|| Mismatch {
                kind: MismatchKind::Memory,
                address: address + index as u64 * 8,
                word: index as u32,
                expected,
                found,
                lap,
            })
        })
    }
}

fn word(bytes: &[u8; PAGE_BYTES], index: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[index * 8..index * 8 + 8]);
    u64::from_le_bytes(word)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parameters(pattern: u32, fill: u32, seed: u64) -> layout::Parameters {
        layout::Parameters { pattern, fill, seed, ..Default::default() }
    }

    proptest! {
        #[test]
        fn each_page_has_its_turn_once_a_lap(
            count in 1u64..3000, lap in 1u64..1 << 40, vcpu in 0u32..64, pattern in 0u32..2, seed: u64,
        ) {
            let order = Order::new(&parameters(pattern, 0, seed), vcpu, lap, count);
            let mut seen = PageSet::empty(count);
            (0..count).for_each(|position| seen.insert(order.page(position)));
            prop_assert_eq!(seen.len(), count);
        }

        #[test]
        fn parts_of_processors_follow_each_other_without_a_gap(pages in 0u64..1 << 28, vcpus in 1u32..=64) {
            let mut next = 0;
            for vcpu in 0..vcpus {
                let (first, count) = slice(pages, vcpus, vcpu);
                prop_assert_eq!(first, next);
                next += count;
            }
            prop_assert_eq!(next, pages);
        }

        #[test]
        fn a_page_is_what_its_laps_made_of_it(laps in 0u64..1200, fill in 0u32..2, page in 0u64..1 << 28, seed: u64) {
            let parameters = parameters(0, fill, seed);
            let content = Content::new(&parameters, 3, page);
            let mut words = [0; PAGE_WORDS];
            for lap in 1..=laps {
                let base = content.base(lap);
                if fill == layout::FILL_FULL {
                    (1..PAGE_WORDS).for_each(|index| words[index] = Content::word(base, index));
                }
                for index in [Content::turn(lap), PAGE_WORDS - 1] {
                    words[index] = Content::word(base, index);
                }
                words[0] = content.stamp(lap);
            }
            let written = content.after(laps);
            for (index, word) in words.into_iter().enumerate() {
                prop_assert_eq!(written.word(index), word, "word {}", index);
            }
        }
    }

    #[test]
    fn laps_differ_in_their_order_and_pages_in_their_content() {
        let parameters = parameters(layout::PATTERN_RANDOM, 0, 7);
        let lap =
            |lap: u64| (0..100).map(|i| Order::new(&parameters, 0, lap, 100).page(i)).collect::<Vec<_>>();
        assert_ne!(lap(1), lap(2));
        assert_ne!(lap(1), (0..100).collect::<Vec<_>>());
        let base = |vcpu, page, lap| Content::new(&parameters, vcpu, page).base(lap);
        assert!(
            base(0, 5, 1) != base(0, 6, 1)
                && base(0, 5, 1) != base(0, 5, 2)
                && base(0, 5, 1) != base(1, 5, 1)
        );
    }
}
