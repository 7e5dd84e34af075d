//! `blockd`: serves images over vhost-user-blk and moves them while they are used.

use std::process::ExitCode;

use blockd::daemon::config::{Args, Config, Surroundings};
use blockd::daemon::server;
use clap::Parser;

/// Wrong usage, as `clap` has it too.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    let config = match Config::resolve(Args::parse(), &Surroundings::default()) {
        Ok(config) => config,
        Err(e) => {
            eprintln!("blockd: {e}");
            return ExitCode::from(USAGE);
        }
    };
    match server::run(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("blockd: {e}");
            ExitCode::FAILURE
        }
    }
}
