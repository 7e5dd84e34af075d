//! The machine runs before all of its pages are there, and never sees a wrong one.

mod migrate_fake;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::time::{Duration, Instant};

use migrate_fake::proxy::{Cut, Place, Proxy};
use migrate_fake::*;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use shim::machine::SourceMachine;
use shim::memory::GuestRam;
use shim::migrate::{
    Address, CancelToken, Compression, Resolve, Resolved, Security, SendError, SendOptions, TargetEvent,
};
use shim::pages::PAGE_BYTES;

const BYTES: u64 = 16 << 20;

fn has_userfaultfd() -> bool {
    let there = Path::new("/dev/userfaultfd").exists();
    if !there {
        eprintln!("SKIPPED: there is no /dev/userfaultfd");
    }
    there
}

/// Options with which post-copy is sure to begin.
fn late(to: &Address, dir: &Path) -> SendOptions {
    let mut options = options(to, dir);
    options.postcopy = true;
    options.patience = Duration::from_secs(5);
    options.downtime = Duration::from_micros(1);
    options.timeout = Some(Duration::from_millis(1));
    options
}

/// What the processors of the target do as soon as they run: read pages at random, each of which has to be right.
struct Processors {
    threads: Vec<std::thread::JoinHandle<u64>>,
    stop: Arc<AtomicBool>,
}

impl Processors {
    fn wait_to_run(world: &Arc<World>, source: &Arc<GuestRam>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let threads = (0..2)
            .map(|seed| {
                let (world, source, stop) = (world.clone(), source.clone(), stop.clone());
                std::thread::spawn(move || {
                    let mut random = ChaCha8Rng::seed_from_u64(seed);
                    let (mut expected, mut found) = (vec![0; PAGE_BYTES], vec![0; PAGE_BYTES]);
                    let mut reads = 0;
                    while !stop.load(SeqCst) {
                        if !world.target_runs.load(SeqCst) {
                            std::thread::sleep(Duration::from_millis(1));
                            continue;
                        }
                        let ram =
                            world.target_ram.lock().expect("nobody panics with it").clone().expect("made");
                        let page = random.random_range(0..ram.pages());
                        ram.read_pages(page, &mut found);
                        source.read_pages(page, &mut expected);
                        assert!(found == expected, "page {page} is wrong");
                        reads += 1;
                        // A test machine has few processors, and others need them.
                        std::thread::sleep(Duration::from_micros(50));
                    }
                    reads
                })
            })
            .collect();
        Self { threads, stop }
    }

    fn finish(mut self) -> u64 {
        self.stop.store(true, SeqCst);
        self.threads.drain(..).map(|thread| thread.join().expect("each page was right")).sum()
    }
}

impl Drop for Processors {
    fn drop(&mut self) {
        self.stop.store(true, SeqCst);
    }
}

#[test]
fn a_machine_that_runs_early_sees_only_right_pages() {
    if !has_userfaultfd() {
        return;
    }
    for (connections, compression) in [(1, Compression::None), (2, Compression::Lz4), (4, Compression::Zstd)]
    {
        let (world, dir) = (World::new(), tempfile::tempdir().expect("dir"));
        // Almost every page is written while the others are copied.
        let source = FakeSource::new(&world, 8 << 20, Log::Manual, 20_000);
        *world.restore_reads.lock().expect("nobody panics with it") = (0..512).collect();
        let target = Target::start(&world, &unix(dir.path()), &Security::default(), dir.path());
        let processors = Processors::wait_to_run(&world, source.ram());
        let mut options = late(&target.address, dir.path());
        (options.connections, options.compression) = (connections, compression);
        options.bandwidth = Some(12 << 20);
        let report = send(&source, &options).expect("moved");
        let late =
            report.postcopy.unwrap_or_else(|| panic!("post-copy was not begun: {:?}", report.progress));
        assert!(late.pages > 0, "{late:?}");
        let received = target.received();
        assert!(processors.finish() > 0);
        let faults = received.postcopy.clone().expect("reported");
        assert_eq!(faults.pages, late.pages);
        assert!(faults.p50 <= faults.p99 && faults.p99 <= faults.max, "{faults:?}");
        assert!(faults.faults > 0 && late.requested > 0, "{faults:?} {late:?}");
        assert!(world.devices_started.load(SeqCst) && source.ended());
        assert_same(source.ram(), received.machine.ram());
        world.assert_rules_kept();
    }
}

