//! What of a move blocks: waiting for routes to settle, the journal, flushing, renaming, deleting. One thread, one
//! action after the other.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::Duration;

use blockd_api::Receipt;
use formats::{AllocState, ErrorKind, ReadAlone};
use mirror::{Action, Event, JobState, Record, RecordedPhase, Route, SwitchMode};
use roaring::RoaringBitmap;
use sha2::{Digest, Sha256};

use super::journal_file::{JournalFile, dir_of, sync_dir};
use super::layering::Layering;
use super::preparing::ParentCopy;
use super::{Move, NewImage, merging};
use crate::daemon::{clock, fence};
use crate::disk::Disk;
use crate::disk::handle::{ImageHandle, PayloadFile};

/// Bytes of a deleted source that are freed at once, and the pause after them.
const FREED_AT_ONCE: u64 = 32 << 20;
const FREEING_PAUSE: Duration = Duration::from_millis(20);

pub(super) struct Control {
    this: Arc<Move>,
    disk: Arc<Disk>,
    journal: JournalFile,
}

fn text<T>(result: io::Result<T>, what: impl FnOnce() -> String) -> Result<T, String> {
    result.map_err(|e| format!("{}: {e}", what()))
}

/// Gives a file another name that must be free. Fine if that has happened before.
pub(super) fn rename_durably(from: &Path, to: &Path) -> io::Result<()> {
    match nix::fcntl::renameat2(
        nix::fcntl::AT_FDCWD,
        from,
        nix::fcntl::AT_FDCWD,
        to,
        nix::fcntl::RenameFlags::RENAME_NOREPLACE,
    ) {
        Ok(()) => {}
        // Done by an earlier attempt.
        Err(nix::errno::Errno::ENOENT) if to.exists() => {}
        // A file system without that flag: the name was free when the move began.
        Err(nix::errno::Errno::EINVAL) if !to.exists() => std::fs::rename(from, to)?,
        Err(e) => return Err(e.into()),
    }
    sync_dir(dir_of(to))
}

/// Deletes a file, durably. Fine if it is gone.
pub(super) fn remove_durably(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Ok(()) => {}
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(e),
    }
    sync_dir(dir_of(path))
}

/// Gives the space of a file that has no name any more back, a piece at a time: a file system that frees gigabytes at once
/// can make everybody else wait for it, the guest of the moved disk first. What is left when the process ends, the kernel
/// frees. A file that still has another name belongs to whoever gave it that: it is left alone. `alone` keeps those off who
/// have opened a parent and wait for its lock: it must not be cut under them.
fn free_slowly(image: Arc<ImageHandle>, level: usize, alone: Option<ReadAlone>) {
    let thread = std::thread::Builder::new().name("free-source".into()).spawn(move || {
        let _alone = alone;
        let storage = &image.image().files()[level];
        let Some(file) = storage.file() else { return };
        let mut len = storage.len().unwrap_or(0);
        while len > 0 {
            len = len.saturating_sub(FREED_AT_ONCE);
            let is_nameless = file.metadata().is_ok_and(|m| m.nlink() == 0);
            if !is_nameless || storage.set_len(len).is_err() {
                return;
            }
            std::thread::sleep(FREEING_PAUSE);
        }
    });
    if let Err(e) = thread {
        tracing::debug!("no thread to free a source slowly: {e}");
    }
}

/// Deletes the source, durably: what is at `path`, if that is still the file that was moved. Fine if nothing is there. Of a
/// symbolic link the file goes, and then the link, which would lead nowhere.
fn remove_source(path: &Path, file: &PayloadFile) -> io::Result<()> {
    if let (Ok(there), Ok(ours)) = (std::fs::metadata(path), file.file().metadata())
        && (there.dev(), there.ino()) != (ours.dev(), ours.ino())
    {
        return Err(io::Error::other("another file has this name now, so it was not deleted"));
    }
    let fence = fence::path_of(path);
    if path.is_symlink()
        && let Ok(file) = path.canonicalize()
    {
        remove_durably(&file)?;
    }
    remove_durably(path)?;
    fence::remove_free(&fence);
    Ok(())
}

impl Control {
    pub(super) fn new(this: Arc<Move>, disk: Arc<Disk>, journal: JournalFile) -> Self {
        Self { this, disk, journal }
    }

    pub(super) fn run(&mut self, copies: &[ParentCopy], actions: &Receiver<Action>) {
        self.prepare(copies);
        while let Ok(action) = actions.recv() {
            tracing::debug!(job = self.this.plan.job, ?action, "move");
            if let Some(event) = self.carry_out(action) {
                self.this.shared.apply(event);
            }
            if self.this.outcome().over {
                return;
            }
        }
    }

