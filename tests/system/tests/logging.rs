//! Dirty logging, for VMs that migrate while their disks are used; and new ring addresses, by which it is switched on.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use system_tests::daemon::Program;
use system_tests::memory::DirtyLog;
use system_tests::ring::{OK, READ, Request};
use system_tests::{Daemon, FrontEnd, Image, LoadOptions, Mix, Options, VerifiedLoad};
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserProtocolFeatures as Protocol;

const SIZE: u64 = 64 << 20;
const SECTORS: u64 = SIZE / 512;

fn daemon(queues: u16) -> Daemon {
    Daemon::with_disk(Image::Raw, SIZE, queues).unwrap()
}

fn start(daemon: &Daemon, options: Options) -> FrontEnd {
    FrontEnd::start(&daemon.socket("disk"), options).unwrap()
}

fn load(front: FrontEnd, options: LoadOptions) -> VerifiedLoad {
    let reference = Daemon::program() == Program::Reference;
    let mix = if reference && options.mix.discard > 0 { Mix::PLAIN } else { options.mix };
    VerifiedLoad::new(front, LoadOptions { mix, ..options }).unwrap()
}

/// Compares what the device says it wrote with what it has to have written.
#[derive(Default)]
struct LogCheck {
    /// What was taken from the log by the last check.
    last: HashSet<u64>,
    /// Written by requests that were completed before or after `last` was taken from the log.
    unsure: HashSet<u64>,
    pages: usize,
}

impl LogCheck {
    /// Everything that was written by what is completed is in the log, or in the one before: a page is marked when it has
    /// been written and before its request is completed, and the log may be taken between the two.
    fn check(&mut self, load: &mut VerifiedLoad, log: &DirtyLog, what: &str) {
        let mut written = written_pages(load);
        self.pages += written.len();
        written.extend(self.unsure.drain());
        let marked: HashSet<_> = log.take().into_iter().collect();
        written.retain(|page| !marked.contains(page) && !self.last.contains(page));
        assert!(
            written.is_empty(),
            "{what}: pages {written:x?} are missing in this log and in the one before"
        );
        load.poll().unwrap();
        (self.last, self.unsure) = (marked, written_pages(load));
        self.pages += self.unsure.len();
    }
}

fn written_pages(load: &mut VerifiedLoad) -> HashSet<u64> {
    load.front.rings.iter_mut().flat_map(|ring| ring.take_written_pages()).collect()
}

#[test]
fn every_page_that_the_device_writes_is_in_the_dirty_log() {
    let daemon = daemon(2);
    let memory = vec![16 << 20, 16 << 20, 128 << 20];
    let front = start(&daemon, Options { queues: 2, memory, mem_slots: false, ..Options::default() });
    let options = LoadOptions { depth: 32, buffers_per_request: 20, ..LoadOptions::new(15, SECTORS) };
    let mut load = load(front, options);
    load.run_requests(500).unwrap();
    let log = DirtyLog::new(load.front.memory.end()).unwrap();
    load.drain().unwrap();
    load.front.start_log(&log).unwrap();
    for ring in &mut load.front.rings {
        ring.track_written_pages();
    }
    let mut checked = LogCheck::default();
    for round in 0..300 {
        load.run_requests(40).unwrap();
        match round % 3 {
            0 => checked.check(&mut load, &log, "while rings run"),
            1 => {
                load.front.send_memory().unwrap();
                checked.check(&mut load, &log, "after SET_MEM_TABLE");
            }
            _ => {
                let base = load.front.stop_ring(round % 2).unwrap();
                // Completed but not yet seen: the stop has completed it, so the log must have it.
                load.run_while(|load| load.front.rings[round % 2].seen_idx() != base).unwrap();
                checked.check(&mut load, &log, "after a stop");
                load.front.start_ring(round % 2, base).unwrap();
            }
        }
    }
    load.drain().unwrap();
    checked.check(&mut load, &log, "at the end");
    load.front.stop_log().unwrap();
    // Until then the device may have written the used ring's event index.
    log.take();
    load.run_requests(200).unwrap();
    load.drain().unwrap();
    let after = log.take();
    assert!(
        after.is_empty() || daemon.runs() == Program::Reference,
        "nothing is marked any more: {after:x?}"
    );
    println!("{} pages, each in the log; {}", checked.pages, load.counts());
}

