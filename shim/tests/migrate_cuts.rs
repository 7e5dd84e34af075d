//! The connection is cut at each message: one side runs the machine afterwards, its memory is right, and the next attempt works.

mod migrate_fake;

use std::collections::BTreeSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::time::Duration;

use migrate_fake::proxy::{Cut, Proxy};
use migrate_fake::*;
use shim::machine::SourceMachine;
use shim::migrate::{Address, CancelToken, Resolve, Resolved, Security, SendError};

/// More messages than a small machine's migration has.
const MESSAGES_MAX: u64 = 200;
/// Attempts at once: most of their time they wait.
const AT_ONCE: usize = 8;

/// Cuts at the k-th message for each k, until one attempt has fewer.
fn at_each_message(test: impl Fn(u64) -> Option<u16> + Sync) -> BTreeSet<u16> {
    let (next, done) = (AtomicU64::new(0), AtomicBool::new(false));
    let kinds = Mutex::new(BTreeSet::new());
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                while !done.load(SeqCst) {
                    let at = next.fetch_add(1, SeqCst);
                    assert!(at < MESSAGES_MAX);
                    match test(at) {
                        Some(kind) => drop(kinds.lock().expect("nobody panics with it").insert(kind)),
                        None => done.store(true, SeqCst),
                    }
                }
            });
        }
    });
    kinds.into_inner().expect("nobody panics with it")
}

/// One migration with a cut. The kind of the message at which it was cut, if it came to that.
fn cut_once(how: Cut, at: u64, stay_down: bool) -> Option<u16> {
    let (world, dir) = (World::new(), tempfile::tempdir().expect("dir"));
    let source = FakeSource::new(&world, 4 << 20, Log::Manual, 300);
    let Address::Unix(path) = unix(dir.path()) else { unreachable!() };
    let target = Target::start(&world, &Address::Unix(path.clone()), &Security::default(), dir.path());
    let proxy = Proxy::start(dir.path(), &path, how, at, stay_down);
    let mut options = options(&Address::Unix(proxy.path.clone()), dir.path());
    options.connections = 2;
    options.reconnect = Duration::from_millis(if stay_down { 100 } else { 3000 });
    let mut sent = send(&source, &options).map(drop);
    world.assert_rules_kept();
    let kind = proxy.kind();
    if let Err(SendError::Unresolved(_)) = &sent {
        assert!(stay_down, "cut at {at}: {sent:?}");
        assert_ne!(world.runs(), 's', "cut at {at}");
        assert!(!source.ended());
        proxy.heal();
        let resolved =
            shim::migrate::resolve(Some(&source), "vm one", &options, Resolve::Ask, &CancelToken::new());
        sent = match resolved.unwrap_or_else(|error| panic!("cut at {at}, kind {kind:?}: {error}")) {
            Resolved::Here => Err(SendError::Cancelled),
            Resolved::Gone => Ok(()),
        };
    }
    proxy.heal();
    if let Err(error) = sent {
        assert!(proxy.happened(), "{error}");
        source.assert_untouched();
        send(&source, &options).unwrap_or_else(|error| panic!("after a cut at {at}, kind {kind:?}: {error}"));
    }
    assert!(source.ended(), "cut at {at}");
    let received = target.received();
    assert_eq!(world.runs(), 't', "cut at {at}");
    assert_same(source.ram(), received.machine.ram());
    world.assert_rules_kept();
    kind
}

#[test]
fn a_cut_at_any_message_that_heals_leaves_one_machine_and_the_next_attempt_works() {
    for how in [Cut::Before, Cut::Within, Cut::After] {
        let kinds = at_each_message(|at| cut_once(how, at, false));
        // Hello to running.
        assert!(
            kinds.is_superset(&BTreeSet::from([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14])),
            "{kinds:?}"
        );
    }
}

#[test]
fn a_cut_at_any_message_that_lasts_is_settled_once_the_sides_see_each_other_again() {
    for how in [Cut::Before, Cut::After] {
        let kinds = at_each_message(|at| cut_once(how, at, true));
        assert!(kinds.is_superset(&BTreeSet::from([11, 12, 13, 14])), "{kinds:?}");
    }
}
