//! The governor between a guest and a move that share a disk, which serves one request after the other.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::*;

const LIMITS: Limits = Limits { extent_size: 64 << 10, copy_bytes_max: 512 << 10, in_flight_max: 3 };
const S: u64 = 1_000_000;
const HEAR_EVERY_US: u64 = 50_000;

/// How the guest makes requests of 4 KiB.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Guest {
    Idle,
    /// So many a second, whatever becomes of them.
    Open(u64),
    /// So many at a time.
    Closed(u32),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Happens {
    Arrival,
    Return,
    /// The copy's read is done, and its write is to follow.
    Read(u64),
    Written(u64),
    Hearing,
    Alarm,
}

/// What was seen in one second.
#[derive(Debug, Default, Clone)]
struct Second {
    guest: Vec<(u64, u64)>,
    bytes: u64,
}

struct World {
    governor: Governor,
    guest: Guest,
    /// Of each request, and of each byte.
    op_us: f64,
    bytes_per_us: f64,
    now: u64,
    free_at: f64,
    to_come: BinaryHeap<Reverse<(u64, Happens)>>,
    dice: u64,
    heard: Vec<(u64, u64)>,
    seconds: Vec<Second>,
    is_deaf: bool,
    is_copying: bool,
    windows: Vec<f64>,
}

impl World {
    fn new(budget_us: Option<u64>, guest: Guest) -> Self {
        let mut world = Self {
            governor: Governor::new(LIMITS, budget_us),
            guest: Guest::Idle,
            op_us: 100.0,
            bytes_per_us: 1000.0,
            now: 1,
            free_at: 0.0,
            to_come: BinaryHeap::new(),
            dice: 7,
            heard: Vec::new(),
            seconds: Vec::new(),
            is_deaf: false,
            is_copying: true,
            windows: Vec::new(),
        };
        world.set_guest(guest);
        world.to_come.push(Reverse((5_000, Happens::Hearing)));
        world
    }

    fn set_guest(&mut self, guest: Guest) {
        self.guest = guest;
        match guest {
            Guest::Idle => {}
            Guest::Open(_) => self.to_come.push(Reverse((self.now, Happens::Arrival))),
            Guest::Closed(depth) => (0..depth).for_each(|_| self.request()),
        }
    }

    fn random(&mut self) -> f64 {
        self.dice = self.dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.dice >> 33) as f64 + 0.5) / f64::from(1u32 << 31)
    }

    /// The disk takes a request at the end of its line; answers when it is done.
    fn serve(&mut self, bytes: u64) -> u64 {
        let noise = 0.8 + 0.4 * self.random();
        let took = (self.op_us + bytes as f64 / self.bytes_per_us) * noise;
        self.free_at = self.free_at.max(self.now as f64) + took;
        self.free_at as u64
    }

    fn request(&mut self) {
        let done = self.serve(4096);
        let us = done - self.now;
        // As coarse as a histogram.
        self.heard.push((us & !((1 << us.ilog2().saturating_sub(4)) - 1), 1));
        self.to_come.push(Reverse((done, Happens::Return)));
        self.second().guest.push((us, 1));
    }

    fn second(&mut self) -> &mut Second {
        let index = (self.now / S) as usize;
        if self.seconds.len() <= index {
            self.seconds.resize(index + 1, Second::default());
        }
        &mut self.seconds[index]
    }

    fn run_until(&mut self, end: u64) {
        while let Some(&Reverse((at, what))) = self.to_come.peek()
            && at < end
        {
            self.to_come.pop();
            self.now = self.now.max(at);
            self.happens(what);
            self.pump();
        }
    }

    fn happens(&mut self, what: Happens) {
        match what {
            Happens::Arrival => {
                if let Guest::Open(rate) = self.guest {
                    self.request();
                    let gap = -self.random().ln() * S as f64 / rate as f64;
                    self.to_come.push(Reverse((self.now + gap as u64 + 1, Happens::Arrival)));
                }
            }
            Happens::Return if matches!(self.guest, Guest::Closed(_)) => self.request(),
            Happens::Return | Happens::Alarm => {}
            Happens::Read(bytes) => {
                let done = self.serve(bytes);
                self.to_come.push(Reverse((done, Happens::Written(bytes))));
            }
            Happens::Written(bytes) => {
                self.governor.ended(Tick(self.now), bytes);
                self.second().bytes += bytes;
            }
            Happens::Hearing => {
                let heard = std::mem::take(&mut self.heard).into_iter().collect();
                if !self.is_deaf {
                    self.governor.hear(Tick(self.now), heard);
                }
                self.windows.push(self.governor.window);
                self.to_come.push(Reverse((self.now + HEAR_EVERY_US, Happens::Hearing)));
            }
        }
    }

    fn pump(&mut self) {
        let allowed = self.governor.copies();
        while self.is_copying && self.governor.in_flight < allowed.in_flight {
            if let Some(at) = self.governor.free_at(Tick(self.now)) {
                assert!(at > Tick(self.now));
                return self.to_come.push(Reverse((at.0, Happens::Alarm)));
            }
            self.governor.begun(Tick(self.now));
            let done = self.serve(allowed.bytes);
            self.to_come.push(Reverse((done, Happens::Read(allowed.bytes))));
        }
    }

    /// The guest's 99th percentile in these seconds, and bytes a second that were copied.
    fn saw(&self, seconds: std::ops::Range<usize>) -> (u64, u64) {
        let seconds = &self.seconds[seconds];
        let all: Latencies = seconds.iter().flat_map(|second| second.guest.iter().copied()).collect();
        let bytes: u64 = seconds.iter().map(|second| second.bytes).sum();
        (all.p99_us().unwrap_or(0), bytes / seconds.len() as u64)
    }

    /// The same without a governor, or without copies.
    fn without(copies: bool, guest: Guest) -> (u64, u64) {
        let mut world = Self::new(None, guest);
        (world.is_deaf, world.is_copying) = (true, copies);
        world.run_until(10 * S);
        world.saw(1..10)
    }
}

