//! Which pages of a guest's memory have memory of the host behind them.

use std::ops::Range;
use std::os::fd::AsRawFd;

use crate::memory::GuestRam;
use crate::pages::PAGE_BYTES;

/// Finds out which pages have memory behind them. The others are zero, and reading them would take memory from the host for
/// nothing. Of a memory in huge pages all count as present, as they are ([`GuestRam::new`]).
#[derive(Debug, Default)]
pub(super) struct Presence {
    /// Bytes that were found to have memory behind them. Kept, as the kernel looks at each page on the way to the next hole. That
    /// some may have been given back since does no harm: they are read, and are zero.
    known: Range<u64>,
}

impl Presence {
    /// The pages from `first` on, a bit for each, in so many words. A page that is written for the first time meanwhile may be
    /// missing: it has to be noticed as written.
    pub fn pages(&mut self, ram: &GuestRam, first: u64, words: usize) -> Vec<u64> {
        let mut present = vec![0u64; words];
        let end = (first + words as u64 * 64).min(ram.pages()) * PAGE_BYTES as u64;
        let mut at = first * PAGE_BYTES as u64;
        while at < end {
            if !self.known.contains(&at) {
                // Asked anew each time: a hole that was seen before may be one no longer.
                let Some(data) = seek(ram, at, libc::SEEK_DATA) else { return vec![u64::MAX; words] };
                if data >= end {
                    break;
                }
                let Some(hole) = seek(ram, data, libc::SEEK_HOLE) else { return vec![u64::MAX; words] };
                self.known = data..hole.max(data + PAGE_BYTES as u64);
                at = data;
            }
            let stop = self.known.end.min(end);
            for page in at / PAGE_BYTES as u64..stop.div_ceil(PAGE_BYTES as u64) {
                let index = page - first;
                present[(index / 64) as usize] |= 1 << (index % 64);
            }
            at = stop;
        }
        present
    }
}

/// Where data or a hole begins at or after a place; the end if there is none. `None`: the file system does not say.
fn seek(ram: &GuestRam, at: u64, whence: libc::c_int) -> Option<u64> {
    if at >= ram.bytes() {
        return Some(ram.bytes());
    }
    // SAFETY: plain system call on a descriptor of ours. It moves the file's position, which nobody uses.
    let found = unsafe { libc::lseek(ram.file().as_raw_fd(), at as libc::off_t, whence) };
    if found >= 0 {
        return Some(found as u64);
    }
    let error = std::io::Error::last_os_error();
    (error.raw_os_error() == Some(libc::ENXIO)).then(|| ram.bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_without_memory_behind_them_are_not_read() {
        let ram = GuestRam::new(8 << 20, false).expect("ram");
        let written = [0, 63, 64, 1030, 2047];
        for page in written {
            ram.write_pages(page, &[1; PAGE_BYTES]);
        }
        let mut presence = Presence::default();
        let mut found = Vec::new();
        for first in (0..2048).step_by(128) {
            for (i, word) in presence.pages(&ram, first, 2).into_iter().enumerate() {
                found.extend(
                    (0..64).filter(|bit| word >> bit & 1 == 1).map(|bit| first + i as u64 * 64 + bit),
                );
            }
        }
        assert!(written.iter().all(|page| found.contains(page)), "{found:?}");
        assert!(found.len() < 100, "holes are not seen: {}", found.len());
    }

    #[test]
    fn a_page_written_since_is_found() {
        let ram = GuestRam::new(4 << 20, false).expect("ram");
        let mut presence = Presence::default();
        assert_eq!(presence.pages(&ram, 0, 16), [0; 16]);
        ram.write_pages(700, &[1; PAGE_BYTES]);
        assert_eq!(presence.pages(&ram, 0, 16)[10] >> 60 & 1, 1);
    }

    #[test]
    fn what_was_found_once_is_the_same_as_what_is_found_anew() {
        let ram = GuestRam::new(8 << 20, false).expect("ram");
        for page in (3..200).chain(300..301).chain(512..1100).chain(2000..2048) {
            ram.write_pages(page, &[1; PAGE_BYTES]);
        }
        let mut remembers = Presence::default();
        for words in [1, 3, 16] {
            for first in (0..2048).step_by(64 * words) {
                let anew = Presence::default().pages(&ram, first, words);
                assert_eq!(remembers.pages(&ram, first, words), anew, "{words} words at page {first}");
            }
        }
    }
}
