//! Copying a disk from one image file to another, offline: under a name that can't be mistaken until all is there.

use std::fs::File;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use formats::{
    AllocState, Comparison, CopyError, CopyOutcome, CopyProgress, CreateError, CreateOptions, ErrorKind,
    Format, Image, Layer, NewParentLink, OpenOptions,
};
use indicatif::ProgressBar;
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, PosixFadviseAdvice, RenameFlags, posix_fadvise, renameat2};

use crate::failure::Failure;
use crate::interrupt::Cancel;
use crate::paths::folder_of;
use crate::render;

/// A name for a piece of work, as the daemon gives them.
pub(crate) fn new_job() -> String {
    let id = uuid::Uuid::new_v4().simple().to_string();
    format!("m{}", &id[..8])
}

/// A target under its temporary name `NAME.incomplete-JOB`. Unless it is finished, it goes when it is dropped.
#[derive(Debug)]
pub(crate) struct Unfinished {
    path: PathBuf,
    /// What it is called for now.
    temporary: PathBuf,
    format: Format,
    finished: bool,
}

impl Unfinished {
    /// Creates an empty image that is to become `path`.
    ///
    /// # Errors
    /// When `path` exists, whatever it is, and whatever creating an image fails with.
    pub(crate) fn create(path: &Path, job: &str, options: &CreateOptions) -> Result<Self, Failure> {
        let unfinished = Self::named(path, job, options.format)?;
        // Whoever reads of a failure knows the target by its final name.
        let made = formats::create(&unfinished.temporary, options);
        made.map_err(|e| unfinished.not_made(e))?;
        Ok(unfinished.made())
    }

    /// Creates an empty image of a chain, with this link to its parent if it is to have one, and opens it by itself.
    ///
    /// # Errors
    /// As [`Self::create`].
    pub(crate) fn create_layer(
        path: &Path,
        job: &str,
        options: &CreateOptions,
        link: Option<NewParentLink>,
    ) -> Result<(Self, Arc<dyn Layer>), Failure> {
        let unfinished = Self::named(path, job, options.format)?;
        // Nobody knows of it yet, so there is nothing that the death of the process could lose.
        let layer = formats::make_layer(&unfinished.temporary, options, link, None);
        let layer = layer.map_err(|e| unfinished.not_made(e))?;
        Ok((unfinished.made(), layer))
    }

    /// Before there is a file; nothing is removed when it is dropped.
    fn named(path: &Path, job: &str, format: Format) -> Result<Self, Failure> {
        check_free(path)?;
        let Some(name) = path.file_name() else {
            return Err(Failure::usage(format!("{}: this names no file", path.display())));
        };
        let mut name = name.to_owned();
        name.push(format!(".incomplete-{job}"));
        let temporary = path.with_file_name(name);
        Ok(Self { path: path.to_owned(), temporary, format, finished: true })
    }

    fn made(mut self) -> Self {
        self.finished = false;
        self
    }

    fn not_made(&self, e: CreateError) -> CreateError {
        CreateError { path: self.path.clone(), ..e }
    }

    /// Where it is for now.
    pub(crate) fn temporary(&self) -> &Path {
        &self.temporary
    }

    /// Opens it under its temporary name, whose ending says nothing of the format.
    pub(crate) fn open(&self, read_only: bool) -> Result<Arc<dyn Image>, Failure> {
        let options = OpenOptions { format: Some(self.format), read_only, ..OpenOptions::default() };
        Ok(formats::open(&self.temporary, &options)?)
    }

    /// Makes its content durable and forgets what the system has cached of it, so that who reads it next reads what
    /// the disk below has kept.
    pub(crate) fn sync(&self) -> Result<(), Failure> {
        let failed = |e: std::io::Error| Failure::io(self.temporary.display(), &e);
        let file = File::open(&self.temporary).map_err(failed)?;
        file.sync_all().map_err(failed)?;
        // Only a hint: not every file system takes it.
        let _ = posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
        Ok(())
    }

    /// Gives it its final name, durably. Nothing that has come to exist there meanwhile is overwritten.
    pub(crate) fn finish(mut self) -> Result<(), Failure> {
        self.rename()?;
        self.keep();
        Ok(())
    }

