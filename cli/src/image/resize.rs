//! `image resize`.

use std::path::PathBuf;

use clap::Args;
use formats::Format;
use serde_json::json;

use super::{FormatName, Parents, settle};
use crate::failure::{Exit, Failure};
use crate::interrupt::guarded;
use crate::render::{self, Screen};
use crate::units::parse_nonzero_size;

/// Change the size of a disk that nobody uses; what is new reads as zeroes
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  blockctl image resize disk.vhdx 20G
  blockctl image resize disk.vhdx 5G --shrink

Before a disk is made smaller, its partitions and file systems have to be. A disk that is served is resized with
`blockctl disk resize`.")]
pub(crate) struct ResizeArgs {
    /// The image
    path: PathBuf,
    /// The new size of the disk, such as 20G
    #[arg(value_parser = parse_nonzero_size)]
    size: u64,
    /// Allow a smaller size, where what is cut off holds nothing but zeroes
    #[arg(long)]
    shrink: bool,
    /// Its format [default: from its name]
    #[arg(long)]
    format: Option<FormatName>,
    #[command(flatten)]
    parents: Parents,
}

/// `blockctl image resize`
pub(crate) async fn run(args: ResizeArgs, screen: Screen) -> Result<Exit, Failure> {
    let path = args.path.display().to_string();
    // A signal does not end it in the middle: it is soon done, and a crash would do no harm.
    let (old, new) = guarded(move |_| {
        let format = args.format.map(Format::from);
        settle(&args.path, format)?;
        let old = formats::info(&args.path, format)?.virtual_size;
        formats::resize_with_parents(&args.path, format, args.size, args.shrink, &args.parents.parents)?;
        Ok((old, formats::info(&args.path, format)?.virtual_size))
    })
    .await?;
    let shown = json!({"path": path, "old_size_bytes": old, "size_bytes": new});
    screen.show(&shown, |_| {
        format!("{path}: {}, before {}", render::size_exact(new), render::size_exact(old))
    })?;
    Ok(Exit::Done)
}
