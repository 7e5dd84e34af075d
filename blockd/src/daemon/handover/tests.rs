//! Two daemons, one image, and the death of either of them before and after each storage operation on the way.
//!
//! Daemons that died are dropped before the next one starts, so the locks of their images are gone, as they are on another
//! host: what keeps two from serving is the fence.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Barrier};

use blockd_api::AttachRequest;

use super::*;
use crate::daemon::crash::{Died, die_after};
use crate::daemon::state::StateDir;

/// More steps than anything here has.
const STEPS_MAX: u32 = 100;
const DISK: &str = "vm1";

/// The folder that the daemons share, and their state directories.
struct Bench {
    dir: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let image = std::fs::File::create(dir.path().join("disk.raw")).expect("created");
        image.set_len(1 << 20).expect("sized");
        Self { dir }
    }

    fn image(&self) -> PathBuf {
        self.dir.path().join("disk.raw")
    }

    fn daemon(&self, name: &str) -> Arc<Daemon> {
        let state = StateDir::open(&self.dir.path().join(name)).expect("the state directory opens");
        Daemon::start(state, &self.dir.path().join(format!("{name}.api")), Vec::new()).expect("it starts")
    }

    fn request(&self, name: &str, generation: Option<u64>) -> AttachRequest {
        let text = |path: PathBuf| path.to_str().expect("UTF-8").to_owned();
        AttachRequest {
            id: DISK.into(),
            image: text(self.image()),
            socket: text(self.dir.path().join(format!("{name}.sock"))),
            format: None,
            queues: 1,
            io_threads: 1,
            read_only: false,
            parents: Vec::new(),
            generation,
        }
    }

    /// A daemon that serves the image.
    fn serving(&self, name: &str) -> Arc<Daemon> {
        let daemon = self.daemon(name);
        daemon.attach(&self.request(name, None)).expect("attached");
        daemon
    }

    /// The first daemon has released the disk; the number for whoever takes it.
    fn released(&self) -> (Arc<Daemon>, u64) {
        let a = self.serving("a");
        let handover = release(&a).expect("released");
        (a, handover.generation)
    }

    fn take(&self, daemon: &Daemon, name: &str, generation: u64) -> Result<DiskInfo, DaemonError> {
        daemon.attach(&self.request(name, Some(generation)))
    }

    /// Does as people would who read what they are told: the number of an error, at this daemon.
    fn follow_advice(&self, daemon: &Daemon, name: &str, e: &DaemonError) {
        let number = e.message.split("--generation ").nth(1).expect("the way out is named");
        let number: u64 = number.split(' ').next().expect("a number").parse().expect("a number");
        self.take(daemon, name, number).unwrap_or_else(|again| panic!("{e}: was followed: {again}"));
    }
}

fn release(daemon: &Daemon) -> Result<Handover, DaemonError> {
    daemon.release(DISK, false, Duration::ZERO)
}

fn serves(daemon: &Daemon) -> bool {
    daemon.show(DISK).is_ok_and(|disk| !disk.released && disk.failed.is_none())
}

/// Does something that ends after so many steps with the death of the daemon; whether it came to its end before.
fn lives(steps: u32, act: impl FnOnce()) -> bool {
    die_after(Some(steps));
    let ended = catch_unwind(AssertUnwindSafe(act));
    die_after(None);
    match ended {
        Ok(()) => true,
        Err(died) if died.is::<Died>() => false,
        Err(failed) => std::panic::resume_unwind(failed),
    }
}

/// Repeats a history, with a death after one more step each time, until nobody dies any more.
fn each_death(mut history: impl FnMut(u32) -> bool) {
    for steps in 0..STEPS_MAX {
        if history(steps) {
            assert!(steps > 3, "there is something to die of");
            return;
        }
    }
    panic!("more than {STEPS_MAX} steps");
}

