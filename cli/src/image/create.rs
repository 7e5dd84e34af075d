//! `image create`.

use std::path::PathBuf;

use clap::Args;
use formats::{CreateOptions, Format, format_by_name};
use serde_json::json;

use super::{Layout, type_for};
use crate::failure::{Exit, Failure};
use crate::render::{self, Screen};
use crate::units::parse_nonzero_size;

/// Create an empty image
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  blockctl image create disk.vhdx --size 10G
  blockctl image create disk.vhd --size 10G --type fixed")]
pub(crate) struct CreateArgs {
    /// The new file; one that exists is never overwritten
    path: PathBuf,
    /// Size of the disk, such as 10G
    #[arg(long, value_parser = parse_nonzero_size)]
    size: u64,
    #[command(flatten)]
    layout: Layout,
}

/// `blockctl image create`
pub(crate) fn run(args: &CreateArgs, screen: Screen) -> Result<Exit, Failure> {
    let layout = &args.layout;
    let asked = layout.format.map(Format::from);
    let format = asked.or_else(|| format_by_name(&args.path)).unwrap_or(Format::Vhdx);
    let image_type = type_for(format, layout.image_type.map(Into::into))?;
    let options = CreateOptions {
        format,
        image_type,
        virtual_size: args.size,
        block_size: layout.block_size,
        logical_sector_size: layout.sector_bytes().unwrap_or(512),
    };
    formats::create(&args.path, &options)?;
    let shown = json!({
        "path": args.path.display().to_string(),
        "format": format,
        "type": image_type,
        "size_bytes": args.size,
    });
    screen.show(&shown, |_| {
        format!("{}: created, {image_type} {format}, {}", args.path.display(), render::size(args.size))
    })?;
    Ok(Exit::Done)
}
