//! `image convert`: the same disk in another format, as sparse as before. A chain becomes one image.

use std::path::PathBuf;
use std::time::Instant;

use clap::Args;
use formats::{CreateOptions, Format, ImageType, format_by_name};
use serde::Serialize;

use super::{FormatName, Layout, Parents, open, type_for};
use crate::failure::{Exit, Failure};
use crate::interrupt::{Cancel, guarded};
use crate::render::{self, Screen};
use crate::transfer::{self, Side, Unfinished};
use crate::units::parse_nonzero_size;

/// Copy an image into another format; what is empty stays empty, and a differencing image becomes one with its parents
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  blockctl image convert disk.vhdx disk.vhd
  blockctl image convert disk.bin disk.vhdx --from-format raw --block-size 1M
  blockctl image convert child.vhdx whole.vhdx --parents /srv/base")]
pub(crate) struct ConvertArgs {
    /// The image to copy
    source: PathBuf,
    /// The new file; one that exists is never overwritten
    target: PathBuf,
    /// Format of the image to copy [default: from its name]
    #[arg(long, value_name = "FORMAT")]
    from_format: Option<FormatName>,
    /// Size of the new disk, at least the old one's [default: the same]
    #[arg(long, value_parser = parse_nonzero_size)]
    size: Option<u64>,
    #[command(flatten)]
    layout: Layout,
    #[command(flatten)]
    parents: Parents,
}

/// What was done, as `--json` prints it.
#[derive(Debug, Serialize)]
struct Converted {
    source: String,
    target: String,
    format: Format,
    #[serde(rename = "type")]
    image_type: ImageType,
    size_bytes: u64,
    bytes_copied: u64,
    bytes_skipped_zero: u64,
    seconds: f64,
}

/// `blockctl image convert`
pub(crate) async fn run(args: ConvertArgs, screen: Screen) -> Result<Exit, Failure> {
    let converted = guarded(move |cancel| convert(&args, &cancel, screen)).await?;
    screen.show(&converted, |done| {
        let seconds = done.seconds.max(1e-9);
        format!(
            "{}: {} {}, {} copied in {} ({}), {} empty",
            done.target,
            done.image_type,
            done.format,
            render::size(done.bytes_copied),
            render::duration(std::time::Duration::from_secs_f64(seconds)),
            render::rate((done.bytes_copied as f64 / seconds) as u64),
            render::size(done.bytes_skipped_zero),
        )
    })?;
    Ok(Exit::Done)
}

fn convert(args: &ConvertArgs, cancel: &Cancel, screen: Screen) -> Result<Converted, Failure> {
    let started = Instant::now();
    let source = open(&args.source, args.from_format, &args.parents)?;
    let geometry = source.geometry();
    let size = args.size.unwrap_or(geometry.virtual_size);
    if size < geometry.virtual_size {
        return Err(Failure::usage(format!(
            "--size {} is less than the {} of {}, and would cut it off",
            render::size_exact(size),
            render::size_exact(geometry.virtual_size),
            args.source.display()
        )));
    }
    let asked = args.layout.format.map(Format::from);
    let format = asked.or_else(|| format_by_name(&args.target)).unwrap_or(Format::Vhdx);
    let image_type = type_for(format, args.layout.image_type.map(Into::into))?;
    if image_type == ImageType::Differencing {
        let message = "converting makes one whole image, which has no parent; leave --type differencing away";
        return Err(Failure::usage(message));
    }
    let options = CreateOptions {
        format,
        image_type,
        virtual_size: size,
        block_size: args.layout.block_size,
        logical_sector_size: args.layout.sector_bytes().unwrap_or(match format {
            // A 4096-byte sector is kept where the format knows it.
            Format::Vhdx => geometry.logical_sector_size,
            Format::Vhd | Format::Raw => 512,
        }),
        parent: None,
    };
    let unfinished = Unfinished::create(&args.target, &transfer::new_job(), &options)?;
    let bar = screen.bar(geometry.virtual_size);
    bar.set_prefix("copying");
    let copied =
        transfer::copy_to(Side { image: &*source, path: &args.source }, &unfinished, cancel, &bar, None)?;
    unfinished.finish()?;
    bar.finish_and_clear();
    Ok(Converted {
        source: args.source.display().to_string(),
        target: args.target.display().to_string(),
        format,
        image_type,
        size_bytes: size,
        bytes_copied: copied.bytes_copied,
        bytes_skipped_zero: copied.bytes_zero,
        seconds: started.elapsed().as_secs_f64(),
    })
}
