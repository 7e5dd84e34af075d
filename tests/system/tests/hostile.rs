//! A front end and a guest that mean harm, or are broken.
//!
//! Whatever they send: the daemon lives, nothing that was not asked for is changed on the disk, and the next front end
//! that keeps to the rules is served.

use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use system_tests::daemon::Program;
use system_tests::load::zero_segment;
use system_tests::memory::{DirtyLog, Mapping};
use system_tests::model::{Content, read_stamp, stamp};
use system_tests::ring::{
    Completion, DESC_INDIRECT, DESC_NEXT, DESC_WRITE, DISCARD, Desc, FLUSH, GET_ID, NO_STATUS, OK, READ,
    Request, Token, UNSUPPORTED, WRITE, WRITE_ZEROES,
};
use system_tests::wire::{Answer, NEED_REPLY, REPLY, RawConnection, VERSION};
use system_tests::{Daemon, FrontEnd, Image, Options};
use vhost::VhostBackend;

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
        let mut front = FrontEnd::start(&self.daemon.socket("disk"), Options::default())
            .unwrap_or_else(|e| panic!("nobody is served after {after}: {e:#}"));
        let buffer = front.memory.alloc(0, STAMPED * 512, 4096);
        for first in [0, SECTORS - STAMPED] {
            let request = Request { kind: READ, sector: first, data: &[(buffer, STAMPED as u32 * 512)] };
            let token = front.rings[0].submit(&request).unwrap();
            front.rings[0].kick();
            let done = front.rings[0].wait(Duration::from_secs(10));
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
        let until = Instant::now() + Duration::from_secs(5);
        // The sockets of the last connections may stay until the next one comes.
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

/// What may become of an attack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    /// The request is completed with any error.
    Refused,
    /// The request is completed with this status.
    Status(u8),
    /// It may even succeed: what is wrong with it need not be looked at.
    Any,
    /// The ring is stopped, or the request is completed with an error or without a status: anything but success.
    NotOk,
}

/// What an attack works with: a front end and some of its memory.
struct Attack {
    front: FrontEnd,
    /// 64 KiB of guest memory.
    buffer: u64,
}

impl Attack {
    /// Publishes a chain that begins at `head`, and looks what becomes of it.
    fn launch(&mut self, head: Token) -> Option<Completion> {
        let ring = &mut self.front.rings[0];
        ring.publish(head, 0);
        ring.kick_always();
        ring.wait(Duration::from_millis(150))
    }

    /// One request with the given data descriptors between a right header and a right status.
    fn request(&mut self, kind: u32, sector: u64, data: &[(u64, u32, u16)]) -> Option<Completion> {
        let head = self.front.rings[0].take_head().unwrap();
        let (header, status) = self.front.rings[0].write_header(head, kind, sector);
        let mut descs = vec![(header, 16, 0)];
        descs.extend_from_slice(data);
        descs.push((status, 1, DESC_WRITE));
        self.chain(head, &descs);
        self.launch(head)
    }

    /// Links descriptors into a chain that begins at `head`. Those that follow are never used otherwise: they are at
    /// the table's end.
    fn chain(&mut self, head: Token, descs: &[(u64, u32, u16)]) {
        let size = self.front.rings[0].options().size;
        let first = size - descs.len() as u16;
        for (i, &(addr, len, flags)) in descs.iter().enumerate() {
            let at = if i == 0 { head.0 } else { first + i as u16 };
            let more = i + 1 < descs.len();
            let next = if more { first + i as u16 + 1 } else { 0 };
            let flags = flags | if more { DESC_NEXT } else { 0 };
            self.front.rings[0].write_desc(at, Desc { addr, len, flags, next });
        }
    }

    fn head(&mut self) -> (Token, u64, u64) {
        let head = self.front.rings[0].take_head().unwrap();
        let (header, status) = self.front.rings[0].write_header(head, READ, 0);
        (head, header, status)
    }

    fn zeroing(&mut self, kind: u32, sector: u64, count: u32, flags: u32) -> Option<Completion> {
        let mut segment = zero_segment(sector, u64::from(count), false);
        segment[12..].copy_from_slice(&flags.to_le_bytes());
        self.front.memory.write(self.buffer, &segment);
        self.request(kind, 0, &[(self.buffer, 16, 0)])
    }
}

