//! Many histories, each from its seed.
//!
//! `MIRROR_SIM_HISTORIES` says how many (100000), `MIRROR_SIM_FIRST` where to begin (0). `MIRROR_SIM_SEED` runs one
//! alone, and tells every event and action of it.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use mirror_tests::{Tally, run};

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name} is {text:?}: it has to be a number")))
}

#[test]
fn every_history_keeps_every_write() {
    if let Some(seed) = number("MIRROR_SIM_SEED") {
        eprintln!("{:#?}", run(seed, true));
        return;
    }
    let first = number("MIRROR_SIM_FIRST").unwrap_or(0);
    let count = number("MIRROR_SIM_HISTORIES").unwrap_or(100_000);
    let (next, has_failed) = (AtomicU64::new(first), AtomicBool::new(false));
    let work = || {
        let mut tally = Tally::default();
        while !has_failed.load(Ordering::Relaxed) {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= first + count {
                break;
            }
            match catch_unwind(AssertUnwindSafe(|| run(seed, false))) {
                Ok(one) => tally.add(&one),
                Err(_) => {
                    has_failed.store(true, Ordering::Relaxed);
                    eprintln!("to see this history again: MIRROR_SIM_SEED={seed} cargo test -p mirror-tests");
                }
            }
        }
        tally
    };
    let mut tally = Tally::default();
    std::thread::scope(|scope| {
        let threads = [scope.spawn(work), scope.spawn(work)];
        for thread in threads {
            tally.add(&thread.join().expect("panics of histories are caught"));
        }
    });
    eprintln!("{tally:#?}");
    assert!(!has_failed.load(Ordering::Relaxed), "a history failed: its seed is above");
    if count >= 20_000 {
        assert_rare_things_happened(&tally);
    }
}

/// A simulator that no longer reaches the rare cases proves nothing about them.
fn assert_rare_things_happened(tally: &Tally) {
    let rare = [
        ("moves done", tally.done),
        ("cancelled", tally.cancelled),
        ("failed", tally.failed),
        ("power cuts", tally.power_cuts),
        ("the source after a death", tally.source_after_death),
        ("the target after a death", tally.target_after_death),
        ("pauses by the target", tally.pauses_by_target),
        ("writes to both", tally.writes_to_both),
        ("writes to the source only", tally.writes_to_source_only),
        ("results held until the commit is known", tally.held),
        ("differences while guests write", tally.differences),
        ("mismatches found", tally.mismatches_found),
        ("failed records", tally.records_failed),
        ("late workers", tally.stragglers),
        ("copies held back", tally.held_back),
    ];
    for (what, times) in rare {
        assert!(times >= 20, "{what}: only {times} in {} histories", tally.histories);
    }
}

#[test]
fn a_seed_is_always_the_same_history() {
    for seed in 0..100 {
        assert_eq!(run(seed, false), run(seed, false), "seed {seed}");
    }
}