    /// Copies the parents, and then begins the move; or ends it when that can't be.
    fn prepare(&mut self, copies: &[ParentCopy]) {
        let this = self.this.clone();
        if copies.is_empty() {
            return this.shared.apply(Event::Start);
        }
        (this.hooks.state_changed)(&this.job());
        let copied = this.preparation.run(copies, &this.shared);
        let mut state = this.preparation.state();
        let outcome = match copied {
            _ if state.is_cancelled => Err(None),
            Ok(()) => Ok(()),
            Err(why) => Err(Some(why)),
        };
        state.is_running = false;
        // Under the lock of the preparation: what is said meanwhile finds a machine that has begun, or ends.
        this.shared.apply(match outcome {
            Ok(()) => Event::Start,
            Err(None) => Event::Cancel,
            Err(Some(why)) => Event::PreparationFailed(why),
        });
        if state.is_paused {
            this.shared.apply(Event::Pause);
        }
    }

    fn carry_out(&mut self, action: Action) -> Option<Event> {
        let this = &self.this;
        let target = this.shared.target();
        Some(match action {
            Action::SetRoute(route) => self.settle(route),
            Action::Scan => match self.scan() {
                Ok(extents) => Event::Scanned(extents),
                Err(e) => Event::ScanFailed(e),
            },
            Action::Record(record) => {
                let done = text(self.journal.append(&record), || "the journal cannot be written".into());
                match record {
                    Record::Committed { .. } if done.is_ok() => self.note_commit(),
                    Record::Phase { phase: RecordedPhase::Synced } => self.flush_ahead(),
                    _ => {}
                }
                Event::Recorded(done)
            }
            Action::FlushTarget => {
                self.disk.shared().counters.take_longest_us();
                let flushed = target.image().commit().map_err(|e| e.to_string());
                Event::TargetFlushed(this.shared.target_flushed(flushed))
            }
            Action::FinishTarget => Event::TargetFinished(self.finish_target()),
            Action::DeleteSource => {
                let done = self.delete_sources();
                this.outcome().source_deleted = done.is_ok();
                Event::SourceDeleted(done)
            }
            Action::DiscardTarget => Event::TargetDiscarded(self.discard_target()),
            Action::StateChanged(state) => {
                self.state_changed(&state);
                return None;
            }
            // Carried out where they were dispatched, or by the copier.
            Action::Copy { .. }
            | Action::Verify { .. }
            | Action::Wake(_)
            | Action::FlushSourceOnly
            | Action::StartWrite { .. }
            | Action::CompleteWrite { .. } => return None,
        })
    }

    /// Waits until everything that was begun under an earlier route has ended.
    fn settle(&self, route: Route) -> Event {
        let shared = &self.this.shared;
        self.disk.shared().gate.wait();
        shared.deliver_marks();
        match route {
            Route::Target => {
                let longest = self.disk.shared().counters.take_longest_us();
                self.this.outcome().longest_guest_wait_us = longest;
                self.close(shared.source());
            }
            Route::Source if self.this.plan.copy_only => self.close(shared.target()),
            _ => {}
        }
        Event::RouteSettled(route)
    }

    /// Leaves an image that nothing goes to any more as a cleanly closed one.
    fn close(&self, image: &crate::disk::handle::ImageHandle) {
        if image.image().is_read_only() {
            return;
        }
        // Not beside maintenance that began while it was still in use, and never again after this.
        let mut given_up = image.without_upkeep();
        *given_up = true;
        if let Err(e) = image.image().close() {
            tracing::warn!(job = self.this.plan.job, image = %image.path().display(), "not closed cleanly: {e}");
        }
    }

    /// The extents that the source holds.
    fn scan(&self) -> Result<RoaringBitmap, String> {
        let (image, size) = (self.this.shared.source().image(), self.this.shared.extent_size);
        let levels = self.this.shared.own_levels;
        let next = |at| match (levels, image.as_chain()) {
            (Some(levels), Some(chain)) => chain.next_own_extent(levels, at),
            _ => image.next_extent(at),
        };
        let mut extents = RoaringBitmap::new();
        let mut at = 0;
        while let Some(extent) = next(at).map_err(|e| e.to_string())? {
            let end = extent.span.offset + extent.span.len;
            // The zeroes of a layer hide what its parent has there.
            let is_held = match levels {
                None => extent.state == AllocState::Data,
                Some(_) => extent.state != AllocState::Absent,
            };
            if is_held {
                extents.insert_range((at / size) as u32..end.div_ceil(size) as u32);
            }
            at = end;
        }
        Ok(extents)
    }

