//! What is done to images that nobody uses: children, merging, other sizes, less space, other parents.

use std::sync::Arc;

use formats::{AllocState, ByteSpan, Format, ImageError, LayerOptions, ZeroMode};

use super::bytes::Bytes;
use super::{Session, create};
use crate::payload::{self, Fence, Until};
use crate::storage::{Contents, Fault, MemoryFile};
use crate::{SECTOR, codec};

/// The longest chain.
const LAYERS_MAX: usize = 4;
/// A merge copies so much at once, in bytes.
const STEP: u64 = 1 << 20;

impl Session {
    /// Closes the image, whatever happened to it before. It has to be opened again.
    pub(super) fn settle(&mut self) {
        self.mend();
        if !self.close() {
            self.heal();
            self.died();
            self.image = self.open(false, true).expect("what failed can be opened again");
            self.compare("opened after a failure");
            assert!(self.close(), "cannot be closed");
        }
        self.heal();
    }

    fn reopen(&mut self, when: &str) {
        self.image = self.open(false, false).expect("what is closed can be opened");
        self.measure();
        self.compare(when);
    }

    /// Puts an empty child on the image.
    pub(super) fn snapshot(&mut self, bytes: &mut Bytes) {
        if self.format == Format::Raw || self.layers.len() == LAYERS_MAX {
            return;
        }
        self.compare("before a snapshot");
        self.settle();
        let id = self.image.content_id().expect("such an image has an id");
        let larger = match bytes.byte() {
            n @ 200.. => u64::from(n - 199) * 37,
            _ => 0,
        };
        let size = (self.sectors + larger) * self.sector;
        let child = create::child(bytes, self.format, id, size, self.sector);
        self.layers.insert(0, child);
        self.notes = (bytes.byte() & 7 != 0).then(|| MemoryFile::new(Contents::default()));
        self.reopen("a new child");
        let link = self.image.parent_link().expect("a child has a parent");
        assert!(link.ids.contains(&id), "the child names {:?}, and the parent is {id}", link.ids);
    }

    /// Writes what the image has of its own to its parent, which takes its place. A failure in between leaves the
    /// child over a parent that has some of the child's sectors.
    pub(super) fn merge(&mut self, bytes: &mut Bytes) {
        if !self.is_differencing() {
            return;
        }
        self.compare("before a merge");
        self.settle();
        let parent = self.open_as(&self.layers[1..], None, true, false).expect("a parent can be read");
        if parent.geometry().virtual_size > self.sectors * self.sector {
            // What lies beyond the child's end may be data.
            self.reopen("without a merge");
            return;
        }
        let files = self.layers[1..].to_vec();
        files[0].set_fault(fault(bytes));
        if let Err(e) = self.merge_into(&files) {
            assert!(files[0].has_failed(), "merging fails, though the file does what it is told: {e}");
            files[0].heal();
            let opened = codec::open_layer(
                self.format,
                &files[0],
                &LayerOptions { recover: true, ..LayerOptions::default() },
            );
            // Of what a dead merge wrote the parent may have anything, but it has to be sound.
            let parent = opened.expect("a parent that was written to can be opened");
            parent.close().expect("it can be closed");
            self.reopen("after a merge that failed");
            return;
        }
        files[0].heal();
        self.layers.remove(0);
        self.notes = self.is_differencing().then(|| MemoryFile::new(Contents::default()));
        self.reopen("after a merge");
    }

    fn merge_into(&self, files: &[Arc<MemoryFile>]) -> Result<(), ImageError> {
        let child = self.open_as(&self.layers, None, true, false).expect("what is closed can be read");
        let chain = child.as_chain().expect("a child is a chain");
        let size = child.geometry().virtual_size;
        if size != chain.layers()[1].geometry().virtual_size {
            codec::resize(self.format, &files[0], size, false)?;
        }
        let parent = self.open_as(files, None, false, true)?;
        let fence = Fence::of_ours(self.format, &files[0]);
        let mut at = 0;
        while let Some(extent) = chain.next_own_extent(1, at)? {
            let end = at + extent.span.len;
            match extent.state {
                AllocState::Absent => at = end,
                AllocState::Zero => {
                    let span = ByteSpan::new(at, end - at);
                    payload::zero(&*parent, span, ZeroMode::Unmap, true, &fence)?;
                    at = end;
                }
                AllocState::Data => {
                    let span = ByteSpan::new(at, (end - at).min(STEP));
                    let data = payload::read(&*child, span, &Fence::of_foreign(self.format, self.file()))?;
                    payload::write(&*parent, at, &data, Until::Told, &fence)?;
                    at += span.len;
                }
            }
        }
        parent.close()
    }

