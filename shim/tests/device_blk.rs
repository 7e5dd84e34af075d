//! A disk behind a real blockd, driven through its registers as a guest would.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

mod device_rig;

use std::collections::BTreeSet;
use std::sync::Arc;

use device_rig::driver::{BLOCK, FLUSH, Load, READ, WRITE, fill, read32, set_up, stamp, write32};
use device_rig::{Daemon, device, memory, options};
use shim::device::Device;
use shim::device::blk::BlkDevice;
use shim::memory::GuestRam;
use shim::pages::PageSet;

fn dir() -> tempfile::TempDir {
    tempfile::Builder::new().prefix("shim-blk-").tempdir().unwrap()
}

/// A copy of the guest's memory, as the target of a migration has it.
fn copy_of(ram: &GuestRam) -> Arc<GuestRam> {
    let copy = memory();
    let mut bytes = vec![0; ram.bytes() as usize];
    ram.read_pages(0, &mut bytes);
    copy.write_pages(0, &bytes);
    copy
}

#[test]
fn what_is_written_is_read_back() {
    let dir = dir();
    let Some(daemon) = Daemon::start(dir.path(), 1) else { return };
    let ram = memory();
    let device = device(&daemon, 1, &ram);
    let mut queue = set_up(&*device, &ram, 1, 0).remove(0);
    for block in 0..20 {
        fill(&ram, queue.data(0), block + 100);
        assert_eq!(queue.run(&ram, &device, WRITE, block), 0);
    }
    assert_eq!(queue.run(&ram, &device, FLUSH, 0), 0);
    for block in 0..20 {
        assert_eq!(queue.run(&ram, &device, READ, block), 0);
        assert_eq!(stamp(&ram, queue.data(0)), block + 100);
    }
    let beyond = device_rig::DISK_BYTES / BLOCK as u64;
    assert_eq!(queue.run(&ram, &device, READ, beyond), 1, "an error is told as one");
    assert_eq!(read32(&*device, 0x60), 1, "a driver that looks why it was interrupted finds a reason");
    let image = std::fs::read(dir.path().join("disk.raw")).unwrap();
    assert_eq!(image[19 * BLOCK..][..8], 119u64.to_le_bytes());
}

#[test]
fn the_driver_is_told_what_the_backend_offers() {
    let dir = dir();
    let Some(daemon) = Daemon::start(dir.path(), 2) else { return };
    let device = device(&daemon, 2, &memory());
    let mut capacity = [0; 8];
    device.read(0x100, &mut capacity);
    assert_eq!(u64::from_le_bytes(capacity), device_rig::DISK_BYTES / 512);
    assert_eq!(read32(&*device, 0x100 + 12), 126, "segments");
    let mut queues = [0; 2];
    device.read(0x100 + 34, &mut queues);
    assert_eq!(u16::from_le_bytes(queues), 2);
    let description = device.description();
    assert_eq!((description.kind.as_str(), description.id.as_str(), description.queues), ("blk", "disk0", 2));
    assert_eq!(description.size_bytes, Some(device_rig::DISK_BYTES));
}

#[test]
fn more_queues_than_the_backend_has_are_refused() {
    let dir = dir();
    let Some(daemon) = Daemon::start(dir.path(), 1) else { return };
    let mut options = options(daemon.socket(), 2);
    options.patience = std::time::Duration::from_secs(2);
    let error = format!("{:#}", BlkDevice::new(options, memory()).err().unwrap());
    assert!(error.contains("has 1 queues and 2 are asked for"), "{error}");
}

#[test]
fn what_a_backend_answered_is_told_though_it_hangs_by_the_end() {
    let dir = dir();
    let Some(daemon) = Daemon::start(dir.path(), 1) else { return };
    let mut options = options(daemon.socket(), 2);
    options.patience = std::time::Duration::from_secs(2);
    let error = std::thread::scope(|scope| {
        let refused = scope.spawn(|| BlkDevice::new(options, memory()).err().unwrap());
        std::thread::sleep(std::time::Duration::from_secs(1));
        daemon.signal(libc::SIGSTOP);
        format!("{:#}", refused.join().unwrap())
    });
    assert!(error.contains("has 1 queues and 2 are asked for"), "{error}");
}

