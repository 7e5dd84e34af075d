//! The virtio-mmio registers under guests that keep to the rules and guests that do not.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

mod device_rig;

use std::sync::{Arc, Mutex};

use device_rig::driver::{Load, read32, set_up};
use device_rig::{Daemon, device, memory};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use shim::device::blk::BlkDevice;
use shim::device::mmio::{Backend, Notices, QUEUE_SIZE_MAX, ReadyQueue, Transport};
use shim::device::{DEVICES_MAX, Device, FIRST_IRQ, MMIO_START, Place};
use shim::memory::GuestRam;

const FEATURES: u64 = 1 << 32 | 0b1011;

/// A backend that keeps a record and minds the transport's promises.
#[derive(Default)]
struct Record {
    notices: Notices,
    runs: Mutex<Option<(u64, Vec<ReadyQueue>)>>,
    kicked: Mutex<Vec<u16>>,
    config: Mutex<[u8; 16]>,
}

impl Backend for Record {
    fn device_id(&self) -> u32 {
        2
    }
    fn features(&self) -> u64 {
        FEATURES
    }
    fn notices(&self) -> &Notices {
        &self.notices
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.config.lock().unwrap();
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = config.get(offset as usize + i).copied().unwrap_or(0);
        }
    }
    fn write_config(&self, _features: u64, offset: u64, data: &[u8]) {
        let mut config = self.config.lock().unwrap();
        for (i, byte) in data.iter().enumerate() {
            if let Some(place) = config.get_mut(offset as usize + i) {
                *place = *byte;
            }
        }
    }
    fn activate(&self, features: u64, queues: Vec<ReadyQueue>) {
        assert_eq!(features & !FEATURES, 0, "features that were not offered");
        assert_ne!(features & 1 << 32, 0, "VERSION_1");
        for queue in &queues {
            assert!(queue.size.is_power_of_two() && queue.size <= QUEUE_SIZE_MAX && queue.index < 2);
            let end = 16 << 20;
            assert!(queue.desc.is_multiple_of(16) && queue.desc + 16 * u64::from(queue.size) <= end);
            assert!(queue.avail.is_multiple_of(2) && queue.avail + 6 + 2 * u64::from(queue.size) <= end);
            assert!(queue.used.is_multiple_of(4) && queue.used + queue.used_bytes() <= end);
        }
        assert!(self.runs.lock().unwrap().replace((features, queues)).is_none(), "activated twice");
    }
    fn deactivate(&self) {
        assert!(self.runs.lock().unwrap().take().is_some(), "not active");
    }
    fn kick(&self, queue: u16) {
        assert!(queue < 2);
        self.kicked.lock().unwrap().push(queue);
    }
}

fn transport(ram: &Arc<GuestRam>) -> Transport<Record> {
    Transport::new(Arc::new(Record::default()), ram.clone(), 2, 256).unwrap()
}

fn read(transport: &Transport<Record>, offset: u64) -> u32 {
    let mut data = [0; 4];
    transport.read(offset, &mut data);
    u32::from_le_bytes(data)
}

fn write(transport: &Transport<Record>, offset: u64, value: u32) {
    transport.write(offset, &value.to_le_bytes());
}

fn negotiate(transport: &Transport<Record>, features: u64) {
    write(transport, 0x70, 1);
    write(transport, 0x70, 3);
    for half in 0..2 {
        write(transport, 0x24, half);
        write(transport, 0x20, (features >> (32 * half)) as u32);
    }
    write(transport, 0x70, 11);
}

fn make_ready(transport: &Transport<Record>, index: u32, size: u32, at: [u64; 3]) -> bool {
    write(transport, 0x30, index);
    write(transport, 0x38, size);
    for (offset, address) in [0x80, 0x90, 0xa0].into_iter().zip(at) {
        write(transport, offset, address as u32);
        write(transport, offset + 4, (address >> 32) as u32);
    }
    write(transport, 0x44, 1);
    read(transport, 0x44) == 1
}

#[test]
fn places_follow_each_other_and_end() {
    assert_eq!(Place::of(0), Some(Place { address: MMIO_START, irq: FIRST_IRQ }));
    assert_eq!(Place::of(2), Some(Place { address: MMIO_START + 0x2000, irq: FIRST_IRQ + 2 }));
    assert_eq!(Place::of(DEVICES_MAX), None);
    assert_eq!(Place::find(MMIO_START + 0x2050), Some((2, 0x50)));
    assert_eq!(Place::find(MMIO_START - 1), None);
    assert_eq!(Place::find(MMIO_START + DEVICES_MAX as u64 * 0x1000), None);
}

