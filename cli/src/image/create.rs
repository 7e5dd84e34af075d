//! `image create`.

use std::path::PathBuf;

use clap::Args;
use formats::{CreateOptions, Format, ImageType, format_by_name};
use serde_json::json;

use super::{Layout, type_for};
use crate::failure::{Exit, Failure};
use crate::render::{self, Screen};
use crate::units::parse_nonzero_size;

/// Create an empty image
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  blockctl image create disk.vhdx --size 10G
  blockctl image create disk.vhd --size 10G --type fixed
  blockctl image create child.vhdx --type differencing --parent base.vhdx")]
pub(crate) struct CreateArgs {
    /// The new file; one that exists is never overwritten
    path: PathBuf,
    /// Size of the disk, such as 10G [default: the parent's, if there is one]
    #[arg(long, value_parser = parse_nonzero_size, required_unless_present = "parent")]
    size: Option<u64>,
    /// The image that a differencing one is based on; nobody may write to it from then on
    #[arg(long, value_name = "PATH")]
    parent: Option<PathBuf>,
    #[command(flatten)]
    layout: Layout,
}

/// `blockctl image create`
pub(crate) fn run(args: &CreateArgs, screen: Screen) -> Result<Exit, Failure> {
    let layout = &args.layout;
    let on_parent = args.parent.is_some();
    let asked = layout.format.map(Format::from);
    // A child has its parent's format, whatever its own name says.
    let format = asked
        .or_else(|| args.parent.as_ref().and_then(format_by_name))
        .or_else(|| format_by_name(&args.path))
        .unwrap_or(Format::Vhdx);
    let asked_type = layout.image_type.map(ImageType::from);
    if on_parent != (asked_type == Some(ImageType::Differencing)) && (asked_type.is_some() || !on_parent) {
        let message = if on_parent {
            "only a differencing image has a parent; say --type differencing, or leave --parent away"
        } else {
            "a differencing image needs a parent; say which with --parent PATH"
        };
        return Err(Failure::usage(message));
    }
    let image_type = type_for(format, if on_parent { Some(ImageType::Differencing) } else { asked_type })?;
    let options = CreateOptions {
        format,
        image_type,
        virtual_size: args.size.unwrap_or(0),
        block_size: layout.block_size,
        // 0 of a child: as its parent.
        logical_sector_size: layout.sector_bytes().unwrap_or(if on_parent { 0 } else { 512 }),
        parent: args.parent.clone(),
    };
    formats::create(&args.path, &options)?;
    let size = match args.size {
        Some(size) => size,
        None => formats::info(&args.path, Some(format))?.virtual_size,
    };
    let mut shown = json!({
        "path": args.path.display().to_string(),
        "format": format,
        "type": image_type,
        "size_bytes": size,
    });
    if let Some(parent) = &args.parent {
        shown["parent"] = parent.display().to_string().into();
    }
    screen.show(&shown, |_| {
        let on = args.parent.as_ref().map_or(String::new(), |parent| format!(", on {}", parent.display()));
        format!("{}: created, {image_type} {format}, {}{on}", args.path.display(), render::size(size))
    })?;
    Ok(Exit::Done)
}
