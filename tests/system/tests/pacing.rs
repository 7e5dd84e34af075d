//! Moves beside a guest whose latency has a budget.
//!
//! What a budget does to the guest is a matter of the machine, and measured elsewhere. Here it is looked at whether it is
//! kept in mind at all: one that nothing could keep slows a move down to its floor and no further, with every sector
//! right, and it is there again after the daemon died.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::path::PathBuf;
use std::time::Instant;

use blockd_api::{Job, JobSettings, MoveRequest};
use system_tests::PATIENCE;
use system_tests::daemon::Program;
use system_tests::{Daemon, FrontEnd, Image, LoadOptions, Mix, Options, RunningLoad, VerifiedLoad};

const SIZE: u64 = 12 << 20;
/// The rate to which a budget slows a move down, in bytes a second.
const FLOOR: f64 = (8 << 20) as f64;
/// No request takes less time.
const TINY_US: u64 = 1;

struct Bench {
    daemon: Daemon,
    moves: u32,
}

impl Bench {
    /// A disk, much of which was written to, and the load on it; nothing with the reference, which moves in another way.
    fn new() -> Option<(Self, RunningLoad)> {
        if Daemon::program() == Program::Reference {
            println!("SKIPPED: the reference has another way of moving");
            return None;
        }
        let daemon = Daemon::with_disk(Image::Raw, SIZE, 1).unwrap();
        let front = FrontEnd::start(&daemon.socket("disk"), Options::default()).unwrap();
        // Writes are the fewer, so that not all has to be copied twice.
        let mix = Mix { read: 80, write: 18, zero: 0, discard: 0, flush: 2 };
        let options = LoadOptions { depth: 4, mix, ..LoadOptions::new(81, SIZE / 512) };
        let mut load = VerifiedLoad::new(front, options).unwrap();
        load.run_requests(4000).unwrap();
        load.set_rate(Some(1000.0));
        Some((Self { daemon, moves: 0 }, load.spawn()))
    }

    fn start(&mut self, change: impl FnOnce(&mut MoveRequest)) -> Job {
        self.moves += 1;
        let to = self.daemon.dir().join(format!("moved-{}.raw", self.moves));
        let mut request: MoveRequest =
            serde_json::from_value(serde_json::json!({ "disks": ["disk"], "to": to })).unwrap();
        change(&mut request);
        self.daemon.start_move(&request).unwrap()
    }

    fn wait(&self, job: &Job, what: impl Fn(&Job) -> bool) -> Job {
        self.daemon.wait_job(&job.job, PATIENCE, what).unwrap()
    }

    /// A move from its start to its end, and how long it took.
    fn moved(&mut self, change: impl FnOnce(&mut MoveRequest)) -> (Job, f64) {
        let start = Instant::now();
        let job = self.start(change);
        let done = self.wait(&job, |job| job.state == "done");
        (done, start.elapsed().as_secs_f64())
    }

    fn finish(mut self, load: RunningLoad) {
        load.wait_requests(200, PATIENCE).unwrap();
        let mut load = load.stop().unwrap();
        load.verify_all().unwrap();
        let image = PathBuf::from(self.daemon.disk("disk").unwrap().image);
        assert!(self.daemon.terminate().unwrap(), "the daemon failed at its end");
        load.check_file(&image).unwrap();
    }
}

#[test]
fn a_budget_that_nothing_can_keep_slows_a_move_down_to_its_floor_and_no_further() {
    let Some((mut bench, load)) = Bench::new() else { return };
    let (free, free_s) = bench.moved(|_| ());
    assert_eq!(free.max_guest_p99_us, None);
    let (paced, paced_s) = bench.moved(|r| r.max_guest_p99_us = Some(TINY_US));
    assert_eq!(paced.max_guest_p99_us, Some(TINY_US));
    assert!(paced.guest_p99_us > Some(TINY_US), "{paced:?}");
    let at_floor_s = (paced.bytes_copied + paced.bytes_verified) as f64 / FLOOR;
    println!(
        "without a budget {free_s:.2} s, with one {paced_s:.2} s; at the floor it would be {at_floor_s:.2} s"
    );
    // Comparing is held back as well as copying, so both together take longer than either. The move without a budget tells
    // nothing: the machine may be busy with something else while it is made.
    assert!(paced_s > 0.6 * at_floor_s, "{paced_s} s, where {at_floor_s} s were expected");
    assert!(paced_s < 5.0 * at_floor_s + 60.0, "{paced_s} s, where {at_floor_s} s were expected");
    bench.finish(load);
}

#[test]
fn a_budget_is_given_and_taken_away_on_the_way() {
    let Some((mut bench, load)) = Bench::new() else { return };
    let job = bench.start(|r| r.max_guest_p99_us = Some(TINY_US));
    let set = |max_guest_p99_us| {
        let settings = JobSettings { max_guest_p99_us, ..JobSettings::default() };
        let path = format!("/v1/jobs/{}", job.job);
        bench.daemon.call::<Job>("PATCH", &path, Some(&settings)).unwrap().max_guest_p99_us
    };
    assert_eq!(set(Some(5_000_000)), Some(5_000_000));
    assert_eq!(set(Some(0)), None);
    assert_eq!(set(Some(TINY_US)), Some(TINY_US));
    assert_eq!(set(None), Some(TINY_US), "what is not named stays");
    // Whoever asks for nothing is not waited for.
    load.set_rate(Some(1.0));
    bench.wait(&job, |job| job.state == "done");
    load.set_rate(None);
    bench.finish(load);
}

#[test]
fn a_budget_outlives_the_daemon() {
    let Some((mut bench, load)) = Bench::new() else { return };
    let job = bench.start(|r| {
        r.max_guest_p99_us = Some(TINY_US);
        r.switch = "manual".into();
    });
    bench.wait(&job, |job| job.bytes_copied > 0);
    bench.daemon.kill9();
    bench.daemon.restart().unwrap();
    load.wait_reconnects(1, PATIENCE).unwrap();
    let again = bench.wait(&job, |job| job.bytes_copied > 0);
    assert_eq!(again.max_guest_p99_us, Some(TINY_US));
    bench.daemon.job_verb(&job.job, "cancel").unwrap();
    bench.wait(&job, |job| job.state == "cancelled");
    bench.finish(load);
}