#[test]
fn a_release_that_is_interrupted_anywhere_leaves_one_who_serves_or_may() {
    for guessed in [false, true] {
        each_death(|steps| {
            let bench = Bench::new();
            let a = bench.serving("a");
            let lived = lives(steps, || drop(release(&a).expect("released")));
            drop(a);
            let (a, b) = (bench.daemon("a"), bench.daemon("b"));
            if guessed && serves(&a) {
                // Somebody who knows the number without having been answered.
                bench.take(&b, "b", 1).expect_err("it is served");
                assert!(!serves(&b) && serves(&a));
            }
            let handover = release(&a).expect("released, again or at last");
            assert_eq!(release(&a).expect("the same"), handover);
            bench.daemon_stays_away(&a, &b, &handover);
            lived
        });
    }
}

impl Bench {
    /// The second daemon takes the disk over; from then on the first one does not serve it, whatever happens to it.
    fn daemon_stays_away(&self, a: &Arc<Daemon>, b: &Daemon, handover: &Handover) {
        let taken = self.take(b, "b", handover.generation).expect("taken over");
        assert_eq!(taken.generation, handover.generation);
        let e = a.reclaim(DISK).expect_err("it is taken");
        assert!(e.message.contains("state directory") && e.message.contains("/b)"), "{e}");
        let e = a.attach(&self.request("a", None)).expect_err("it is released");
        assert!(e.message.contains("reclaim"), "{e}");
        self.take(a, "a", handover.generation).expect_err("it is taken");
        assert!(!serves(a) && serves(b));
        b.detach(DISK, false).expect("detached");
        let e = a.reclaim(DISK).expect_err("it was taken");
        self.follow_advice(a, "a", &e);
        assert!(serves(a));
    }
}

#[test]
fn a_take_over_that_is_interrupted_anywhere_can_be_finished_or_is_taken_back_but_not_both() {
    for back_first in [false, true] {
        each_death(|steps| {
            let bench = Bench::new();
            let (a, number) = bench.released();
            let b = bench.daemon("b");
            let lived = lives(steps, || drop(bench.take(&b, "b", number).expect("taken over")));
            drop(b);
            let b = bench.daemon("b");
            let take = |b: &Daemon| if serves(b) { Ok(()) } else { bench.take(b, "b", number).map(drop) };
            let (back, taken) = if back_first {
                let back = a.reclaim(DISK);
                (back, take(&b))
            } else {
                let taken = take(&b);
                (a.reclaim(DISK), taken)
            };
            assert_eq!(back.is_ok(), taken.is_err(), "one of them has it: {back:?}, {taken:?}");
            assert_eq!((serves(&a), serves(&b)), (back.is_ok(), taken.is_ok()));
            drop((a, b));
            let (a, b) = (bench.daemon("a"), bench.daemon("b"));
            assert_eq!((serves(&a), serves(&b)), (back.is_ok(), taken.is_ok()), "after a restart too");
            lived
        });
    }
}

#[test]
fn a_reclaim_that_is_interrupted_anywhere_can_be_finished_or_is_overtaken_but_not_both() {
    for back_first in [false, true] {
        each_death(|steps| {
            let bench = Bench::new();
            let (a, number) = bench.released();
            let lived = lives(steps, || drop(a.reclaim(DISK).expect("taken back")));
            drop(a);
            let (a, b) = (bench.daemon("a"), bench.daemon("b"));
            let back = |a: &Daemon| if serves(a) { Ok(()) } else { a.reclaim(DISK).map(drop) };
            let (back, taken) = if back_first {
                let back = back(&a);
                (back, bench.take(&b, "b", number))
            } else {
                let taken = bench.take(&b, "b", number);
                (back(&a), taken)
            };
            assert_eq!(back.is_ok(), taken.is_err(), "one of them has it: {back:?}, {taken:?}");
            assert_eq!((serves(&a), serves(&b)), (back.is_ok(), taken.is_ok()));
            if serves(&a) {
                let later = release(&a).expect("released");
                assert!(later.generation > number, "no number is used twice");
                bench.take(&b, "b", number).expect_err("that one is stale");
                bench.take(&b, "b", later.generation).expect("taken over");
            }
            lived
        });
    }
}

