//! `plan`: what a move would do, without doing any of it.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use blockd_api::DiskInfo;
use clap::Args as ClapArgs;
use clap::builder::NonEmptyStringValueParser;
use formats::{AllocState, Format, OpenOptions};
use nix::sys::statvfs::statvfs;
use serde::Serialize;

use crate::client::Client;
use crate::failure::{Exit, Failure};
use crate::moving::{Options, Subject, check_target, subjects};
use crate::offline::format_named;
use crate::paths::{folder_of, same_file, target_of};
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
    problems: Vec<String>,
}

/// The source as far as a plan needs it.
#[derive(Debug)]
struct Source {
    path: PathBuf,
    format: Format,
    image_type: String,
    size: u64,
    holds: u64,
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
            Subject::Image(path) => (path.display().to_string(), Source::of_image(path, &args.options)?),
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
    /// The daemon holds the image, so its file tells how much there is: no more than it occupies.
    fn of_disk(disk: DiskInfo) -> Result<Self, Failure> {
        let path = PathBuf::from(&disk.image);
        let format = format_named(&disk.format).ok_or_else(|| {
            Failure::new("internal", format!("{}: unknown format {}", disk.id, disk.format))
        })?;
        let holds = occupied(&path)?.min(disk.size_bytes);
        Ok(Self { path, format, image_type: disk.image_type, size: disk.size_bytes, holds, job: disk.job })
    }

    fn of_image(path: PathBuf, options: &Options) -> Result<Self, Failure> {
        let format = options.from_format.as_deref().and_then(format_named);
        let image = formats::open(&path, &OpenOptions { format, read_only: true, ..OpenOptions::default() })?;
        let (mut offset, mut holds) = (0, 0);
        while let Some(extent) = image.next_extent(offset)? {
            offset += extent.span.len;
            if extent.state == AllocState::Data {
                holds += extent.span.len;
            }
        }
        let size = image.geometry().virtual_size;
        Ok(Self {
            path,
            format: image.format(),
            image_type: image.image_type().to_string(),
            size,
            holds,
            job: None,
        })
    }
}

fn occupied(path: &Path) -> Result<u64, Failure> {
    let metadata = std::fs::metadata(path).map_err(|e| Failure::io(path.display(), &e))?;
    Ok(metadata.blocks().saturating_mul(512))
}

fn make(what: String, source: &Source, options: &Options) -> Result<Plan, Failure> {
    let format = options.format.as_deref().and_then(format_named);
    let target = target_of(&source.path, source.format, &options.to, format)?;
    let image_type = match (target.format, &options.image_type, source.format) {
        (Format::Raw, ..) => "fixed".to_owned(),
        (_, Some(asked), _) => asked.clone(),
        (_, None, Format::Raw) => "dynamic".to_owned(),
        (_, None, _) => source.image_type.clone(),
    };
    let folder = folder_of(&target.path);
    let stat = statvfs(folder).map_err(|e| Failure::io(folder.display(), &e.into()))?;
    let free = stat.blocks_available().saturating_mul(stat.fragment_size());
    // Fixed images are made as sparse files, so what is not copied takes no space there either.
    let needed = source.holds;
    let mut problems = Vec::new();
    if same_file(&source.path, &target.path) {
        problems.push(format!("{} is already there", source.path.display()));
    } else if target.path.symlink_metadata().is_ok() {
        problems.push(format!("{} exists already, and is not overwritten", target.path.display()));
    }
    if needed > free {
        let (needed, free) = (render::size(needed), render::size(free));
        problems.push(format!("{} has {free} free, and the target needs up to {needed}", folder.display()));
    }
    if let Some(job) = &source.job {
        problems.push(format!("{what} is being moved already, by {job}"));
    }
    let work = source.holds as f64 * if options.verify == "full" { 2.0 } else { 1.0 };
    Ok(Plan {
        what,
        source: source.path.clone(),
        target: target.path,
        format: target.format,
        image_type,
        size_bytes: source.size,
        bytes_to_copy: source.holds,
        space_needed_bytes: needed,
        space_free_bytes: free,
        fits: needed <= free,
        seconds: options.bandwidth.map(|limit| work / limit as f64),
        // Once writes go to both images, what still differs can only become less.
        ends: true,
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
    facts
        .add("move", &plan.what)
        .add("from", plan.source.display().to_string())
        .add("to", plan.target.display().to_string())
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