#[test]
fn a_new_log_each_round_loses_no_page_and_the_old_one_is_left_alone() {
    let daemon = daemon(2);
    let memory = vec![16 << 20, 128 << 20];
    let front = start(&daemon, Options { queues: 2, memory, ..Options::default() });
    let options = LoadOptions { depth: 32, buffers_per_request: 20, ..LoadOptions::new(16, SECTORS) };
    let mut load = load(front, options);
    load.drain().unwrap();
    let mut log = DirtyLog::new(load.front.memory.end()).unwrap();
    load.front.start_log(&log).unwrap();
    for ring in &mut load.front.rings {
        ring.track_written_pages();
    }
    let mut checked = LogCheck::default();
    for round in 0..300 {
        load.run_requests(60).unwrap();
        let next = DirtyLog::new(load.front.memory.end()).unwrap();
        load.front.set_log(&next).unwrap();
        checked.check(&mut load, &log, "in the log of the last round");
        if round % 10 == 0 {
            load.run_requests(100).unwrap();
            let late = log.take();
            assert!(late.is_empty(), "pages {late:x?} were marked in a log that had been replaced");
        }
        log = next;
    }
    println!("{} pages in 300 logs; {}", checked.pages, load.counts());
}

#[test]
fn memory_that_is_added_while_logging_is_logged_too() {
    let daemon = daemon(1);
    let memory = vec![16 << 20, 64 << 20];
    let mut front =
        FrontEnd::connect(&daemon.socket("disk"), Options { memory, ..Options::default() }).unwrap();
    if !front.protocol.contains(Protocol::CONFIGURE_MEM_SLOTS) {
        return;
    }
    front.make_rings().unwrap();
    let regions = front.region_infos();
    front.vhost.set_mem_table(&regions[..1]).unwrap();
    front.start_ring(0, 0).unwrap();
    let log = DirtyLog::new(front.memory.end()).unwrap();
    front.start_log(&log).unwrap();
    front.vhost.add_mem_region(&regions[1]).unwrap();
    let mut load = load(front, LoadOptions { buffers_per_request: 20, ..LoadOptions::new(17, SECTORS) });
    load.front.rings[0].track_written_pages();
    let mut checked = LogCheck::default();
    for _ in 0..50 {
        load.run_requests(40).unwrap();
        load.drain().unwrap();
        checked.check(&mut load, &log, "in added memory");
        load.front.vhost.remove_mem_region(&regions[1]).unwrap();
        load.front.vhost.add_mem_region(&regions[1]).unwrap();
    }
    println!("{} pages in memory that was added, removed and added; {}", checked.pages, load.counts());
}

#[test]
fn a_million_requests_survive_new_ring_addresses_all_the_time() {
    let daemon = daemon(1);
    let mut front = start(&daemon, Options { queue_size: 256, ..Options::default() });
    let log = DirtyLog::new(front.memory.end()).unwrap();
    front.set_log(&log).unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let (vhost, configs) = (front.vhost.clone(), [front.rings[0].config(false), front.rings[0].config(true)]);
    let told = stop.clone();
    let messages = std::thread::spawn(move || {
        let mut sent = 0u64;
        while !told.load(Ordering::Relaxed) {
            vhost.set_vring_addr(0, &configs[(sent % 2) as usize]).unwrap();
            sent += 1;
            if sent.is_multiple_of(64) {
                std::thread::sleep(Duration::from_micros(200));
            }
        }
        sent
    });
    let buffer = front.memory.alloc(0, 1 << 20, 4096);
    let ring = &mut front.rings[0];
    ring.poll_only();
    let begin = Instant::now();
    let (mut submitted, mut completed, mut last) = (0u64, 0u64, Instant::now());
    const WANTED: u64 = 1_000_000;
    while completed < WANTED {
        while submitted < WANTED && ring.in_flight() < 64 {
            let data = [(buffer + submitted % 256 * 4096, 512)];
            ring.submit(&Request { kind: READ, sector: submitted % SECTORS, data: &data }).unwrap();
            submitted += 1;
        }
        ring.kick();
        let before = completed;
        while let Some(done) = ring.poll() {
            assert_eq!(done.status, OK);
            completed += 1;
        }
        if completed > before {
            last = Instant::now();
        } else {
            assert!(
                last.elapsed() < Duration::from_secs(60),
                "lost: {submitted} submitted, {completed} completed"
            );
            std::thread::yield_now();
        }
    }
    stop.store(true, Ordering::Relaxed);
    let sent = messages.join().unwrap();
    println!("{completed} requests and {sent} SET_VRING_ADDR in {:.1?}", begin.elapsed());
    assert!(sent > 1000);
}
