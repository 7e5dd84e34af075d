//! What `check` looks at, and mends.
//!
//! Every rule that a file can break has a code; those of what makes a file unusable are the [`Corruption`]s, which opening
//! refuses too. Names of fields and rules are those of the Virtual Hard Disk specification 1.0. *Damage* makes the image
//! unsound, a *warning* costs space or safety, a *note* is harmless. † is mended by a repair.
//!
//! | code | what is wrong |
//! |---|---|
//! | **footer** ("Hard Disk Footer Format") | |
//! | `vhd-footer-missing` † | damage: no footer at the end of the file (mended from the copy of a dynamic disk) |
//! | `vhd-footer-checksum` | damage: there is one, but its checksum is wrong, and there is no copy |
//! | `vhd-footer-version`, `vhd-disk-type` | damage: not version 1.x; not fixed, dynamic or differencing |
//! | `vhd-size-zero`, `-unaligned`, `-too-large` | damage: the current size is 0, no multiple of 512, above 2040 GiB |
//! | `vhd-fixed-too-short` | damage: the content of a fixed disk does not fit in the file |
//! | `vhd-copy-bad` †, `vhd-copy-differs` † | warning: the copy at 0 is no footer, or another one |
//! | `vhd-footer-short`, `vhd-footer-unaligned` | note: it has 511 bytes; it is off the sector grid |
//! | `vhd-saved-state` | note: a virtual machine was suspended with the disk, which is then read only |
//! | `vhd-features` | note: bit 1 (reserved, always set) is not set, or a bit beyond 1 is |
//! | `vhd-geometry` | note: the geometry is not the one that the size gives |
//! | `vhd-data-offset` | note: a fixed disk's data offset, or a header's, is not all ones |
//! | `vhd-reserved` | note: reserved bytes of the footer or the header are not zero |
//! | **dynamic header** ("Dynamic Disk Header Format") | |
//! | `vhd-header-unaligned`, `-outside` | damage: off the sector grid; not in the file |
//! | `vhd-header-cookie`, `-checksum`, `-version` | damage |
//! | `vhd-block-size` | damage: no power of two from 512 bytes to 256 MiB |
//! | `vhd-table-too-large`, `-too-small` | damage: more than 4 Mi entries; fewer than the disk has blocks |
//! | `vhd-table-unaligned`, `-outside` | damage: off the sector grid; not in the file |
//! | `vhd-table-entries` | note: there are more entries than blocks |
//! | `vhd-structures-overlap` | damage: two of copy, header, table and locators share space |
//! | **parent** ("Parent Locator Entry"), of a differencing disk | |
//! | `vhd-locator-outside`, `-too-long`, `-odd`, `-text` | damage: not in the file; above 8 KiB; UTF-16 of odd length; no UTF-16 |
//! | `vhd-locator-unknown` | note: a platform code that is not read here |
//! | `vhd-locator-fields` | note: less space than data, reserved bytes, or an unused one with fields |
//! | `vhd-parent-self` | warning: the parent's id is the disk's own |
//! | `vhd-parent-unknown` | warning: the parent's id is zero, or there is neither name nor path |
//! | `vhd-parent-unused` | note: a dynamic disk names a parent |
//! | **block table and blocks** ("Block Allocation Table and Data Blocks") | |
//! | `vhd-block-outside`, `-over-structure`, `vhd-blocks-overlap` | damage: a block not in the file, over a structure, over another |
//! | `vhd-surplus-blocks` † | warning: entries beyond the disk's last block are in use |
//! | `vhd-table-padding` | note: the rest of the table's last sector is not all ones |
//! | `vhd-unused-end` † | warning: space behind the last block (a session that was killed leaves some) |
//! | `vhd-unused-space` | warning: space between blocks, or of a fixed disk before the footer († of a fixed disk) |
//! | `vhd-bitmap-partial` | note: bitmaps of a dynamic disk do not mark sectors that are read here anyway |
//! | `vhd-bitmap-beyond` | note: bitmaps mark sectors beyond the end of the disk |
//! | `vhd-block-empty` | note: blocks of a differencing disk have no sector of their own |
//! | `vhd-batmap` | warning: blktap's map calls blocks whole that are not; note: its checksum is wrong |

use crate::{CheckReport, Finding, ImageError, Severity, Storage};

use super::batmap::Batmap;
use super::check_blocks::look_at_blocks;
use super::check_header::look_at_header;
use super::corruption::Fault;
use super::footer::{DiskType, FOOTER_LEN, Footer, chs};
use super::grow::sync;
use super::layout::{self, CopyState, Found};
use super::offline::{Closed, clear_entries};
use super::{Corruption, SECTOR, put_footer_back};

