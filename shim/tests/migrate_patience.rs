//! Peers that say that they are there, and nothing else: nobody waits for them without end.

mod migrate_fake;

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::{Duration, Instant};

use migrate_fake::proxy::{Cut, Proxy};
use migrate_fake::*;
use shim::migrate::batch::Unpacker;
use shim::migrate::connection::{Connection, Parcel};
use shim::migrate::record::{Pages, RECORD_VERSION, Records, TargetRecord};
use shim::migrate::transport::Connector;
use shim::migrate::wire::{Header, Hello, Message, Role, TargetStatus};
use shim::migrate::{
    Address, CancelToken, Listener, MigrationId, Resolve, Resolved, Security, SendError, SendOptions,
};

/// How often such a peer says that it is there.
const ALIVE_EVERY: Duration = Duration::from_millis(50);
/// Patience of sources here.
const PATIENCE: Duration = Duration::from_millis(1200);

/// A peer that says these things and from then on only that it is there, until it is hung up on.
fn only_alive(mut connection: Connection, says: Vec<Message>) {
    for message in says {
        connection.send(&message).expect("sent");
    }
    while connection.send(&Message::Alive).is_ok() {
        std::thread::sleep(ALIVE_EVERY);
    }
}

/// A target that answers each hello, and what follows it, with one of `answers` each, and from then on is only alive.
fn target_that_is_only_alive(dir: &Path, answers: Vec<Message>) -> Address {
    let address = Address::Unix(dir.join("alive.sock"));
    let listener = Listener::bind(&address, &Security::default()).expect("listens");
    std::thread::spawn(move || {
        loop {
            let Some(arrival) = listener.accept().expect("accepts") else { continue };
            let mut connection = Connection::new(arrival.establish().expect("plain"), PATIENCE);
            let answers = answers.clone();
            std::thread::spawn(move || {
                for answer in answers {
                    if connection.await_message(|| Ok(())).and_then(|_| connection.send(&answer)).is_err() {
                        return;
                    }
                }
                only_alive(connection, vec![]);
            });
        }
    });
    address
}

fn hello(role: Role, migration: MigrationId) -> Message {
    Message::Hello(Hello {
        protocol_min: 1,
        protocol_max: 1,
        role,
        index: 0,
        migration,
        secret: "secret".into(),
        given_up: vec![],
    })
}

/// A source whose migration was cut at the first message of a kind, and the options to resolve it with.
fn cut_at(kind: u16, how: Cut, postcopy: bool) -> (Arc<World>, tempfile::TempDir, FakeSource, SendOptions) {
    let (world, dir) = (World::new(), tempfile::tempdir().expect("dir"));
    let source = FakeSource::new(&world, 8 << 20, Log::Manual, 20_000);
    let Address::Unix(path) = unix(dir.path()) else { unreachable!() };
    let target = Target::start(&world, &Address::Unix(path.clone()), &Security::default(), dir.path());
    let proxy = Proxy::start_at_kind(dir.path(), &path, how, kind);
    let mut options = options(&Address::Unix(proxy.path), dir.path());
    (options.reconnect, options.patience) = (Duration::from_millis(50), PATIENCE);
    options.timeout = Some(Duration::from_millis(1));
    options.on_timeout = shim::migrate::OnTimeout::Force;
    options.postcopy = postcopy;
    if postcopy {
        options.downtime = Duration::from_micros(1);
    }
    let error = send(&source, &options).expect_err("cut");
    assert!(matches!(error, SendError::Unresolved(_) | SendError::PostcopyInterrupted(_)), "{error}");
    // Its process is as good as dead: nobody speaks to it any more.
    std::mem::forget(target);
    (world, dir, source, options)
}

fn resolve(
    source: &FakeSource,
    options: &SendOptions,
    how: Resolve,
    cancel: &CancelToken,
) -> Result<Resolved, SendError> {
    shim::migrate::resolve(Some(source), "vm one", options, how, cancel)
}

