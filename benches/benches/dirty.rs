//! What it costs to know what a guest has changed during a move, as the disk grows.
//!
//! * `dirty/mark`: what a worker does after a guest write that is only tracked; `of-1000-first` is one of the first thousand
//!   writes of a move, all over the disk, which take memory for marks.
//! * `dirty/collect`: taking all marks away, every now and then, by the move.
//! * `dirty/hear`: the machine is told of an extent that was written.
//! * `dirty/next`: a copy has ended, and the machine picks the next range.
//! * `dirty/write`: both words about one mirrored write; `clean` ones go to both disks, `dirty` ones to the source.
//! * `dirty/scanned`: the machine is given all that the source holds.
//!
//! `dense`: every extent is dirty. `sparse`: every hundredth one.

mod memory;

use std::collections::VecDeque;
use std::hint::black_box;
use std::time::{Duration, Instant};

use blockd::mover::marks::Marks;
use criterion::{BenchmarkId, Criterion};
use memory::{GIB, KIB, MIB, TIB};
use mirror::{
    Action, Config, CopyResult, Event, ExtentRange, Machine, MirrorMode, RoaringBitmap, SwitchMode, Tick,
    Verify, WriteKind, WriteTo,
};

/// What the daemon takes for disks of these sizes.
const EXTENT: u64 = 64 * KIB;
const SIZES: [(&str, u64); 3] = [("1g", GIB), ("1t", TIB), ("64t", 64 * TIB)];

fn extents(size: u64) -> u32 {
    u32::try_from(size / EXTENT).expect("extents are numbered in 32 bits")
}

/// Extents all over the disk.
fn anywhere(extents: u32) -> impl FnMut() -> ExtentRange {
    let mut state = 0x853c_49e6_748f_ea9b_u64;
    move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ExtentRange { first: ((u128::from(state) * u128::from(extents)) >> 64) as u32, count: 1 }
    }
}

/// Marks of a disk to all parts of which something was written before, so that the memory for marking it is there.
fn warm_marks(size: u64) -> Marks {
    let marks = Marks::new(extents(size));
    for extent in (0..extents(size)).step_by(1 << 10) {
        marks.mark(ExtentRange { first: extent, count: 1 });
    }
    marks.collect(|_| ());
    marks
}

fn marking(c: &mut Criterion) {
    for (name, size) in SIZES {
        let marks = warm_marks(size);
        for (what, reach) in [("random", size), ("near", 16 * MIB)] {
            c.bench_function(&format!("dirty/mark/{what}/{name}"), |b| {
                let mut next = anywhere(extents(reach));
                b.iter(|| marks.mark(next()));
            });
        }
        c.bench_function(&format!("dirty/mark/of-1000-first/{name}"), |b| {
            let mut next = anywhere(extents(size));
            b.iter_custom(|iterations| {
                let (mut sum, mut left) = (Duration::ZERO, iterations);
                while left > 0 {
                    let (marks, steps) = (Marks::new(extents(size)), left.min(1000));
                    let begun = Instant::now();
                    (0..steps).for_each(|_| marks.mark(next()));
                    sum += begun.elapsed();
                    left -= steps;
                }
                sum
            });
        });
    }
}

/// Between two collections: nothing, or so many marks all over the disk, or side by side.
fn collecting(c: &mut Criterion) {
    for (name, size) in SIZES {
        let marks = warm_marks(size);
        for (what, count, random) in
            [("none", 0, false), ("1000-random", 1000, true), ("1000-near", 1000, false)]
        {
            c.bench_function(&format!("dirty/collect/{what}/{name}"), |b| {
                let mut next = anywhere(extents(size));
                b.iter_custom(|iterations| {
                    let mut sum = Duration::ZERO;
                    for _ in 0..iterations {
                        for i in 0..count {
                            marks.mark(if random { next() } else { ExtentRange { first: 2 * i, count: 1 } });
                        }
                        let begun = Instant::now();
                        marks.collect(|range| {
                            black_box(range);
                        });
                        sum += begun.elapsed();
                    }
                    sum
                });
            });
        }
    }
}

fn held_by_source(what: &str, extents: u32) -> RoaringBitmap {
    let mut held = RoaringBitmap::new();
    match what {
        "dense" => {
            held.insert_range(0..extents);
        }
        _ => held.extend((0..extents).step_by(100)),
    }
    held
}

/// A machine, and the copies that it has asked for.
struct Moving {
    machine: Machine,
    now: Tick,
    actions: Vec<Action>,
    copies: VecDeque<u64>,
}

impl Moving {
    /// A move whose source has been scanned.
    fn new(size: u64, mode: MirrorMode, held: &RoaringBitmap) -> Self {
        let mut this = Self::opening(size, mode);
        this.apply(Event::Scanned(held.clone()));
        this
    }