#[test]
fn a_driver_finds_the_device_and_sets_it_up() {
    let ram = memory();
    let t = transport(&ram);
    assert_eq!((read(&t, 0), read(&t, 4), read(&t, 8)), (0x7472_6976, 2, 2));
    write(&t, 0x14, 1);
    assert_eq!(read(&t, 0x10), 1);
    write(&t, 0x14, 2);
    assert_eq!(read(&t, 0x10), 0);
    assert_eq!([0xb0, 0xb4, 0xb8, 0xbc].map(|at| read(&t, at)), [u32::MAX; 4], "no shared memory");
    negotiate(&t, FEATURES);
    assert_eq!(read(&t, 0x70), 11);
    assert_eq!(read(&t, 0x60), 0);
    assert!(make_ready(&t, 1, 128, [0x1000, 0x2000, 0x3000]));
    assert_eq!(read(&t, 0x60), 1);
    write(&t, 0x70, 15);
    let expected = ReadyQueue { index: 1, size: 128, desc: 0x1000, avail: 0x2000, used: 0x3000 };
    assert_eq!(*t.backend().runs.lock().unwrap(), Some((FEATURES, vec![expected])));
    write(&t, 0x50, 1);
    write(&t, 0x50, 2);
    assert_eq!(*t.backend().kicked.lock().unwrap(), [1]);
    write(&t, 0x70, 0);
    assert_eq!((read(&t, 0x70), read(&t, 0x44), read(&t, 0x60)), (0, 0, 0));
    assert!(t.backend().runs.lock().unwrap().is_none());
}

#[test]
fn features_that_were_not_offered_are_not_accepted() {
    let ram = memory();
    for bad in [FEATURES | 1 << 40, FEATURES & !(1 << 32)] {
        let t = transport(&ram);
        negotiate(&t, bad);
        assert_eq!(read(&t, 0x70), 3, "features {bad:#x}");
        write(&t, 0x70, 15);
        assert_eq!(read(&t, 0x70) & 4, 0, "and the device cannot be driven");
    }
}

#[test]
fn features_stay_once_they_are_accepted() {
    let ram = memory();
    let t = transport(&ram);
    negotiate(&t, FEATURES);
    write(&t, 0x24, 0);
    write(&t, 0x20, !0);
    assert_eq!(t.driver_features(), FEATURES);
}

#[test]
fn a_queue_that_is_not_within_memory_does_not_get_ready() {
    let ram = memory();
    let t = transport(&ram);
    let end = 16 << 20;
    for (size, at) in [
        (128, [end, 0x2000, 0x3000]),
        (128, [0x1000, end - 4, 0x3000]),
        (128, [0x1000, 0x2000, u64::MAX - 3]),
        (128, [0x1008, 0x2000, 0x3000]),
        (128, [0x1000, 0x2001, 0x3000]),
        (128, [0x1000, 0x2000, 0x3002]),
        (100, [0x1000, 0x2000, 0x3000]),
        (512, [0x1000, 0x2000, 0x3000]),
        (0, [0x1000, 0x2000, 0x3000]),
        (0x1_0080, [0x1000, 0x2000, 0x3000]),
    ] {
        assert!(!make_ready(&t, 0, size, at), "size {size} at {at:x?}");
    }
    assert!(!make_ready(&t, 2, 128, [0x1000, 0x2000, 0x3000]), "there are two queues");
    assert!(make_ready(&t, 0, 128, [0x1000, 0x2000, 0x3000]));
}

#[test]
fn a_change_of_the_configuration_is_told_until_it_is_acknowledged() {
    let ram = memory();
    let t = transport(&ram);
    let before = read(&t, 0xfc);
    t.backend().notices.config_changed();
    assert_eq!((read(&t, 0xfc), read(&t, 0x60)), (before + 1, 2));
    write(&t, 0x64, 1);
    assert_eq!(read(&t, 0x60), 2);
    write(&t, 0x64, 3);
    assert_eq!(read(&t, 0x60), 0);
    t.backend().notices.set_needs_reset(true);
    assert_eq!((read(&t, 0x70), read(&t, 0x60)), (64, 2));
    write(&t, 0x70, 0);
    assert_eq!(read(&t, 0x70), 0);
}

#[derive(Debug, Clone)]
enum Access {
    Read(u64, usize),
    Write(u64, Vec<u8>),
    /// What a driver does that keeps to the rules, as far as it goes before the next access.
    SetUp(u32),
}

