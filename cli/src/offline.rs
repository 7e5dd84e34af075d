//! `move` of an image that nobody serves: copy, verify, rename, and only then delete.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use blockd_api::Job;
use formats::{CreateOptions, Format, Image, ImageType};
use indicatif::ProgressBar;

use crate::failure::Failure;
use crate::held::{Deletes, Source};
use crate::interrupt::{Cancel, guarded};
use crate::moving::Options;
use crate::paths::{Target, same_file, target_of};
use crate::places::{self, SourceFile};
use crate::render::Screen;
use crate::transfer::{self, Side, Unfinished};
use crate::{offline_chain, watch};

/// A move of one image, or of one with its parents, and what it needs of its surroundings.
#[derive(Debug)]
pub(crate) struct Task<'a> {
    pub(crate) path: &'a Path,
    pub(crate) options: &'a Options,
    pub(crate) cancel: &'a Cancel,
    pub(crate) screen: Screen,
}

/// Moves one image and shows it.
pub(crate) async fn run(source: PathBuf, options: &Options, screen: Screen) -> Result<(), Failure> {
    let options = options.clone();
    let work = move |cancel: Cancel| Task { path: &source, options: &options, cancel: &cancel, screen }.run();
    let job = guarded(work).await?;
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
        // A chain that becomes one image goes on growing as it did.
        (_, None, _) if source.image_type() == ImageType::Differencing => ImageType::Dynamic,
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

/// What is said when the copy of `source` is none.
pub(crate) fn different(source: &Path, at: u64) -> Failure {
    let message = format!(
        "{}: the copy differs at byte {at}; it is removed, and the source is as it was: check the target's disk",
        source.display()
    );
    Failure::new("different", message)
}

/// What an image of a chain is, as far as its place needs it.
pub(crate) fn source_files(source: &Source) -> Vec<SourceFile> {
    let files = source.held.iter().zip(source.layers());
    files
        .map(|(held, layer)| SourceFile {
            path: held.path.clone(),
            image_type: layer.image_type(),
            block_size: layer.geometry().block_size,
        })
        .collect()
}

impl Task<'_> {
    fn run(&self) -> Result<Job, Failure> {
        if let Some(job) = formats::incomplete_move(self.path) {
            let message = format!(
                "{}: this is the unfinished target of move {job}, not a disk; `blockctl job show {job}` tells more, or delete it",
                self.path.display()
            );
            return Err(Failure::new("state", message));
        }
        let deletes = match () {
            () if self.keeps_source() => Deletes::Nothing,
            () if self.options.flatten => Deletes::Newest,
            () => Deletes::All,
        };
        let format = self.options.from_format.as_deref().and_then(format_named);
        if deletes != Deletes::Nothing && !self.path.is_symlink() {
            crate::image::settle(self.path, format)?;
        }
        let source = Source::open(self.path, format, &self.options.parents, deletes)?;
        let files = source_files(&source);
        if files.len() > 1 && !self.options.flatten {
            return offline_chain::run(self, &source, &files);
        }
        places::check_files(&files, self.options)?;
        self.move_whole(&source)
    }

    /// Makes one image of what there is.
    fn move_whole(&self, source: &Source) -> Result<Job, Failure> {
        let (image, options) = (&*source.image, self.options);
        let format = options.format.as_deref().and_then(format_named);
        let target = target_of(self.path, image.format(), &options.to, format)?;
        if same_file(self.path, &target.path) {
            let message = format!("{}: is already there", self.path.display());
            return Err(Failure::new("exists", message));
        }
        let image_type = options.image_type.as_deref().map(places::type_named);
        let create = create_options(image, &target, image_type, options.block_size)?;
        let bytes_total = image.geometry().virtual_size;
        let mut job = self.job(&[self.path], &[&target.path], bytes_total);
        let unfinished = Unfinished::create(&target.path, &job.job, &create)?;
        let bar = self.screen.bar(job.bytes_total);

        self.enter("copying", &job, &bar)?;
        let started = Instant::now();
        let side = Side { image, path: self.path };
        let copied = transfer::copy_to(side, &unfinished, self.cancel, &bar, options.bandwidth)?;
        job.bytes_copied = copied.bytes_copied;
        job.bytes_skipped_zero = copied.bytes_zero;
        job.phases.copying_s = started.elapsed().as_secs_f64();

        let started = Instant::now();
        let open = || unfinished.open(true);
        job.bytes_verified = self.verify(image, &open, unfinished.temporary(), &job, &bar)?;
        job.phases.verify_s = started.elapsed().as_secs_f64();
        bar.finish_and_clear();

        let started = Instant::now();
        for held in &source.held {
            held.refuse_changes()?;
        }
        source.held[0].give_attributes_to(unfinished.temporary())?;
        unfinished.sync()?;
        if self.cancel.is_set() {
            return Err(transfer::cancelled());
        }
        unfinished.finish()?;
        if !self.keeps_source() {
            source.held[0].delete(&target.path)?;
            job.source_deleted = true;
        }
        job.phases.commit_s = started.elapsed().as_secs_f64();
        job.state = "done".into();
        Ok(job)
    }

    /// Whether all of the source stays.
    pub(crate) fn keeps_source(&self) -> bool {
        self.options.keep_source || self.options.copy_only
    }

    pub(crate) fn job(&self, source: &[&Path], target: &[&Path], bytes_total: u64) -> Job {
        let texts = |paths: &[&Path]| paths.iter().map(|path| path.display().to_string()).collect();
        Job {
            job: transfer::new_job(),
            state: "copying".into(),
            source: texts(source),
            target: texts(target),
            bytes_total,
            passes: 1,
            verified: self.options.verify.clone(),
            ..Job::default()
        }
    }

    pub(crate) fn enter(&self, phase: &str, job: &Job, bar: &ProgressBar) -> Result<(), Failure> {
        bar.set_prefix(phase.to_owned());
        bar.set_position(0);
        self.screen.note(&format!("{} ({}): {phase}", self.path.display(), job.job))
    }

    /// Compares the disk with its copy as asked. Returns how many bytes were compared.
    pub(crate) fn verify(
        &self,
        source: &dyn Image,
        open: &dyn Fn() -> Result<Arc<dyn Image>, Failure>,
        target: &Path,
        job: &Job,
        bar: &ProgressBar,
    ) -> Result<u64, Failure> {
        if self.options.verify == "none" {
            return Ok(0);
        }
        self.enter("verifying", job, bar)?;
        bar.set_length(source.geometry().virtual_size);
        let image = open()?;
        let (compared, difference) = if self.options.verify == "full" {
            let sides = (Side { image: source, path: self.path }, Side { image: &*image, path: target });
            let bandwidth = self.options.bandwidth;
            let comparison = transfer::compare(sides.0, sides.1, self.cancel, bar, bandwidth)?;
            (source.geometry().virtual_size, comparison.first_difference)
        } else {
            transfer::compare_samples(source, &*image, self.cancel)?
        };
        match difference {
            None => Ok(compared),
            Some(at) => Err(different(self.path, at)),
        }
    }
}