    /// Gives it its final name, durably, under which it still goes unless it is kept. As [`Self::finish`] otherwise.
    pub(crate) fn rename(&mut self) -> Result<(), Failure> {
        rename_without_overwriting(&self.temporary, &self.path)?;
        self.temporary.clone_from(&self.path);
        sync_folder(folder_of(&self.path))
    }

    /// It is there to stay.
    pub(crate) fn keep(mut self) {
        self.finished = true;
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if !self.finished {
            // There is nobody left to tell; its name says what it is.
            let _ = std::fs::remove_file(&self.temporary);
        }
    }
}

/// Refuses a name that is taken, be it by a link that leads nowhere.
pub(crate) fn check_free(path: &Path) -> Result<(), Failure> {
    if path.symlink_metadata().is_ok() { Err(exists(path)) } else { Ok(()) }
}

fn exists(path: &Path) -> Failure {
    let message = format!(
        "{}: exists already, and is not overwritten; remove it or choose another name",
        path.display()
    );
    Failure::new("exists", message)
}

fn rename_without_overwriting(from: &Path, to: &Path) -> Result<(), Failure> {
    match renameat2(AT_FDCWD, from, AT_FDCWD, to, RenameFlags::RENAME_NOREPLACE) {
        Ok(()) => Ok(()),
        Err(Errno::EEXIST) => Err(exists(to)),
        // A file system without this kind of rename: a link fails as surely where the name is taken.
        Err(Errno::EINVAL | Errno::ENOSYS) => match std::fs::hard_link(from, to) {
            Ok(()) => std::fs::remove_file(from).map_err(|e| Failure::io(from.display(), &e)),
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => Err(exists(to)),
            Err(e) => Err(Failure::io(to.display(), &e)),
        },
        Err(e) => Err(Failure::io(to.display(), &e.into())),
    }
}

/// Makes the names in a folder durable.
pub(crate) fn sync_folder(folder: &Path) -> Result<(), Failure> {
    File::open(folder).and_then(|f| f.sync_all()).map_err(|e| Failure::io(folder.display(), &e))
}

/// Keeps a bar, a limit and ^C in step with work that reports its progress.
struct Pace<'a> {
    cancel: &'a Cancel,
    bar: &'a ProgressBar,
    bandwidth: Option<u64>,
    started: Instant,
    /// Where the bar was when this began.
    before: u64,
}

impl<'a> Pace<'a> {
    fn new(cancel: &'a Cancel, bar: &'a ProgressBar, bandwidth: Option<u64>) -> Self {
        Self { cancel, bar, bandwidth, started: Instant::now(), before: bar.position() }
    }

    /// Draws, and waits while that was too fast.
    fn report(&self, progress: CopyProgress) -> ControlFlow<()> {
        let moved = progress.bytes_copied;
        self.bar.set_position(self.before + progress.bytes_done);
        let elapsed = self.started.elapsed().as_secs_f64().max(0.001);
        let rate = render::rate((moved as f64 / elapsed) as u64);
        let left =
            elapsed * (progress.bytes_total - progress.bytes_done) as f64 / progress.bytes_done.max(1) as f64;
        let left = render::duration(Duration::try_from_secs_f64(left).unwrap_or_default());
        self.bar.set_message(format!("{rate}, {left} left"));
        let due = self.bandwidth.map_or(0.0, |limit| moved as f64 / limit as f64);
        let due = self.started + Duration::try_from_secs_f64(due).unwrap_or(Duration::MAX / 4);
        while !self.cancel.is_set() {
            let left = due.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return ControlFlow::Continue(());
            }
            std::thread::sleep(left.min(Duration::from_millis(50)));
        }
        ControlFlow::Break(())
    }
}

/// Names the image that failed. ^C explains any end of the work better than the work itself does.
fn explain(e: CopyError, source: &Path, target: &Path, cancel: &Cancel) -> Failure {
    let (path, e) = match e {
        _ if cancel.is_set() => return cancelled(),
        CopyError::Cancelled => return cancelled(),
        CopyError::Source(e) => (source, e),
        CopyError::Target(e) => (target, e),
    };
    let hint = match e.kind {
        ErrorKind::NoSpace => "; make room or choose another place: what was unfinished is removed",
        _ => "",
    };
    let failure = Failure::from(e);
    Failure { message: format!("{}: {failure}{hint}", path.display()), ..failure }
}