/// Mostly accesses that look right, so that the deeper states are reached; some of any kind.
fn access() -> impl Strategy<Value = Access> {
    let register = prop_oneof![
        4 => prop::sample::select(vec![0x14u64, 0x20, 0x24, 0x30, 0x38, 0x44, 0x50, 0x64, 0x70, 0x70, 0x70]),
        3 => prop::sample::select(vec![0x80u64, 0x84, 0x90, 0x94, 0xa0, 0xa4, 0xac, 0xc0]),
        1 => 0u64..0x1100,
        1 => any::<u64>(),
    ];
    let value = prop_oneof![
        4 => prop::sample::select(vec![0u32, 1, 2, 3, 11, 15, 64, 128, 0x1000, 0x2000, 0x10_0000]),
        1 => any::<u32>(),
    ];
    prop_oneof![
        1 => (0..13u32).prop_map(Access::SetUp),
        5 => (register.clone(), value).prop_map(|(at, value)| Access::Write(at, value.to_le_bytes().to_vec())),
        1 => (register.clone(), prop::collection::vec(any::<u8>(), 0..9)).prop_map(|(at, data)| Access::Write(at, data)),
        2 => (register, 0usize..9).prop_map(|(at, len)| Access::Read(at, len)),
    ]
}

fn apply(accesses: &[Access], mut read: impl FnMut(u64, &mut [u8]), mut write: impl FnMut(u64, &[u8])) {
    for access in accesses {
        match access {
            Access::Read(at, len) => read(*at, &mut vec![0xaa; *len]),
            Access::Write(at, data) => write(*at, data),
            Access::SetUp(steps) => {
                let steps_of_all = [
                    (0x70, 0),
                    (0x70, 3),
                    (0x24, 1),
                    (0x20, 1),
                    (0x24, 0),
                    (0x20, 0),
                    (0x70, 11),
                    (0x38, 128),
                    (0x80, 0x1000),
                    (0x90, 0x2000),
                    (0xa0, 0x3000),
                    (0x44, 1),
                    (0x70, 15),
                ];
                for (at, value) in &steps_of_all[..=*steps as usize] {
                    write(*at, &u32::to_le_bytes(*value));
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    #[test]
    fn no_order_of_accesses_breaks_the_transport_or_its_promises(accesses in prop::collection::vec(access(), 0..200)) {
        let ram = memory();
        let t = transport(&ram);
        apply(&accesses, |at, data| t.read(at, data), |at, data| t.write(at, data));
        // Whatever became of it can be carried over, and a reset helps.
        let state = t.save();
        let other = transport(&ram);
        let runs = other.restore(&serde_json::from_value(serde_json::to_value(&state).unwrap()).unwrap()).unwrap();
        prop_assert_eq!(other.save(), state);
        prop_assert_eq!(runs, t.backend().runs.lock().unwrap().as_ref().map(|(_, queues)| queues.clone()));
        write(&t, 0x70, 0);
        negotiate(&t, FEATURES);
        prop_assert!(make_ready(&t, 0, 128, [0x1000, 0x2000, 0x3000]));
        write(&t, 0x70, 15);
        prop_assert!(t.backend().runs.lock().unwrap().is_some());
    }
}

#[test]
fn a_guest_that_does_anything_can_set_its_disk_up_afterwards() {
    let dir = tempfile::tempdir().unwrap();
    let Some(daemon) = Daemon::start(dir.path(), 2) else { return };
    let ram = memory();
    let device: Arc<BlkDevice> = device(&daemon, 2, &ram);
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let strategy = prop::collection::vec(access(), 0..200);
    for _ in 0..150 {
        let accesses = strategy.new_tree(&mut runner).unwrap().current();
        apply(&accesses, |at, data| device.read(at, data), |at, data| device.write(at, data));
    }
    assert_eq!(read32(&*device, 0), 0x7472_6976);
    let activations = daemon.log().matches("its rings run").count();
    println!("the backend's rings ran {activations} times");
    assert!(activations > 10, "the accesses came to that {activations} times only");
    // The rings were anything as well; a backend that took offence is connected anew.
    let mut load = Load::new(set_up(&*device, &ram, 2, 0), 24);
    for queue in 0..2 {
        for block in 0..24 {
            let place = queue as u64 * 24 + block;
            device_rig::driver::fill(&ram, load.queues[queue].data(0), 0);
            assert_eq!(load.queues[queue].run(&ram, &device, device_rig::driver::WRITE, place), 0);
        }
    }
    load.run(&ram, &device, 300);
    load.verify(&ram, &device);
}
