//! The command line.
//!
//! `run`, `receive` and `restore` are processes with a machine; everything else asks such a process by its API's socket.

pub mod args;
pub mod ask;
pub mod parts;
pub mod process;
pub mod show;
pub mod units;

use std::process::ExitCode;

use clap::Parser as _;

use self::args::{Arguments, Command};
use crate::api::ErrorInfo;

/// What the process ends with; the numbers are those of `blockctl`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// It is done.
    Done = 0,
    /// It failed.
    Failed = 1,
    /// The command line makes no sense.
    Usage = 2,
    /// Somebody has cancelled it.
    Cancelled = 3,
    /// The machine would not run there, or something was found damaged.
    Different = 4,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(e) => {
            let _ = e.print();
            return if e.use_stderr() { Exit::Usage.into() } else { Exit::Done.into() };
        }
    };
    let json = arguments.json;
    match run(arguments) {
        Ok(exit) => exit.into(),
        Err(error) => complain(&error, json).into(),
    }
}

fn run(arguments: Arguments) -> anyhow::Result<Exit> {
    let json = arguments.json;
    match arguments.command {
        Command::Run(run) => process::run(&run),
        Command::Receive(receive) => process::receive(&receive, json),
        Command::Restore(restore) => process::restore(&restore),
        Command::Send(send) => ask::send(&send, json),
        Command::Save(save) => ask::save(&save, json),
        Command::Status(api) => ask::status(&api, json),
        Command::Pause(api) => ask::verb(&api, "pause", json),
        Command::Resume(api) => ask::verb(&api, "resume", json),
        Command::Stop(api) => ask::verb(&api, "stop", json),
        Command::Cancel(api) => ask::migration_verb(&api, "cancel", json),
        Command::Resolve(resolve) => ask::resolve(&resolve, json),
        Command::Guest(guest) => ask::guest(&guest, json),
    }
}

/// One sentence on standard error; with `--json` as an object as well. Says what the process ends with.
fn complain(error: &anyhow::Error, json: bool) -> Exit {
    let info = error.downcast_ref::<ErrorInfo>().cloned();
    let info = info.unwrap_or_else(|| ErrorInfo { kind: "failed".into(), message: format!("{error:#}") });
    if json {
        let body = serde_json::json!({ "error": info });
        eprintln!("{body}");
    } else {
        eprintln!("kvm-shim: {}", info.message);
    }
    match info.kind.as_str() {
        "cancelled" => Exit::Cancelled,
        "incompatible" => Exit::Different,
        "usage" => Exit::Usage,
        _ => Exit::Failed,
    }
}
