//! `plan`: what a move would do, without doing any of it.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use blockd_api::DiskInfo;
use clap::Args as ClapArgs;
use clap::builder::NonEmptyStringValueParser;
use formats::{AllocState, Format, Image, ImageType};
use nix::sys::statvfs::statvfs;
use serde::Serialize;

use crate::client::Client;
use crate::failure::{Exit, Failure};
use crate::held::{self, Deletes};
use crate::moving::{Options, Subject, check_target, subjects};
use crate::offline::{format_named, source_files};
use crate::paths::{folder_of, same_file, target_of};
use crate::places::{self, Place, SourceFile};
use crate::render::{self, Facts, Screen, yes};

/// Show what a move would do: bytes, space, time, whether it ends
#[derive(Debug, ClapArgs)]
#[command(after_help = "Example:
  blockctl plan vm1 --to /mnt/faster/ --bandwidth 200M

Ends with 1 when the move would be refused or would run out of space.")]
pub(crate) struct Args {
    /// Disks by name, or images by path
    #[arg(required = true, value_name = "ID|IMAGE", value_parser = NonEmptyStringValueParser::new())]
    what: Vec<String>,
    #[command(flatten)]
    options: Options,
}

/// One move's plan, as `--json` prints it.
#[derive(Debug, Serialize)]
struct Plan {
    what: String,
    source: PathBuf,
    target: PathBuf,
    format: Format,
    #[serde(rename = "type")]
    image_type: String,
    size_bytes: u64,
    /// At most so much is copied; what the guest writes meanwhile comes on top.
    bytes_to_copy: u64,
    /// What the target takes on its file system.
    space_needed_bytes: u64,
    space_free_bytes: u64,
    fits: bool,
    /// Only known with a bandwidth.
    seconds: Option<f64>,
    ends: bool,
    /// The images one by one, the newest first; one for a disk that becomes one image.
    files: Vec<FilePlan>,
    problems: Vec<String>,
}

/// What becomes of one file.
#[derive(Debug, Serialize)]
struct FilePlan {
    source: PathBuf,
    /// The source itself where it stays.
    target: PathBuf,
    #[serde(rename = "type")]
    image_type: String,
    bytes_to_copy: u64,
    stays: bool,
}

/// The source as far as a plan needs it.
#[derive(Debug)]
struct Source {
    format: Format,
    size: u64,
    /// The newest first.
    files: Vec<SourceFile>,
    /// What each of them has of its own.
    holds: Vec<u64>,
    /// What all of them have that the disk shows.
    holds_together: u64,
    job: Option<String>,
}

/// `blockctl plan`
pub(crate) async fn run(
    args: &Args,
    client: Result<Client, Failure>,
    screen: Screen,
) -> Result<Exit, Failure> {
    check_target(&args.what, &args.options.to)?;
    let mut exit = Exit::Done;
    for subject in subjects(&args.what, client.as_ref()).await? {
        let (what, source) = match subject {
            Subject::Disk(id) => {
                let disk = client.as_ref().map_err(Clone::clone)?.disk(&id).await?;
                (id, Source::of_disk(disk)?)
            }
            Subject::Image(path) => (path.display().to_string(), Source::of_image(&path, &args.options)?),
        };
        let plan = make(what, &source, &args.options)?;
        screen.show(&plan, render_plan)?;
        if !plan.problems.is_empty() {
            exit = Exit::Failed;
        }
    }
    Ok(exit)
}

