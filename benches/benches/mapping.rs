//! What asking an image costs: where do these bytes live, and where are they to be written?
//!
//! Names are `map/DISK/full|absent/read|write/REQUEST`. A write is what the data path does for one: `map_write` and, as if
//! the payload was in the file by then, `wrote`. Of disks where nothing has its place reads alone are measured here;
//! what a first write costs is in `allocating`. Chains are called `KIND-chain-N` after their number of children, and are full in
//! three ways: all that the disk reads as is the top's own (`full`), or in the disk below all of them, so that every image is
//! asked (`below`), or every second 4 KiB is the top's own (`striped`).

mod memory;

use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, BenchmarkId, Criterion, Throughput};
use formats::{ByteSpan, Image, Pieces};
use memory::{GIB, KIB, Kind, MIB, TIB};

/// What is asked for: requests of which length, and in which order.
#[derive(Clone, Copy)]
struct Requests {
    name: &'static str,
    bytes: u64,
    random: bool,
}

const fn requests(name: &'static str, bytes: u64, random: bool) -> Requests {
    Requests { name, bytes, random }
}

const RANDOM: [Requests; 2] =
    [requests("4k-random", 4 * KIB, true), requests("128k-random", 128 * KIB, true)];
const REQUESTS: [Requests; 4] = {
    let [small, large] = RANDOM;
    [small, requests("4k-sequential", 4 * KIB, false), large, requests("128k-sequential", 128 * KIB, false)]
};

impl Requests {
    /// Spans of the `len` bytes of the disk from `start` on, over and over. Random ones lie on 4 KiB, so that some of the larger
    /// ones are in two blocks.
    fn spans(&self, start: u64, len: u64) -> impl FnMut() -> ByteSpan + use<> {
        let (bytes, random) = (self.bytes, self.random);
        let mut state = 0x853c_49e6_748f_ea9b_u64;
        let mut next = 0;
        let places = (len - bytes) / (4 * KIB) + 1;
        move || {
            let offset = if random {
                // The upper bits of a linear congruence are good enough, and cost less than a nanosecond.
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                ((u128::from(state) * u128::from(places)) >> 64) as u64 * 4 * KIB
            } else {
                let at = next;
                next = if at + 2 * bytes > len { 0 } else { at + bytes };
                at
            };
            ByteSpan::new(start + offset, bytes)
        }
    }
}

fn measure_reads(
    group: &mut BenchmarkGroup<'_, WallTime>,
    state: &str,
    image: &Arc<dyn Image>,
    (start, len): (u64, u64),
    requests: &[Requests],
) {
    for requests in requests {
        group.bench_function(BenchmarkId::new(format!("{state}/read"), requests.name), |b| {
            let (mut next, mut pieces) = (requests.spans(start, len), Pieces::new());
            b.iter(|| {
                pieces.clear();
                image.map_read(next(), &mut pieces).expect("the span is within the disk");
                black_box(pieces.len())
            });
        });
    }
}

fn measure_writes(
    group: &mut BenchmarkGroup<'_, WallTime>,
    state: &str,
    image: &Arc<dyn Image>,
    (start, len): (u64, u64),
    requests: &[Requests],
) {
    for requests in requests {
        group.bench_function(BenchmarkId::new(format!("{state}/write"), requests.name), |b| {
            let (mut next, mut pieces) = (requests.spans(start, len), Pieces::new());
            b.iter(|| {
                let span = next();
                pieces.clear();
                image.map_write(span, &mut pieces).expect("the span is within the disk");
                image.wrote(span).expect("the span is within the disk");
                black_box(pieces.len())
            });
        });
    }
}

fn group<'a>(c: &'a mut Criterion, disk: &str) -> BenchmarkGroup<'a, WallTime> {
    let mut group = c.benchmark_group(format!("map/{disk}"));
    group.throughput(Throughput::Elements(1));
    group
}

/// Disks on which every byte has its place from the start.
fn flat(c: &mut Criterion) {
    for (name, image) in [("raw", memory::raw_disk(16 * GIB)), ("vhd-fixed", memory::fixed_vhd(16 * GIB))] {
        let mut group = group(c, name);
        measure_reads(&mut group, "full", &image, (0, 16 * GIB), &REQUESTS);
        measure_writes(&mut group, "full", &image, (0, 16 * GIB), &REQUESTS);
    }
}

/// Disks of blocks: one half has its place and the other does not. Of the largest one the first TiB has it.
fn blocks(c: &mut Criterion) {
    let disks = [
        ("vhd", Kind::Vhd, 32 * GIB, 2 * MIB, 16 * GIB),
        ("vhdx-1m", Kind::Vhdx, 32 * GIB, MIB, 16 * GIB),
        ("vhdx-32m", Kind::Vhdx, 32 * GIB, 32 * MIB, 16 * GIB),
        ("vhdx-64t", Kind::Vhdx, 64 * TIB, 2 * MIB, TIB),
    ];
    for (name, kind, size, block, filled) in disks {
        let image: Arc<dyn Image> = memory::dynamic_disk(kind, size, block, filled);
        let mut group = group(c, name);
        measure_reads(&mut group, "full", &image, (0, filled), &REQUESTS);
        measure_writes(&mut group, "full", &image, (0, filled), &REQUESTS);
        measure_reads(&mut group, "absent", &image, (filled, size - filled), &RANDOM);
    }
}

/// Differencing images.
fn chains(c: &mut Criterion) {
    const SIZE: u64 = 4 * GIB;
    for (name, kind) in [("vhdx", Kind::Vhdx), ("vhd", Kind::Vhd)] {
        for children in [1, 4, 16] {
            let mut group = group(c, &format!("{name}-chain-{children}"));
            let only = |wanted: usize| {
                memory::chain(kind, SIZE, 2 * MIB, children, |level, image| {
                    if level == wanted {
                        memory::fill(image, SIZE);
                    }
                })
            };
            let own = only(children);
            measure_reads(&mut group, "full", &own, (0, SIZE), &RANDOM);
            measure_writes(&mut group, "full", &own, (0, SIZE), &RANDOM);
            measure_reads(&mut group, "below", &only(0), (0, SIZE), &RANDOM);
            // No level holds anything.
            measure_reads(&mut group, "absent", &only(children + 1), (0, SIZE), &RANDOM[..1]);
        }
        striped(&mut group(c, &format!("{name}-chain-1")), kind);
    }
}

/// A child that has every second 4 KiB of its own.
fn striped(group: &mut BenchmarkGroup<'_, WallTime>, kind: Kind) {
    const SIZE: u64 = 256 * MIB;
    let image = memory::chain(kind, SIZE, 2 * MIB, 1, |level, image| {
        if level == 0 {
            return memory::fill(image, SIZE);
        }
        let mut pieces = Pieces::new();
        for offset in (0..SIZE).step_by(8 * KIB as usize) {
            let span = ByteSpan::new(offset, 4 * KIB);
            pieces.clear();
            image.map_write(span, &mut pieces).expect("there is space");
            image.wrote(span).expect("there is space");
        }
    });
    measure_reads(group, "striped", &image, (0, SIZE), &RANDOM);
}

fn main() {
    // A hundred of the shortest benchmarks: half a second is plenty for each.
    let short = memory::criterion().measurement_time(Duration::from_millis(500));
    let mut c = short.configure_from_args();
    flat(&mut c);
    blocks(&mut c);
    chains(&mut c);
    c.final_summary();
}