type Run = fn(&mut Attack) -> Option<Completion>;

const W: u16 = DESC_WRITE;

fn attacks() -> Vec<(&'static str, Fate, Run)> {
    use Fate::{NotOk, Refused, Status};
    let mut all: Vec<(&'static str, Fate, Run)> = vec![
        ("data at an address that is no memory", Refused, |a| a.request(READ, 0, &[(1 << 50, 512, W)])),
        ("data to write from an address that is no memory", Refused, |a| {
            a.request(WRITE, 0, &[(1 << 50, 512, 0)])
        }),
        ("data at an address that overflows", Refused, |a| a.request(READ, 0, &[(u64::MAX - 100, 512, W)])),
        ("data that leaves the memory in the middle", Refused, |a| {
            let end = a.front.memory.end();
            a.request(READ, 0, &[(end - 512, 1024, W)])
        }),
        ("a write whose data leaves the memory in the middle", Refused, |a| {
            let end = a.front.memory.end();
            a.request(WRITE, 0, &[(end - 512, 1024, 0)])
        }),
        ("data that the device may not write in a read", Refused, |a| {
            a.request(READ, 0, &[(a.buffer, 512, 0)])
        }),
        ("data that the device may write in a write", Refused, |a| {
            a.request(WRITE, 0, &[(a.buffer, 512, W)])
        }),
        ("no data in a read", NotOk, |a| a.request(READ, 0, &[])),
        ("no data in a write", NotOk, |a| a.request(WRITE, 0, &[])),
        ("data of no length", NotOk, |a| a.request(READ, 0, &[(a.buffer, 0, W)])),
        ("511 bytes", Refused, |a| a.request(READ, 0, &[(a.buffer, 511, W)])),
        ("513 bytes to write", Refused, |a| a.request(WRITE, 0, &[(a.buffer, 513, 0)])),
        ("1 byte to write", Refused, |a| a.request(WRITE, 0, &[(a.buffer, 1, 0)])),
        ("4 GiB in one descriptor", Refused, |a| a.request(READ, 0, &[(a.buffer, u32::MAX, W)])),
        ("more than 4 GiB in many descriptors", Refused, |a| {
            let data = vec![(a.buffer, 1 << 30, W); 20];
            a.request(READ, 0, &data)
        }),
        ("the first sector beyond the end", Refused, |a| a.request(READ, SECTORS, &[(a.buffer, 512, W)])),
        ("a write beyond the end", Refused, |a| a.request(WRITE, SECTORS, &[(a.buffer, 512, 0)])),
        ("a write across the end", Refused, |a| a.request(WRITE, SECTORS - 1, &[(a.buffer, 1024, 0)])),
        ("a read across the end", Refused, |a| a.request(READ, SECTORS - 1, &[(a.buffer, 1024, W)])),
        ("the last sector there could be", Refused, |a| a.request(WRITE, u64::MAX, &[(a.buffer, 512, 0)])),
        ("a sector whose byte overflows to 0", Refused, |a| a.request(WRITE, 1 << 55, &[(a.buffer, 512, 0)])),
        ("a sector whose end overflows", Refused, |a| {
            a.request(WRITE, u64::MAX / 512, &[(a.buffer, 4096, 0)])
        }),
        ("room for half a name", NotOk, |a| a.request(GET_ID, 0, &[(a.buffer, 10, 0)])),
    ];
    all.extend(zeroing_attacks());
    all.extend(chain_attacks());
    all.extend(indirect_attacks());
    all.extend([("flags in a discard", Status(UNSUPPORTED), (|a| a.zeroing(DISCARD, 0, 8, 1)) as Run)]);
    all
}

