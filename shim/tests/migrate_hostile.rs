//! Peers that send nonsense, too much, nothing, or the wrong thing at the wrong time.

mod migrate_fake;

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::time::{Duration, Instant};

use migrate_fake::*;
use rand::{Rng, RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;
use shim::machine::{CompatibilityReport, SourceMachine};
use shim::migrate::batch::{BatchBuilder, Packer};
use shim::migrate::connection::Connection;
use shim::migrate::record::{Pages, Place, RECORD_VERSION, Records, SourceRecord, TargetRecord};
use shim::migrate::transport::Connector;
use shim::migrate::wire::{
    CONTROL_MAX, HEADER_BYTES, Header, Hello, Message, Plan, Role, RoundEnd, TargetStatus,
};
use shim::migrate::{
    Address, CancelToken, Compression, Listener, MigrationId, Resolve, Resolved, Security, SendError,
};

fn hello(role: Role, migration: MigrationId, secret: &str) -> Message {
    Message::Hello(Hello {
        protocol_min: 1,
        protocol_max: 1,
        role,
        index: 0,
        migration,
        secret: secret.into(),
        given_up: vec![],
    })
}

fn connect(address: &Address) -> Connection {
    let connector = Connector::new(address.clone(), &Security::default()).expect("connector");
    Connection::new(connector.connect().expect("connected"), Duration::from_secs(20))
}

fn next(connection: &mut Connection) -> anyhow::Result<Message> {
    connection.await_message(|| Ok(()))
}

#[test]
fn a_target_survives_whatever_strangers_send() {
    let (world, dir) = (World::new(), tempfile::tempdir().expect("dir"));
    let source = FakeSource::new(&world, 4 << 20, Log::Classic, 500);
    let Address::Unix(path) = unix(dir.path()) else { unreachable!() };
    let target = Target::start(&world, &Address::Unix(path.clone()), &Security::default(), dir.path());
    let mut random = ChaCha8Rng::seed_from_u64(1);
    let mut idle = Vec::new();
    for round in 0..40 {
        let mut stream = UnixStream::connect(&path).expect("connect");
        let mut bytes = vec![0; random.random_range(0..200)];
        random.fill_bytes(&mut bytes);
        if round % 3 == 0 && bytes.len() >= HEADER_BYTES {
            let good = Header::encode(random.random_range(1..25), &[]).expect("header");
            bytes[..HEADER_BYTES].copy_from_slice(&good);
            bytes[random.random_range(0..HEADER_BYTES)] ^= 0x40;
        }
        let _ = stream.write_all(&bytes);
        // Some hang up, others stay and say nothing more.
        if round % 4 == 0 {
            idle.push(stream);
        }
    }
    send(&source, &options(&target.address, dir.path())).expect("moved");
    assert_same(source.ram(), target.received().machine.ram());
}

#[test]
fn a_first_message_is_not_believed_to_be_long() {
    let (world, dir) = (World::new(), tempfile::tempdir().expect("dir"));
    let Address::Unix(path) = unix(dir.path()) else { unreachable!() };
    let _target = Target::start(&world, &Address::Unix(path.clone()), &Security::default(), dir.path());
    let body = vec![0; CONTROL_MAX + 1];
    // The kinds that may be longer, later on.
    for kind in [3, 4, 7, 11, 13, 21, 23] {
        // A sign of life is no first message.
        for before in [vec![], Header::encode(20, &[]).expect("header").to_vec()] {
            let header = Header::encode(kind, &[&body]).expect("header");
            let mut stream = UnixStream::connect(&path).expect("connect");
            // Without the body: it is not waited for.
            stream.write_all(&[&before[..], &header].concat()).expect("written");
            stream.set_read_timeout(Some(Duration::from_secs(20))).expect("timeout");
            let mut answer = Vec::new();
            let _ = stream.read_to_end(&mut answer);
            assert!(String::from_utf8_lossy(&answer).contains("first message"), "{kind}: {answer:?}");
        }
    }
}

#[test]
fn a_stranger_is_told_what_is_wrong() {
    let (world, dir) = (World::new(), tempfile::tempdir().expect("dir"));
    let Address::Unix(path) = unix(dir.path()) else { unreachable!() };
    let target = Target::start(&world, &Address::Unix(path.clone()), &Security::default(), dir.path());
    let mut stream = UnixStream::connect(&path).expect("connect");
    stream.write_all(&[b'G'; HEADER_BYTES]).expect("written");
    let mut answer = Vec::new();
    stream.set_read_timeout(Some(Duration::from_secs(20))).expect("timeout");
    let _ = stream.read_to_end(&mut answer);
    assert!(String::from_utf8_lossy(&answer).contains("does not speak this protocol"), "{answer:?}");
    let mut newer = connect(&target.address);
    let Message::Hello(hello) = hello(Role::Control, MigrationId::new(), "s") else { unreachable!() };
    newer.send(&Message::Hello(Hello { protocol_min: 7, protocol_max: 9, ..hello })).expect("sent");
    let Message::Refused(reason) = next(&mut newer).expect("an answer") else { panic!("must be refused") };
    assert!(reason.contains("versions 7 to 9"), "{reason}");
}

/// Brings a migration of 4 MiB to the point where the machine is made, with a connection for pages.
fn begun(target: &Target) -> (MigrationId, Connection, Connection) {
    let migration = MigrationId::new();
    let mut control = connect(&target.address);
    control.send(&hello(Role::Control, migration, "secret")).expect("sent");
    assert_eq!(next(&mut control).expect("answer"), Message::Welcome(1));
    let plan = Plan { machine: description(4 << 20), connections: 1, postcopy: false };
    control.send(&Message::Plan(Box::new(plan))).expect("sent");
    assert!(matches!(next(&mut control).expect("answer"), Message::Compatibility(_)));
    assert_eq!(next(&mut control).expect("answer"), Message::Created);
    let mut pages = connect(&target.address);
    pages.send(&hello(Role::Pages, migration, "secret")).expect("sent");
    assert_eq!(next(&mut pages).expect("answer"), Message::Welcome(1));
    (migration, control, pages)
}

#[test]
fn a_target_refuses_what_does_not_belong_and_takes_the_next_machine() {
    let (world, dir) = (World::new(), tempfile::tempdir().expect("dir"));
    let target = Target::start(&world, &unix(dir.path()), &Security::default(), dir.path());
    let refused = |control: &mut Connection, part: &str| {
        let Message::Refused(reason) = next(control).expect("an answer") else { panic!("must be refused") };
        assert!(reason.contains(part), "{reason}");
    };
    let end = |round, pages| Message::RoundEnd(RoundEnd { round, batches: 0, pages });
    for message in [Message::Commit(vec![]), Message::State(vec![]), Message::RoundBegin(1), Message::Created]
    {
        let (_, mut control, _pages) = begun(&target);
        control.send(&message).expect("sent");
        refused(&mut control, "where it does not belong");
    }
    let (_, mut control, mut pages) = begun(&target);
    control.send(&Message::RoundBegin(0)).expect("sent");
    pages.send(&end(0, 5)).expect("sent");
    refused(&mut control, "a connection says that it carried");
    let (_, mut control, mut pages) = begun(&target);
    control.send(&Message::RoundBegin(0)).expect("sent");
    pages.send(&Message::Paused).expect("sent");
    refused(&mut control, "came on a connection for pages");
    let (_, mut control, mut pages) = begun(&target);
    control.send(&Message::RoundBegin(0)).expect("sent");
    let mut batch = BatchBuilder::new(0);
    // The memory ends at page 1024.
    batch.put_zero(1024);
    pages.send_pages(&batch, &mut Packer::new(Compression::None).expect("packer")).expect("sent");
    refused(&mut control, "does not fit a memory of 1024 pages");
    let source = FakeSource::new(&world, 4 << 20, Log::Classic, 500);
    send(&source, &options(&target.address, dir.path())).expect("moved");
    assert_same(source.ram(), target.received().machine.ram());
}

#[test]
fn a_connection_without_the_secret_is_not_let_into_a_migration() {
    let (world, dir) = (World::new(), tempfile::tempdir().expect("dir"));
    let target = Target::start(&world, &unix(dir.path()), &Security::default(), dir.path());
    let (migration, mut control, mut pages) = begun(&target);
    for role in [Role::Pages, Role::Resolve, Role::Control] {
        let mut stranger = connect(&target.address);
        stranger.send(&hello(role, migration, "guessed")).expect("sent");
        assert!(matches!(next(&mut stranger).expect("an answer"), Message::Refused(_)), "{role:?}");
    }
    control.send(&Message::RoundBegin(0)).expect("sent");
    pages.send(&Message::RoundEnd(RoundEnd { round: 0, batches: 0, pages: 0 })).expect("sent");
    assert!(matches!(next(&mut control).expect("still alive"), Message::RoundReceived(_)));
}

#[test]
fn a_silent_source_is_noticed() {
    let (world, dir) = (World::new(), tempfile::tempdir().expect("dir"));
    let target = Target::start(&world, &unix(dir.path()), &Security::default(), dir.path());
    let (_, _control, _pages) = begun(&target);
    target.await_event(|event| matches!(event, shim::migrate::TargetEvent::Failed { reason } if reason.contains("not heard of")));
}

/// A target that follows a script.
fn scripted(dir: &Path, script: impl FnOnce(&Listener) + Send + 'static) -> Address {
    let address = Address::Unix(dir.join("scripted.sock"));
    let listener = Listener::bind(&address, &Security::default()).expect("listens");
    std::thread::spawn(move || script(&listener));
    address
}

fn accept(listener: &Listener) -> Connection {
    let until = Instant::now() + Duration::from_secs(60);
    loop {
        assert!(Instant::now() < until);
        if let Some(arrival) = listener.accept().expect("accepts") {
            let mut connection =
                Connection::new(arrival.establish().expect("plain"), Duration::from_secs(60));
            assert!(matches!(next(&mut connection).expect("hello"), Message::Hello(_)));
            return connection;
        }
    }
}

/// Answers until the source sends pages, then with `answers`.
fn up_to_the_first_round(listener: &Listener, answers: Vec<Message>) {
    let mut control = accept(listener);
    control.send(&Message::Welcome(1)).expect("sent");
    assert!(matches!(next(&mut control).expect("plan"), Message::Plan(_)));
    control.send(&Message::Compatibility(CompatibilityReport::default())).expect("sent");
    control.send(&Message::Created).expect("sent");
    let mut pages = accept(listener);
    pages.send(&Message::Welcome(1)).expect("sent");
    for answer in answers {
        control.send(&answer).expect("sent");
    }
    // Stays, so that it is not the end of the connection that the source notices.
    std::thread::sleep(Duration::from_secs(60));
}

#[test]
fn a_source_goes_on_whatever_a_target_answers() {
    let end = |round| Message::RoundReceived(RoundEnd { round, batches: 0, pages: 0 });
    let cases: Vec<(Vec<Message>, &str)> = vec![
        (vec![Message::Running], "running message instead of"),
        (vec![Message::Prepared], "prepared message instead of"),
        (vec![Message::Status(TargetStatus::Running)], "status message instead of"),
        (vec![end(1)], "of round 1 have arrived, but not all was sent"),
        (vec![Message::Abort("no more room".into())], "the target gave up: no more room"),
        (vec![Message::Refused("not you".into())], "the target refused: not you"),
        // Silence, or a round that never ends.
        (vec![], "not heard of"),
        (vec![end(0)], "of round 0 have arrived, but not all was sent"),
    ];
    std::thread::scope(|scope| {
        for (answers, part) in cases {
            scope.spawn(move || {
                let (world, dir) = (World::new(), tempfile::tempdir().expect("dir"));
                let source = FakeSource::new(&world, 4 << 20, Log::Classic, 500);
                let address = scripted(dir.path(), |listener| up_to_the_first_round(listener, answers));
                let begun = Instant::now();
                let error = send(&source, &options(&address, dir.path())).expect_err("refused");
                assert!(
                    matches!(error, SendError::Failed(_)) && error.to_string().contains(part),
                    "{part}: {error}"
                );
                assert!(begun.elapsed() < Duration::from_secs(30));
                source.assert_untouched();
                world.assert_rules_kept();
            });
        }
    });
}

#[test]
fn a_source_goes_on_when_the_target_sends_bytes_that_are_no_messages() {
    let mut long = Header::encode(14, &[]).expect("header");
    long[12..16].copy_from_slice(&u32::MAX.to_le_bytes());
    let mut damaged = Header::encode(14, &[]).expect("header");
    damaged[17] ^= 1;
    let cases: [(Vec<u8>, &str); 5] = [
        (vec![0; 100], "does not speak this protocol"),
        (long.to_vec(), "more than the"),
        (damaged.to_vec(), "damaged on its way"),
        (long[..10].to_vec(), "in the middle of a new message"),
        (vec![], "hung up"),
    ];
    for (bytes, part) in cases {
        let (world, dir) = (World::new(), tempfile::tempdir().expect("dir"));
        let path: PathBuf = dir.path().join("s");
        let listener = UnixListener::bind(&path).expect("bind");
        let peer = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("accept");
            let mut hello = [0; 50];
            stream.read_exact(&mut hello).expect("hello");
            stream.write_all(&bytes).expect("written");
            stream.shutdown(std::net::Shutdown::Write).expect("shutdown");
            let _ = stream.read_to_end(&mut Vec::new());
        });
        let source = FakeSource::new(&world, 4 << 20, Log::Classic, 500);
        let error = send(&source, &options(&Address::Unix(path), dir.path())).expect_err("refused");
        assert!(error.to_string().contains(part), "{part}: {error}");
        source.assert_untouched();
        peer.join().expect("peer");
    }
}

