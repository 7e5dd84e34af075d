//! `image`: work on images that no daemon serves.

mod compact;
mod compare;
mod convert;
mod create;
mod inspect;
mod rebase;
mod resize;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::{Args, Subcommand, ValueEnum};
use formats::{Format, Image, ImageType, OpenOptions};

use crate::failure::{Exit, Failure};
use crate::paths::notes_dir;
use crate::render::Screen;
use crate::units::parse_block_size;

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Create(create::CreateArgs),
    Info(inspect::InfoArgs),
    Check(inspect::CheckArgs),
    Map(inspect::MapArgs),
    Compare(compare::CompareArgs),
    Convert(convert::ConvertArgs),
    Resize(resize::ResizeArgs),
    Compact(compact::CompactArgs),
    Rebase(rebase::RebaseArgs),
}

/// `blockctl image ...`
pub(crate) async fn run(command: Command, screen: Screen) -> Result<Exit, Failure> {
    match command {
        Command::Create(args) => create::run(&args, screen),
        Command::Info(args) => inspect::info(&args, screen),
        Command::Check(args) => inspect::check(&args, screen),
        Command::Map(args) => inspect::map(&args, screen),
        Command::Compare(args) => compare::run(args, screen).await,
        Command::Convert(args) => convert::run(args, screen).await,
        Command::Resize(args) => resize::run(args, screen).await,
        Command::Compact(args) => compact::run(args, screen).await,
        Command::Rebase(args) => rebase::run(args, screen).await,
    }
}

// Documentation of the variants would turn every `--help` that names them into a page of its own.

/// The formats as people type them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum FormatName {
    Vhdx,
    Vhd,
    Raw,
}

impl From<FormatName> for Format {
    fn from(name: FormatName) -> Self {
        match name {
            FormatName::Vhdx => Self::Vhdx,
            FormatName::Vhd => Self::Vhd,
            FormatName::Raw => Self::Raw,
        }
    }
}

/// The types as people type them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum TypeName {
    Dynamic,
    Fixed,
    Differencing,
}

impl From<TypeName> for ImageType {
    fn from(name: TypeName) -> Self {
        match name {
            TypeName::Dynamic => Self::Dynamic,
            TypeName::Fixed => Self::Fixed,
            TypeName::Differencing => Self::Differencing,
        }
    }
}

/// How a new image is laid out.
#[derive(Debug, Args)]
pub(crate) struct Layout {
    /// Format [default: from the name, else vhdx]
    #[arg(long)]
    pub(crate) format: Option<FormatName>,
    /// Type [default: dynamic; raw is always fixed; differencing goes with --parent]
    #[arg(long = "type", value_name = "TYPE")]
    pub(crate) image_type: Option<TypeName>,
    /// Block size, a power of two; VHDX allows 1M to 256M [default: the format's]
    #[arg(long, value_name = "SIZE", value_parser = parse_block_size)]
    pub(crate) block_size: Option<u32>,
    /// The guest's sector size
    #[arg(long, value_name = "BYTES", value_parser = ["512", "4096"])]
    pub(crate) sector_size: Option<String>,
}

impl Layout {
    /// The sector size, where one was asked for; the parser lets nothing but numbers through.
    pub(crate) fn sector_bytes(&self) -> Option<u32> {
        self.sector_size.as_ref().and_then(|text| text.parse().ok())
    }
}

/// The type that an image gets: raw images have but one.
pub(crate) fn type_for(format: Format, asked: Option<ImageType>) -> Result<ImageType, Failure> {
    match (format, asked) {
        (Format::Raw, Some(ImageType::Dynamic)) => {
            Err(Failure::usage("a raw image can't be dynamic (its file is sparse anyway); leave --type away"))
        }
        (Format::Raw, Some(ImageType::Differencing)) => {
            Err(Failure::usage("a raw image can't be differencing; VHDX and VHD can"))
        }
        (Format::Raw, _) => Ok(ImageType::Fixed),
        (_, asked) => Ok(asked.unwrap_or(ImageType::Dynamic)),
    }
}

/// Opens an image for reading, with its parents if it has any.
pub(crate) fn open(
    path: &Path,
    format: Option<FormatName>,
    parents: &Parents,
) -> Result<Arc<dyn Image>, Failure> {
    let options = OpenOptions {
        format: format.map(Format::from),
        parents: parents.parents.clone(),
        notes_dir: notes_dir(),
        ..OpenOptions::read_only()
    };
    Ok(formats::open(path, &options)?)
}

/// Brings home what a killed daemon has left of an image, before its structure is changed.
pub(crate) fn settle(path: &Path, format: Option<Format>) -> Result<(), Failure> {
    if let Some(dir) = notes_dir() {
        formats::settle(path, format, dir)?;
    }
    Ok(())
}

/// Where the parents of differencing images are looked for.
#[derive(Debug, Args)]
pub(crate) struct Parents {
    /// A folder, or a file, in which parents of a differencing image may be found; repeatable. They are looked for
    /// nowhere else, whatever the image says
    #[arg(long, value_name = "DIR")]
    pub(crate) parents: Vec<PathBuf>,
}

/// One image that exists.
#[derive(Debug, Args)]
pub(crate) struct Existing {
    /// The image
    pub(crate) path: PathBuf,
    /// Its format [default: from its name]
    #[arg(long)]
    pub(crate) format: Option<FormatName>,
}