const MIB: u64 = 1 << 20;

#[test]
fn the_guest_is_kept_within_its_budget_and_the_copy_goes_as_fast_as_that_allows() {
    for (budget, rate) in [(3_000, 2_000), (1_000, 2_000), (600, 2_000), (1_500, 5_000), (20_000, 100)] {
        let guest = Guest::Open(rate);
        let (hurt, full) = World::without(true, guest);
        let mut world = World::new(Some(budget), guest);
        world.run_until(40 * S);
        let (p99, bytes) = world.saw(5..40);
        println!(
            "{rate}/s, budget {budget}: p99 {p99} at {} MiB/s; else {hurt} at {}",
            bytes / MIB,
            full / MIB
        );
        assert!(p99 <= budget, "{p99} us where {budget} are allowed");
        let worst = (5..40).map(|s| world.saw(s..s + 1).0).max();
        assert!(worst <= Some(budget * 3 / 2), "{worst:?} us in one second, where {budget} are allowed");
        assert!(bytes > full / 8, "{bytes} bytes a second, where {full} are possible");
    }
}

#[test]
fn where_the_guest_alone_exceeds_its_budget_the_copy_goes_at_the_floor() {
    for guest in [Guest::Open(2_000), Guest::Closed(32)] {
        let mut world = World::new(Some(50), guest);
        world.run_until(30 * S);
        let (p99, bytes) = world.saw(10..30);
        println!("{guest:?}: p99 {p99} at {} KiB/s", bytes >> 10);
        assert!(
            (FLOOR_WITH_BUDGET * 3 / 4..FLOOR_WITH_BUDGET * 3 / 2).contains(&bytes),
            "{bytes} bytes a second"
        );
    }
}

#[test]
fn without_a_budget_the_guest_sees_little_more_than_without_a_move() {
    for rate in [200, 1_000, 3_000, 5_000] {
        let guest = Guest::Open(rate);
        let (alone, _) = World::without(false, guest);
        let (hurt, full) = World::without(true, guest);
        let mut world = World::new(None, guest);
        world.run_until(40 * S);
        let (p99, bytes) = world.saw(5..40);
        println!(
            "{rate}/s: p99 {p99} at {} MiB/s; alone {alone}, else {hurt} at {}",
            bytes / MIB,
            full / MIB
        );
        let is_at_floor = bytes < FLOOR * 11 / 10;
        assert!(
            p99 <= (alone + UNHEARD_US) * 3 / 2 || (is_at_floor && p99 < alone * 2),
            "{p99} us with a move, {alone} without"
        );
        assert!(bytes >= FLOOR * 8 / 10, "{bytes} bytes a second");
    }
}

#[test]
fn a_guest_that_goes_as_fast_as_it_can_does_not_stop_the_copy() {
    for (depth, op_us) in [(1, 100.0), (32, 100.0), (128, 20.0)] {
        let mut world = World::new(None, Guest::Closed(depth));
        world.op_us = op_us;
        world.run_until(20 * S);
        let (p99, bytes) = world.saw(2..20);
        println!("{depth} at a time: p99 {p99} at {} MiB/s", bytes / MIB);
        assert!(bytes >= FLOOR * 3 / 4, "{bytes} bytes a second");
    }
}

#[test]
fn an_idle_guest_holds_nothing_up_and_one_that_comes_back_is_kept_in_mind() {
    let (_, full) = World::without(true, Guest::Idle);
    let mut world = World::new(Some(400), Guest::Open(2_000));
    world.run_until(10 * S);
    assert!(world.saw(8..10).1 < full / 2);
    world.set_guest(Guest::Idle);
    world.run_until(20 * S);
    assert!(world.saw(13..20).1 > full * 95 / 100, "{:?} of {full}", world.saw(13..20));
    world.set_guest(Guest::Open(2_000));
    world.run_until(30 * S);
    assert!(world.saw(21..30).0 <= 400, "{:?}", world.saw(21..30));
    // From the start, too.
    let mut world = World::new(None, Guest::Idle);
    world.run_until(2 * S);
    assert!(world.saw(0..1).1 > full * 95 / 100);
}

