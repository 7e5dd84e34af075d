//! Requests that no driver makes, and what may become of them.

use std::time::Duration;

use system_tests::FrontEnd;
use system_tests::load::zero_segment;
use system_tests::ring::{
    Completion, DESC_INDIRECT, DESC_NEXT, DESC_WRITE, DISCARD, Desc, FLUSH, GET_ID, OK, READ, Token,
    UNSUPPORTED, WRITE, WRITE_ZEROES,
};

use crate::SECTORS;

/// What may become of an attack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fate {
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
pub(crate) struct Attack {
    pub(crate) front: FrontEnd,
    /// 64 KiB of guest memory.
    pub(crate) buffer: u64,
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

pub(crate) type Run = fn(&mut Attack) -> Option<Completion>;

const W: u16 = DESC_WRITE;

pub(crate) fn all_attacks() -> Vec<(&'static str, Fate, Run)> {
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