fn restarted(world: &Arc<World>, dir: &Path) -> Target {
    Target::start(world, &Address::Unix(dir.join("restarted.sock")), &Security::default(), dir)
}

#[test]
fn a_source_learns_that_its_machine_was_lost_with_the_target_in_postcopy() {
    if !Path::new("/dev/userfaultfd").exists() {
        return eprintln!("SKIPPED: there is no /dev/userfaultfd");
    }
    let (world, dir, source, mut options) = cut_at(14, Cut::After, true);
    let target = restarted(&world, dir.path());
    options.to = target.address.clone();
    for how in [Resolve::Ask, Resolve::ForceHere] {
        let error = resolve(&source, &options, how, &CancelToken::new()).expect_err("lost");
        assert!(matches!(error, SendError::PostcopyInterrupted(_)), "{error}");
        assert!(error.to_string().contains("the machine is lost"), "{error}");
        // What it has written to its disks since is not in the memory here.
        assert!(!source.ended() && !world.source_runs.load(SeqCst));
    }
    let another = shim::migrate::check(&description(4 << 20), &options);
    assert!(another.expect("the target serves others").is_compatible());
}

#[test]
fn a_source_learns_that_its_machine_had_all_pages_when_the_target_died() {
    if !Path::new("/dev/userfaultfd").exists() {
        return eprintln!("SKIPPED: there is no /dev/userfaultfd");
    }
    let (world, dir, source, mut options) = cut_at(24, Cut::Before, true);
    let until = Instant::now() + Duration::from_secs(60);
    let records = Records::open(&dir.path().join("target")).expect("records");
    let last = shim::migrate::last_attempt(&options.state_dir, "vm one").expect("read").expect("there");
    let record = || records.target(last.migration).expect("read").expect("there");
    while record().pages != Pages::Complete {
        assert!(Instant::now() < until, "{:?}", record());
        std::thread::sleep(Duration::from_millis(10));
    }
    let target = restarted(&world, dir.path());
    options.to = target.address.clone();
    let resolved = resolve(&source, &options, Resolve::Ask, &CancelToken::new());
    assert_eq!(resolved.expect("resolved"), Resolved::Gone);
    assert!(source.ended());
    while !record().settled {
        assert!(Instant::now() < until, "{:?}", record());
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_source_that_is_only_alive_does_not_keep_a_target_from_others() {
    let cases = [
        (Role::Check, vec![]),
        (Role::Control, vec![]),
        (Role::Resolve, vec![]),
        // It is told that its machine ran, and does not say that it knows.
        (Role::Resolve, vec![Message::Ask]),
    ];
    std::thread::scope(|scope| {
        for (role, says) in cases {
            scope.spawn(move || {
                let (world, dir) = (World::new(), tempfile::tempdir().expect("dir"));
                let target = Target::start(&world, &unix(dir.path()), &Security::default(), dir.path());
                let migration = MigrationId::new();
                if !says.is_empty() {
                    let record = TargetRecord {
                        version: RECORD_VERSION,
                        machine: None,
                        migration,
                        status: TargetStatus::Running,
                        pages: Pages::All,
                        settled: false,
                    };
                    let records = Records::open(&dir.path().join("target")).expect("records");
                    records.write_target(&record).expect("written");
                }
                let connector = Connector::new(target.address.clone(), &Security::default()).expect("one");
                let stream = connector.connect().expect("connected");
                let connection = Connection::new(stream, Duration::from_secs(2));
                let says = [vec![hello(role, migration)], says].concat();
                std::thread::spawn(move || only_alive(connection, says));
                std::thread::sleep(Duration::from_millis(300));
                let mut options = options(&target.address, dir.path());
                options.patience = Duration::from_secs(40);
                let report = shim::migrate::check(&description(4 << 20), &options);
                assert!(report.unwrap_or_else(|error| panic!("{role:?}: {error:#}")).is_compatible());
            });
        }
    });
}

#[test]
fn signs_of_life_do_not_keep_whoever_receives_beyond_its_time() {
    let dir = tempfile::tempdir().expect("dir");
    let address = unix(dir.path());
    let listener = Listener::bind(&address, &Security::default()).expect("listens");
    let mut stream = UnixStream::connect(dir.path().join("target.sock")).expect("connected");
    let arrival = listener.accept().expect("accepts").expect("somebody");
    let mut connection = Connection::new(arrival.establish().expect("plain"), PATIENCE);
    let (alive, ask) = (Header::encode(20, &[]).expect("header"), Header::encode(18, &[]).expect("header"));
    stream.write_all(&[alive, alive, ask, alive, alive, ask].concat()).expect("written");
    // Who goes on from one to the next goes on for as long as a peer sends them.
    for _ in 0..2 {
        assert_eq!(connection.receive(Duration::ZERO).expect("received"), None);
    }
    assert_eq!(connection.receive(Duration::ZERO).expect("received"), Some(Message::Ask));
    let mut unpacker = Unpacker::new();
    for last in [false, false, true] {
        let parcel = connection.receive_parcel(Duration::ZERO, 1024, &mut unpacker).expect("received");
        assert_eq!(matches!(parcel, Some(Parcel::Message(Message::Ask))), last);
        assert!(last || parcel.is_none());
    }
    // Within its time it does not show them.
    stream.write_all(&[alive, alive, ask].concat()).expect("written");
    assert_eq!(connection.receive(PATIENCE).expect("received"), Some(Message::Ask));
}

#[test]
fn a_target_that_is_only_alive_does_not_hold_who_asks_for_a_check() {
    let dir = tempfile::tempdir().expect("dir");
    let mut options = options(&target_that_is_only_alive(dir.path(), vec![]), dir.path());
    options.patience = PATIENCE;
    let error = shim::migrate::check(&description(4 << 20), &options).expect_err("no answer");
    assert!(format!("{error:#}").contains("has not said"), "{error:#}");
}

#[test]
fn a_target_that_is_only_alive_does_not_hold_a_source_that_is_told_to_stop() {
    let (prepared, running) = (TargetStatus::Prepared, TargetStatus::Running);
    let cases = [
        // It does not answer the question, nor the commit, nor say which pages it needs.
        (13, Cut::Before, false, vec![Message::Welcome(1)]),
        (13, Cut::Before, false, vec![Message::Welcome(1), Message::Status(prepared)]),
        (14, Cut::After, true, vec![Message::Welcome(1), Message::Status(running)]),
    ];
    let has_userfaultfd = Path::new("/dev/userfaultfd").exists();
    std::thread::scope(|scope| {
        for (kind, how, postcopy, answers) in cases.into_iter().filter(|case| has_userfaultfd || !case.2) {
            scope.spawn(move || {
                let (world, dir, source, mut options) = cut_at(kind, how, postcopy);
                options.to = target_that_is_only_alive(dir.path(), answers.clone());
                let (cancel, over) = (CancelToken::new(), AtomicBool::new(false));
                std::thread::scope(|scope| {
                    scope.spawn(|| {
                        let error = resolve(&source, &options, Resolve::Ask, &cancel).expect_err("unknown");
                        let late = matches!(error, SendError::PostcopyInterrupted(_));
                        assert_eq!(late, postcopy, "{error}");
                        over.store(true, SeqCst);
                    });
                    std::thread::sleep(Duration::from_millis(200));
                    cancel.cancel();
                    let until = Instant::now() + Duration::from_secs(60);
                    while !over.load(SeqCst) {
                        // Who is held cannot be joined either.
                        if Instant::now() > until {
                            eprintln!("held after {answers:?}");
                            std::process::abort();
                        }
                        std::thread::sleep(Duration::from_millis(10));
                    }
                });
                assert!(!source.ended() && !world.source_runs.load(SeqCst));
            });
        }
    });
}