#[test]
fn the_window_settles() {
    for (budget, guest) in [(Some(1_000), Guest::Open(2_000)), (None, Guest::Open(3_000))] {
        let mut world = World::new(budget, guest);
        world.run_until(60 * S);
        let settled = &world.windows[200..];
        let (least, most) =
            settled.iter().fold((f64::MAX, 0.0_f64), |(a, b), &window| (a.min(window), b.max(window)));
        println!("{budget:?}: windows of {least} to {most} bytes");
        assert!(most <= 4.0 * least, "the window swings between {least} and {most} bytes");
    }
}

#[test]
fn a_budget_that_changes_takes_effect_and_may_be_taken_away() {
    let guest = Guest::Open(2_000);
    let mut world = World::new(Some(50), guest);
    world.run_until(10 * S);
    assert!(world.saw(8..10).1 < 2 * FLOOR_WITH_BUDGET);
    world.governor.set_budget(Tick(world.now), Some(100_000));
    world.run_until(20 * S);
    let (_, full) = World::without(true, guest);
    assert!(world.saw(16..20).1 > full * 9 / 10, "{:?} of {full}", world.saw(16..20));
    world.governor.set_budget(Tick(world.now), None);
    world.run_until(30 * S);
    let (p99, bytes) = world.saw(24..30);
    let (alone, _) = World::without(false, guest);
    let within = (alone + UNHEARD_US) * 3 / 2;
    assert!(p99 <= within && bytes >= FLOOR * 9 / 10, "{p99} us, {alone} without a move, {bytes}");
}

#[test]
fn work_beside_the_machine_pauses_down_to_the_floor() {
    let mut governor = Governor::new(LIMITS, Some(50));
    governor.did_beside(Tick(0), Tick(1_000), MIB);
    assert_eq!(governor.free_at(Tick(1_000)), None, "nothing was heard");
    let mut now = Tick(1_000);
    let mut bytes = 0;
    while now < Tick(10 * S) {
        let begun = now;
        now = now.plus_us(1_000);
        governor.did_beside(begun, now, MIB);
        governor.hear(now, [(900, 100)].into_iter().collect());
        bytes += MIB;
        while let Some(at) = governor.free_at(now) {
            now = at;
        }
    }
    assert!((FLOOR_WITH_BUDGET * 9..FLOOR_WITH_BUDGET * 12).contains(&bytes), "{bytes} bytes in 10 s");
}

#[test]
fn nothing_heard_is_nothing_that_holds_up() {
    let mut governor = Governor::new(LIMITS, Some(1));
    assert_eq!(governor.copies(), Allowance { in_flight: 3, bytes: 512 << 10 });
    assert_eq!(governor.verifications(), governor.copies());
    assert_eq!(governor.free_at(Tick(0)), None);
    assert_eq!(governor.guest_p99_us(), None);
}

#[test]
fn a_rest_ends_though_nothing_is_heard_any_more() {
    let mut governor = Governor::new(LIMITS, None);
    governor.hear(Tick(1_000), [(100, 50)].into_iter().collect());
    let end = governor.free_at(Tick(1_000)).expect("it rests first");
    assert_eq!(end, Tick(1_000 + REST_US_MAX));
    assert_eq!(governor.free_at(end), None);
    assert_eq!(governor.copies(), Allowance { in_flight: 1, bytes: 64 << 10 });
}

#[test]
fn a_request_that_took_long_is_no_sign_of_an_idle_guest() {
    let mut governor = Governor::new(LIMITS, Some(10_000));
    let mut now = Tick(0);
    let mut hear = |governor: &mut Governor, latencies: &[(u64, u64)]| {
        now = now.plus_us(1_900_000);
        governor.hear(now, latencies.iter().copied().collect());
        governor.is_idle
    };
    assert!(!hear(&mut governor, &[(100, 1)]), "after one moment one request may be many");
    assert!(hear(&mut governor, &[(100, 2)]));
    assert!(!hear(&mut governor, &[(1_800_000, 1)]));
    assert!(hear(&mut governor, &[]) || hear(&mut governor, &[]));
}

#[test]
fn one_disturbed_rest_does_not_say_what_the_guest_sees_alone() {
    let mut governor = Governor::new(LIMITS, None);
    let rest = |us: u64| std::iter::once((us, 500)).collect::<Latencies>();
    governor.quiet.extend([rest(3_000), rest(150), rest(140)]);
    let quiet = governor.quiet_p99_us().unwrap();
    assert!((140..200).contains(&quiet), "{quiet} us");
}
