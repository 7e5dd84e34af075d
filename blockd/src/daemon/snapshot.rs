//! Changes of a disk's image while it is served: another size, and a new image on top of it.
//!
//! A snapshot, and what a crash after each step leaves:
//!
//! ```text
//!                                                  the record names    a restart finds
//!   1. the new image is made, durable              the old image       the old image; the new one is a file that nobody
//!                                                                      uses, and is replaced by the next attempt
//!   2. the record is replaced: the new image,      the new one,        the old image with writes that ended on it: opened
//!      its parents, and what has to settle         settling the old    for writing, made whole and closed; then the new
//!   3. the route is swapped, in-flight writes end  the same            one on top, empty or not: it has what was written to
//!   4. the old image is made durable and closed    the same            it, and all else is in the old one
//!   5. the record is replaced: nothing settles     the new one         the new image on the old one, which is closed
//! ```
//!
//! Between 2 and 3 guests still write to the old image although the record names the new one: these writes are seen through
//! the new one, which holds nothing there. From 3 on new writes go to the new image; a write that was under way on the old
//! one and overlaps such a write was in flight together with it, so that either may be the last. The old image keeps the
//! content id that the new one knows it by all the time: it was settled before 1, and the opening after a crash is told it.
//! Flushes between 3 and 4 reach both images ([`crate::disk::route::Route::Settling`]).

use std::path::{Path, PathBuf};

use blockd_api::{DiskInfo, ResizeRequest, Resized, SnapshotRequest};
use formats::{Format, OpenOptions};

use super::error::{DaemonError, Kind};
use super::state::{DiskRecord, Settling};
use super::{Daemon, names};
use crate::disk::DiskError;

impl Daemon {
    /// Lets a disk go on in a new differencing image; the one so far becomes its parent. The guest notices nothing.
    ///
    /// # Errors
    /// As [`Kind`] has them; the disk is as before then, unless the message says otherwise.
    pub fn snapshot(&self, id: &str, request: &SnapshotRequest) -> Result<DiskInfo, DaemonError> {
        let path = PathBuf::from(&request.to);
        names::check_absolute("the new image", &path)?;
        let act = self.act(id, "being given a new image")?;
        let (served, disk) = (&act.served, &act.served.disk);
        check_name(&path, disk.format())?;
        let old = disk.image();
        let new = disk.make_child(&path)?;
        // Settled when the child was made.
        let content_id = old.image().content_id().unwrap_or_default();
        let before = served.record();
        // The name without links, as those who look for parents want it.
        let parent = old.path().canonicalize().unwrap_or_else(|_| old.path());
        let fenced = self.state.hold_new_image(id, &path, before.generation + 1);
        let named = fenced.map_err(std::io::Error::other).and_then(|fenced| {
            served.change_record(&self.state, |record| {
                let known = std::mem::take(&mut record.parents);
                record.settling = Some(Settling { image: parent.clone(), content_id });
                record.parents = std::iter::once(parent).chain(known).collect();
                (record.image, record.format) = (path.clone(), Some(disk.format()));
                record.generation += 1;
                record.fenced = fenced;
            })
        });
        if let Err(e) = named {
            // The record may name the new image all the same, though perhaps not durably: then the file has to stay.
            let message = format!("disk {id} goes on as before: its record can't be replaced");
            let e = DaemonError::io(message, &e);
            if self.state.put(&before).is_ok() {
                drop(new);
                let _ = std::fs::remove_file(&path);
            }
            return Err(e);
        }
        self.state.free_old_image(&before, before.generation + 1);
        disk.continue_in(&new).map_err(|e| {
            let message = format!("disk {id} goes on in {}, but: {e}", path.display());
            DaemonError::new(e.kind.into(), message)
        })?;
        self.events.push("disk-snapshot", Some(id), None, format!("the disk goes on in {}", path.display()));
        tracing::info!(disk = id, image = %path.display(), parent = %old.path().display(), "the disk has a new image");
        if let Err(e) = served.change_record(&self.state, |record| record.settling = None) {
            // It settles once more at the next start, where there is nothing left to do.
            tracing::warn!(disk = id, "the record still says that the parent has to settle: {e}");
        }
        Ok(served.info())
    }