fn zeroing_attacks() -> Vec<(&'static str, Fate, Run)> {
    use Fate::{NotOk, Refused, Status};
    vec![
        ("unknown flags in a discard", Status(UNSUPPORTED), |a| a.zeroing(DISCARD, 0, 8, 0x8000_0000)),
        ("unknown flags in a write-zeroes", Status(UNSUPPORTED), |a| a.zeroing(WRITE_ZEROES, 0, 8, 2)),
        ("a discard beyond the end", Refused, |a| a.zeroing(DISCARD, SECTORS, 8, 0)),
        ("a discard across the end", Refused, |a| a.zeroing(DISCARD, SECTORS - 4, 8, 0)),
        ("a write-zeroes across the end", Refused, |a| a.zeroing(WRITE_ZEROES, SECTORS - 4, 8, 1)),
        ("a discard whose sector overflows", Refused, |a| a.zeroing(DISCARD, 1 << 55, 8, 0)),
        ("a write-zeroes whose end overflows", Refused, |a| a.zeroing(WRITE_ZEROES, u64::MAX - 3, 8, 0)),
        ("a discard of all that can be said", Refused, |a| a.zeroing(DISCARD, 0, u32::MAX, 0)),
        ("a write-zeroes of all that can be said", Refused, |a| a.zeroing(WRITE_ZEROES, 0, u32::MAX, 0)),
        ("a discard without a segment", NotOk, |a| a.request(DISCARD, 0, &[])),
        ("half a segment", Refused, |a| a.request(DISCARD, 0, &[(a.buffer, 8, 0)])),
        ("a segment and a half", Refused, |a| a.request(WRITE_ZEROES, 0, &[(a.buffer, 24, 0)])),
        ("a segment that is no memory", Refused, |a| a.request(DISCARD, 0, &[(1 << 50, 16, 0)])),
        ("a segment that the device may write", NotOk, |a| a.request(DISCARD, 0, &[(a.buffer, 16, W)])),
        ("four thousand segments", Refused, |a| {
            for i in 0..4096 {
                a.front.memory.write(a.buffer + i * 16, &zero_segment(0, 8, false));
            }
            a.request(WRITE_ZEROES, 0, &[(a.buffer, 4096 * 16, 0)])
        }),
    ]
}

fn chain_attacks() -> Vec<(&'static str, Fate, Run)> {
    use Fate::NotOk;
    vec![
        ("a header alone", NotOk, |a| {
            let (head, header, _) = a.head();
            a.chain(head, &[(header, 16, 0)]);
            a.launch(head)
        }),
        ("a status alone", NotOk, |a| {
            let (head, _, status) = a.head();
            a.chain(head, &[(status, 1, W)]);
            a.launch(head)
        }),
        ("a header of 15 bytes", NotOk, |a| {
            let (head, header, status) = a.head();
            a.chain(head, &[(header, 15, 0), (status, 1, W)]);
            a.launch(head)
        }),
        ("a header of no length", NotOk, |a| {
            let (head, header, status) = a.head();
            a.chain(head, &[(header, 0, 0), (a.buffer, 512, W), (status, 1, W)]);
            a.launch(head)
        }),
        ("a header that the device may write", NotOk, |a| {
            let (head, header, status) = a.head();
            a.chain(head, &[(header, 16, W), (a.buffer, 512, W), (status, 1, W)]);
            a.launch(head)
        }),
        ("a header that is no memory", NotOk, |a| {
            let (head, _, status) = a.head();
            a.chain(head, &[(1 << 50, 16, 0), (a.buffer, 512, W), (status, 1, W)]);
            a.launch(head)
        }),
        ("a status that the device may not write", NotOk, |a| {
            let (head, header, status) = a.head();
            a.chain(head, &[(header, 16, 0), (a.buffer, 512, 0), (status, 1, 0)]);
            a.launch(head)
        }),
        ("a status that is no memory", NotOk, |a| {
            let (head, header, _) = a.head();
            a.chain(head, &[(header, 16, 0), (a.buffer, 512, W), (1 << 50, 1, W)]);
            a.launch(head)
        }),
        ("a status of no length", NotOk, |a| {
            let (head, header, status) = a.head();
            a.chain(head, &[(header, 16, 0), (status, 0, W)]);
            a.launch(head)
        }),
        ("what is read after what is written", NotOk, |a| {
            let (head, header, status) = a.head();
            a.chain(head, &[(header, 16, 0), (a.buffer, 512, W), (a.buffer, 512, 0), (status, 1, W)]);
            a.launch(head)
        }),
        ("a chain that leads to itself", NotOk, |a| {
            let (head, header, _) = a.head();
            a.front.rings[0]
                .write_desc(head.0, Desc { addr: header, len: 16, flags: DESC_NEXT, next: head.0 });
            a.launch(head)
        }),
        ("a chain that runs in a circle", NotOk, |a| {
            let (head, header, _) = a.head();
            a.chain(head, &[(header, 16, 0), (a.buffer, 512, W), (a.buffer, 512, W)]);
            let last = a.front.rings[0].options().size - 1;
            let desc = Desc { addr: a.buffer, len: 512, flags: DESC_NEXT | W, next: last - 1 };
            a.front.rings[0].write_desc(last, desc);
            a.launch(head)
        }),
        ("a chain that leads out of the table", NotOk, |a| {
            let (head, header, _) = a.head();
            a.front.rings[0]
                .write_desc(head.0, Desc { addr: header, len: 16, flags: DESC_NEXT, next: 40_000 });
            a.launch(head)
        }),
        ("a head out of the table", NotOk, |a| {
            a.front.rings[0].push_avail(60_000);
            a.front.rings[0].kick_always();
            a.front.rings[0].wait(Duration::from_millis(150))
        }),
        ("an available index that jumps", NotOk, |a| {
            let index = a.front.rings[0].avail_idx().wrapping_add(1000);
            a.front.rings[0].set_avail_idx(index);
            a.front.rings[0].kick_always();
            a.front.rings[0].wait(Duration::from_millis(150))
        }),
        ("an available index that goes back", NotOk, |a| {
            let index = a.front.rings[0].avail_idx().wrapping_sub(1);
            a.front.rings[0].set_avail_idx(index);
            a.front.rings[0].kick_always();
            a.front.rings[0].wait(Duration::from_millis(150))
        }),
        ("a flush with data in both directions", Fate::Status(OK), |a| {
            let data = [(a.buffer, 512, 0), (a.buffer, 512, W)];
            a.request(FLUSH, 0, &data)
        }),
    ]
}