impl Source {
    /// The daemon holds the images, so their files tell how much there is: no more than they occupy.
    fn of_disk(disk: DiskInfo) -> Result<Self, Failure> {
        let format = format_named(&disk.format).ok_or_else(|| {
            Failure::new("internal", format!("{}: unknown format {}", disk.id, disk.format))
        })?;
        let (mut files, mut holds) = (Vec::new(), Vec::new());
        let paths = if disk.chain.len() > 1 { disk.chain } else { vec![disk.image] };
        let is_one = paths.len() == 1;
        for path in paths.into_iter().map(PathBuf::from) {
            holds.push(occupied(&path)?.min(disk.size_bytes));
            files.push(if is_one {
                let image_type =
                    if disk.image_type == "fixed" { ImageType::Fixed } else { ImageType::Dynamic };
                SourceFile { path, image_type, block_size: 0 }
            } else {
                let info = formats::info(&path, Some(format))?;
                SourceFile { path, image_type: info.image_type, block_size: info.block_size }
            });
        }
        let holds_together = holds.iter().sum::<u64>().min(disk.size_bytes);
        Ok(Self { format, size: disk.size_bytes, files, holds, holds_together, job: disk.job })
    }

    fn of_image(path: &Path, options: &Options) -> Result<Self, Failure> {
        let format = options.from_format.as_deref().and_then(format_named);
        let source = held::Source::open(path, format, &options.parents, Deletes::Nothing)?;
        let holds = source.layers().iter().map(|layer| data_of(&**layer)).collect::<Result<_, _>>()?;
        Ok(Self {
            format: source.image.format(),
            size: source.image.geometry().virtual_size,
            files: source_files(&source),
            holds,
            holds_together: data_of(&*source.image)?,
            job: None,
        })
    }

    /// What becomes of each file.
    fn places(&self, options: &Options) -> Result<(Format, Vec<FilePlan>), Failure> {
        if self.files.len() == 1 || options.flatten {
            places::check_files(&self.files, options)?;
            return self.one_place(options);
        }
        let (format, places) = places::of_chain(&self.files, self.format, options)?;
        let plan = |(place, holds): (Place, &u64)| FilePlan {
            bytes_to_copy: if place.stays { 0 } else { *holds },
            image_type: place.image_type.to_string(),
            source: place.source,
            target: place.target,
            stays: place.stays,
        };
        Ok((format, places.into_iter().zip(&self.holds).map(plan).collect()))
    }

    fn one_place(&self, options: &Options) -> Result<(Format, Vec<FilePlan>), Failure> {
        let format = options.format.as_deref().and_then(format_named);
        let newest = &self.files[0];
        let target = target_of(&newest.path, self.format, &options.to, format)?;
        let image_type = match (target.format, &options.image_type, self.format) {
            (Format::Raw, ..) => "fixed".to_owned(),
            (_, Some(asked), _) => asked.clone(),
            (_, None, Format::Raw) => "dynamic".to_owned(),
            (_, None, _) if newest.image_type == ImageType::Differencing => "dynamic".to_owned(),
            (_, None, _) => newest.image_type.to_string(),
        };
        let plan = FilePlan {
            source: newest.path.clone(),
            target: target.path,
            image_type,
            bytes_to_copy: self.holds_together,
            stays: false,
        };
        Ok((target.format, vec![plan]))
    }
}

/// How much an image has of its own.
fn data_of(image: &dyn Image) -> Result<u64, Failure> {
    let (mut offset, mut holds) = (0, 0);
    while let Some(extent) = image.next_extent(offset)? {
        offset += extent.span.len;
        if extent.state == AllocState::Data {
            holds += extent.span.len;
        }
    }
    Ok(holds)
}

fn occupied(path: &Path) -> Result<u64, Failure> {
    let metadata = std::fs::metadata(path).map_err(|e| Failure::io(path.display(), &e))?;
    Ok(metadata.blocks().saturating_mul(512))
}

/// What the files need of one file system.
#[derive(Debug)]
struct Space<'a> {
    folder: &'a Path,
    needed: u64,
    free: u64,
}