#[test]
fn devices_begin_only_when_all_pages_are_there() {
    if !has_userfaultfd() {
        return;
    }
    let (world, dir) = (World::new(), tempfile::tempdir().expect("dir"));
    let source = FakeSource::new(&world, BYTES, Log::Manual, 20_000);
    let target = Target::start(&world, &unix(dir.path()), &Security::default(), dir.path());
    let mut options = late(&target.address, dir.path());
    options.bandwidth = Some(8 << 20);
    std::thread::scope(|scope| {
        let sending = scope.spawn(|| send(&source, &options));
        while !world.announced.load(SeqCst) && !sending.is_finished() {
            std::thread::sleep(Duration::from_millis(1));
        }
        let early = world.devices_started.load(SeqCst);
        sending.join().expect("no panic").expect("moved");
        assert!(!early, "devices began before the pages were there");
    });
    assert_same(source.ram(), target.received().machine.ram());
    assert!(world.devices_started.load(SeqCst));
}

#[test]
fn a_cut_at_any_message_in_post_copy_is_healed() {
    if !has_userfaultfd() {
        return;
    }
    // State to running, and what only post-copy has: missing, complete, armed.
    let kinds = [11, 12, 13, 14, 21, 24, 25].map(|kind| Place::Kind(kind, 0));
    // From where the rounds of copying end, more or less.
    let messages = (15..50).map(Place::Message);
    for (how, places) in
        [(Cut::Before, kinds.into_iter().chain(messages).collect()), (Cut::After, kinds.to_vec())]
    {
        let places: Vec<Place> = places;
        let next = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    while let Some(place) = places.get(next.fetch_add(1, SeqCst)) {
                        let happened = cut_once(how, *place);
                        assert!(happened || matches!(place, Place::Message(_)), "there is no {place:?}");
                    }
                });
            }
        });
    }
}

/// Whether it came to the cut.
fn cut_once(how: Cut, at: Place) -> bool {
    let (world, dir) = (World::new(), tempfile::tempdir().expect("dir"));
    let source = FakeSource::new(&world, 4 << 20, Log::Manual, 2000);
    let Address::Unix(path) = unix(dir.path()) else { unreachable!() };
    let target = Target::start(&world, &Address::Unix(path.clone()), &Security::default(), dir.path());
    let proxy = Proxy::start(dir.path(), &path, vec![(how, at)], false);
    let processors = Processors::wait_to_run(&world, source.ram());
    let mut options = late(&Address::Unix(proxy.path.clone()), dir.path());
    options.connections = 2;
    if let Err(error) = send(&source, &options) {
        assert!(proxy.cuts() > 0 && matches!(error, SendError::Failed(_)), "cut at {at:?}: {error}");
        source.assert_untouched();
        send(&source, &options).unwrap_or_else(|error| panic!("after a cut at {at:?}: {error}"));
    }
    let received = target.received();
    processors.finish();
    assert_same(source.ram(), received.machine.ram());
    assert!(source.ended());
    world.assert_rules_kept();
    proxy.cuts() > 0
}

#[test]
fn a_source_that_cannot_reach_the_target_keeps_its_pages_until_told() {
    if !has_userfaultfd() {
        return;
    }
    let (world, dir) = (World::new(), tempfile::tempdir().expect("dir"));
    let source = FakeSource::new(&world, BYTES, Log::Manual, 20_000);
    let Address::Unix(path) = unix(dir.path()) else { unreachable!() };
    let target = Target::start(&world, &Address::Unix(path.clone()), &Security::default(), dir.path());
    // After the word that the machine runs.
    let proxy = Proxy::start_at_kind(dir.path(), &path, Cut::After, 14);
    let processors = Processors::wait_to_run(&world, source.ram());
    let mut options = late(&Address::Unix(proxy.path.clone()), dir.path());
    options.reconnect = Duration::from_millis(50);
    let error = send(&source, &options).expect_err("interrupted");
    assert!(matches!(error, SendError::PostcopyInterrupted(_)), "{error}");
    assert!(!source.ended() && world.runs() == 't');
    let resolve =
        || shim::migrate::resolve(Some(&source), "vm one", &options, Resolve::Ask, &CancelToken::new());
    assert!(matches!(resolve(), Err(SendError::PostcopyInterrupted(_))));
    proxy.heal();
    assert_eq!(resolve().expect("resolved"), Resolved::Gone);
    let received = target.received();
    processors.finish();
    assert_same(source.ram(), received.machine.ram());
    assert!(source.ended());
    world.assert_rules_kept();
}

