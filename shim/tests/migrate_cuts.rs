//! The connection is cut at each message: one side runs the machine afterwards, its memory is right, and the next attempt works.

mod migrate_fake;

use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use migrate_fake::proxy::{Cut, Place, Proxy};
use migrate_fake::*;
use shim::machine::SourceMachine;
use shim::migrate::{Address, CancelToken, Resolve, Resolved, Security, SendError};

/// Attempts at once: most of their time they wait.
const AT_ONCE: usize = 8;

/// Cuts at each of these places.
fn at_each_place(places: &[Place], test: impl Fn(Place) -> bool + Sync) {
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                while let Some(place) = places.get(next.fetch_add(1, SeqCst)) {
                    let happened = test(*place);
                    assert!(happened || !matches!(place, Place::Kind(_, 0)), "there is no {place:?}");
                }
            });
        }
    });
}

/// The first of each kind, from hello to running, and the second where there are two.
fn kinds() -> Vec<Place> {
    let seconds = [1, 2, 6, 7, 8, 9].map(|kind| Place::Kind(kind, 1));
    (1..=14).map(|kind| Place::Kind(kind, 0)).chain(seconds).collect()
}

/// All messages of a small machine's migration: it has more than these only if it goes on for more rounds.
fn messages() -> Vec<Place> {
    (0..45).map(Place::Message).collect()
}

/// One migration with a cut. Whether it came to that.
fn cut_once(how: Cut, at: Place, stay_down: bool) -> bool {
    cut(&[(how, at)], stay_down) == 1
}

/// One migration with cuts at these places. How many there were.
fn cut(at: &[(Cut, Place)], stay_down: bool) -> usize {
    let (world, dir) = (World::new(), tempfile::tempdir().expect("dir"));
    let source = FakeSource::new(&world, 4 << 20, Log::Manual, 300);
    let Address::Unix(path) = unix(dir.path()) else { unreachable!() };
    let target = Target::start(&world, &Address::Unix(path.clone()), &Security::default(), dir.path());
    let proxy = Proxy::start(dir.path(), &path, at.to_vec(), stay_down);
    let mut options = options(&Address::Unix(proxy.path.clone()), dir.path());
    options.connections = 2;
    options.reconnect = Duration::from_millis(if stay_down { 100 } else { 3000 });
    let mut sent = send(&source, &options).map(drop);
    world.assert_rules_kept();
    if let Err(SendError::Unresolved(_)) = &sent {
        assert!(stay_down, "cut at {at:?}: {sent:?}");
        assert_ne!(world.runs(), 's', "cut at {at:?}");
        assert!(!source.ended());
        proxy.heal();
        let resolved =
            shim::migrate::resolve(Some(&source), "vm one", &options, Resolve::Ask, &CancelToken::new());
        sent = match resolved.unwrap_or_else(|error| panic!("cut at {at:?}: {error}")) {
            Resolved::Here => Err(SendError::Cancelled),
            Resolved::Gone => Ok(()),
        };
    }
    proxy.heal();
    if let Err(error) = sent {
        assert!(proxy.cuts() > 0, "{error}");
        source.assert_untouched();
        send(&source, &options).unwrap_or_else(|error| panic!("after a cut at {at:?}: {error}"));
    }
    assert!(source.ended(), "cut at {at:?}");
    let received = target.received();
    assert_eq!(world.runs(), 't', "cut at {at:?}");
    assert_same(source.ram(), received.machine.ram());
    world.assert_rules_kept();
    proxy.cuts()
}

#[test]
fn a_cut_at_any_kind_of_message_leaves_one_machine_and_the_next_attempt_works() {
    for how in [Cut::Before, Cut::Within, Cut::After] {
        at_each_place(&kinds(), |at| cut_once(how, at, false));
    }
}

#[test]
fn a_cut_at_any_message_leaves_one_machine_and_the_next_attempt_works() {
    for how in [Cut::Before, Cut::After] {
        at_each_place(&messages(), |at| cut_once(how, at, false));
    }
}

