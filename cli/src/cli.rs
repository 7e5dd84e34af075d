//! The commands and how they are dispatched.

use std::path::PathBuf;

use clap::{Parser, Subcommand};

use crate::client::Client;
use crate::failure::{Exit, Failure};
use crate::render::Screen;
use crate::{demo, disk, events, image, job, moving, plan, shell};

/// Serves disk images to virtual machines with blockd, and moves them while the machines run
#[derive(Debug, Parser)]
#[command(name = "blockctl", version, max_term_width = 100, propagate_version = true)]
#[command(after_help = "Examples:
  blockctl demo
  blockctl image create disk.vhdx --size 10G
  blockctl disk attach vm1 disk.vhdx --socket /run/vm1.sock
  blockctl move vm1 --to /mnt/faster/

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 cancelled, 4 found different or damaged.")]
pub(crate) struct Cli {
    /// The daemon's API socket [default: /run/blockd/api.sock as root, else $XDG_RUNTIME_DIR/blockd/api.sock]
    #[arg(long, global = true, env = "BLOCKD_API", value_name = "SOCKET", hide_env_values = true)]
    api: Option<PathBuf>,
    /// Print one JSON object, or one a line where it streams, and nothing else on standard output
    #[arg(long, global = true)]
    pub(crate) json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Demo(demo::Args),
    /// Work on images that no daemon serves
    #[command(subcommand, after_help = "Example:\n  blockctl image create disk.vhdx --size 10G")]
    Image(image::Command),
    /// Attach, watch and detach the disks that a daemon serves
    #[command(subcommand, after_help = "Example:\n  blockctl disk list")]
    Disk(disk::Command),
    Plan(plan::Args),
    Move(moving::Args),
    /// See and control moves
    #[command(subcommand, after_help = "Example:\n  blockctl job watch m1a2b3c4d")]
    Job(job::Command),
    Events(events::Args),
    Completions(shell::CompletionArgs),
    Man(shell::ManArgs),
}

impl Cli {
    /// Does what was asked.
    pub(crate) async fn run(self, screen: Screen) -> Result<Exit, Failure> {
        let client = || Client::new(self.api.as_deref());
        match self.command {
            Command::Demo(args) => demo::run(args, screen).await,
            Command::Image(command) => image::run(command, screen).await,
            Command::Disk(command) => disk::run(command, &client()?, screen).await,
            Command::Plan(args) => plan::run(&args, client(), screen).await,
            Command::Move(args) => moving::run(&args, client(), screen).await,
            Command::Job(command) => job::run(command, &client()?, screen).await,
            Command::Events(args) => events::run(&args, &client()?, screen).await,
            Command::Completions(args) => shell::completions(&args),
            Command::Man(args) => shell::man(&args, screen),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    fn every_command(command: &clap::Command, visit: &mut impl FnMut(&clap::Command)) {
        visit(command);
        for sub in command.get_subcommands() {
            every_command(sub, visit);
        }
    }

    #[test]
    fn the_definition_of_the_commands_holds_together() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_has_help_with_an_example_that_parses() {
        let mut seen = 0;
        every_command(&Cli::command(), &mut |command| {
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(help.starts_with("Example"), "`{}` has no example", command.get_name());
            assert!(command.get_about().is_some(), "`{}` says nothing about itself", command.get_name());
            for line in help.lines().filter_map(|l| l.trim().strip_prefix("blockctl ")) {
                let words = line.split(" > ").next().unwrap_or_default().split_whitespace();
                let parsed = Cli::try_parse_from(std::iter::once("blockctl").chain(words));
                assert!(parsed.is_ok(), "the example `blockctl {line}` is refused: {}", parsed.unwrap_err());
                seen += 1;
            }
        });
        assert!(seen >= 25, "only {seen} examples were found");
    }

    #[test]
    fn every_option_is_described() {
        every_command(&Cli::command(), &mut |command| {
            for arg in command.get_arguments() {
                assert!(arg.get_help().is_some(), "{} {} has no help", command.get_name(), arg.get_id());
            }
        });
    }
}
