//! `blockctl`: the command line of blockd.
//!
//! A client of the daemon's control API like any other, and a workbench for images that no daemon serves. Each group
//! of commands has its own module; what people see is in [`render`], how a command fails in [`failure`].
//!
//! ```text
//!   disk, job, move, plan, events ──► client ──► the daemon's socket
//!   image, move of a file ──────────► formats
//!   demo ───────────────────────────► all of it, with a guest of its own
//! ```
//!
//! This room must not know how blockd serves; only [`demo`] drives a disk, as a guest would.
#![deny(unsafe_code)]

mod cli;
mod client;
mod demo;
mod disk;
mod events;
mod failure;
mod held;
mod image;
mod interrupt;
mod job;
mod moving;
mod offline;
mod offline_chain;
mod paths;
mod places;
mod plan;
mod render;
mod shell;
mod transfer;
mod units;
mod watch;

use std::process::ExitCode;

use clap::Parser as _;

use crate::cli::Cli;
use crate::failure::{Exit, Failure};
use crate::render::{Screen, complain};

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => return refuse_arguments(&e),
    };
    let screen = Screen::new(cli.json);
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(e) => return report(screen, &Failure::io("the event loop can't be started", &e)),
    };
    let result = runtime.block_on(cli.run(screen));
    // A thread that hangs in a system call must not hold up the end.
    runtime.shutdown_background();
    match result {
        Ok(exit) => exit.into(),
        Err(failure) => report(screen, &failure),
    }
}

/// Says on standard error why it failed, and with `--json` on standard output as well.
fn report(screen: Screen, failure: &Failure) -> ExitCode {
    if failure.message.is_empty() {
        return failure.exit.into();
    }
    complain(&failure.message);
    if screen.is_json() {
        // Standard output may be what has failed; the exit code tells it anyway.
        let _ = screen.json_line(&failure.body());
    }
    failure.exit.into()
}

/// Help and version go to standard output and are no failure; all else is wrong usage.
fn refuse_arguments(error: &clap::Error) -> ExitCode {
    // Nothing is left to be done where even this can't be printed.
    let _ = error.print();
    if !error.use_stderr() {
        return Exit::Done.into();
    }
    if std::env::args_os().any(|arg| arg == "--json") {
        let text = error.render().to_string();
        let sentence = text.split("\n\n").next().unwrap_or_default();
        let sentence = sentence.trim_start_matches("error:").split_whitespace().collect::<Vec<_>>().join(" ");
        let _ = Screen::new(true).json_line(&Failure::usage(sentence).body());
    }
    Exit::Usage.into()
}
