//! `image compare`: whether two images hold the same disk, whatever their formats.

use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use super::{FormatName, Parents, open};
use crate::failure::{Exit, Failure};
use crate::interrupt::guarded;
use crate::render::{self, Screen};
use crate::transfer::{self, Side};

/// Tell whether two images hold the same disk, whatever their formats
#[derive(Debug, Args)]
#[command(after_help = "Example:
  blockctl image compare disk.vhdx disk.vhd

Ends with 0 when they are the same and with 4 when they differ.")]
pub(crate) struct CompareArgs {
    /// One image
    a: PathBuf,
    /// The other
    b: PathBuf,
    /// Format of A [default: from its name]
    #[arg(long, value_name = "FORMAT")]
    format_a: Option<FormatName>,
    /// Format of B [default: from its name]
    #[arg(long, value_name = "FORMAT")]
    format_b: Option<FormatName>,
    #[command(flatten)]
    parents: Parents,
}

/// `blockctl image compare`
pub(crate) async fn run(args: CompareArgs, screen: Screen) -> Result<Exit, Failure> {
    let [a, b] = [&args.a, &args.b].map(|path| path.display().to_string());
    let comparison = guarded(move |cancel| {
        let (a, b) =
            (open(&args.a, args.format_a, &args.parents)?, open(&args.b, args.format_b, &args.parents)?);
        let bar = screen.bar(a.geometry().virtual_size.max(b.geometry().virtual_size));
        bar.set_prefix("comparing");
        let (a, b) = (Side { image: &*a, path: &args.a }, Side { image: &*b, path: &args.b });
        let comparison = transfer::compare(a, b, &cancel, &bar, None)?;
        bar.finish_and_clear();
        Ok(comparison)
    })
    .await?;
    let (difference, sizes) = (comparison.first_difference, <[u64; 2]>::from(comparison.sizes));
    let same = comparison.is_same();
    // A longer disk differs from a shorter one even where the rest of it is zeroes: a guest would see it.
    let first = difference.or_else(|| (!same).then(|| sizes[0].min(sizes[1])));
    let shown = json!({
        "a": a, "b": b, "same": same, "first_difference": first,
        "size_bytes_a": sizes[0], "size_bytes_b": sizes[1],
    });
    screen.show(&shown, |_| match (difference, first) {
        (Some(at), _) => format!("{a} and {b} differ; the first difference is at byte {at}"),
        (None, Some(_)) => {
            let [a_size, b_size] = sizes.map(render::size_exact);
            format!("{a} and {b} differ in size, {a_size} and {b_size}; all else is the same")
        }
        (None, None) => format!("{a} and {b} hold the same disk"),
    })?;
    Ok(if same { Exit::Done } else { Exit::Different })
}