/// Reads everything that the image says of itself and reports what breaks the specification or wastes space. With `repair`,
/// and when nothing is wrong that cannot be mended without guessing, what can is: the module's table says what. Content is
/// never touched. Without it, [`Finding::repair`] says what a repair would do.
///
/// # Errors
/// Only when the file cannot be read or, repairing, written: what is wrong with the image is in the report.
pub fn check(storage: &dyn Storage, repair: bool) -> Result<CheckReport, ImageError> {
    let mut exam = Exam { storage, findings: Vec::new(), mends: Vec::new() };
    match exam.examine() {
        Ok(()) => {}
        Err(Fault::Corrupt(c)) => exam.damage(&c),
        Err(Fault::Image(e)) => return Err(e),
    }
    exam.settle(repair)
}

/// What a repair can do, in the order in which it does it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Mend {
    /// Writes the lost footer from its copy.
    PutFooterBack,
    /// Writes the copy from the footer.
    RenewCopy,
    /// Takes the surplus entries out of the table.
    ClearSurplus,
    /// Moves the footer behind what is used, and cuts the file.
    Cut,
}

/// A check under way.
pub(super) struct Exam<'a> {
    pub(super) storage: &'a dyn Storage,
    findings: Vec<Finding>,
    /// Which finding is mended how.
    mends: Vec<(Mend, usize)>,
}

impl Exam<'_> {
    pub(super) fn damage(&mut self, c: &Corruption) {
        let (structure, offset) = c.place();
        self.find(c.code(), Severity::Damage, structure, offset, c.to_string());
    }

    pub(super) fn note(&mut self, code: &str, structure: &str, offset: u64, message: impl Into<String>) {
        self.find(code, Severity::Note, structure, Some(offset), message.into());
    }

    pub(super) fn warn(&mut self, code: &str, structure: &str, offset: u64, message: impl Into<String>) {
        self.find(code, Severity::Warning, structure, Some(offset), message.into());
    }

    fn find(
        &mut self,
        code: &str,
        severity: Severity,
        structure: &str,
        offset: Option<u64>,
        message: String,
    ) {
        let (code, structure) = (code.to_owned(), structure.to_owned());
        let (repairable, repair, repaired) = (false, None, false);
        self.findings.push(Finding {
            code,
            severity,
            structure,
            offset,
            message,
            repairable,
            repair,
            repaired,
        });
    }

    /// Says of the last finding how it can be mended.
    pub(super) fn mendable(&mut self, mend: Mend, how: impl Into<String>) {
        let last = self.findings.len() - 1;
        self.findings[last].repairable = true;
        self.findings[last].repair = Some(how.into());
        self.mends.push((mend, last));
    }

    fn examine(&mut self) -> Result<(), Fault> {
        let found = match layout::find_footer(self.storage) {
            Ok(found) => found,
            Err(Fault::Corrupt(c)) => return self.without_type(&c),
            Err(e) => return Err(e),
        };
        self.look_at_footer(&found.footer, found.at, found.disk_type);
        self.compare_footers(&found);
        let size = match found.virtual_size() {
            Ok(size) => Some(size),
            Err(c) => {
                self.damage(&c);
                None
            }
        };
        if found.disk_type == DiskType::Fixed {
            if let Some(size) = size {
                self.look_at_fixed(&found, size);
            }
            return Ok(());
        }
        if let Some(known) = look_at_header(self, &found, size)? {
            look_at_blocks(self, &found, &known)?;
        }
        Ok(())
    }

    /// A disk of which it is not known what it is: its footer can be looked at, if there is one, but no more.
    fn without_type(&mut self, why: &Corruption) -> Result<(), Fault> {
        self.damage(why);
        let file_len =
            self.storage.len().map_err(|e| ImageError::io("cannot find out the size of the file", e))?;
        let Some((footer, at)) = layout::end_footer(self.storage, file_len)? else { return Ok(()) };
        // The size of no particular kind of disk.
        let found =
            Found { footer, disk_type: DiskType::Dynamic, at: Some(at), copy: CopyState::Same, file_len };
        if let Err(c) = found.virtual_size() {
            self.damage(&c);
        }
        Ok(())
    }

    fn look_at_footer(&mut self, footer: &Footer, at: Option<u64>, disk_type: DiskType) {
        let offset = at.unwrap_or(0);
        let raw = footer.bytes();
        if footer.saved_state() {
            let message = "a virtual machine was suspended with this disk: it can be opened for reading only";
            self.note("vhd-saved-state", "footer", offset, message);
        }
        if footer.features() & !1 != 2 {
            let message = format!(
                "features {:#010x}: bit 1 is reserved and always set, and those above it are 0",
                footer.features()
            );
            self.note("vhd-features", "footer", offset, message);
        }
        let geometry = footer.geometry();
        if geometry != chs(footer.current_size()) {
            let say = |[high, low, heads, sectors]: [u8; 4]| {
                format!("{}/{heads}/{sectors}", u16::from_be_bytes([high, low]))
            };
            let message = format!(
                "the geometry is {} (cylinders, heads, sectors), and the current size gives {}; it is a hint only",
                say(geometry),
                say(chs(footer.current_size()))
            );
            self.note("vhd-geometry", "footer", offset, message);
        }
        if disk_type == DiskType::Fixed && !is_ones(footer.data_offset()) {
            let message =
                format!("data offset {:#x} of a fixed disk should be all ones", footer.data_offset());
            self.note("vhd-data-offset", "footer", offset, message);
        }
        if raw[85..].iter().any(|&b| b != 0) {
            self.note("vhd-reserved", "footer", offset, "reserved bytes from 85 on are not zero");
        }
        match at {
            Some(at) if !at.is_multiple_of(SECTOR) => {
                let message = format!("the footer at {at} is off the grid of 512 bytes");
                self.note("vhd-footer-unaligned", "footer", at, message);
            }
            _ => {}
        }
    }

    /// Reports footers that are missing or do not match.
    fn compare_footers(&mut self, found: &Found) {
        if found.at.is_some_and(|at| found.file_len - at < FOOTER_LEN) {
            let message = "the footer has 511 bytes, as Virtual PC wrote it before 2004";
            self.note("vhd-footer-short", "footer", found.limit(), message);
        }
        match (found.at, found.copy) {
            (None, _) => {
                let message = "the file does not end in a footer, and only the copy at 0 is valid, as after a power \
                               cut while it grew";
                self.find("vhd-footer-missing", Severity::Damage, "footer", None, message.into());
                self.mendable(
                    Mend::PutFooterBack,
                    "writes the footer at the end of the file from its copy at 0",
                );
            }
            (_, CopyState::Bad) => {
                self.warn("vhd-copy-bad", "footer", 0, "the copy of the footer at 0 is damaged");
                self.mendable(Mend::RenewCopy, "writes the copy at 0 from the footer at the end of the file");
            }
            (_, CopyState::Different) => {
                let message =
                    "the copy of the footer at 0 is valid, but differs from the footer, which counts";
                self.warn("vhd-copy-differs", "footer", 0, message);
                self.mendable(Mend::RenewCopy, "writes the copy at 0 from the footer at the end of the file");
            }
            (_, CopyState::None | CopyState::Same) => {}
        }
    }

    fn look_at_fixed(&mut self, found: &Found, size: u64) {
        let spare = found.limit() - size;
        if spare > 0 {
            let message = format!("{spare} bytes between the content and the footer belong to nobody");
            self.warn("vhd-unused-space", "file", size, message);
            self.mendable(Mend::Cut, "moves the footer right behind the content and cuts the file there");
        }
    }

    /// Mends what can be mended if that is wanted, and sorts the findings.
    fn settle(mut self, repair: bool) -> Result<CheckReport, ImageError> {
        self.mends.sort_unstable();
        let hopeless = self.findings.iter().any(|f| f.severity == Severity::Damage && !f.repairable);
        let suspended = self.findings.iter().any(|f| f.code == "vhd-saved-state");
        for (mend, index) in std::mem::take(&mut self.mends) {
            // Of an image that is damaged otherwise, or that belongs to a suspended machine, only a spare is renewed.
            if hopeless || (suspended && mend > Mend::RenewCopy) {
                self.findings[index].repairable = false;
                self.findings[index].repair = None;
            } else if repair {
                carry_out(self.storage, mend)?;
                self.findings[index].repaired = true;
            }
        }
        self.findings.sort_by_key(|f| std::cmp::Reverse(f.severity));
        Ok(CheckReport { findings: self.findings })
    }
}

