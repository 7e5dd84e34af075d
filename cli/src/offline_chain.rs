//! `move` of a chain that nobody serves, image by image.
//!
//! ```text
//!   made, base first, as NAME.incomplete-JOB ─► copied, base first ─► compared as a disk
//!     ─► renamed, base first ─► opened where it is now ─► the source deleted, newest first
//! ```
//!
//! At any moment each image that has its own name has its parent where it says. So whenever the process dies, the source
//! is whole or the target is.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use blockd_api::Job;
use formats::{CreateOptions, Format, Image, Layer, OpenOptions};
use indicatif::ProgressBar;

use crate::failure::Failure;
use crate::held::Source;
use crate::offline::{Task, different};
use crate::paths::folder_of;
use crate::places::{self, Place, SourceFile};
use crate::render::complain;
use crate::transfer::{self, Side, Unfinished, check_free};

/// Moves `source`, a chain whose files are `files`, the newest first.
pub(crate) fn run(task: &Task<'_>, source: &Source, files: &[SourceFile]) -> Result<Job, Failure> {
    let (format, places) = places::of_chain(files, source.image.format(), task.options)?;
    let moving = || places.iter().filter(|place| !place.stays);
    for place in moving() {
        check_free(&place.target)?;
    }
    let sources: Vec<&Path> = moving().map(|place| place.source.as_path()).collect();
    let targets: Vec<&Path> = places.iter().map(|place| place.target.as_path()).collect();
    let sizes = source.layers().iter().zip(&places).filter(|(_, place)| !place.stays);
    let bytes_total = sizes.map(|(layer, _)| layer.geometry().virtual_size).sum();
    let mut job = task.job(&sources, &targets, bytes_total);
    let bar = task.screen.bar(bytes_total);
    let chain = ChainMove { task, source, places: &places, format, bar: &bar };
    let made = chain.make(&job.job)?;

    task.enter("copying", &job, &bar)?;
    let started = Instant::now();
    let made = chain.copy(made, &mut job)?;
    job.phases.copying_s = started.elapsed().as_secs_f64();

    let started = Instant::now();
    let open = || chain.open(&places.iter().zip(&made).map(|(p, m)| m.path_now(p)).collect::<Vec<_>>());
    job.bytes_verified = task.verify(&*source.image, &open, made[0].path_now(&places[0]), &job, &bar)?;
    job.bytes_verified += chain.verify_parents(&made)?;
    job.phases.verify_s = started.elapsed().as_secs_f64();
    bar.finish_and_clear();

    let started = Instant::now();
    chain.finish(made)?;
    if !task.keeps_source() {
        job.source_deleted = chain.delete()?;
    }
    job.phases.commit_s = started.elapsed().as_secs_f64();
    job.state = "done".into();
    Ok(job)
}

struct ChainMove<'a> {
    task: &'a Task<'a>,
    source: &'a Source,
    /// The newest first, as all lists here.
    places: &'a [Place],
    format: Format,
    bar: &'a ProgressBar,
}

/// A file of the target that is open for writing.
struct Open {
    file: Made,
    /// The layer on its parents, so that zeroes that hide nothing take no space.
    image: Arc<dyn Image>,
}

/// A file of the target; `None` of one that stays where it is.
struct Made(Option<Unfinished>);

impl Made {
    fn path_now<'a>(&'a self, place: &'a Place) -> &'a Path {
        self.0.as_ref().map_or(&place.target, Unfinished::temporary)
    }
}

