//! `image compact`.

use std::path::PathBuf;

use clap::Args;
use formats::Format;
use serde_json::json;

use super::{FormatName, settle};
use crate::failure::{Exit, Failure};
use crate::interrupt::guarded;
use crate::render::{self, Screen, complain};

/// Give unused space of an image that nobody uses back: blocks of zeroes, and gaps
#[derive(Debug, Args)]
#[command(after_help = "Example:
  blockctl image compact disk.vhdx

It can be broken off at any moment: the image stays sound, and the next run goes on.")]
pub(crate) struct CompactArgs {
    /// The image
    path: PathBuf,
    /// Its format [default: from its name]
    #[arg(long)]
    format: Option<FormatName>,
}

/// `blockctl image compact`
pub(crate) async fn run(args: CompactArgs, screen: Screen) -> Result<Exit, Failure> {
    let path = args.path.display().to_string();
    let outcome = guarded(move |cancel| {
        let format = args.format.map(Format::from);
        settle(&args.path, format)?;
        let bar = screen.bar(0);
        bar.set_prefix("compacting");
        let outcome = formats::compact(&args.path, format, &mut |done, total| {
            bar.set_length(total);
            bar.set_position(done);
            if cancel.is_set() {
                // There is no way back to go: wherever it ends, the image is sound.
                bar.finish_and_clear();
                end_here(screen);
            }
        })?;
        bar.finish_and_clear();
        Ok(outcome)
    })
    .await?;
    let shown = json!({
        "path": path, "freed_bytes": outcome.freed_bytes, "moved_bytes": outcome.moved_bytes,
    });
    screen.show(&shown, |_| {
        let [freed, moved] = [outcome.freed_bytes, outcome.moved_bytes].map(render::size);
        format!("{path}: {freed} given back, {moved} moved for that")
    })?;
    Ok(Exit::Done)
}

/// Ends the process in the middle of the work, which can only be broken off.
fn end_here(screen: Screen) -> ! {
    let failure = Failure::cancelled("cancelled; the image is sound, and the next run goes on from here");
    complain(&failure.message);
    if screen.is_json() {
        // Standard output may have gone away; the exit code tells it anyway.
        let _ = screen.json_line(&failure.body());
    }
    std::process::exit(failure.exit as i32)
}