#[test]
fn a_page_that_was_waited_for_longer_than_patience_comes_when_the_source_is_back() {
    if !has_userfaultfd() {
        return;
    }
    let (world, dir) = (World::new(), tempfile::tempdir().expect("dir"));
    let source = FakeSource::new(&world, BYTES, Log::Manual, 20_000);
    let Address::Unix(path) = unix(dir.path()) else { unreachable!() };
    let target = Target::start(&world, &Address::Unix(path.clone()), &Security::default(), dir.path());
    // With the first page that is asked for.
    let proxy = Proxy::start_at_kind(dir.path(), &path, Cut::Before, 22);
    let processors = Processors::wait_to_run(&world, source.ram());
    let mut options = late(&Address::Unix(proxy.path.clone()), dir.path());
    // So slow that a page is asked for before all are there.
    options.bandwidth = Some(16 << 20);
    options.reconnect = Duration::from_millis(50);
    let error = send(&source, &options).expect_err("interrupted");
    // The word that the machine runs may be lost with it.
    assert!(matches!(error, SendError::PostcopyInterrupted(_) | SendError::Unresolved(_)), "{error}");
    std::thread::sleep(target.options.patience + Duration::from_millis(300));
    proxy.heal();
    let resolved =
        shim::migrate::resolve(Some(&source), "vm one", &options, Resolve::Ask, &CancelToken::new());
    assert_eq!(resolved.expect("resolved"), Resolved::Gone);
    let lost = |event: &TargetEvent| matches!(event, TargetEvent::Waiting { .. });
    let losses =
        target.events.lock().expect("nobody panics with it").iter().filter(|event| lost(event)).count();
    assert_eq!(losses, 1, "the source was lost again after it had come back");
    let received = target.received();
    processors.finish();
    assert_same(source.ram(), received.machine.ram());
    world.assert_rules_kept();
}

#[test]
fn a_source_that_died_with_missing_pages_does_not_let_the_target_run() {
    if !has_userfaultfd() {
        return;
    }
    let (world, dir) = (World::new(), tempfile::tempdir().expect("dir"));
    let source = FakeSource::new(&world, BYTES, Log::Manual, 20_000);
    let Address::Unix(path) = unix(dir.path()) else { unreachable!() };
    let target = Target::start(&world, &Address::Unix(path.clone()), &Security::default(), dir.path());
    let proxy = Proxy::start_at_kind(dir.path(), &path, Cut::Before, 13);
    let mut options = late(&Address::Unix(proxy.path.clone()), dir.path());
    // So slow that a page is asked for before all are there.
    options.bandwidth = Some(16 << 20);
    options.reconnect = Duration::from_millis(50);
    assert!(matches!(send(&source, &options), Err(SendError::Unresolved(_))));
    drop(source);
    proxy.heal();
    let resolved = shim::migrate::resolve(None, "vm one", &options, Resolve::Ask, &CancelToken::new());
    assert_eq!(resolved.expect("resolved"), Resolved::Here);
    let until = Instant::now() + Duration::from_secs(60);
    while Instant::now() < until && world.runs() != '-' {
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(world.runs(), '-');
    assert!(!target.is_finished());
    world.assert_rules_kept();
}

#[test]
fn a_cancellation_while_restoring_waits_for_pages_lets_go_of_everything() {
    if !has_userfaultfd() {
        return;
    }
    let (world, dir) = (World::new(), tempfile::tempdir().expect("dir"));
    let source = FakeSource::new(&world, BYTES, Log::Manual, 20_000);
    *world.restore_reads.lock().expect("nobody panics with it") = (0..4096).collect();
    let Address::Unix(path) = unix(dir.path()) else { unreachable!() };
    let target = Target::start(&world, &Address::Unix(path.clone()), &Security::default(), dir.path());
    // Lost with the first page that is asked for.
    let proxy = Proxy::start_at_kind(dir.path(), &path, Cut::Before, 22);
    let options = late(&Address::Unix(proxy.path.clone()), dir.path());
    let error = send(&source, &options).expect_err("lost");
    assert!(matches!(error, SendError::Failed(_)), "{error}");
    source.assert_untouched();
    proxy.heal();
    send(&source, &options).expect("moved");
    assert_same(source.ram(), target.received().machine.ram());
    world.assert_rules_kept();
}
