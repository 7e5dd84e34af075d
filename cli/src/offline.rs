//! `move` of an image that nobody serves: copy, verify, rename, and only then delete.

use std::fs::{File, Metadata};
use std::os::unix::fs::{MetadataExt as _, chown};
use std::path::{Path, PathBuf};
use std::time::Instant;

use blockd_api::Job;
use formats::{CreateOptions, Format, Image, ImageType, OpenOptions};
use indicatif::ProgressBar;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};

use crate::failure::Failure;
use crate::interrupt::{Cancel, guarded};
use crate::moving::Options;
use crate::paths::{Target, folder_of, same_file, target_of};
use crate::render::Screen;
use crate::transfer::{self, Side, Unfinished, sync_folder};
use crate::watch;

/// What is to be done, decided before anything is touched.
#[derive(Debug)]
struct Task {
    source: PathBuf,
    from_format: Option<Format>,
    to: PathBuf,
    format: Option<Format>,
    image_type: Option<ImageType>,
    block_size: Option<u32>,
    bandwidth: Option<u64>,
    verify: String,
    keep_source: bool,
}

/// Moves one image and shows it.
pub(crate) async fn run(source: PathBuf, options: &Options, screen: Screen) -> Result<(), Failure> {
    let task = Task {
        source,
        from_format: options.from_format.as_deref().and_then(format_named),
        to: options.to.clone(),
        format: options.format.as_deref().and_then(format_named),
        image_type: options.image_type.as_deref().map(|name| match name {
            "fixed" => ImageType::Fixed,
            _ => ImageType::Dynamic,
        }),
        block_size: options.block_size,
        bandwidth: options.bandwidth,
        verify: options.verify.clone(),
        keep_source: options.keep_source || options.copy_only,
    };
    let job = guarded(move |cancel| task.run(&cancel, screen)).await?;
    watch::show_end(&job, screen).map(|_| ())
}

/// A format by its name, which the parser of the arguments has checked.
pub(crate) fn format_named(name: &str) -> Option<Format> {
    match name {
        "raw" => Some(Format::Raw),
        "vhd" => Some(Format::Vhd),
        "vhdx" => Some(Format::Vhdx),
        _ => None,
    }
}

/// How a target is made for a disk like `source`; its type is the source's unless another is asked for.
pub(crate) fn create_options(
    source: &dyn Image,
    target: &Target,
    image_type: Option<ImageType>,
    block_size: Option<u32>,
) -> Result<CreateOptions, Failure> {
    let geometry = source.geometry();
    let image_type = match (target.format, image_type, source.format()) {
        (Format::Raw, asked, _) => crate::image::type_for(Format::Raw, asked)?,
        (_, Some(asked), _) => asked,
        // A raw image is "fixed" for want of a choice, and its holes are worth keeping.
        (_, None, Format::Raw) => ImageType::Dynamic,
        (_, None, _) => source.image_type(),
    };
    let keeps_blocks = target.format == source.format() && image_type != ImageType::Fixed;
    let own_block_size = Some(geometry.block_size).filter(|size| keeps_blocks && *size != 0);
    Ok(CreateOptions {
        format: target.format,
        image_type,
        virtual_size: geometry.virtual_size,
        block_size: block_size.or(own_block_size),
        logical_sector_size: match target.format {
            Format::Vhdx => geometry.logical_sector_size,
            Format::Vhd | Format::Raw => 512,
        },
        parent: None,
    })
}

impl Task {
    fn run(&self, cancel: &Cancel, screen: Screen) -> Result<Job, Failure> {
        if let Some(job) = formats::incomplete_move(&self.source) {
            let message = format!(
                "{}: this is the unfinished target of move {job}, not a disk; `blockctl job show {job}` tells more, or delete it",
                self.source.display()
            );
            return Err(Failure::new("state", message));
        }
        let held = Held::take(&self.source, !self.keep_source)?;
        // The lock is ours already where the source is to be deleted; else this takes a shared one.
        let options = OpenOptions {
            format: self.from_format,
            read_only: true,
            lock: self.keep_source,
            ..OpenOptions::default()
        };
        let source = formats::open(&self.source, &options)?;
        let target = target_of(&self.source, source.format(), &self.to, self.format)?;
        if same_file(&self.source, &target.path) {
            let message = format!("{}: is already there", self.source.display());
            return Err(Failure::new("exists", message));
        }
        let create = create_options(&*source, &target, self.image_type, self.block_size)?;
        let mut job = self.job(&*source, &target);
        let unfinished = Unfinished::create(&target.path, &job.job, &create)?;
        let bar = screen.bar(job.bytes_total);

        self.enter("copying", &job, &bar, screen)?;
        let started = Instant::now();
        let copied = transfer::copy_to(self.side(&*source), &unfinished, cancel, &bar, self.bandwidth)?;
        job.bytes_copied = copied.bytes_copied;
        job.bytes_skipped_zero = copied.bytes_zero;
        job.phases.copying_s = started.elapsed().as_secs_f64();

        let started = Instant::now();
        job.bytes_verified = self.verify(&*source, &unfinished, &job, cancel, &bar, screen)?;
        job.phases.verify_s = started.elapsed().as_secs_f64();
        bar.finish_and_clear();

        let started = Instant::now();
        held.refuse_changes()?;
        held.give_attributes_to(unfinished.temporary())?;
        unfinished.sync()?;
        if cancel.is_set() {
            return Err(transfer::cancelled());
        }
        unfinished.finish()?;
        if !self.keep_source {
            held.delete(&target.path)?;
            job.source_deleted = true;
        }
        job.phases.commit_s = started.elapsed().as_secs_f64();
        job.state = "done".into();
        Ok(job)
    }

