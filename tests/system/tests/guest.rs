//! A real Linux guest on the daemon's disks.

use std::path::Path;
use std::time::{Duration, Instant};

use system_tests::guest::{Guest, GuestOptions, Setup};
use system_tests::{Daemon, Image};

const MINUTE: Duration = Duration::from_secs(60);

/// SHA-256 of an image's content, computed by programs that are not of this project.
fn content_sum(kind: Image, image: &Path, scratch: &Path) -> String {
    kind.to_raw(image, scratch).unwrap();
    let output = std::process::Command::new("sha256sum").arg(scratch).output().unwrap();
    String::from_utf8(output.stdout).unwrap().split_whitespace().next().unwrap().to_owned()
}

#[test]
fn a_guest_makes_a_file_system_and_reads_back_what_it_wrote() {
    let Some(setup) = Setup::find_or_skip("a guest on every format") else { return };
    for (kind, cpus, queues) in [(Image::Raw, 1, 1), (Image::DynamicVhd, 1, 1), (Image::DynamicVhdx, 2, 2)] {
        let start = Instant::now();
        let mut daemon = Daemon::with_disk(kind, 128 << 20, queues as u16).unwrap();
        let options = GuestOptions { cpus, queues, ..GuestOptions::new("guest", "files") };
        let mut guest = Guest::start(&setup, daemon.dir(), &daemon.socket("disk"), &options).unwrap();
        println!("{kind:?}: {}", guest.wait_for("disk ", MINUTE).unwrap());
        let sum = guest.wait_for("device ", 2 * MINUTE).unwrap();
        guest.wait_for("PASS", MINUTE).unwrap();
        guest.wait_end(MINUTE).unwrap();
        let ended = daemon.terminate().unwrap();
        assert!(
            ended || daemon.runs() != system_tests::daemon::Program::Blockd,
            "the daemon failed at its end"
        );
        let image = &daemon.disks()[0].image;
        assert_eq!(
            content_sum(kind, image, &daemon.dir().join("raw")),
            sum,
            "the file holds what the guest read"
        );
        kind.check(image).unwrap();
        println!("{kind:?}: {options:?} done in {:.1?}", start.elapsed());
    }
}