    /// Gives a disk another size while it is served. The guest is told if its front end listens, else it sees the new size
    /// when it next connects.
    ///
    /// # Errors
    /// As [`Kind`] has them; the disk has its old size then.
    pub fn resize(&self, id: &str, request: &ResizeRequest) -> Result<Resized, DaemonError> {
        let act = self.act(id, "being resized")?;
        let disk = &act.served.disk;
        let (old, new) = (disk.geometry(), request.size_bytes);
        let sector = u64::from(old.logical_sector_size);
        if new == 0 || !new.is_multiple_of(sector) {
            return Err(DaemonError::invalid(format!(
                "a disk of {new} bytes: the size must be a multiple of its sectors of {sector} bytes, and not 0"
            )));
        }
        if new < old.virtual_size && !request.shrink {
            return Err(DaemonError::invalid(format!(
                "disk {id} has {} bytes, and would be cut to {new}: what is beyond is lost to the guest; ask for shrinking \
                 if that is meant",
                old.virtual_size
            )));
        }
        let told = new != old.virtual_size && disk.resize(new, request.shrink)?;
        if new != old.virtual_size {
            let message = format!("the disk has {new} bytes now, and had {} before", old.virtual_size);
            self.events.push("disk-resized", Some(id), None, message);
        }
        Ok(Resized { disk: act.served.info(), guest_told: told })
    }

    /// Closes what a snapshot of an earlier run has left open. The record that comes back has nothing to settle.
    pub(super) fn settle_snapshot(&self, record: &DiskRecord) -> Result<DiskRecord, DaemonError> {
        let Some(Settling { image: path, content_id }) = &record.settling else { return Ok(record.clone()) };
        let failed = |e: DiskError| {
            let message = format!(
                "{}, on which the last snapshot of disk {} has put {}, was not closed and can't be now: {e}",
                path.display(),
                record.spec.id,
                record.image.display()
            );
            DaemonError::new(e.kind.into(), message)
        };
        let options = OpenOptions {
            format: record.format,
            recover: true,
            parents: record.serve().parents.into_iter().filter(|parent| parent != path).collect(),
            notes_dir: Some(self.state.notes_dir()),
            next_content_id: Some(*content_id),
            ..OpenOptions::default()
        };
        let image =
            formats::open(path, &options).map_err(|e| failed(DiskError::new(e.kind, e.to_string())))?;
        image
            .commit()
            .and_then(|()| image.close())
            .map_err(|e| failed(DiskError::new(e.kind, e.to_string())))?;
        formats::remove_notes(&*image, &self.state.notes_dir());
        drop(image);
        tracing::info!(disk = record.spec.id, parent = %path.display(), "closed after a snapshot was interrupted");
        let mut settled = record.clone();
        settled.settling = None;
        self.state.put(&settled).map_err(|e| {
            DaemonError::io(format!("the record of disk {} can't be replaced", record.spec.id), &e)
        })?;
        Ok(settled)
    }
}

/// The name of a new image must not say another format than it will have.
fn check_name(path: &Path, format: Format) -> Result<(), DaemonError> {
    if format == Format::Raw {
        return Err(DaemonError::new(
            Kind::Unsupported,
            "a raw image can't be the parent of a differencing one; move the disk to a VHDX first (blockctl move ... \
             --format vhdx)",
        ));
    }
    match names::format_of_name(path) {
        Some(said) if said != format => Err(DaemonError::invalid(format!(
            "{} says {said}, and the new image has to be a {format} as its parent is; choose another name",
            path.display()
        ))),
        _ => Ok(()),
    }
}