#[test]
fn a_cut_that_lasts_is_settled_once_the_sides_see_each_other_again() {
    for how in [Cut::Before, Cut::After] {
        at_each_place(&kinds(), |at| cut_once(how, at, true));
    }
}

#[test]
fn a_cut_while_the_sides_find_out_who_runs_the_machine_is_settled_as_well() {
    // With the commit or its answer, and then at any message of the question, or the second commit or answer.
    let mut both = Vec::new();
    for first in [(Cut::Before, 13), (Cut::After, 13), (Cut::Before, 14)] {
        for second in [1, 2, 18, 19, 13, 14] {
            for how in [Cut::Before, Cut::After] {
                both.push([(first.0, Place::Kind(first.1, 0)), (how, Place::Kind(second, 0))]);
            }
        }
    }
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                while let Some(places) = both.get(next.fetch_add(1, SeqCst)) {
                    assert!(cut(places, false) >= 1, "{places:?}");
                }
            });
        }
    });
}

#[test]
fn a_target_left_prepared_takes_the_machine_after_any_number_of_attempts_that_did_not_reach_it() {
    let (world, dir) = (World::new(), tempfile::tempdir().expect("dir"));
    let source = FakeSource::new(&world, 4 << 20, Log::Manual, 300);
    let Address::Unix(path) = unix(dir.path()) else { unreachable!() };
    let target = Target::start(&world, &Address::Unix(path.clone()), &Security::default(), dir.path());
    let proxy = Proxy::start_at_kind(dir.path(), &path, Cut::Before, 12);
    let options = options(&Address::Unix(proxy.path.clone()), dir.path());
    for _ in 0..3 {
        assert!(matches!(send(&source, &options), Err(SendError::Failed(_))));
        source.assert_untouched();
    }
    target.await_event(|event| matches!(event, shim::migrate::TargetEvent::Prepared));
    proxy.heal();
    send(&source, &options).expect("moved");
    assert_same(source.ram(), target.received().machine.ram());
    world.assert_rules_kept();
}

#[test]
fn a_refusal_that_could_not_be_written_down_is_told_all_the_same() {
    let (world, dir) = (World::new(), tempfile::tempdir().expect("dir"));
    let source = FakeSource::new(&world, 4 << 20, Log::Manual, 300);
    let Address::Unix(path) = unix(dir.path()) else { unreachable!() };
    let target = Target::start(&world, &Address::Unix(path.clone()), &Security::default(), dir.path());
    // That it runs is written down, but then it does not, and the word of that is lost.
    world.fail("target resume");
    let records = dir.path().join("target");
    let broken = records.clone();
    *world.before_return.lock().expect("nobody panics with it") = Some(Box::new(move || {
        for entry in std::fs::read_dir(&broken).expect("listed").flatten() {
            // Nothing can be written where a directory is.
            std::fs::create_dir(entry.path().with_extension("new")).expect("made");
        }
    }));
    let proxy = Proxy::start(dir.path(), &path, vec![(Cut::Before, Place::Kind(16, 0))], false);
    let options = options(&Address::Unix(proxy.path.clone()), dir.path());
    let error = send(&source, &options).expect_err("refused");
    assert!(matches!(error, SendError::Failed(_)), "{error}");
    assert_eq!(proxy.cuts(), 1);
    source.assert_untouched();
    // As long as nothing can be written no machine is taken.
    world.heal();
    let error = send(&source, &options).expect_err("refused").to_string();
    assert!(error.contains("state directory"), "{error}");
    for entry in std::fs::read_dir(&records).expect("listed").flatten() {
        if entry.path().is_dir() {
            std::fs::remove_dir(entry.path()).expect("removed");
        }
    }
    let until = std::time::Instant::now() + Duration::from_secs(60);
    while let Err(error) = send(&source, &options) {
        assert!(std::time::Instant::now() < until, "{error}");
        std::thread::sleep(Duration::from_millis(100));
    }
    assert_same(source.ram(), target.received().machine.ram());
    world.assert_rules_kept();
}