    fn side<'a>(&'a self, image: &'a dyn Image) -> Side<'a> {
        Side { image, path: &self.source }
    }

    fn job(&self, source: &dyn Image, target: &Target) -> Job {
        Job {
            job: transfer::new_job(),
            state: "copying".into(),
            source: vec![self.source.display().to_string()],
            target: vec![target.path.display().to_string()],
            bytes_total: source.geometry().virtual_size,
            passes: 1,
            verified: self.verify.clone(),
            ..Job::default()
        }
    }

    fn enter(&self, phase: &str, job: &Job, bar: &ProgressBar, screen: Screen) -> Result<(), Failure> {
        bar.set_prefix(phase.to_owned());
        bar.set_position(0);
        screen.note(&format!("{} ({}): {phase}", self.source.display(), job.job))
    }

    /// Compares as asked. Returns how many bytes were compared.
    fn verify(
        &self,
        source: &dyn Image,
        target: &Unfinished,
        job: &Job,
        cancel: &Cancel,
        bar: &ProgressBar,
        screen: Screen,
    ) -> Result<u64, Failure> {
        if self.verify == "none" {
            return Ok(0);
        }
        self.enter("verifying", job, bar, screen)?;
        let image = target.open(true)?;
        let (compared, difference) = if self.verify == "full" {
            let copy = Side { image: &*image, path: target.temporary() };
            let comparison = transfer::compare(self.side(source), copy, cancel, bar, self.bandwidth)?;
            (source.geometry().virtual_size, comparison.first_difference)
        } else {
            transfer::compare_samples(source, &*image, cancel)?
        };
        match difference {
            None => Ok(compared),
            Some(at) => Err(Failure::new(
                "different",
                format!(
                    "{}: the copy differs at byte {at}; it is removed, and the source is as it was: check the target's disk",
                    self.source.display()
                ),
            )),
        }
    }
}

/// The source's file, held so that it is certain what is deleted in the end.
#[derive(Debug)]
struct Held {
    path: PathBuf,
    file: File,
    before: Metadata,
}

impl Held {
    /// With `exclusively`, nobody else may have it open with a lock, not even for reading.
    fn take(path: &Path, exclusively: bool) -> Result<Self, Failure> {
        let failed = |e: std::io::Error| Failure::io(path.display(), &e);
        if exclusively && path.is_symlink() {
            let real = std::fs::canonicalize(path).map_err(failed)?;
            let message = format!("{}: is a symbolic link; move {} itself", path.display(), real.display());
            return Err(Failure::usage(message));
        }
        let file = File::options().read(true).write(exclusively).open(path).map_err(failed)?;
        if exclusively {
            lock(&file, path)?;
        }
        let before = file.metadata().map_err(failed)?;
        Ok(Self { path: path.to_owned(), file, before })
    }

    /// A writer that knows nothing of locks can still be told by what it has changed.
    fn refuse_changes(&self) -> Result<(), Failure> {
        let now = self.file.metadata().map_err(|e| Failure::io(self.path.display(), &e))?;
        let stamp = |m: &Metadata| (m.len(), m.mtime(), m.mtime_nsec());
        if stamp(&now) == stamp(&self.before) {
            return Ok(());
        }
        let message = format!(
            "{}: was changed by somebody while it was copied; nothing is deleted and the copy is removed: end whoever uses it and try again",
            self.path.display()
        );
        Err(Failure::new("busy", message))
    }

    /// The target may be read by those who could read the source, and by nobody else.
    fn give_attributes_to(&self, target: &Path) -> Result<(), Failure> {
        // Only the superuser can give files away; for all others the file is theirs as the source was.
        let _ = chown(target, Some(self.before.uid()), Some(self.before.gid()));
        std::fs::set_permissions(target, self.before.permissions())
            .map_err(|e| Failure::io(target.display(), &e))
    }

    /// Deletes the source, if its name still leads to it.
    fn delete(&self, target: &Path) -> Result<(), Failure> {
        let there = std::fs::symlink_metadata(&self.path).ok();
        let ours = |m: &Metadata| (m.dev(), m.ino()) == (self.before.dev(), self.before.ino());
        let deleted = match there {
            Some(found) if ours(&found) => std::fs::remove_file(&self.path),
            _ => Err(std::io::Error::other("its name leads to another file by now")),
        };
        deleted.map_err(|e| {
            let message = format!(
                "{} is complete, but the source {} can't be deleted: {e}; delete it by hand",
                target.display(),
                self.path.display()
            );
            Failure::new("io", message)
        })?;
        sync_folder(folder_of(&self.path))
    }
}

/// Takes the lock that whoever serves or changes an image holds: on the whole file, until it is closed.
fn lock(file: &File, path: &Path) -> Result<(), Failure> {
    let whole = nix::libc::flock {
        l_type: nix::libc::F_WRLCK as nix::libc::c_short,
        l_whence: nix::libc::SEEK_SET as nix::libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    match fcntl(file, FcntlArg::F_OFD_SETLK(&whole)) {
        Ok(_) => Ok(()),
        Err(Errno::EAGAIN | Errno::EACCES) => Err(Failure::new(
            "locked",
            format!(
                "{}: another program has it open; end that, or move the disk through its daemon",
                path.display()
            ),
        )),
        Err(e) => Err(Failure::io(path.display(), &e.into())),
    }
}
