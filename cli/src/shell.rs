//! `completions` and `man`: what belongs around a program.

use std::path::PathBuf;

use clap::{Args, CommandFactory as _};
use clap_complete::Shell;

use crate::cli::Cli;
use crate::failure::{Exit, Failure};
use crate::render::{Screen, write_out};

/// Print a script that completes commands in a shell
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  blockctl completions bash > /etc/bash_completion.d/blockctl")]
pub(crate) struct CompletionArgs {
    /// The shell
    shell: Shell,
}

/// Write the manual pages of all commands into a folder
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  blockctl man /usr/local/share/man/man1")]
pub(crate) struct ManArgs {
    /// The folder; created where it is missing
    dir: PathBuf,
}

/// `blockctl completions`
pub(crate) fn completions(args: &CompletionArgs) -> Result<Exit, Failure> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "blockctl", &mut script);
    write_out(&script)?;
    Ok(Exit::Done)
}

/// `blockctl man`
pub(crate) fn man(args: &ManArgs, screen: Screen) -> Result<Exit, Failure> {
    let failed = |e: std::io::Error| Failure::io(args.dir.display(), &e);
    std::fs::create_dir_all(&args.dir).map_err(failed)?;
    clap_mangen::generate_to(Cli::command(), &args.dir).map_err(failed)?;
    let shown = serde_json::json!({ "dir": args.dir.display().to_string() });
    screen.show(&shown, |_| format!("wrote the manual pages to {}", args.dir.display()))?;
    Ok(Exit::Done)
}
