//! What taking a guest's request out of its ring costs, before anything is done with it.
//!
//! * `request/chain`: from a head to the buffers of its chain.
//! * `request/parse`: from the buffers to operation, span, and addresses in this process.
//! * `request/whole`: both, with taking the head from the available ring and putting it on the used ring.
//!
//! `4k` is a request of one data buffer (3 descriptors), `128k` one of 32 (34 descriptors). `direct` ones stand in the ring's own
//! table, `indirect` ones in a table of their own. Guest memory is one region, or 64 where the name says so.

mod memory;

use std::fs::File;
use std::hint::black_box;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use blockd::vhost::memory::GuestMemory;
use blockd::vhost::ring::{Ring, RingAddresses};
use blockd::worker::request::{self, Limits};
use blockd::worker::slot::Slot;
use criterion::{BenchmarkId, Criterion, Throughput};
use memory::{GIB, KIB, MIB};
use nix::sys::memfd::{MFdFlags, memfd_create};
use vhost::vhost_user::message::VhostUserMemoryRegion;

const QUEUE_SIZE: u16 = 1024;
const AREAS: RingAddresses = RingAddresses { desc: 0, avail: 0x8000, used: 0x1_0000 };
/// Headers, a page for each request; its status follows in the same page, and so does its indirect table.
const HEADERS: u64 = MIB;
const STATUS: u64 = 0x100;
const INDIRECT: u64 = 0x800;
/// Data, 128 KiB for each request.
const DATA: u64 = 8 * MIB;
const MEMORY: u64 = 256 * MIB;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const IS_INDIRECT: u16 = 4;

/// A guest's memory with requests in its ring.
struct Guest {
    memory: Arc<GuestMemory>,
    ring: Ring,
    heads: Vec<u16>,
    file: File,
}

fn descriptor(addr: u64, len: u32, flags: u16, next: u16) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&addr.to_le_bytes());
    bytes[8..12].copy_from_slice(&len.to_le_bytes());
    bytes[12..14].copy_from_slice(&flags.to_le_bytes());
    bytes[14..].copy_from_slice(&next.to_le_bytes());
    bytes
}

impl Guest {
    /// As many reads as the ring has room for.
    fn new(regions: u64, data_buffers: u64, indirect: bool) -> Self {
        let file = File::from(memfd_create(c"guest", MFdFlags::empty()).expect("memory for a guest"));
        file.set_len(MEMORY).expect("memory for a guest");
        let len = MEMORY / regions;
        let table: Vec<_> =
            (0..regions).map(|i| VhostUserMemoryRegion::new(i * len, len, i * len, i * len)).collect();
        let files = table.iter().map(|_| file.try_clone().expect("a descriptor")).collect();
        let memory = Arc::new(GuestMemory::from_table(&table, files).expect("the regions are in the file"));
        let ring = Ring::map(&memory, QUEUE_SIZE.into(), AREAS, true, 0).expect("the areas are in memory");
        let mut guest = Self { memory, ring, heads: Vec::new(), file };
        let per_request = if indirect { 1 } else { data_buffers as u16 + 2 };
        for request in 0..QUEUE_SIZE / per_request {
            guest.add_request(request, request * per_request, data_buffers, indirect);
        }
        guest.make_available();
        guest
    }

    fn put(&self, bytes: &[u8], at: u64) {
        self.file.write_all_at(bytes, at).expect("within the guest's memory");
    }

    fn add_request(&mut self, request: u16, head: u16, data_buffers: u64, indirect: bool) {
        let page = HEADERS + u64::from(request) * 4 * KIB;
        let mut header = [0; 16];
        // VIRTIO_BLK_T_IN is 0, so only the sector is left to be said.
        header[8..].copy_from_slice(&(u64::from(request) * 256).to_le_bytes());
        self.put(&header, page);
        let (table, first) = if indirect { (page + INDIRECT, 0) } else { (u64::from(head) * 16, head) };
        let data = DATA + u64::from(request) * 128 * KIB;
        let mut bytes = descriptor(page, 16, NEXT, first + 1).to_vec();
        for i in 0..data_buffers {
            bytes.extend(descriptor(data + i * 4 * KIB, 4096, NEXT | WRITE, first + 2 + i as u16));
        }
        bytes.extend(descriptor(page + STATUS, 1, WRITE, 0));
        self.put(&bytes, table);
        if indirect {
            let pointer = descriptor(table, bytes.len() as u32, IS_INDIRECT, 0);
            self.put(&pointer, u64::from(head) * 16);
        }
        self.heads.push(head);
    }

    fn make_available(&self) {
        let heads: Vec<u8> = self.heads.iter().flat_map(|head| head.to_le_bytes()).collect();
        self.put(&heads, AREAS.avail + 4);
        self.put(&(self.heads.len() as u16).to_le_bytes(), AREAS.avail + 2);
    }
}

fn taking(c: &mut Criterion) {
    let limits = Limits { size: GIB, sector: 512, read_only: false, zero_bytes_max: GIB };
    let shapes = [
        ("4k-direct", 1, 1, false),
        ("4k-indirect", 1, 1, true),
        ("4k-indirect-64-regions", 64, 1, true),
        ("128k-direct", 1, 32, false),
        ("128k-indirect", 1, 32, true),
        ("128k-indirect-64-regions", 64, 32, true),
    ];
    for (name, regions, data_buffers, indirect) in shapes {
        let mut group = c.benchmark_group("request");
        group.throughput(Throughput::Elements(1));
        let mut guest = Guest::new(regions, data_buffers, indirect);
        let (mut buffers, mut slot) = (Vec::new(), Slot::default());
        group.bench_function(BenchmarkId::new("chain", name), |b| {
            let mut heads = guest.heads.iter().cycle();
            b.iter(|| {
                let head = *heads.next().expect("the ring has requests");
                buffers.clear();
                guest.ring.chain(&guest.memory, head, &mut buffers).expect("a sound chain");
                black_box(buffers.len())
            });
        });
        // Whichever of the benchmarks are asked for.
        buffers.clear();
        guest.ring.chain(&guest.memory, guest.heads[0], &mut buffers).expect("a sound chain");
        assert_eq!(buffers.len() as u64, data_buffers + 2);
        group.bench_function(BenchmarkId::new("parse", name), |b| {
            b.iter(|| {
                slot.reset();
                request::parse(&guest.memory, &buffers, &limits, &mut slot).expect("a sound request");
                black_box(slot.span)
            });
            assert_eq!(slot.span.len, data_buffers * 4 * KIB);
        });
        group.bench_function(BenchmarkId::new("whole", name), |b| {
            b.iter(|| {
                if !guest.ring.has_available() {
                    guest.ring.set_next_avail(0);
                }
                let head = guest.ring.pop().expect("a sound ring").expect("the ring has requests");
                buffers.clear();
                guest.ring.chain(&guest.memory, head, &mut buffers).expect("a sound chain");
                slot.reset();
                request::parse(&guest.memory, &buffers, &limits, &mut slot).expect("a sound request");
                guest.ring.push_used(head, slot.written)
            });
        });
    }
}

fn main() {
    let mut c = memory::criterion().configure_from_args();
    taking(&mut c);
    c.final_summary();
}