/// The space on each file system that a target goes to. Fixed images are made as sparse files, so what is not copied takes
/// no space there either.
fn spaces(files: &[FilePlan]) -> Result<Vec<Space<'_>>, Failure> {
    let mut spaces: BTreeMap<u64, Space<'_>> = BTreeMap::new();
    for file in files.iter().filter(|file| !file.stays) {
        let folder = folder_of(&file.target);
        let failed = |e: std::io::Error| Failure::io(folder.display(), &e);
        let device = std::fs::metadata(folder).map_err(failed)?.dev();
        if let Some(space) = spaces.get_mut(&device) {
            space.needed += file.bytes_to_copy;
            continue;
        }
        let stat = statvfs(folder).map_err(|e| failed(e.into()))?;
        let free = stat.blocks_available().saturating_mul(stat.fragment_size());
        spaces.insert(device, Space { folder, needed: file.bytes_to_copy, free });
    }
    Ok(spaces.into_values().collect())
}

fn make(what: String, source: &Source, options: &Options) -> Result<Plan, Failure> {
    let (format, files) = source.places(options)?;
    let mut problems = Vec::new();
    for file in files.iter().filter(|file| !file.stays) {
        if same_file(&file.source, &file.target) {
            problems.push(format!("{} is already there", file.source.display()));
        } else if file.target.symlink_metadata().is_ok() {
            problems.push(format!("{} exists already, and is not overwritten", file.target.display()));
        }
    }
    let spaces = spaces(&files)?;
    for Space { folder, needed, free } in spaces.iter().filter(|space| space.needed > space.free) {
        let (needed, free) = (render::size(*needed), render::size(*free));
        problems.push(format!("{} has {free} free, and the target needs up to {needed}", folder.display()));
    }
    if let Some(job) = &source.job {
        problems.push(format!("{what} is being moved already, by {job}"));
    }
    let bytes_to_copy = files.iter().map(|file| file.bytes_to_copy).sum();
    // The parents by themselves, and then the disk.
    let parents: u64 = files[1..].iter().map(|file| file.bytes_to_copy).sum();
    let verified = if options.verify == "full" { source.holds_together + parents } else { 0 };
    Ok(Plan {
        what,
        source: files[0].source.clone(),
        target: files[0].target.clone(),
        format,
        image_type: files[0].image_type.clone(),
        size_bytes: source.size,
        bytes_to_copy,
        space_needed_bytes: spaces.iter().map(|space| space.needed).sum(),
        space_free_bytes: spaces.iter().map(|space| space.free).sum(),
        fits: spaces.iter().all(|space| space.needed <= space.free),
        seconds: options.bandwidth.map(|limit| (bytes_to_copy + verified) as f64 / limit as f64),
        // Once writes go to both images, what still differs can only become less.
        ends: true,
        files,
        problems,
    })
}

fn render_plan(plan: &Plan) -> String {
    let time = plan.seconds.map_or_else(
        || "as fast as both disks allow; --bandwidth limits it".to_owned(),
        |s| {
            format!(
                "{} at that bandwidth, copying and verifying",
                render::duration(Duration::try_from_secs_f64(s).unwrap_or(Duration::MAX))
            )
        },
    );
    let mut facts = Facts::new();
    facts.add("move", &plan.what);
    for file in &plan.files {
        facts.add("from", file.source.display().to_string());
        match (file.stays, plan.files.len()) {
            (true, _) => facts.add("to", "it stays where it is"),
            (false, 1) => facts.add("to", file.target.display().to_string()),
            (false, _) => {
                let size = render::size(file.bytes_to_copy);
                facts.add("to", format!("{}, at most {size}", file.target.display()))
            }
        };
    }
    facts
        .add("target", format!("{} {}, {}", plan.image_type, plan.format, render::size(plan.size_bytes)))
        .add("to copy", format!("at most {}", render::size(plan.bytes_to_copy)))
        .add(
            "space",
            format!(
                "at most {} needed, {} free",
                render::size(plan.space_needed_bytes),
                render::size(plan.space_free_bytes)
            ),
        )
        .add("time", time)
        .add("ends", format!("{}: once writes go to both, what differs only shrinks", yes(plan.ends)));
    let mut text = facts.render();
    for problem in &plan.problems {
        text.push_str(&format!("PROBLEM: {problem}\n"));
    }
    text
}