#[test]
fn a_target_whose_process_died_when_prepared_never_runs_the_machine() {
    let (world, dir) = (World::new(), tempfile::tempdir().expect("dir"));
    let source = FakeSource::new(&world, 4 << 20, Log::Classic, 500);
    for (status, expected) in [
        (Some(TargetStatus::Prepared), Resolved::Here),
        (None, Resolved::Here),
        (Some(TargetStatus::Refused), Resolved::Here),
        (Some(TargetStatus::Running), Resolved::Gone),
    ] {
        // As after a loss of the connection with the commit.
        let address = scripted(dir.path(), |listener| {
            let mut control = accept(listener);
            control.send(&Message::Welcome(1)).expect("sent");
            next(&mut control).expect("plan");
            control.send(&Message::Compatibility(CompatibilityReport::default())).expect("sent");
            control.send(&Message::Created).expect("sent");
            let mut pages = accept(listener);
            pages.send(&Message::Welcome(1)).expect("sent");
            loop {
                match next(&mut control).expect("a message") {
                    Message::RoundBegin(_) => {
                        let ram = 1024;
                        let mut unpacker = shim::migrate::batch::Unpacker::new();
                        let end = loop {
                            use shim::migrate::connection::Parcel;
                            let parcel = pages.receive_parcel(Duration::from_secs(20), ram, &mut unpacker);
                            if let Some(Parcel::Message(Message::RoundEnd(end))) = parcel.expect("pages") {
                                break end;
                            }
                        };
                        control.send(&Message::RoundReceived(end)).expect("sent");
                    }
                    Message::State(_) => control.send(&Message::Prepared).expect("sent"),
                    Message::Commit(_) => return,
                    _ => {}
                }
            }
        });
        let mut options = options(&address, dir.path());
        options.reconnect = Duration::from_millis(10);
        let error = send(&source, &options).expect_err("unresolved");
        assert!(matches!(error, SendError::Unresolved(_)), "{error}");
        let last = shim::migrate::last_attempt(&options.state_dir, "vm one").expect("read").expect("there");
        if let Some(status) = status {
            let records = Records::open(&dir.path().join("target")).expect("records");
            let migration = last.migration;
            let record = TargetRecord {
                version: RECORD_VERSION,
                machine: None,
                migration,
                status,
                pages: Pages::All,
                settled: false,
            };
            records.write_target(&record).expect("written");
        }
        let target = Target::start(&world, &unix(dir.path()), &Security::default(), dir.path());
        options.to = target.address.clone();
        let resolved =
            shim::migrate::resolve(Some(&source), "vm one", &options, Resolve::Ask, &CancelToken::new());
        assert_eq!(resolved.expect("resolved"), expected, "{status:?}");
        if expected == Resolved::Here {
            source.assert_untouched();
        } else {
            assert!(source.ended());
        }
        world.assert_rules_kept();
    }
}