/// What ^C leads to.
pub(crate) fn cancelled() -> Failure {
    Failure::cancelled("cancelled; what was unfinished is removed, and what was there before is as it was")
}

/// Copies what `source` holds into the fresh target and makes it durable. `bandwidth` is in bytes a second.
///
/// # Errors
/// Whatever either image fails with; `cancelled` when `cancel` was set.
pub(crate) fn copy_to(
    source: Side<'_>,
    target: &Unfinished,
    cancel: &Cancel,
    bar: &ProgressBar,
    bandwidth: Option<u64>,
) -> Result<CopyOutcome, Failure> {
    let image = target.open(false)?;
    let pace = Pace::new(cancel, bar, bandwidth);
    let outcome = formats::copy(source.image, &*image, &mut |progress| pace.report(progress))
        .map_err(|e| explain(e, source.path, &target.path, cancel))?;
    image.close()?;
    drop(image);
    target.sync()?;
    Ok(outcome)
}

/// Copies what the layer `source` has of its own into the fresh target `image`, which is on parents that read as the
/// source's do, closes that and makes it durable.
///
/// # Errors
/// As [`copy_to`].
pub(crate) fn copy_layer_to(
    source: Side<'_>,
    image: &dyn Image,
    target: &Unfinished,
    cancel: &Cancel,
    bar: &ProgressBar,
    bandwidth: Option<u64>,
) -> Result<CopyOutcome, Failure> {
    let pace = Pace::new(cancel, bar, bandwidth);
    let outcome = formats::copy_layer(source.image, image, &mut |progress| pace.report(progress))
        .map_err(|e| explain(e, source.path, &target.path, cancel))?;
    image.close()?;
    target.sync()?;
    Ok(outcome)
}

/// The first byte in which two disks differ; where one is shorter, the rest of the other is compared with zeroes.
pub(crate) fn compare(
    a: Side<'_>,
    b: Side<'_>,
    cancel: &Cancel,
    bar: &ProgressBar,
    bandwidth: Option<u64>,
) -> Result<Comparison, Failure> {
    let pace = Pace::new(cancel, bar, bandwidth);
    formats::compare(a.image, b.image, &mut |progress| pace.report(progress))
        .map_err(|e| explain(e, a.path, b.path, cancel))
}

/// Compares what the newest layers of two images of one size have of their own, wherever either has something, as both
/// read there. Where all below is the same, this makes sure of the rest. Returns the bytes compared and where the first
/// piece that differs begins.
pub(crate) fn compare_own(
    a: Side<'_>,
    b: Side<'_>,
    cancel: &Cancel,
    bar: &ProgressBar,
    bandwidth: Option<u64>,
) -> Result<(u64, Option<u64>), Failure> {
    let (size, pace) = (a.image.geometry().virtual_size, Pace::new(cancel, bar, bandwidth));
    let newest = |side: Side<'_>| side.image.as_chain().map(|chain| chain.layers()[0].clone());
    let (own_a, own_b) = (newest(a), newest(b));
    let (own_a, own_b) = (own_a.as_deref().unwrap_or(a.image), own_b.as_deref().unwrap_or(b.image));
    let in_a = |e| explain(CopyError::Source(e), a.path, b.path, cancel);
    let in_b = |e| explain(CopyError::Target(e), a.path, b.path, cancel);
    let (mut left, mut right) = (vec![0; COMPARED_AT_ONCE], vec![0; COMPARED_AT_ONCE]);
    let (mut at, mut compared) = (0, 0);
    while at < size {
        let extents = (own_a.next_extent(at).map_err(in_a)?, own_b.next_extent(at).map_err(in_b)?);
        let (Some(held_a), Some(held_b)) = extents else { return Ok((compared, Some(at))) };
        let mut len = held_a.span.len.min(held_b.span.len).min(size - at);
        if (held_a.state, held_b.state) != (AllocState::Absent, AllocState::Absent) {
            len = len.min(COMPARED_AT_ONCE as u64);
            let part = len as usize;
            formats::read_payload(a.image, at, &mut left[..part]).map_err(in_a)?;
            formats::read_payload(b.image, at, &mut right[..part]).map_err(in_b)?;
            if left[..part] != right[..part] {
                return Ok((compared, Some(at)));
            }
            compared += len;
        }
        at += len;
        let now = CopyProgress {
            bytes_total: size,
            bytes_done: at,
            bytes_copied: compared,
            bytes_zero: at - compared,
        };
        if pace.report(now).is_break() {
            return Err(cancelled());
        }
    }
    Ok((compared, None))
}

