//! Visits the pages of a processor's part of the working set: each is verified as the lap before left it, and written anew.

use super::layout::{FILL_FULL, Mismatch, PAGE_WORDS, Parameters, WRONG_MEMORY};
use super::pattern::{Content, Order, TURNS, page_address, slice};
use super::report::VcpuReport;

pub struct Worker<'a> {
    parameters: &'a Parameters,
    vcpu: u32,
    /// First page and number of pages.
    first: u64,
    count: u64,
    order: Order,
    /// The lap that runs, from 1, and the place in it.
    lap: u64,
    position: u64,
    visits: u64,
    /// Pages verified since the command.
    verified: u64,
}

impl<'a> Worker<'a> {
    pub fn new(parameters: &'a Parameters, vcpu: u32) -> Self {
        let (first, count) = slice(parameters.pages, parameters.vcpus, vcpu);
        let order = Order::new(parameters, vcpu, 1, count);
        Self { parameters, vcpu, first, count, order, lap: 1, position: 0, visits: 0, verified: 0 }
    }

    /// Verifies and writes the next page.
    #[inline]
    pub fn visit(&mut self, report: &mut VcpuReport) {
        if self.count == 0 {
            return;
        }
        let page = self.first + self.order.page(self.position);
        let at = page_address(self.parameters, page);
        let content = Content::new(self.parameters, self.vcpu, page);
        let before = self.lap - 1;
        if self.parameters.fill == FILL_FULL {
            if !is_full(at, &content, before) {
                self.find_wrong(at, &content, before, report);
            }
            write_full(at, &content, self.lap);
        } else {
            if !is_line(at, &content, before) {
                self.find_wrong(at, &content, before, report);
            }
            write_line(at, &content, self.lap);
        }
        self.visits += 1;
        report.visited(self.visits);
        self.position += 1;
        if self.position == self.count {
            self.position = 0;
            self.lap += 1;
            self.order = Order::new(self.parameters, self.vcpu, self.lap, self.count);
        }
    }

    /// Reports the first wrong word of a page.
    #[cold]
    fn find_wrong(&self, at: u64, content: &Content, lap: u64, report: &mut VcpuReport) {
        let written = content.after(lap);
        for index in 0..PAGE_WORDS {
            let (expected, found) = (written.word(index), word(at, index));
            if expected != found {
                let kind = WRONG_MEMORY;
                report.mismatch(Mismatch { kind, word: index as u32, address: at, expected, found, lap });
                return;
            }
        }
        // It was wrong a moment ago and is right now: that is wrong as well.
        report.mismatch(Mismatch {
            kind: WRONG_MEMORY,
            word: u32::MAX,
            address: at,
            expected: 0,
            found: 0,
            lap,
        });
    }

    pub fn begin_verifying(&mut self, report: &mut VcpuReport) {
        self.verified = 0;
        report.set_verified(0);
    }

    /// Verifies every word of the next page; false if there is none left.
    pub fn verify_next(&mut self, report: &mut VcpuReport) -> bool {
        if self.verified == self.count {
            return false;
        }
        // Pages before the place in the order are of this lap, the others of the one before.
        let page = self.first + self.order.page(self.verified);
        let lap = if self.verified < self.position { self.lap } else { self.lap - 1 };
        let at = page_address(self.parameters, page);
        let content = Content::new(self.parameters, self.vcpu, page);
        let right = if self.parameters.fill == FILL_FULL {
            is_full(at, &content, lap)
        } else {
            let written = content.after(lap);
            (0..PAGE_WORDS).all(|index| word(at, index) == written.word(index))
        };
        if !right {
            self.find_wrong(at, &content, lap, report);
        }
        self.verified += 1;
        report.set_verified(self.verified);
        true
    }
}

/// A word of a page of the working set.
#[inline]
fn word(at: u64, index: usize) -> u64 {
    // SAFETY: pages of the working set are memory that nothing refers to, and this processor alone uses its own.
    unsafe { (at as *const u64).add(index).read() }
}

#[inline]
fn put(at: u64, index: usize, value: u64) {
    // SAFETY: as in `word`.
    unsafe { (at as *mut u64).add(index).write(value) }
}

/// Whether every word is what the lap wrote.
#[inline]
fn is_full(at: u64, content: &Content, lap: u64) -> bool {
    if lap == 0 {
        return (0..PAGE_WORDS).fold(0, |wrong, index| wrong | word(at, index)) == 0;
    }
    let base = content.base(lap);
    // Without a branch in it, so that the compiler makes it wide.
    let wrong = (1..PAGE_WORDS).fold(0, |wrong, index| wrong | word(at, index) ^ Content::word(base, index));
    wrong == 0 && word(at, 0) == content.stamp(lap)
}

#[inline]
fn write_full(at: u64, content: &Content, lap: u64) {
    let base = content.base(lap);
    for index in 1..PAGE_WORDS {
        put(at, index, Content::word(base, index));
    }
    put(at, 0, content.stamp(lap));
}

/// Whether the first and the last word, the one whose turn it was, and the one whose turn comes next are right.
#[inline]
fn is_line(at: u64, content: &Content, lap: u64) -> bool {
    let (turn, next) = (Content::turn(lap), Content::turn(lap + 1));
    if lap == 0 {
        return word(at, 0) | word(at, PAGE_WORDS - 1) | word(at, turn) | word(at, next) == 0;
    }
    let base = content.base(lap);
    let oldest = match (lap + 1).checked_sub(TURNS) {
        None | Some(0) => 0,
        Some(then) => Content::word(content.base(then), next),
    };
    word(at, 0) == content.stamp(lap)
        && word(at, PAGE_WORDS - 1) == Content::word(base, PAGE_WORDS - 1)
        && word(at, turn) == Content::word(base, turn)
        && word(at, next) == oldest
}

#[inline]
fn write_line(at: u64, content: &Content, lap: u64) {
    let (base, turn) = (content.base(lap), Content::turn(lap));
    put(at, 0, content.stamp(lap));
    put(at, turn, Content::word(base, turn));
    put(at, PAGE_WORDS - 1, Content::word(base, PAGE_WORDS - 1));
}