#[test]
fn two_queues_work_side_by_side() {
    let dir = dir();
    let Some(daemon) = Daemon::start(dir.path(), 2) else { return };
    let ram = memory();
    let device = device(&daemon, 2, &ram);
    let mut load = Load::new(set_up(&*device, &ram, 2, 0), 40);
    load.run(&ram, &device, 3000);
    load.verify(&ram, &device);
}

#[test]
fn a_pause_with_requests_in_flight_loses_and_doubles_nothing() {
    let dir = dir();
    let Some(daemon) = Daemon::start(dir.path(), 2) else { return };
    let ram = memory();
    let device = device(&daemon, 2, &ram);
    let mut load = Load::new(set_up(&*device, &ram, 2, 0), 40);
    for _ in 0..40 {
        load.run(&ram, &device, 50);
        load.submit_all(&ram, &*device);
        device.pause().unwrap();
        load.reap(&ram);
        let before = copy_of(&ram);
        // What is submitted now has to wait, and nothing may touch the memory.
        let untouched: Vec<_> = load.queues.iter().map(|queue| queue.in_flight.clone()).collect();
        std::thread::sleep(std::time::Duration::from_millis(1));
        assert_eq!(load.reap(&ram), 0, "{untouched:?}");
        let (mut a, mut b) = (vec![0; ram.bytes() as usize], vec![0; ram.bytes() as usize]);
        before.read_pages(0, &mut a);
        ram.read_pages(0, &mut b);
        assert!(a == b, "memory changed during a pause");
        load.submit_all(&ram, &*device);
        device.resume().unwrap();
    }
    load.verify(&ram, &device);
}

#[test]
fn a_guest_that_resets_its_device_begins_anew() {
    let dir = dir();
    let Some(daemon) = Daemon::start(dir.path(), 1) else { return };
    let ram = memory();
    let device = device(&daemon, 1, &ram);
    for round in 0..5 {
        let mut load = Load::new(set_up(&*device, &ram, 1, 0), 40);
        if round > 0 {
            // What was in flight is forgotten, and what blocks hold is not known.
            load = Load::new(load.queues, 40);
            for block in 0..40 {
                fill(&ram, load.queues[0].data(0), 0);
                assert_eq!(load.queues[0].run(&ram, &device, WRITE, block), 0);
            }
        }
        load.run(&ram, &device, 70);
        load.submit_all(&ram, &*device);
        write32(&*device, 0x70, 0);
        assert_eq!(read32(&*device, 0x70), 0);
    }
}

#[test]
fn a_machine_goes_on_at_another_process_with_the_same_backend() {
    let dir = dir();
    let Some(daemon) = Daemon::start(dir.path(), 2) else { return };
    let mut ram = memory();
    let mut device = device(&daemon, 2, &ram);
    let mut load = Load::new(set_up(&*device, &ram, 2, 0), 40);
    for round in 0..10 {
        load.run(&ram, &device, 100);
        load.submit_all(&ram, &*device);
        let target_ram = memory();
        let mut wanted = options(daemon.socket(), 2);
        wanted.deferred = round % 2 == 0;
        let target = BlkDevice::new(wanted, target_ram.clone()).unwrap();
        device.pause().unwrap();
        let state = device.save().unwrap();
        let state = serde_json::from_slice(&serde_json::to_vec(&state).unwrap()).unwrap();
        let mut bytes = vec![0; ram.bytes() as usize];
        ram.read_pages(0, &mut bytes);
        target_ram.write_pages(0, &bytes);
        target.restore(&state).unwrap();
        target.preflight().unwrap();
        if round == 5 {
            // The target is not to be, and the source goes on.
            drop(target);
            device.resume().unwrap();
            continue;
        }
        target.resume().unwrap();
        assert_eq!(read32(&*target, 0x70), 15, "the driver finds its device as it was");
        // The source may live on for a while.
        let source = std::mem::replace(&mut device, target);
        ram = target_ram;
        load.run(&ram, &device, 50);
        drop(source);
    }
    load.verify(&ram, &device);
}

/// Pages that a completed request says the backend wrote.
fn written(load: &Load, before: &[BTreeSet<usize>]) -> BTreeSet<u64> {
    let mut pages = BTreeSet::new();
    for (queue, before) in load.queues.iter().zip(before) {
        for slot in before.difference(&queue.in_flight) {
            pages.insert((queue.meta(*slot) + 16) / 4096);
            pages.insert(queue.used() / 4096);
        }
    }
    pages
}