/// Does one thing that a repair can do. Each reads and validates the image anew, and leaves it sound at every moment.
fn carry_out(storage: &dyn Storage, mend: Mend) -> Result<(), ImageError> {
    match mend {
        Mend::PutFooterBack => {
            if let (found, _, Some(body)) = layout::read_all(storage)? {
                let map_end = Batmap::find(storage, &body.header, found.limit())?.map_or(0, |map| map.end());
                let used_end = layout::first_free(storage, &body, found.limit())?.max(map_end);
                put_footer_back(storage, &found, used_end)?;
            }
        }
        Mend::RenewCopy => {
            let (found, _, _) = layout::read_all(storage)?;
            storage
                .write_at(found.footer.bytes(), 0)
                .map_err(|e| ImageError::io("renewing the footer's copy at 0", e))?;
            sync(storage)?;
        }
        Mend::ClearSurplus => {
            if let (disk, Some(blocks)) = Closed::open(storage)? {
                clear_entries(&disk, &blocks, blocks.body.shape.blocks)?;
                disk.sync()?;
            }
        }
        Mend::Cut => {
            let (mut disk, blocks) = Closed::open(storage)?;
            let end = match &blocks {
                Some(blocks) => disk.used_end(blocks)?,
                None => disk.size,
            };
            disk.cut(end)?;
        }
    }
    Ok(())
}

/// Whether an offset says "none": the specification has 32 bits of ones, and everybody writes 64.
pub(super) fn is_ones(offset: u64) -> bool {
    offset == u64::MAX || offset == u64::from(u32::MAX)
}
