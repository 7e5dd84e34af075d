//! A front end and a guest that mean harm, or are broken.
//!
//! Whatever they send: the daemon lives, nothing that was not asked for is changed on the disk, and the next front end
//! that keeps to the rules is served.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

mod attacks;
mod messages;

use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use system_tests::daemon::Program;
use system_tests::memory::{DirtyLog, Mapping};
use system_tests::model::{Content, read_stamp, stamp};
use system_tests::ring::{DISCARD, Desc, FLUSH, NO_STATUS, OK, READ, Request, WRITE, WRITE_ZEROES};
use system_tests::wire::{Answer, NEED_REPLY, REPLY, RawConnection, VERSION};
use system_tests::{Daemon, FrontEnd, Image, Options};

use vhost::VhostBackend;

use attacks::{Attack, Fate, all_attacks};
use messages::all_messages;

const SIZE: u64 = 16 << 20;
const SECTORS: u64 = SIZE / 512;
/// Sectors at the beginning and at the end of the disk that hold stamps.
const STAMPED: u64 = 256;
const GENERATION: u32 = 77;

/// A daemon whose disk holds stamps at both ends.
struct Victim {
    daemon: Daemon,
    files_before: usize,
}

impl Victim {
    fn new() -> Self {
        let daemon = Daemon::with_disk(Image::Raw, SIZE, 4).unwrap();
        let mut victim = Self { daemon, files_before: 0 };
        let mut front = victim.connect(Options::default());
        let buffer = front.memory.alloc(0, STAMPED * 512, 4096);
        for first in [0, SECTORS - STAMPED] {
            let mut content = vec![0; STAMPED as usize * 512];
            stamp(&mut content, first, GENERATION);
            front.memory.write(buffer, &content);
            let data = [(buffer, STAMPED as u32 * 512)];
            assert_eq!(front.rings[0].run(&Request { kind: WRITE, sector: first, data: &data }).status, OK);
        }
        drop(front);
        std::thread::sleep(Duration::from_millis(200));
        victim.files_before = victim.open_files();
        victim
    }