#[test]
fn a_disk_that_is_served_is_back_already() {
    let bench = Bench::new();
    let a = bench.serving("a");
    assert_eq!(a.reclaim(DISK).expect("never away").generation, 0);
    let handover = release(&a).expect("released");
    for _ in 0..3 {
        let back = a.reclaim(DISK).expect("taken back, or there");
        assert!(serves(&a) && back.generation == handover.generation);
    }
}

#[test]
fn what_a_taker_released_unused_is_taken_back_wherever_that_is_interrupted() {
    each_death(|steps| {
        let bench = Bench::new();
        let (a, number) = bench.released();
        let b = bench.daemon("b");
        bench.take(&b, "b", number).expect("taken over");
        a.reclaim(DISK).expect_err("it is held");
        release(&b).expect("released");
        let lived = lives(steps, || drop(a.reclaim(DISK).expect("taken back")));
        drop(a);
        let a = bench.daemon("a");
        let back = a.reclaim(DISK).expect("taken back, again or at last");
        assert_eq!(back.generation, number + 1);
        assert!(serves(&a) && !serves(&b));
        b.reclaim(DISK).expect_err("it has gone back");
        for stale in [number, number + 1] {
            bench.take(&b, "b", stale).expect_err("over");
        }
        let next = release(&a).expect("released").generation;
        bench.take(&b, "b", next).expect("taken over");
        assert!(!serves(&a) && serves(&b));
        lived
    });
}

#[test]
fn a_giving_back_that_is_interrupted_anywhere_leaves_one_who_serves_or_may() {
    each_death(|steps| {
        let bench = Bench::new();
        let (a, number) = bench.released();
        let b = bench.daemon("b");
        bench.take(&b, "b", number).expect("taken over");
        let lived = lives(steps, || drop(release(&b).expect("released")));
        drop(b);
        let b = bench.daemon("b");
        let held = serves(&b);
        assert_eq!(a.reclaim(DISK).is_err(), held, "unless it is still held");
        assert_ne!(serves(&a), serves(&b));
        if held {
            // Whoever might have used it before the restart is not known any more.
            release(&b).expect("released");
            let e = a.reclaim(DISK).expect_err("it may have been used");
            bench.follow_advice(&a, "a", &e);
            assert!(serves(&a) && !serves(&b));
        }
        lived
    });
}

#[test]
fn what_a_taker_opened_twice_is_not_known_to_be_unused() {
    let bench = Bench::new();
    let (a, number) = bench.released();
    let b = bench.daemon("b");
    bench.take(&b, "b", number).expect("taken over");
    drop(b);
    // It comes back without its state's record, and takes its own image again by the same number.
    std::fs::remove_dir_all(bench.dir.path().join("b").join("disks")).expect("removed");
    let b = bench.daemon("b");
    bench.take(&b, "b", number).expect("it is its own");
    release(&b).expect("released");
    let e = a.reclaim(DISK).expect_err("it may have been used");
    bench.follow_advice(&a, "a", &e);
}

#[test]
fn of_two_who_take_back_what_the_second_has_released_one_wins() {
    for _ in 0..20 {
        let bench = Bench::new();
        let (a, number) = bench.released();
        let b = bench.daemon("b");
        bench.take(&b, "b", number).expect("taken over");
        release(&b).expect("released");
        let start = Barrier::new(2);
        let (first, second) = std::thread::scope(|scope| {
            let other = scope.spawn(|| {
                start.wait();
                b.reclaim(DISK).is_ok()
            });
            start.wait();
            (a.reclaim(DISK).is_ok(), other.join().expect("it ends"))
        });
        assert_ne!(first, second, "one has it");
        assert_eq!((serves(&a), serves(&b)), (first, second));
    }
}

#[test]
fn what_went_on_from_its_taker_is_not_taken_back() {
    let bench = Bench::new();
    let (a, number) = bench.released();
    let (b, c) = (bench.daemon("b"), bench.daemon("c"));
    bench.take(&b, "b", number).expect("taken over");
    let next = release(&b).expect("released").generation;
    bench.take(&c, "c", next).expect("taken over");
    a.reclaim(DISK).expect_err("held");
    release(&c).expect("released");
    let e = a.reclaim(DISK).expect_err("released by one who has no handover of ours");
    assert!(e.kind == Kind::Locked && e.message.contains("/c)"), "{e}");
    bench.follow_advice(&a, "a", &e);
    a.reclaim(DISK).expect("it is there");
}