#[test]
fn the_log_has_every_page_that_the_backend_wrote_and_no_other() {
    let dir = dir();
    let Some(daemon) = Daemon::start(dir.path(), 2) else { return };
    let ram = memory();
    let device = device(&daemon, 2, &ram);
    let mut load = Load::new(set_up(&*device, &ram, 2, 0), 40);
    let collect = |device: &Arc<BlkDevice>| {
        let mut set = PageSet::empty(ram.pages());
        device.collect_dirty(&mut set).unwrap();
        set.iter().collect::<BTreeSet<_>>()
    };
    for time in 0..2 {
        load.run(&ram, &device, 100);
        load.drain(&ram, &device);
        assert!(collect(&device).is_empty(), "nothing is logged before it is asked for");
        device.start_logging().unwrap();
        device.start_logging().unwrap();
        for round in 0..30 {
            let mut shadow = vec![0; ram.bytes() as usize];
            ram.read_pages(0, &mut shadow);
            load.submit_all(&ram, &*device);
            let before: Vec<_> = load.queues.iter().map(|queue| queue.in_flight.clone()).collect();
            load.drain(&ram, &device);
            let mut needed = written(&load, &before);
            // Data that reads brought: the pages whose contents are not what was filled in.
            for queue in &load.queues {
                for slot in &before[usize::from(queue.index)] {
                    let page = queue.data(*slot) / 4096;
                    let header: u32 =
                        vm_memory::Bytes::read_obj(ram.memory(), vm_memory::GuestAddress(queue.meta(*slot)))
                            .unwrap();
                    if header == READ {
                        needed.insert(page);
                    }
                }
            }
            if round % 7 == 3 {
                device.pause().unwrap();
            }
            let found = collect(&device);
            let missing: Vec<_> = needed.difference(&found).collect();
            assert!(missing.is_empty(), "time {time}, round {round}: {missing:x?} were not reported");
            // The backend also writes the event index of a used ring, whenever it looks for requests.
            let used: BTreeSet<_> = load.queues.iter().map(|queue| queue.used() / 4096).collect();
            let surplus: Vec<_> = found.difference(&needed).filter(|page| !used.contains(page)).collect();
            assert!(
                surplus.is_empty(),
                "time {time}, round {round}: {surplus:x?} were reported and not written"
            );
            if round % 7 == 3 {
                device.resume().unwrap();
                load.drain(&ram, &device);
                let _ = collect(&device);
            }
        }
        device.stop_logging().unwrap();
        device.stop_logging().unwrap();
    }
    load.verify(&ram, &device);
}

#[test]
fn a_copy_that_follows_the_log_is_the_memory() {
    let dir = dir();
    let Some(daemon) = Daemon::start(dir.path(), 2) else { return };
    let ram = memory();
    let device = device(&daemon, 2, &ram);
    let mut load = Load::new(set_up(&*device, &ram, 2, 0), 40);
    load.run(&ram, &device, 100);
    device.start_logging().unwrap();
    let copy = copy_of(&ram);
    let mut own = PageSet::empty(ram.pages());
    ram.take_own_writes(&mut own);
    let mut page = vec![0; 4096];
    for round in 0..60 {
        load.run(&ram, &device, 40);
        load.submit_all(&ram, &*device);
        let is_last = round == 59;
        if is_last {
            device.pause().unwrap();
        }
        let mut dirty = PageSet::empty(ram.pages());
        device.collect_dirty(&mut dirty).unwrap();
        // What the driver itself wrote, as KVM's log would have it.
        ram.take_own_writes(&mut dirty);
        for index in dirty.iter() {
            ram.read_pages(index, &mut page);
            copy.write_pages(index, &page);
        }
    }
    let (mut a, mut b) = (vec![0; ram.bytes() as usize], vec![0; ram.bytes() as usize]);
    ram.read_pages(0, &mut a);
    copy.read_pages(0, &mut b);
    let different: Vec<_> = (0..ram.pages() as usize)
        .filter(|page| a[page * 4096..][..4096] != b[page * 4096..][..4096])
        .collect();
    assert!(different.is_empty(), "pages {different:x?} differ");
    device.resume().unwrap();
    load.verify(&ram, &device);
}