#[test]
fn a_machine_is_forced_to_go_on_only_by_a_person() {
    let (world, dir) = (World::new(), tempfile::tempdir().expect("dir"));
    let source = FakeSource::new(&world, 4 << 20, Log::Classic, 500);
    let Address::Unix(path) = unix(dir.path()) else { unreachable!() };
    let target = Target::start(&world, &Address::Unix(path.clone()), &Security::default(), dir.path());
    // Lost with the commit, for good.
    let proxy = loop_until_commit(&source, &target, &path, dir.path());
    let mut options = options(&Address::Unix(proxy.path.clone()), dir.path());
    options.reconnect = Duration::from_millis(10);
    let ask = |how| shim::migrate::resolve(Some(&source), "vm one", &options, how, &CancelToken::new());
    assert!(matches!(ask(Resolve::Ask), Err(SendError::Unresolved(_))));
    assert_eq!(world.runs(), '-');
    assert_eq!(ask(Resolve::ForceHere).expect("forced"), Resolved::Here);
    source.assert_untouched();
}

#[test]
fn a_source_whose_process_died_after_the_handover_lets_the_target_run() {
    let (world, dir) = (World::new(), tempfile::tempdir().expect("dir"));
    let source = FakeSource::new(&world, 4 << 20, Log::Classic, 500);
    let Address::Unix(path) = unix(dir.path()) else { unreachable!() };
    let target = Target::start(&world, &Address::Unix(path.clone()), &Security::default(), dir.path());
    let proxy = loop_until_commit(&source, &target, &path, dir.path());
    let ram = source.ram().clone();
    drop(source);
    proxy.heal();
    let options = options(&Address::Unix(proxy.path.clone()), dir.path());
    let resolved = shim::migrate::resolve(None, "vm one", &options, Resolve::Ask, &CancelToken::new());
    assert_eq!(resolved.expect("resolved"), Resolved::Gone);
    assert_same(&ram, target.received().machine.ram());
    world.assert_rules_kept();
}