#[test]
fn a_take_over_that_fails_gives_the_image_back_wherever_it_is_interrupted() {
    each_death(|steps| {
        let bench = Bench::new();
        let (a, number) = bench.released();
        // A file in the socket's place: the image can be opened, and the disk not be served.
        let in_the_way = bench.dir.path().join("b.sock");
        std::fs::write(&in_the_way, "").expect("written");
        let b = bench.daemon("b");
        let lived = lives(steps, || {
            let e = bench.take(&b, "b", number).expect_err("the socket can't be bound");
            assert!(e.message.contains("b.sock"), "{e}");
        });
        drop(b);
        let b = bench.daemon("b");
        assert!(!serves(&b));
        match a.reclaim(DISK) {
            Ok(_) => drop(bench.take(&b, "b", number).expect_err("it was taken back")),
            Err(e) => {
                assert!(!lived, "what came to its end is undone: {e}");
                std::fs::remove_file(&in_the_way).expect("removed");
                bench.take(&b, "b", number).expect("the one who died is let in again");
            }
        }
        assert_ne!(serves(&a), serves(&b));
        lived
    });
}

#[test]
fn when_the_taker_is_gone_for_good_the_error_says_how_to_go_on() {
    each_death(|steps| {
        let bench = Bench::new();
        let (a, number) = bench.released();
        let b = bench.daemon("b");
        let lived = lives(steps, || drop(bench.take(&b, "b", number).expect("taken over")));
        drop(b);
        if let Err(e) = a.reclaim(DISK) {
            bench.follow_advice(&a, "a", &e);
        }
        assert!(serves(&a));
        // It was not gone for good.
        let b = bench.daemon("b");
        assert!(!serves(&b), "{:?}", b.show(DISK));
        if let Ok(disk) = b.show(DISK) {
            let why = disk.failed.expect("it says why");
            assert!(why.contains("/a)") && why.contains("--generation"), "{why}");
        }
        lived
    });
}

#[test]
fn a_detach_that_is_interrupted_anywhere_is_finished_by_the_next_one() {
    each_death(|steps| {
        let bench = Bench::new();
        let (_a, number) = bench.released();
        let b = bench.daemon("b");
        bench.take(&b, "b", number).expect("taken over");
        let lived = lives(steps, || b.detach(DISK, false).expect("detached"));
        drop(b);
        let b = bench.daemon("b");
        if b.show(DISK).is_ok() {
            assert!(serves(&b), "nobody else has it: {:?}", b.show(DISK));
            b.detach(DISK, false).expect("detached at last");
        }
        let c = bench.daemon("c");
        let disk = c.attach(&bench.request("c", None)).expect("free for anybody");
        assert!(disk.generation > number);
        assert!(bench.take(&b, "b", number).is_err() && bench.take(&b, "b", number + 1).is_err(), "stale");
        lived
    });
}

#[test]
fn of_many_who_take_at_once_one_wins() {
    for _ in 0..20 {
        let bench = Bench::new();
        let (a, number) = bench.released();
        let takers: Vec<_> = ["b", "c", "d"].map(|name| (name, bench.daemon(name))).into_iter().collect();
        let start = Barrier::new(takers.len() + 1);
        let mut won = std::thread::scope(|scope| {
            let (bench, start) = (&bench, &start);
            let takers = takers.iter().map(|(name, daemon)| {
                scope.spawn(move || {
                    start.wait();
                    bench.take(daemon, name, number).is_ok()
                })
            });
            let takers: Vec<_> = takers.collect();
            start.wait();
            let back = a.reclaim(DISK).is_ok();
            let mut won: Vec<_> = takers.into_iter().map(|taker| taker.join().expect("it ends")).collect();
            won.push(back);
            won
        });
        let serve = takers.iter().map(|(_, daemon)| serves(daemon)).chain([serves(&a)]);
        assert!(serve.eq(won.iter().copied()));
        won.retain(|won| *won);
        assert_eq!(won.len(), 1, "one has it");
    }
}