    /// Makes durable what was copied, where somebody else says when to switch: they may have paused their guest for that, and
    /// should wait for no more than was written since.
    fn flush_ahead(&self) {
        if self.this.plan.switch == SwitchMode::Manual {
            let flushed = self.this.shared.target().image().commit().map_err(|e| e.to_string());
            // A failure is told by the flush that the commit waits for.
            let _ = self.this.shared.target_flushed(flushed);
        }
    }

    fn note_commit(&self) {
        let machine = self.this.shared.machine();
        let commit_s = machine.progress(self.this.shared.now()).commit_s;
        drop(machine);
        self.this.outcome().commit_us = (commit_s * 1e6) as u64;
    }

    fn finish_target(&self) -> Result<(), String> {
        let (plan, target) = (&self.this.plan, self.this.shared.target());
        let mut files = plan.target_files();
        // Parents first: a child under its final name has its parent where it says.
        for (from, to) in plan.made_files() {
            match rename_durably(&from, &to) {
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                    // Somebody has taken the name since the move began. Nothing of theirs is touched; the file keeps the
                    // name that it has.
                    let (from, to) = (from.display(), to.display());
                    tracing::error!(job = plan.job, "{to} exists now: the target stays {from}");
                    self.this.outcome().target_kept_name = true;
                }
                renamed => {
                    text(renamed, || format!("{} cannot become {}", from.display(), to.display()))?;
                    continue;
                }
            }
            files.iter_mut().filter(|file| **file == to).for_each(|file| file.clone_from(&from));
        }
        target.set_paths(files.clone());
        if plan.copy_only {
            return Ok(());
        }
        let image = NewImage { files, format: plan.format, generation: plan.generation + 1 };
        let told = (self.this.hooks.image_changed)(&image);
        text(told, || format!("the record of disk {} cannot be written", plan.disk))?;
        // The source of a merge shares its parents with the target.
        self.this.outcome().let_go = !matches!(plan.layering, Layering::Merge(_));
        Ok(())
    }

    /// Deletes what the move leaves behind, the newest first, so that no child is left without its parent. A parent that
    /// somebody else uses stays, which is no failure.
    fn delete_sources(&self) -> Result<(), String> {
        let (plan, source) = (&self.this.plan, self.this.shared.source());
        for (level, path) in plan.source_files().iter().enumerate() {
            // Held from here on, so that nobody comes to read it meanwhile.
            let mut alone = None;
            if level > 0 {
                let user = (self.this.hooks.used_by)(path).or_else(|| {
                    match formats::read_alone(&source.image().files()[level]) {
                        Ok(held) => {
                            alone = Some(held);
                            None
                        }
                        Err(e) if e.kind == ErrorKind::Locked => Some("somebody else".into()),
                        // Where it cannot be locked it cannot be known.
                        Err(e) => Some(format!("perhaps somebody else ({e})")),
                    }
                });
                if let Some(user) = user {
                    let path = path.display();
                    tracing::warn!(job = plan.job, "the parent {path} is not deleted: {user} uses it");
                    self.this.outcome().sources_kept.push(path.to_string());
                    continue;
                }
            }
            let file = &source.files()[level];
            text(remove_source(path, file), || path.display().to_string())?;
            free_slowly(source.clone(), level, alone);
        }
        Ok(())
    }

    /// Removes what the move has made. The target of a merge was there before, and goes on as the parent that it was.
    fn discard_target(&self) -> Result<(), String> {
        let plan = &self.this.plan;
        if matches!(plan.layering, Layering::Merge(_)) {
            return merging::give_up(&self.disk, plan, self.this.shared.target());
        }
        for (temporary, _) in plan.made_files().iter().rev() {
            text(remove_durably(temporary), || temporary.display().to_string())?;
        }
        Ok(())
    }

    fn state_changed(&mut self, state: &JobState) {
        let job = self.this.job();
        if state.is_final() {
            let receipt = Receipt {
                started: clock::rfc3339(self.this.started),
                ended: clock::now(),
                generation: [
                    self.this.plan.generation,
                    self.this.plan.generation
                        + u64::from(*state == JobState::Done && !self.this.plan.copy_only),
                ],
                journal_sha256: self.journal.bytes().map(|b| hex(&Sha256::digest(b))).unwrap_or_default(),
                job: job.clone(),
            };
            self.this.finish(receipt);
        }
        (self.this.hooks.state_changed)(&job);
    }
}

/// Hexadecimal digits.
pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}