/// A head whose descriptor is a table of `entries`; the descriptor says `len` bytes.
fn table(a: &mut Attack, entries: &[Desc], len: u32, flags: u16) -> Option<Completion> {
    let (head, ..) = a.head();
    a.front.rings[0].write_table(head, entries);
    let desc = Desc { addr: a.front.rings[0].table(head), len, flags: DESC_INDIRECT | flags, next: 0 };
    a.front.rings[0].write_desc(head.0, desc);
    a.launch(head)
}

fn indirect_attacks() -> Vec<(&'static str, Fate, Run)> {
    use Fate::NotOk;
    fn good(a: &Attack) -> [Desc; 3] {
        // The head that `table` will take has its header and status where every head has them.
        let (header, status) = (a.front.rings[0].meta(Token(0)), a.front.rings[0].meta(Token(0)) + 16);
        [
            Desc { addr: header, len: 16, flags: DESC_NEXT, next: 1 },
            Desc { addr: a.buffer, len: 512, flags: DESC_NEXT | W, next: 2 },
            Desc { addr: status, len: 1, flags: W, next: 0 },
        ]
    }
    vec![
        ("an indirect table of odd length", NotOk, |a| table(a, &good(a), 47, 0)),
        ("an indirect table of no length", NotOk, |a| table(a, &good(a), 0, 0)),
        ("an indirect table that goes on with next", NotOk, |a| table(a, &good(a), 48, DESC_NEXT)),
        ("an indirect table in an indirect table", NotOk, |a| {
            let mut entries = good(a);
            entries[1].flags = DESC_INDIRECT;
            table(a, &entries, 48, 0)
        }),
        ("an indirect table whose chain leaves it", NotOk, |a| {
            let mut entries = good(a);
            entries[1].next = 3;
            table(a, &entries, 48, 0)
        }),
        ("an indirect table whose chain runs in a circle", NotOk, |a| {
            let mut entries = good(a);
            entries[1].next = 0;
            table(a, &entries, 48, 0)
        }),
        ("an indirect table that is no memory", NotOk, |a| {
            let (head, ..) = a.head();
            let desc = Desc { addr: 1 << 50, len: 48, flags: DESC_INDIRECT, next: 0 };
            a.front.rings[0].write_desc(head.0, desc);
            a.launch(head)
        }),
        ("an indirect table of 4 GiB, a little of it used", Fate::Any, |a| {
            table(a, &good(a), 0xffff_fff0, 0)
        }),
        ("an indirect table that is longer than the ring, all of it used", NotOk, |a| {
            let (head, header, status) = a.head();
            let count = 4000u16;
            let at = a.front.memory.alloc(0, u64::from(count) * 16, 4096);
            for i in 0..count {
                let (addr, len, flags) = match i {
                    0 => (header, 16u32, DESC_NEXT),
                    i if i == count - 1 => (status, 1, W),
                    _ => (a.buffer, 512, DESC_NEXT | W),
                };
                let mut bytes = [0; 16];
                bytes[..8].copy_from_slice(&addr.to_le_bytes());
                bytes[8..12].copy_from_slice(&len.to_le_bytes());
                bytes[12..14].copy_from_slice(&flags.to_le_bytes());
                bytes[14..].copy_from_slice(&(i + 1).to_le_bytes());
                a.front.memory.write(at + u64::from(i) * 16, &bytes);
            }
            let desc = Desc { addr: at, len: u32::from(count) * 16, flags: DESC_INDIRECT, next: 0 };
            a.front.rings[0].write_desc(head.0, desc);
            a.launch(head)
        }),
    ]
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
    let attacks = attacks();
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
    let mut random = ChaCha8Rng::seed_from_u64(61);
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

/// The body of a message with a memory table: guest address, size, user address, offset in the file.
fn memory_table(regions: &[[u64; 4]]) -> Vec<u8> {
    let mut body = (regions.len() as u64).to_le_bytes().to_vec();
    regions.iter().flatten().for_each(|word| body.extend_from_slice(&word.to_le_bytes()));
    body
}

fn words(values: &[u64]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// (what it is, request, body, how many copies of the memfd go with it)
fn messages() -> Vec<(&'static str, u32, Vec<u8>, usize)> {
    const MIB: u64 = 1 << 20;
    let state = |index: u32, value: u32| u64::from(index) | u64::from(value) << 32;
    let inflight = |size: u64, offset: u64, queues: u16, depth: u16| {
        let mut body = words(&[size, offset]);
        body.extend_from_slice(&queues.to_le_bytes());
        body.extend_from_slice(&depth.to_le_bytes());
        body.extend_from_slice(&[0; 4]);
        body
    };
    let config = |offset: u32, size: u32, len: usize| {
        let mut body: Vec<u8> = [offset, size, 0].iter().flat_map(|w| w.to_le_bytes()).collect();
        body.resize(12 + len, 0);
        body
    };
    let mut many = vec![[0, MIB, 0x1000, 0]; 100];
    many.iter_mut().enumerate().for_each(|(i, region)| region[0] = i as u64 * MIB);
    vec![
        ("request 0", 0, vec![], 0),
        ("an unknown request", 45, words(&[1]), 0),
        ("a request far out", 1000, vec![0; 64], 0),
        ("the last request", u32::MAX, vec![], 0),
        ("features in a question for them", 1, words(&[1]), 0),
        ("files in a question for features", 1, vec![], 3),
        ("half of the features", 2, vec![0; 4], 0),
        ("no memory table", 5, vec![], 0),
        ("an empty memory table", 5, memory_table(&[]), 0),
        ("a memory table without files", 5, memory_table(&[[0, MIB, 0x1000, 0]]), 0),
        ("a memory table with too many files", 5, memory_table(&[[0, MIB, 0x1000, 0]]), 3),
        ("a memory table of 100 regions", 5, memory_table(&many), 8),
        ("a memory table that says 1000 regions", 5, [words(&[1000]), vec![0; 32]].concat(), 1),
        ("a region of no size", 5, memory_table(&[[0, 0, 0x1000, 0]]), 1),
        ("a region whose end overflows", 5, memory_table(&[[u64::MAX - 100, MIB, 0x1000, 0]]), 1),
        ("a region whose user address overflows", 5, memory_table(&[[0, MIB, u64::MAX - 100, 0]]), 1),
        ("a region beyond its file", 5, memory_table(&[[0, MIB, 0x1000, 1 << 40]]), 1),
        ("a region whose offset overflows", 5, memory_table(&[[0, MIB, 0x1000, u64::MAX - 4095]]), 1),
        ("a region that is larger than its file", 5, memory_table(&[[0, 1 << 45, 0x1000, 0]]), 1),
        ("overlapping regions", 5, memory_table(&[[0, MIB, 0x1000, 0], [MIB / 2, MIB, 0x20_0000, 0]]), 2),
        ("overlapping user addresses", 5, memory_table(&[[0, MIB, 0x1000, 0], [2 * MIB, MIB, 0x2000, 0]]), 2),
        ("a log of no size", 6, words(&[0, 0]), 1),
        ("a log beyond its file", 6, words(&[1 << 40, 0]), 1),
        ("a log whose offset overflows", 6, words(&[4096, u64::MAX - 10]), 1),
        ("a log without a file", 6, words(&[4096, 0]), 0),
        ("a ring of 65,535", 8, words(&[state(0, 65535)]), 0),
        ("a ring of 2^31", 8, words(&[state(0, 1 << 31)]), 0),
        ("the size of ring 4 billion", 8, words(&[state(u32::MAX, 128)]), 0),
        ("addresses of ring 200", 9, words(&[200, 0x1000, 0x2000, 0x3000, 0]), 0),
        ("addresses that are odd", 9, words(&[0, 0x1001, 0x2001, 0x3001, 0]), 0),
        ("addresses at the end of everything", 9, words(&[0, u64::MAX, u64::MAX, u64::MAX, u64::MAX]), 0),
        ("a base of ring 9999", 10, words(&[state(9999, 0)]), 0),
        ("a base of 4 billion", 10, words(&[state(0, u32::MAX)]), 0),
        ("a question for the base of ring 9999", 11, words(&[state(9999, 0)]), 0),
        ("a kick with two files", 12, words(&[0]), 2),
        ("a kick for ring 255", 12, words(&[255]), 1),
        ("a kick that is a memfd", 12, words(&[0]), 1),
        ("a call that is a memfd", 13, words(&[0]), 1),
        ("a kick without a file that says it has one", 12, words(&[0]), 0),
        ("a wish for ring 77", 18, words(&[state(77, 1)]), 0),
        ("a wish that is 7", 18, words(&[state(0, 7)]), 0),
        ("a channel that is a memfd", 21, vec![], 1),
        ("an empty piece of configuration", 24, config(0, 0, 0), 0),
        ("configuration whose size lies", 24, config(0, 200, 10), 0),
        ("configuration far out", 24, config(u32::MAX - 10, 60, 60), 0),
        ("configuration of 4 GiB", 24, config(0, u32::MAX, 60), 0),
        ("a write to all of the configuration", 25, config(0, 256, 256), 0),
        ("a write to the end of the configuration", 25, config(250, 100, 100), 0),
        ("a question for 65,535 rings in flight", 31, inflight(0, 0, 65535, 65535), 0),
        ("a question for no rings in flight", 31, inflight(0, 0, 0, 0), 0),
        ("an in-flight region beyond its file", 32, inflight(1 << 40, 0, 4, 128), 1),
        ("an in-flight region that is too small", 32, inflight(64, 0, 4, 128), 1),
        ("an in-flight region whose offset overflows", 32, inflight(1 << 16, u64::MAX - 5, 4, 128), 1),
        ("an in-flight region of a ring of 100", 32, inflight(1 << 16, 0, 1, 100), 1),
        ("an in-flight region without a file", 32, inflight(1 << 16, 0, 1, 128), 0),
        ("memory added without a file", 37, words(&[0, 0, MIB, 0x1000, 0]), 0),
        ("memory added beyond its file", 37, words(&[0, 0, MIB, 0x1000, 1 << 40]), 1),
        ("memory added of no size", 37, words(&[0, 0, 0, 0x1000, 0]), 1),
        ("memory removed that is not there", 38, words(&[0, 1 << 40, MIB, 0x1000, 0]), 0),
        ("a state in no direction", 42, words(&[9]), 1),
        ("a state to load from a memfd of zeroes", 42, words(&[1]), 1),
    ]
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
    let messages = messages();
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
    let mut random = ChaCha8Rng::seed_from_u64(62);
    let memory = memfd(1 << 20);
    let good = messages();
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