#[test]
fn an_ordinary_attach_is_refused_where_somebody_else_has_the_image_or_may_take_it() {
    let bench = Bench::new();
    let (a, number) = bench.released();
    let b = bench.daemon("b");
    let e = b.attach(&bench.request("b", None)).expect_err("released for somebody");
    assert!(e.kind == Kind::Locked && e.message.contains("blockctl disk reclaim vm1"), "{e}");
    bench.take(&b, "b", number).expect("taken over");
    drop(b);
    let c = bench.daemon("c");
    let e = c.attach(&bench.request("c", None)).expect_err("held by one who is down");
    assert!(e.message.contains("/b)") && e.message.contains(&format!("--generation {}", number + 1)), "{e}");
    bench.follow_advice(&c, "c", &e);
    let b = bench.daemon("b");
    let why = b.show(DISK).expect("listed").failed.expect("not served");
    assert!(why.contains("/c)"), "{why}");
    drop((a, b, c));
}

#[test]
fn a_daemon_whose_fence_was_removed_does_not_guess() {
    let bench = Bench::new();
    let (_a, number) = bench.released();
    let b = bench.daemon("b");
    bench.take(&b, "b", number).expect("taken over");
    drop(b);
    std::fs::remove_file(fence::path_of(&bench.image())).expect("removed");
    let b = bench.daemon("b");
    let why = b.show(DISK).expect("listed").failed.expect("not served");
    assert!(why.contains("is gone") && why.contains(".disk.raw.blockd-owner"), "{why}");
    bench.follow_advice(&b, "b", &DaemonError::new(Kind::Locked, why));
    assert!(serves(&b));
}

#[test]
fn a_damaged_fence_is_believed_by_nobody() {
    let bench = Bench::new();
    let (a, number) = bench.released();
    let path = fence::path_of(&bench.image());
    let whole = std::fs::read_to_string(&path).expect("read");
    let later = whole.replacen("\"version\": 1", "\"version\": 2", 1);
    let cut = whole[..whole.len() / 2].to_owned();
    let far = whole.replacen("\"generation\": 0", "\"generation\": 18446744073709551615", 1);
    let unprintable = whole.replacen("\"vm1\"", "\"vm1\\u001b[2J\"", 1);
    assert!(far != whole && unprintable != whole);
    for damaged in ["", "{}", &later, &cut, &far, &unprintable, &"x".repeat(1 << 20)] {
        std::fs::write(&path, damaged).expect("written");
        let b = bench.daemon("b");
        for e in [
            a.reclaim(DISK).expect_err("refused"),
            bench.take(&b, "b", number).expect_err("refused"),
            b.attach(&bench.request("b", None)).expect_err("refused"),
        ] {
            assert!(e.kind == Kind::Corrupt && e.message.contains("remove this file"), "{e}");
        }
    }
    std::fs::write(&path, whole).expect("written");
    a.reclaim(DISK).expect("as before");
}

#[test]
fn a_link_in_a_fences_place_is_not_followed() {
    let bench = Bench::new();
    let path = fence::path_of(&bench.image());
    let elsewhere = bench.dir.path().join("elsewhere");
    std::fs::write(&elsewhere, "not to be touched").expect("written");
    std::os::unix::fs::symlink(&elsewhere, &path).expect("linked");
    let a = bench.daemon("a");
    a.attach(&bench.request("a", None)).expect_err("refused");
    assert_eq!(std::fs::read_to_string(&elsewhere).expect("read"), "not to be touched");
}

#[test]
fn links_to_an_image_lead_to_its_fence() {
    let bench = Bench::new();
    let link = bench.dir.path().join("link.raw");
    std::os::unix::fs::symlink(bench.image(), &link).expect("linked");
    assert_eq!(fence::path_of(&link), fence::path_of(&bench.image()));
    assert_eq!(fence::path_of(Path::new("/nowhere/disk.vhd")), Path::new("/nowhere/.disk.vhd.blockd-owner"));
}

