//! `image rebase`.

use std::path::PathBuf;

use clap::Args;
use formats::{Format, RebaseOptions};
use serde_json::json;
use uuid::Uuid;

use super::{FormatName, Parents, settle};
use crate::failure::{Exit, Failure};
use crate::interrupt::guarded;
use crate::render::Screen;

/// Tell a differencing image where its parent is, after that was moved or renamed
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  blockctl image rebase child.vhdx --parent /srv/base/base.vhdx
  blockctl image rebase child.vhdx --parent middle.vhdx --parents /srv/base

The parent must be the one that the image was made on, unchanged. With --accept-changed-parent another one is taken:
what the image does not hold itself then reads as that one has it, and unless you know that both have the same content
there, the disk is a mixture of two, with its file systems damaged.")]
pub(crate) struct RebaseArgs {
    /// The differencing image
    path: PathBuf,
    /// Its parent
    #[arg(long, value_name = "PATH")]
    parent: PathBuf,
    /// Take a parent that was changed, or is another image; this may damage the disk
    #[arg(long)]
    accept_changed_parent: bool,
    /// Format of the image [default: from its name]
    #[arg(long)]
    format: Option<FormatName>,
    #[command(flatten)]
    parents: Parents,
}

/// `blockctl image rebase`
pub(crate) async fn run(args: RebaseArgs, screen: Screen) -> Result<Exit, Failure> {
    let [path, parent] = [&args.path, &args.parent].map(|path| path.display().to_string());
    let options = RebaseOptions {
        format: args.format.map(Format::from),
        accept_changed_parent: args.accept_changed_parent,
        parents: args.parents.parents,
    };
    let done = guarded(move |_| {
        settle(&args.path, options.format)?;
        Ok(formats::rebase(&args.path, &args.parent, &options)?)
    })
    .await?;
    let shown = json!({
        "path": path,
        "parent": parent,
        "parent_id": done.id.to_string(),
        "old_parent_ids": done.old_ids.iter().map(Uuid::to_string).collect::<Vec<_>>(),
        "parent_changed": done.parent_changed(),
    });
    screen.show(&shown, |_| {
        let warning = if done.parent_changed() {
            "; it is not the one that the image was made on, as you accepted"
        } else {
            ""
        };
        format!("{path}: its parent is {parent} now{warning}")
    })?;
    Ok(Exit::Done)
}