impl ChainMove<'_> {
    /// Makes all files under their temporary names, so that what is impossible fails at once. Files that were made before a
    /// failure go with it.
    fn make(&self, job: &str) -> Result<Vec<Open>, Failure> {
        let mut made: Vec<Open> = Vec::new();
        let mut below: Vec<Arc<dyn Image>> = Vec::new();
        let mut parent: Option<&Place> = None;
        for (place, layer) in self.places.iter().zip(self.source.layers()).rev() {
            let opened = if place.stays {
                below.insert(0, layer.clone());
                Open { file: Made(None), image: layer.clone() }
            } else {
                let (file, new) = self.make_layer(place, &**layer, parent.zip(below.first()), job)?;
                let image = formats::on_parents(new.clone(), &below)?;
                below.insert(0, new);
                Open { file: Made(Some(file)), image }
            };
            made.insert(0, opened);
            parent = Some(place);
        }
        Ok(made)
    }

    fn make_layer(
        &self,
        place: &Place,
        layer: &dyn Image,
        parent: Option<(&Place, &Arc<dyn Image>)>,
        job: &str,
    ) -> Result<(Unfinished, Arc<dyn Layer>), Failure> {
        let link = match parent {
            None => None,
            Some((parent, image)) => {
                let id = image.content_id().filter(|id| !id.is_nil()).ok_or_else(|| {
                    let message =
                        format!("{}: it has no id that a child could name", parent.source.display());
                    Failure::new("unsupported", message)
                })?;
                Some(places::link_to(&parent.target, id, &place.target)?)
            }
        };
        let geometry = layer.geometry();
        let options = CreateOptions {
            image_type: place.image_type,
            block_size: place.block_size,
            logical_sector_size: geometry.logical_sector_size,
            ..CreateOptions::new(self.format, geometry.virtual_size)
        };
        Unfinished::create_layer(&place.target, job, &options, link)
    }

    /// Copies what each image has of its own, the base first: zeroes that hide something have to know what they hide.
    fn copy(&self, opened: Vec<Open>, job: &mut Job) -> Result<Vec<Made>, Failure> {
        for (level, Open { file, image }) in opened.iter().enumerate().rev() {
            let Made(Some(target)) = file else { continue };
            let source = Side { image: &*self.source.layers()[level], path: &self.places[level].source };
            let (cancel, bandwidth) = (self.task.cancel, self.task.options.bandwidth);
            let copied = transfer::copy_layer_to(source, &**image, target, cancel, self.bar, bandwidth)?;
            job.bytes_copied += copied.bytes_copied;
            job.bytes_skipped_zero += copied.bytes_zero;
        }
        // Their locks go with the images.
        Ok(opened.into_iter().map(|opened| opened.file).collect())
    }

    /// Opens the target, whose files are at `paths` now, whatever they are to be called.
    fn open(&self, paths: &[&Path]) -> Result<Arc<dyn Image>, Failure> {
        self.open_with(paths[0], paths[1..].iter().map(|path| path.to_path_buf()).collect())
    }

    fn open_with(&self, newest: &Path, parents: Vec<PathBuf>) -> Result<Arc<dyn Image>, Failure> {
        let options = OpenOptions { format: Some(self.format), parents, ..OpenOptions::read_only() };
        Ok(formats::open(newest, &options)?)
    }

    /// Compares the parents, as asked: what their children hide of them is seen by whoever goes back to them. Returns how
    /// many bytes were compared.
    fn verify_parents(&self, made: &[Made]) -> Result<u64, Failure> {
        if self.task.options.verify == "none" {
            return Ok(0);
        }
        let mut bytes = 0;
        for level in (1..made.len()).rev().filter(|level| !self.places[*level].stays) {
            let sources = &self.source.held[level..];
            let options = OpenOptions {
                format: Some(self.source.image.format()),
                parents: sources[1..].iter().map(|held| held.path.clone()).collect(),
                // They are locked already.
                lock: false,
                ..OpenOptions::read_only()
            };
            let source = formats::open(&sources[0].path, &options)?;
            let paths: Vec<_> = self.places.iter().zip(made).map(|(p, m)| m.path_now(p)).collect();
            let target = self.open(&paths[level..])?;
            self.bar.set_length(source.geometry().virtual_size);
            self.bar.set_position(0);
            let (cancel, bandwidth) = (self.task.cancel, self.task.options.bandwidth);
            let (compared, difference) = if self.task.options.verify == "full" {
                let sides = [(&*source, sources[0].path.as_path()), (&*target, paths[level])]
                    .map(|(image, path)| Side { image, path });
                transfer::compare_own(sides[0], sides[1], cancel, self.bar, bandwidth)?
            } else {
                transfer::compare_samples(&*source, &*target, cancel)?
            };
            if let Some(at) = difference {
                return Err(different(&sources[0].path, at));
            }
            bytes += compared;
        }
        Ok(bytes)
    }

    /// Gives the files their names. Where that fails, all of them go again.
    fn finish(&self, mut made: Vec<Made>) -> Result<(), Failure> {
        for held in &self.source.held {
            held.refuse_changes()?;
        }
        for (Made(file), held) in made.iter().zip(&self.source.held) {
            if let Some(file) = file {
                held.give_attributes_to(file.temporary())?;
                file.sync()?;
            }
        }
        if self.task.cancel.is_set() {
            return Err(transfer::cancelled());
        }
        for Made(file) in made.iter_mut().rev() {
            if let Some(file) = file {
                file.rename()?;
            }
        }
        // Whoever opens the disk from now on finds its parents by what its images say of them.
        let folders = self.places[1..].iter().map(|place| folder_of(&place.target).to_owned()).collect();
        self.open_with(&self.places[0].target, folders)?;
        made.into_iter().filter_map(|Made(file)| file).for_each(Unfinished::keep);
        Ok(())
    }

    /// Deletes the source, as far as nobody else uses it. An image that stays needs its parents, so they stay too. Says
    /// whether all that was moved is gone.
    fn delete(&self) -> Result<bool, Failure> {
        let target = &self.places[0].target;
        let mut kept: Option<&Place> = None;
        for (level, (place, held)) in self.places.iter().zip(&self.source.held).enumerate() {
            if place.stays {
                break;
            }
            let why = match kept {
                Some(child) => Err(format!("its child {} stays, too", child.source.display())),
                None if level == 0 => Ok(()),
                None => held.take_over(),
            };
            match why {
                Ok(()) => held.delete(target)?,
                Err(why) => {
                    complain(&format!(
                        "warning: the parent {} is not deleted: {why}",
                        place.source.display()
                    ));
                    kept = Some(place);
                }
            }
        }
        Ok(kept.is_none())
    }
}