    fn open_files(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.daemon.pid().unwrap())).unwrap().count()
    }

    fn connect(&self, options: Options) -> FrontEnd {
        FrontEnd::start(&self.daemon.socket("disk"), options).unwrap()
    }

    fn raw(&self) -> RawConnection {
        RawConnection::connect(&self.daemon.socket("disk")).unwrap()
    }

    /// A front end that keeps to the rules is served, and the stamps are there.
    fn is_unharmed(&mut self, after: &str) {
        assert!(self.daemon.is_alive(), "the daemon died of {after}");
        // Connections that were closed a moment ago may still count among those that the daemon allows at once.
        let until = Instant::now() + Duration::from_secs(60);
        let mut front = loop {
            match FrontEnd::start(&self.daemon.socket("disk"), Options::default()) {
                Ok(front) => break front,
                Err(e) => assert!(Instant::now() < until, "nobody is served after {after}: {e:#}"),
            }
            std::thread::sleep(Duration::from_millis(10));
        };
        let buffer = front.memory.alloc(0, STAMPED * 512, 4096);
        for first in [0, SECTORS - STAMPED] {
            let request = Request { kind: READ, sector: first, data: &[(buffer, STAMPED as u32 * 512)] };
            let token = front.rings[0].submit(&request).unwrap();
            front.rings[0].kick();
            let done = front.rings[0].wait(Duration::from_secs(60));
            let done = done.unwrap_or_else(|| panic!("nobody is served after {after}"));
            assert_eq!((done.token, done.status), (token, OK), "after {after}");
            let mut content = vec![0; STAMPED as usize * 512];
            front.memory.read(buffer, &mut content);
            for (i, bytes) in content.chunks_exact(512).enumerate() {
                let sector = first + i as u64;
                let found = read_stamp(bytes, sector);
                assert_eq!(found, Content::Written(GENERATION), "sector {sector} was changed by {after}");
            }
        }
    }

    /// Nothing that the attacks opened stays open in the daemon.
    fn leaks_no_files(&self) {
        let until = Instant::now() + Duration::from_secs(60);
        // The sockets of the last connections may stay until the next one comes.
        drop(self.raw());
        std::thread::sleep(Duration::from_millis(20));
        drop(self.raw());
        while self.open_files() > self.files_before + 3 {
            if Instant::now() > until {
                let links = std::fs::read_dir(format!("/proc/{}/fd", self.daemon.pid().unwrap())).unwrap();
                let links: Vec<_> = links.filter_map(|e| std::fs::read_link(e.ok()?.path()).ok()).collect();
                panic!("{} files were open before, {} are now: {links:?}", self.files_before, links.len());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// The reference dies or hangs of some of this; only ours is asked.
fn is_reference() -> bool {
    let is = Daemon::program() == Program::Reference;
    if is {
        println!("SKIPPED: only blockd is attacked");
    }
    is
}

#[test]
fn a_malformed_request_is_refused_and_harms_nobody() {
    if is_reference() {
        return;
    }
    let mut victim = Victim::new();
    let attacks = all_attacks();
    for (name, fate, run) in &attacks {
        let front = victim.connect(Options { queue_size: 64, ..Options::default() });
        let buffer = front.memory.alloc(0, 1 << 16, 4096);
        let mut attack = Attack { front, buffer };
        let done = run(&mut attack);
        println!(
            "{name}: {}",
            done.map_or("the ring is stopped".to_owned(), |done| format!("{:#x}", done.status))
        );
        match (fate, done) {
            (Fate::Refused, Some(done)) => {
                assert!(done.status != OK && done.status != NO_STATUS, "{name}: {done:?}")
            }
            (Fate::Refused, None) => panic!("{name}: was not completed"),
            (Fate::Status(status), done) => {
                assert_eq!(done.map(|done| done.status), Some(*status), "{name}");
            }
            (Fate::NotOk, Some(done)) => assert_ne!(done.status, OK, "{name}"),
            (Fate::NotOk, None) | (Fate::Any, _) => {}
        }
        drop(attack);
        victim.is_unharmed(name);
    }
    victim.leaks_no_files();
    println!("{} malformed requests", attacks.len());
}

#[test]
fn rubbish_in_rings_harms_nobody() {
    if is_reference() {
        return;
    }
    let mut victim = Victim::new();
    let mut random = ChaCha8Rng::seed_from_u64(system_tests::seed(61));
    let mut completed = 0;
    for round in 0..150 {
        let mut front = victim.connect(Options { queue_size: 16, ..Options::default() });
        let end = front.memory.end();
        for head in 0..16 {
            let desc = Desc {
                addr: if random.random_bool(0.9) { random.random_range(0..end) } else { random.random() },
                len: if random.random_bool(0.8) { random.random_range(0..5000) } else { random.random() },
                flags: random.random_range(0..8),
                next: random.random_range(0..18),
            };
            front.rings[0].write_desc(head, desc);
        }
        // Requests that say "write" are all beyond the end: the stamps must stay.
        let page = front.memory.alloc(0, 1 << 20, 4096);
        for at in (0..1 << 20).step_by(16) {
            let kind: u32 = [READ, WRITE, FLUSH, DISCARD, WRITE_ZEROES, 77][random.random_range(0..6)];
            let sector = SECTORS + random.random_range(0..1 << 40);
            let mut bytes = [0; 16];
            bytes[..4].copy_from_slice(&kind.to_le_bytes());
            bytes[8..].copy_from_slice(&sector.to_le_bytes());
            front.memory.write(page + at, &bytes);
        }
        for _ in 0..16 {
            let head = random.random_range(0..16);
            front.rings[0].push_avail(head);
        }
        front.rings[0].kick_always();
        std::thread::sleep(Duration::from_millis(2));
        completed += u64::from(front.rings[0].used_idx());
        drop(front);
        if round % 10 == 0 {
            victim.is_unharmed("rubbish in a ring");
        }
    }
    victim.is_unharmed("rubbish in a ring");
    victim.leaks_no_files();
    println!("150 rings of rubbish, {completed} chains were completed");
}

fn memfd(len: usize) -> Mapping {
    Mapping::new(len).unwrap()
}

/// Says what a front end says first, so that later messages are looked at.
fn introduce(connection: &mut RawConnection) {
    connection.message(3, &[], &[]).unwrap();
    connection.message(1, &[], &[]).unwrap();
    let Answer::Message(1, features) = connection.answer() else { panic!("no features") };
    connection.message(15, &[], &[]).unwrap();
    let Answer::Message(15, protocol) = connection.answer() else { panic!("no protocol features") };
    connection.message(16, &protocol, &[]).unwrap();
    let accepted = u64::from_le_bytes(features.try_into().unwrap()) & !(1 << 26);
    connection.message(2, &accepted.to_le_bytes(), &[]).unwrap();
}

#[test]
fn a_malformed_message_harms_nobody() {
    if is_reference() {
        return;
    }
    let mut victim = Victim::new();
    let messages = all_messages();
    let memory = memfd(1 << 20);
    for (name, request, body, files) in &messages {
        let mut connection = victim.raw();
        introduce(&mut connection);
        let fds = vec![memory.file().as_raw_fd(); *files];
        let flags = VERSION | NEED_REPLY;
        let sent = connection.send(*request, flags, body.len() as u32, body, &fds);
        connection.finish();
        let answer = if sent.is_ok() { connection.answer() } else { Answer::Closed };
        println!("{name}: {answer:x?}");
        assert_ne!(answer, Answer::Silence, "{name}: the daemon says nothing and does not close");
        drop(connection);
        victim.is_unharmed(name);
    }
    victim.leaks_no_files();
    println!("{} malformed messages", messages.len());
}

#[test]
fn bytes_that_are_no_messages_harm_nobody() {
    if is_reference() {
        return;
    }
    let mut victim = Victim::new();
    let header = |request: u32, flags: u32, size: u32| -> Vec<u8> {
        [request, flags, size].iter().flat_map(|w| w.to_le_bytes()).collect()
    };
    let tries: Vec<(&str, Vec<u8>)> = vec![
        ("nothing", vec![]),
        ("one byte", vec![1]),
        ("half a header", vec![1, 0, 0, 0, 1]),
        ("a header that promises a body", header(2, VERSION, 8)),
        ("half a body", [header(2, VERSION, 8), vec![0; 3]].concat()),
        ("a size of 4 GiB", header(2, VERSION, u32::MAX)),
        ("a size of 1 MiB", [header(5, VERSION, 1 << 20), vec![0; 1 << 16]].concat()),
        ("version 0", header(1, 0, 0)),
        ("version 2", header(1, 2, 0)),
        ("an answer to nothing", header(1, VERSION | REPLY, 0)),
        ("all flags", header(1, u32::MAX, 0)),
        ("a page of 0xff", vec![0xff; 4096]),
    ];
    for (name, bytes) in &tries {
        let mut connection = victim.raw();
        let _ = connection.send_bytes(bytes, &[]);
        connection.finish();
        connection.answer();
        drop(connection);
        victim.is_unharmed(name);
    }
    victim.leaks_no_files();
}

#[test]
fn a_storm_of_random_messages_harms_nobody() {
    if is_reference() {
        return;
    }
    let mut victim = Victim::new();
    let mut random = ChaCha8Rng::seed_from_u64(system_tests::seed(62));
    let memory = memfd(1 << 20);
    let good = all_messages();
    let (mut sent, mut connections) = (0, 0);
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(12) {
        let mut connection = victim.raw();
        connections += 1;
        if random.random_bool(0.8) {
            introduce(&mut connection);
        }
        for _ in 0..random.random_range(1..40) {
            // Real messages with a few bytes changed get further than rubbish does.
            let (_, request, mut body, files) = good[random.random_range(0..good.len())].clone();
            let request = if random.random_bool(0.1) { random.random_range(0..50) } else { request };
            for _ in 0..random.random_range(0..4) {
                if !body.is_empty() {
                    let at = random.random_range(0..body.len());
                    body[at] = [0, 1, 0xff, random.random()][random.random_range(0..4)];
                }
            }
            let files = if random.random_bool(0.2) { random.random_range(0..5) } else { files };
            let fds: Vec<RawFd> = vec![memory.file().as_raw_fd(); files];
            let flags = VERSION | if random.random_bool(0.5) { NEED_REPLY } else { 0 };
            if connection.send(request, flags, body.len() as u32, &body, &fds).is_err() {
                break;
            }
            sent += 1;
        }
        connection.finish();
        while matches!(connection.answer(), Answer::Message(..)) {}
        if connections % 50 == 0 {
            victim.is_unharmed("a storm of random messages");
        }
    }
    victim.is_unharmed("a storm of random messages");
    victim.leaks_no_files();
    println!("{sent} random messages on {connections} connections");
}

#[test]
fn memory_that_is_cut_off_harms_only_its_owner() {
    if is_reference() {
        return;
    }
    let mut victim = Victim::new();
    for round in 0..12 {
        let options = Options { memory: vec![8 << 20, 8 << 20], ..Options::default() };
        let mut front = victim.connect(options);
        let buffer = front.memory.alloc(1, 1 << 20, 4096);
        let log = DirtyLog::new(front.memory.end()).unwrap();
        front.start_log(&log).unwrap();
        for sector in 0..20 {
            let data = [(buffer + 4096 * sector, 4096)];
            front.rings[0].submit(&Request { kind: READ, sector, data: &data }).unwrap();
        }
        // The rings, the data, the in-flight region or the log: gone under the daemon's hands.
        let cut: &File = match round % 4 {
            0 => front.memory.regions()[0].mapping.file(),
            1 => front.memory.regions()[1].mapping.file(),
            2 => &front.inflight.as_ref().unwrap().file,
            _ => log.file(),
        };
        if round % 2 == 0 {
            front.rings[0].kick_always();
        }
        let cut_off = cut.set_len(0);
        let _ = front.rings[0].kick_fd().write(1);
        std::thread::sleep(Duration::from_millis(30));
        if round < 4 {
            println!(
                "cut off {}: {cut_off:?}",
                ["the rings", "the data", "the in-flight region", "the log"][round]
            );
        }
        // Dropping the front end must not touch memory that is gone.
        drop(front);
        victim.is_unharmed("memory that was cut off");
    }
    victim.leaks_no_files();
}

#[test]
fn many_silent_and_many_short_connections_harm_nobody() {
    if is_reference() {
        return;
    }
    let mut victim = Victim::new();
    let silent: Vec<_> = (0..10).map(|_| victim.raw()).collect();
    victim.is_unharmed("10 silent connections");
    let half = victim.raw();
    half.send_bytes(&[1, 0, 0], &[]).unwrap();
    victim.is_unharmed("a connection that stopped in the middle of a message");
    drop((silent, half));
    // More than the daemon keeps: it turns some away, and forgets them all when they are gone.
    let silent: Vec<_> = (0..100).map(|_| victim.raw()).collect();
    std::thread::sleep(Duration::from_millis(100));
    assert!(victim.open_files() < victim.files_before + 80, "not all of 100 connections are kept");
    drop(silent);
    std::thread::sleep(Duration::from_millis(300));
    victim.is_unharmed("100 silent connections");
    for _ in 0..500 {
        drop(victim.raw());
    }
    victim.is_unharmed("500 short connections");
    victim.leaks_no_files();
}

#[test]
fn a_refused_front_end_is_told_so_by_its_closed_connection() {
    if is_reference() {
        return;
    }
    let victim = Victim::new();
    let front = FrontEnd::connect(&victim.daemon.socket("disk"), Options::default()).unwrap();
    assert!(front.vhost.set_vring_num(0, 3).is_err());
    let until = Instant::now() + Duration::from_secs(2);
    while !front.is_hung_up() && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(5));
    }
    // Closed or not: it is not left hanging.
    let again = front.vhost.get_features();
    assert!(front.is_hung_up() == again.is_err(), "{again:?}");
}
