//! Live moves on a file system that can share blocks share them, and lose nothing of what the guest writes meanwhile.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use blockd_api::MoveRequest;
use formats_tests::Xfs;
use system_tests::PATIENCE;
use system_tests::daemon::Program;
use system_tests::{Daemon, FrontEnd, Image, LoadOptions, Mix, Options, VerifiedLoad};

const SIZE: u64 = 48 << 20;

/// Moves a disk that is much written to, beside a guest of this many requests a second. Answers by how much that made the file
/// system fuller, and what the source takes.
fn moved(xfs: &Xfs, kind: Image, rate: f64) -> (u64, u64) {
    let mut daemon = Daemon::with_disk_in(&xfs.path(), kind, SIZE, 1).unwrap();
    let front = FrontEnd::start(&daemon.socket("disk"), Options::default()).unwrap();
    let mix = Mix { read: 20, write: 78, zero: 0, discard: 0, flush: 2 };
    let options = LoadOptions { depth: 8, mix, ..LoadOptions::new(5, SIZE / 512) };
    let mut load = VerifiedLoad::new(front, options).unwrap();
    load.run_requests(8000).unwrap();
    load.set_rate(Some(rate));
    let (empty, source) = (xfs.used().unwrap(), daemon.disk("disk").unwrap().image);
    let load = load.spawn();

    let to = daemon.dir().join(format!("moved.{}", kind.name()));
    let request = serde_json::json!({ "disks": ["disk"], "to": to, "keep_source": true });
    let job = daemon.start_move(&serde_json::from_value::<MoveRequest>(request).unwrap()).unwrap();
    daemon.wait_job(&job.job, PATIENCE, |job| job.state == "done").unwrap();
    let taken = xfs.used().unwrap().saturating_sub(empty);

    load.set_rate(None);
    load.wait_requests(500, PATIENCE).unwrap();
    let mut load = load.stop().unwrap();
    load.verify_all().unwrap();
    assert!(daemon.terminate().unwrap(), "the daemon failed at its end");
    if kind == Image::Raw {
        load.check_file(&to).unwrap();
    }
    let meta = std::fs::metadata(source).unwrap();
    (taken, std::os::unix::fs::MetadataExt::blocks(&meta) * 512)
}

#[test]
fn a_live_move_shares_blocks_and_loses_nothing() {
    if Daemon::program() == Program::Reference {
        println!("SKIPPED: the reference has another way of moving");
        return;
    }
    let Some(xfs) = Xfs::mount() else { return };
    for kind in [Image::Raw, Image::DynamicVhdx] {
        let (taken, source) = moved(&xfs, kind, 1.0);
        println!("{kind:?}: {} KiB more, where the source has {} KiB", taken >> 10, source >> 10);
        assert!(source > SIZE / 4 && taken < source / 2, "{kind:?}: {taken} bytes of {source}");
    }
    // Much is written while blocks are shared.
    for kind in [Image::Raw, Image::DynamicVhdx, Image::DynamicVhd] {
        moved(&xfs, kind, 5000.0);
    }
}