    /// A move that waits for the scan.
    fn opening(size: u64, mode: MirrorMode) -> Self {
        let config = Config {
            disk_size: size,
            extent_size: EXTENT,
            mode,
            switch: SwitchMode::Manual,
            verify: Verify::None,
            ..Config::default()
        };
        let machine = Machine::new(config);
        let mut this = Self { machine, now: Tick(1), actions: Vec::new(), copies: VecDeque::new() };
        this.apply(Event::Start);
        this.apply(Event::Recorded(Ok(())));
        let route = this.actions.iter().find_map(|action| match action {
            Action::SetRoute(route) => Some(*route),
            _ => None,
        });
        this.apply(Event::RouteSettled(route.expect("a recorded plan is followed by a route")));
        assert!(this.actions.contains(&Action::Scan), "a settled route is followed by a scan");
        this
    }

    fn apply(&mut self, event: Event) {
        self.now = self.now.plus_us(10);
        self.actions.clear();
        self.machine.apply(self.now, event, &mut self.actions);
        for action in &self.actions {
            if let Action::Copy { id, .. } = action {
                self.copies.push_back(*id);
            }
        }
    }

    /// Ends the oldest copy. Whether there was one.
    fn end_copy(&mut self) -> bool {
        let Some(id) = self.copies.pop_front() else { return false };
        let result = CopyResult::Done { bytes_written: MIB, bytes_zero: 0 };
        self.apply(Event::CopyEnd { id, result });
        true
    }

    /// A guest's write from its first word to its last.
    fn write(&mut self, id: u64, extent: u32) {
        let offset = u64::from(extent) * EXTENT;
        self.apply(Event::WriteBegin { id, offset, len: 4 * KIB, kind: WriteKind::Write });
        let to = self.actions.iter().find_map(|action| match action {
            Action::StartWrite { to, .. } => Some(*to),
            _ => None,
        });
        let to = to.expect("nothing is in the write's way");
        let target = (to == WriteTo::Both).then_some(Ok(()));
        self.apply(Event::WriteEnd { id, source_ok: true, target });
    }
}

/// Times so many steps of a move, which begins anew, untimed, after every `limit` of them or when a step finds nothing to do.
fn time_steps(
    iterations: u64,
    limit: u64,
    make: impl Fn() -> Moving,
    mut step: impl FnMut(&mut Moving) -> bool,
) -> Duration {
    let (mut sum, mut left) = (Duration::ZERO, iterations);
    while left > 0 {
        let mut moving = make();
        let begun = Instant::now();
        let steps = (0..left.min(limit)).take_while(|_| step(&mut moving)).count() as u64;
        sum += begun.elapsed();
        assert!(steps > 0, "a move that has just begun has something to do");
        left -= steps;
    }
    sum
}

fn machine(c: &mut Criterion) {
    for (name, size) in SIZES {
        for what in ["dense", "sparse"] {
            let held = held_by_source(what, extents(size));
            let make = || Moving::new(size, MirrorMode::AfterCopy, &held);
            c.bench_function(&format!("dirty/next/{what}/{name}"), |b| {
                b.iter_custom(|n| time_steps(n, u64::MAX, make, Moving::end_copy));
            });
            c.bench_function(&format!("dirty/hear/{what}/{name}"), |b| {
                let mut next = anywhere(extents(size));
                // So few that a sparse set stays one.
                let limit = u64::from(extents(size)) / 500;
                b.iter_custom(|n| {
                    time_steps(n, limit, make, |moving| {
                        moving.apply(Event::Dirtied(next()));
                        true
                    })
                });
            });
            c.bench_function(&format!("dirty/scanned/{what}/{name}"), |b| {
                b.iter_custom(|n| {
                    (0..n)
                        .map(|_| {
                            let (mut moving, held) =
                                (Moving::opening(size, MirrorMode::AfterCopy), held.clone());
                            let begun = Instant::now();
                            moving.apply(Event::Scanned(held));
                            begun.elapsed()
                        })
                        .sum()
                });
            });
        }
    }
}

fn mirrored_writes(c: &mut Criterion) {
    for (name, size) in SIZES {
        let all = extents(size);
        for (what, held) in [("clean", RoaringBitmap::new()), ("dirty", held_by_source("dense", all))] {
            c.bench_function(&format!("dirty/write/{what}/{name}"), |b| {
                // The first copies are in flight: what they hold is kept out of the guest's way.
                let (mut next, mut id) = (anywhere(all - 1024), 0);
                let mut moving = Moving::new(size, MirrorMode::FromStart, &held);
                b.iter(|| {
                    id += 1;
                    moving.write(id, 1024 + next().first);
                });
            });
        }
    }
}

/// The sets themselves, to compare with.
fn sets(c: &mut Criterion) {
    for (name, size) in SIZES {
        c.bench_with_input(BenchmarkId::new("dirty/roaring-insert/sparse", name), &size, |b, &size| {
            let (mut set, mut next) = (held_by_source("sparse", extents(size)), anywhere(extents(size)));
            b.iter(|| set.insert(next().first));
        });
    }
}

fn main() {
    let mut c = memory::criterion().configure_from_args();
    marking(&mut c);
    collecting(&mut c);
    machine(&mut c);
    mirrored_writes(&mut c);
    sets(&mut c);
    c.final_summary();
}