#[test]
fn a_machine_that_somebody_has_settled_meanwhile_is_not_given_away() {
    for here in [true, false] {
        let (world, dir) = (World::new(), tempfile::tempdir().expect("dir"));
        let source = FakeSource::new(&world, 4 << 20, Log::Classic, 500);
        let Address::Unix(path) = unix(dir.path()) else { unreachable!() };
        let target = Target::start(&world, &Address::Unix(path.clone()), &Security::default(), dir.path());
        let _proxy = loop_until_commit(&source, &target, &path, dir.path());
        let state = dir.path().join("source");
        let last = shim::migrate::last_attempt(&state, "vm one").expect("read").expect("there");
        let settled = match here {
            true => SourceRecord { place: Place::Here, ..last },
            // Sent anew since, and on its way.
            false => SourceRecord { migration: MigrationId::new(), ..last },
        };
        let (committed, seen) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let (saw_commit, asked) = (committed.clone(), seen.clone());
        let address = scripted(dir.path(), move |listener| {
            let records = Records::open(&state).expect("records");
            loop {
                let mut control = accept(listener);
                control.send(&Message::Welcome(1)).expect("sent");
                while let Ok(message) = next(&mut control) {
                    if message == Message::Ask {
                        records.write_source(&settled).expect("written");
                        asked.fetch_add(1, SeqCst);
                        control.send(&Message::Status(TargetStatus::Prepared)).expect("sent");
                    } else if matches!(message, Message::Commit(_)) {
                        saw_commit.store(true, SeqCst);
                    }
                }
            }
        });
        let mut options = options(&address, dir.path());
        options.reconnect = Duration::from_millis(10);
        options.patience = Duration::from_secs(1);
        let resolved =
            shim::migrate::resolve(Some(&source), "vm one", &options, Resolve::Ask, &CancelToken::new());
        let error = resolved.expect_err("settled by somebody else");
        assert!(matches!(error, SendError::Unresolved(_)), "{error}");
        assert!(error.to_string().contains("settled"), "{error}");
        assert!(!committed.load(SeqCst) && !source.ended() && world.runs() == '-');
        assert_eq!(seen.load(SeqCst), 1);
    }
}

/// Migrates through a proxy that lets everything pass but the commit.
fn loop_until_commit(
    source: &FakeSource,
    target: &Target,
    path: &Path,
    dir: &Path,
) -> migrate_fake::proxy::Proxy {
    use migrate_fake::proxy::{Cut, Proxy};
    let proxy = Proxy::start_at_kind(dir, path, Cut::Before, 13);
    let mut options = options(&Address::Unix(proxy.path.clone()), dir);
    options.reconnect = Duration::from_millis(10);
    let error = send(source, &options).expect_err("unresolved");
    assert!(matches!(error, SendError::Unresolved(_)), "{error}");
    assert!(!target.is_finished());
    proxy
}