    /// Another size.
    pub(super) fn resize(&mut self, bytes: &mut Bytes) {
        let by = match bytes.byte() {
            n @ 0..128 => u64::from(n),
            n => u64::from(n - 127) * self.block / 4,
        };
        let grow = bytes.byte() & 1 == 0;
        let sectors = if grow { self.sectors + by } else { self.sectors.saturating_sub(by).max(1) };
        let new = sectors * self.sector;
        if new > 1 << 36 {
            return;
        }
        self.compare("before another size");
        let old = self.sectors * self.sector;
        self.offline(
            bytes,
            "resizing",
            &|session| codec::resize(session.format, session.file(), new, true),
            &[old, new],
        );
    }

    /// Less space, or another name of the parent.
    pub(super) fn compact_or_relink(&mut self, bytes: &mut Bytes) {
        let size = [self.sectors * self.sector];
        if self.is_differencing() && bytes.byte() & 1 == 0 {
            let id = self.image.parent_link().expect("a child has a parent").ids[0];
            let link = create::link(bytes, id);
            let relink = |session: &Self| codec::relink(session.format, session.file(), &link);
            self.offline(bytes, "relinking", &relink, &size);
            let now = self.image.parent_link().expect("a child has a parent");
            assert!(now.ids.contains(&id), "the child names {:?} instead of {id}", now.ids);
            return;
        }
        self.compare("before compacting");
        let compact = |session: &Self| {
            let before = session.file().contents();
            let done = codec::compact(session.format, session.file())?;
            let after = session.file().contents();
            assert!(after.len() <= before.len(), "compacting makes the file longer");
            assert!(after.stored() <= before.stored() + 4, "compacting takes space: {done:?}");
            Ok(())
        };
        self.offline(bytes, "compacting", &compact, &size);
    }

    /// Does something to the closed image, which may fail or crash once, and then does it again.
    fn offline(
        &mut self,
        bytes: &mut Bytes,
        what: &str,
        operation: &dyn Fn(&Self) -> Result<(), ImageError>,
        sizes: &[u64],
    ) {
        self.settle();
        self.file().set_fault(fault(bytes));
        let mut done = operation(self);
        self.tell(|| format!("{what} {sizes:?}: {done:?}"));
        if done.is_err() && self.has_failed() {
            let power = bytes.byte();
            self.fail(bytes, power & 1 == 1);
            if power & 2 == 2 {
                self.repair_what_crashed();
            }
            self.look_at_size(sizes);
            self.read_what_crashed();
            if power & 4 == 4 {
                self.image = self.open(false, true).expect("what crashed can be opened");
                self.measure();
                self.compare(what);
                self.settle();
            }
            if self.format == Format::Vhd {
                self.repair_what_crashed();
            }
            done = operation(self);
        }
        self.heal();
        match done {
            Ok(()) => self.look_at_size(&sizes[sizes.len() - 1..]),
            Err(e) => {
                let refused =
                    e.kind == formats::ErrorKind::InvalidParameter && sizes.len() == 2 && sizes[1] < sizes[0];
                let full = e.kind == formats::ErrorKind::NoSpace;
                assert!(refused || full, "{what} fails, though the file does what it is told: {e}");
            }
        }
        let report = codec::check(self.format, self.file(), false).expect("it can be checked");
        assert!(report.is_sound(), "damaged by {what}: {report:?}");
        self.reopen(what);
    }

    /// The disk has one of these sizes, in bytes; takes note of which.
    fn look_at_size(&mut self, sizes: &[u64]) {
        let image = self.open(true, true).expect("it can be read");
        let size = image.geometry().virtual_size;
        assert!(sizes.contains(&size), "{size} bytes, which is none of {sizes:?}");
        if size != self.sectors * self.sector {
            self.tell(|| {
                format!("{} sectors are {} now", self.sectors * self.sector / SECTOR, size / SECTOR)
            });
            self.model.resized(size / SECTOR);
            self.sectors = size / self.sector;
        }
    }
}

fn fault(bytes: &mut Bytes) -> Option<Fault> {
    let (what, after) = (bytes.byte(), bytes.byte());
    // Most of what is done to closed images takes a few dozen changes.
    let after = if after < 128 { after % 16 } else { after % 64 };
    let fault = Fault { after: u64::from(after), lasting: what & 2 == 2, partial: what & 4 == 4 };
    (what & 1 == 1).then_some(fault)
}