/// An open image and the name by which people know it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Side<'a> {
    /// The image.
    pub(crate) image: &'a dyn Image,
    /// Its file.
    pub(crate) path: &'a Path,
}

/// What is read of each side at a time when layers are compared, in bytes.
const COMPARED_AT_ONCE: usize = 1 << 20;

/// Compares at most so many places of two disks.
const SAMPLES: u64 = 4096;
/// So many bytes at each.
const SAMPLE_BYTES: u64 = 64 << 10;

/// Compares places spread over the whole of two disks of one size. Returns the bytes compared and where the first
/// place that differs begins.
pub(crate) fn compare_samples(
    a: &dyn Image,
    b: &dyn Image,
    cancel: &Cancel,
) -> Result<(u64, Option<u64>), Failure> {
    let size = a.geometry().virtual_size;
    assert_eq!(size, b.geometry().virtual_size, "samples are for disks of one size");
    let stride = (size / SAMPLES).next_multiple_of(SAMPLE_BYTES).max(SAMPLE_BYTES);
    let (mut left, mut right) = (vec![0; SAMPLE_BYTES as usize], vec![0; SAMPLE_BYTES as usize]);
    let mut compared = 0;
    let last = size.saturating_sub(1) / SAMPLE_BYTES * SAMPLE_BYTES;
    for offset in (0..size).step_by(stride as usize).chain(std::iter::once(last)) {
        if cancel.is_set() {
            return Err(cancelled());
        }
        let len = SAMPLE_BYTES.min(size - offset) as usize;
        formats::read_payload(a, offset, &mut left[..len])?;
        formats::read_payload(b, offset, &mut right[..len])?;
        if left[..len] != right[..len] {
            return Ok((compared, Some(offset)));
        }
        compared += len as u64;
    }
    Ok((compared, None))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A chain of two images in `dir`: the newest hides what the base has at its beginning.
    fn chain(dir: &Path, base_has: u8) -> [Arc<dyn Image>; 2] {
        let (base, child) = (dir.join("base.vhdx"), dir.join("child.vhdx"));
        formats::create(&base, &CreateOptions::new(Format::Vhdx, 8 << 20)).expect("made");
        let image = formats::open(&base, &OpenOptions::default()).expect("opens");
        formats::write_payload(&*image, 4096, &[base_has; 512]).expect("written");
        image.close().expect("closed");
        drop(image);
        formats::create(&child, &CreateOptions::on_parent(Format::Vhdx, &base)).expect("made");
        let parents = vec![dir.to_owned()];
        let options = OpenOptions { parents: parents.clone(), ..OpenOptions::default() };
        let image = formats::open(&child, &options).expect("opens");
        formats::write_payload(&*image, 0, &[7; 64 << 10]).expect("written");
        image.close().expect("closed");
        drop(image);
        let options = OpenOptions { parents, ..OpenOptions::read_only() };
        [base, child].map(|path| formats::open(path, &options).expect("opens"))
    }

    #[test]
    fn what_a_child_hides_is_seen_to_differ_in_the_parents_alone() {
        let dirs = [(); 3].map(|()| tempfile::tempdir().expect("a folder"));
        let [one, same, other] = [0, 1, 2].map(|n| chain(dirs[n].path(), if n == 2 { 2 } else { 1 }));
        let (cancel, bar) = (Cancel::default(), ProgressBar::hidden());
        let compare = |a: &Arc<dyn Image>, b: &Arc<dyn Image>| {
            let [a, b] = [a, b].map(|image| Side { image: &**image, path: Path::new("x") });
            compare_own(a, b, &cancel, &bar, None).expect("compared")
        };
        for level in [0, 1] {
            let (compared, difference) = compare(&one[level], &same[level]);
            assert!((512..8 << 20).contains(&compared), "{compared}");
            assert_eq!(difference, None);
        }
        assert!(compare(&one[0], &other[0]).1.is_some_and(|at| at <= 4096));
        assert_eq!(compare(&one[1], &other[1]).1, None, "as a disk they are the same");
        assert_eq!(compare(&one[0], &one[1]).1, Some(0));
    }
}
