//! The tests' own load: does it get on, and does it see what it should?
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::time::Instant;

use system_tests::daemon::Program;
use system_tests::{Daemon, FrontEnd, Image, LoadOptions, Mix, Options, VerifiedLoad};

#[test]
fn a_verified_load_runs_on_every_format_and_agrees_with_the_file() {
    for kind in Image::ALL {
        if !Image::formats().iter().any(|format| format.name() == kind.name()) {
            continue;
        }
        let mut daemon = Daemon::with_disk(kind, 64 << 20, 2).unwrap();
        let front =
            FrontEnd::start(&daemon.socket("disk"), Options { queues: 2, ..Options::default() }).unwrap();
        let mut options = LoadOptions::new(7, 64 << 11);
        if daemon.runs() == Program::Reference {
            options.mix = Mix::PLAIN;
        }
        let mut load = VerifiedLoad::new(front, options).unwrap();
        let start = Instant::now();
        load.run_requests(20_000).unwrap();
        println!("{kind:?}: {} in {:.1?}: {}", load.counts(), start.elapsed(), load.phases()[0].1);
        load.verify_all().unwrap();
        // Nobody else may open the image while it is served.
        daemon.terminate().unwrap();
        let raw = daemon.dir().join("copy.raw");
        kind.to_raw(&daemon.disks()[0].image, &raw).unwrap();
        load.check_file(&raw).unwrap();
    }
}
