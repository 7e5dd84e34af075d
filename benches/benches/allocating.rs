//! What a first write costs: giving blocks their place, marking the sectors of a differencing image as its own, and the flush
//! that makes it durable. The file is in memory and its sync costs nothing, so this is our own work alone (and the
//! copying of metadata into that file, of which `storage` gives an idea).
//!
//! Names are `first/DISK/ORDER/FLUSH`. One iteration is as many first writes of 4 KiB as `FLUSH` says, each to a block (or, of a
//! child, to sectors) that nobody has written, and a flush; what housekeeping asks for meanwhile is done and counted.
//! `unflushed` is a write without a flush and without the housekeeping: what the guest waits for. `next` goes through the disk
//! in order, `scattered` so that no two writes in a row share a page of the table.

mod memory;

use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput};
use formats::{ByteSpan, Image, Pieces, Storage};
use memory::{GIB, KIB, Kind, MIB, MemoryStorage, TIB};

/// What there is to write to for the first time.
struct Units {
    /// Bytes of the disk.
    size: u64,
    /// Bytes of a unit, the first 4 KiB of which are written.
    unit: u64,
    /// Units that follow each other in the scattered order are so many units away from each other.
    stride: u64,
    make: fn(&Units) -> Arc<dyn Image>,
}

impl Units {
    fn count(&self) -> u64 {
        self.size / self.unit
    }

    /// The `n`th write.
    fn span(&self, n: u64, scattered: bool) -> ByteSpan {
        let rows = self.count() / self.stride;
        let unit = if scattered { n % rows * self.stride + n / rows } else { n };
        ByteSpan::new(unit * self.unit, 4 * KIB)
    }
}

/// A disk with what is left of it.
struct Disk<'a> {
    units: &'a Units,
    scattered: bool,
    image: Arc<dyn Image>,
    written: u64,
    pieces: Pieces,
}

impl<'a> Disk<'a> {
    fn new(units: &'a Units, scattered: bool) -> Self {
        let (image, pieces) = ((units.make)(units), Pieces::new());
        // What the first write of a session does is no part of a first write to a block.
        image.begin_changes().expect("a new image can be changed");
        Self { units, scattered, image, written: 0, pieces }
    }

    /// Another disk where this one has no room for so many writes.
    fn make_room(&mut self, writes: u64) {
        if self.written + writes > self.units.count() {
            *self = Self::new(self.units, self.scattered);
        }
    }

    fn write(&mut self) {
        let span = self.units.span(self.written, self.scattered);
        self.written += 1;
        self.pieces.clear();
        self.image.map_write(span, &mut self.pieces).expect("there is space");
        self.image.wrote(span).expect("there is space");
    }

    fn maintain(&self) {
        if self.image.wants_maintenance() {
            self.image.maintain(&|| ()).expect("nothing fails in memory");
        }
    }

    fn time_unflushed(&mut self, iterations: u64) -> Duration {
        let mut sum = Duration::ZERO;
        for _ in 0..iterations {
            self.make_room(1);
            let begun = Instant::now();
            self.write();
            sum += begun.elapsed();
            self.maintain();
        }
        sum
    }

    fn time_flushed(&mut self, iterations: u64, writes: u64) -> Duration {
        let mut sum = Duration::ZERO;
        for _ in 0..iterations {
            self.make_room(writes);
            let begun = Instant::now();
            for _ in 0..writes {
                self.write();
                self.maintain();
            }
            self.image.commit().expect("nothing fails in memory");
            sum += begun.elapsed();
        }
        sum
    }
}

fn dynamic_vhdx(units: &Units) -> Arc<dyn Image> {
    memory::open(Kind::Vhdx, &memory::create(Kind::Vhdx, units.size, units.unit, None), false)
}

fn dynamic_vhd(units: &Units) -> Arc<dyn Image> {
    memory::open(Kind::Vhd, &memory::create(Kind::Vhd, units.size, units.unit, None), false)
}

/// A child whose blocks all have their place, and nothing in them is its own yet.
fn child(kind: Kind, units: &Units) -> Arc<dyn Image> {
    memory::chain(kind, units.size, 2 * MIB, 1, |level, image| {
        if level > 0 {
            image.map_write(ByteSpan::new(0, units.size), &mut Pieces::new()).expect("there is space");
        }
    })
}

fn vhdx_child(units: &Units) -> Arc<dyn Image> {
    child(Kind::Vhdx, units)
}

fn vhd_child(units: &Units) -> Arc<dyn Image> {
    child(Kind::Vhd, units)
}

fn first_writes(c: &mut Criterion) {
    let sectors = |make| Units { size: 8 * GIB, unit: 4 * KIB, stride: 512, make };
    let disks = [
        ("vhdx-1m", Units { size: 2 * TIB, unit: MIB, stride: 512, make: dynamic_vhdx }),
        ("vhd-2m", Units { size: 128 * GIB, unit: 2 * MIB, stride: 128, make: dynamic_vhd }),
        ("vhdx-child", sectors(vhdx_child as fn(&Units) -> Arc<dyn Image>)),
        ("vhd-child", sectors(vhd_child)),
    ];
    for (name, units) in &disks {
        for (order, scattered) in [("next", false), ("scattered", true)] {
            let mut group = c.benchmark_group(format!("first/{name}/{order}"));
            group.throughput(Throughput::Elements(1));
            group.bench_function("unflushed", |b| {
                let mut disk = Disk::new(units, scattered);
                b.iter_custom(|iterations| disk.time_unflushed(iterations));
            });
            for writes in [1, 32, 1000] {
                group.throughput(Throughput::Elements(writes));
                group.bench_function(format!("flush-{writes}"), |b| {
                    let mut disk = Disk::new(units, scattered);
                    b.iter_custom(|iterations| disk.time_flushed(iterations, writes));
                });
            }
        }
    }
}

/// A large write to blocks that have no place gives all of them theirs at once.
fn large_writes(c: &mut Criterion) {
    let units = Units { size: 2 * TIB, unit: 512 * MIB, stride: 1, make: |_| unreachable!() };
    c.bench_function("first/vhdx-1m/512-at-once", |b| {
        let make = || memory::open(Kind::Vhdx, &memory::create(Kind::Vhdx, units.size, MIB, None), false);
        let (mut image, mut next, mut pieces) = (make(), 0, Pieces::new());
        b.iter_custom(|iterations| {
            let mut sum = Duration::ZERO;
            for _ in 0..iterations {
                if next == units.count() {
                    (image, next) = (make(), 0);
                }
                let begun = Instant::now();
                pieces.clear();
                let span = ByteSpan::new(next * units.unit, units.unit);
                image.map_write(span, &mut pieces).expect("there is space");
                sum += begun.elapsed();
                next += 1;
                if image.wants_maintenance() {
                    image.maintain(&|| ()).expect("nothing fails in memory");
                }
            }
            sum
        });
    });
}

/// What of all this is copying into the file in memory.
fn storage(c: &mut Criterion) {
    for (name, len) in [("512", 512), ("8k", 8 * KIB as usize)] {
        c.bench_function(&format!("first/storage/write-{name}"), |b| {
            let (storage, bytes, mut at) = (MemoryStorage::new(), vec![7; len], 0);
            b.iter(|| {
                storage.write_at(&bytes, at).expect("nothing fails in memory");
                at = (at + len as u64) % (4 * MIB);
            });
        });
    }
}

fn main() {
    let mut c = memory::criterion().configure_from_args();
    first_writes(&mut c);
    large_writes(&mut c);
    storage(&mut c);
    c.final_summary();
}