#[test]
fn disks_that_are_only_read_are_handed_over_without_a_fence() {
    let bench = Bench::new();
    let a = bench.daemon("a");
    let read_only = |name, generation| AttachRequest { read_only: true, ..bench.request(name, generation) };
    a.attach(&read_only("a", None)).expect("attached");
    let handover = release(&a).expect("released");
    assert!(handover.read_only && !fence::path_of(&bench.image()).exists());
    let b = bench.daemon("b");
    b.attach(&read_only("b", Some(handover.generation))).expect("taken over");
    a.reclaim(DISK).expect("nobody is in the other's way");
    assert!(serves(&a) && serves(&b));
}

#[test]
fn a_guests_write_cache_goes_with_its_disk() {
    let bench = Bench::new();
    let a = bench.serving("a");
    a.state.set_write_through(DISK, true).expect("remembered");
    let handover = release(&a).expect("released");
    assert!(!handover.write_cache);
    let b = bench.daemon("b");
    bench.take(&b, "b", handover.generation).expect("taken over");
    assert!(b.state.is_write_through(DISK));
    let handover = release(&b).expect("released");
    bench.take(&a, "a", handover.generation).expect("taken over");
    assert!(a.state.is_write_through(DISK));
    b.state.set_write_through(DISK, false).expect("remembered");
}

#[test]
fn what_was_released_stays_so_whatever_the_command_line_says() {
    let bench = Bench::new();
    let (a, number) = bench.released();
    drop(a);
    let state = StateDir::open(&bench.dir.path().join("a")).expect("it opens");
    let spec = state.disks().expect("listed")[DISK].as_ref().expect("sound").spec.clone();
    let asked = vec![crate::daemon::config::Asked { spec, typed: true }];
    let a = Daemon::start(state, &bench.dir.path().join("a.api"), asked).expect("it starts");
    assert!(a.show(DISK).expect("listed").released);
    let b = bench.daemon("b");
    bench.take(&b, "b", number).expect("taken over");
}

#[test]
fn a_disk_whose_fence_cannot_be_written_is_served_on() {
    let bench = Bench::new();
    // The name of the fence would be too long for any file system.
    let image = bench.dir.path().join(format!("{}.raw", "x".repeat(250)));
    std::fs::rename(bench.image(), &image).expect("renamed");
    let a = bench.daemon("a");
    let image = image.to_str().expect("UTF-8").to_owned();
    a.attach(&AttachRequest { image, ..bench.request("a", None) }).expect("attached");
    let e = release(&a).expect_err("refused");
    assert!(e.message.contains("is served as before") && e.message.contains(".blockd-owner"), "{e}");
    assert!(serves(&a));
}

#[test]
fn numbers_that_nobody_counts_to_are_refused() {
    let bench = Bench::new();
    let b = bench.daemon("b");
    assert_eq!(bench.take(&b, "b", u64::MAX).expect_err("refused").kind, Kind::Invalid);
    bench.take(&b, "b", crate::daemon::names::GENERATION_MAX).expect("the highest");
    let handover = release(&b).expect("released");
    b.reclaim(DISK).expect("taken back");
    assert_eq!(b.show(DISK).expect("listed").generation, handover.generation);
}

#[test]
fn who_only_reads_is_kept_off_an_image_that_another_one_has() {
    let bench = Bench::new();
    let (a, number) = bench.released();
    let c = bench.daemon("c");
    let read_only = AttachRequest { read_only: true, ..bench.request("c", None) };
    assert_eq!(c.attach(&read_only).expect_err("released").kind, Kind::Locked);
    let b = bench.daemon("b");
    bench.take(&b, "b", number).expect("taken over");
    drop(b);
    assert_eq!(c.attach(&read_only).expect_err("held").kind, Kind::Locked);
    let b = bench.daemon("b");
    b.detach(DISK, false).expect("detached");
    c.attach(&read_only).expect("free");
    drop((a, c));
}
