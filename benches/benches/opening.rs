//! What opening an image costs, its file being in memory: what is read, validated and set up.
//!
//! Names are `open/IMAGE/reading|writing`. `placed` says for how much of the disk the table names places: 8 bytes of it for each
//! block of a VHDX, 4 for one of a VHD.

mod memory;

use std::time::{Duration, Instant};

use criterion::Criterion;
use memory::{GIB, Kind, MIB, TIB};

/// An image on which the first `placed` bytes have their place.
struct Example {
    name: &'static str,
    kind: Kind,
    size: u64,
    block: u64,
    placed: u64,
}

const EXAMPLES: [Example; 7] = [
    Example { name: "vhdx-16g-2m", kind: Kind::Vhdx, size: 16 * GIB, block: 2 * MIB, placed: 16 * GIB },
    Example { name: "vhdx-64t-1m-empty", kind: Kind::Vhdx, size: 64 * TIB, block: MIB, placed: 0 },
    Example { name: "vhdx-64t-2m-empty", kind: Kind::Vhdx, size: 64 * TIB, block: 2 * MIB, placed: 0 },
    // Tables of 4 and of 16 MiB.
    Example { name: "vhdx-64t-2m-1t-placed", kind: Kind::Vhdx, size: 64 * TIB, block: 2 * MIB, placed: TIB },
    Example {
        name: "vhdx-64t-2m-4t-placed",
        kind: Kind::Vhdx,
        size: 64 * TIB,
        block: 2 * MIB,
        placed: 4 * TIB,
    },
    Example { name: "vhd-2040g-2m-empty", kind: Kind::Vhd, size: 2040 * GIB, block: 2 * MIB, placed: 0 },
    Example { name: "vhd-32g-2m", kind: Kind::Vhd, size: 32 * GIB, block: 2 * MIB, placed: 32 * GIB },
];

fn opening(c: &mut Criterion) {
    for Example { name, kind, size, block, placed } in EXAMPLES {
        let storage = memory::create(kind, size, block, None);
        let image = memory::open(kind, &storage, false);
        memory::fill(&*image, placed);
        image.close().expect("nothing fails in memory");
        for (how, read_only) in [("reading", true), ("writing", false)] {
            c.bench_function(&format!("open/{name}/{how}"), |b| {
                b.iter_custom(|iterations| {
                    let mut sum = Duration::ZERO;
                    for _ in 0..iterations {
                        let begun = Instant::now();
                        let image = memory::open(kind, &storage, read_only);
                        sum += begun.elapsed();
                        drop(image);
                    }
                    sum
                });
            });
        }
    }
}

fn main() {
    let mut c = memory::criterion().configure_from_args();
    opening(&mut c);
    c.final_summary();
}
