//! `blockd`: serves images over vhost-user-blk and moves them while they are used.

use std::process::ExitCode;

use blockd::daemon::config::{Args, Config, Surroundings};
use blockd::daemon::server;
use clap::Parser;

/// Wrong usage, as `clap` has it too.
const USAGE: u8 = 2;

/// A panic in a thread that guests' data goes through means that something is not as the code believes: nothing more may
/// be written on such a belief. The process ends at once, and its next start recovers as after any crash. A panic in a
/// request to the control API fails that request only.
fn end_on_panics_of_the_data_path() {
    let tell = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        tell(panic);
        let thread = std::thread::current();
        let name = thread.name().unwrap_or_default();
        if ["io-", "move-", "vhost-", "maintenance"].iter().any(|prefix| name.starts_with(prefix)) {
            eprintln!(
                "blockd: {name} has panicked: the daemon ends; start it again, it recovers its disks and moves"
            );
            std::process::abort();
        }
    }));
}

fn main() -> ExitCode {
    end_on_panics_of_the_data_path();
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
