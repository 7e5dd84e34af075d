//! What the daemon tells and allows while a front end uses a disk.

mod support;

use std::fs::File;
use std::path::Path;

use serde_json::{Value, json};
use support::Bench;
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::EventFd;

const NONE: Value = Value::Null;
const MEMORY_BYTES: u64 = 1 << 20;
const QUEUE_SIZE: u16 = 16;
const VIRTIO_F_VERSION_1: u64 = 1 << 32;

/// A front end with one running queue and nothing in it.
struct Idle {
    _front: Frontend,
    _memory: File,
    _events: [EventFd; 2],
}

impl Idle {
    fn connect(socket: &Path) -> Self {
        let mut front = Frontend::connect(socket, 1).expect("connected");
        front.set_owner().expect("set");
        let offered = front.get_features().expect("asked");
        let protocol = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        front.set_features(offered & (VIRTIO_F_VERSION_1 | protocol)).expect("set");
        let offered = front.get_protocol_features().expect("asked");
        front.set_protocol_features(offered & VhostUserProtocolFeatures::CONFIG).expect("set");

        let memory = tempfile::tempfile().expect("memory");
        memory.set_len(MEMORY_BYTES).expect("sized");
        let base = 0x7000_0000_0000;
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size: MEMORY_BYTES,
            userspace_addr: base,
            mmap_offset: 0,
            mmap_handle: std::os::fd::AsRawFd::as_raw_fd(&memory),
        };
        front.set_mem_table(&[region]).expect("set");
        let events = [(); 2].map(|()| EventFd::new(libc::EFD_NONBLOCK).expect("an eventfd"));
        front.set_vring_num(0, QUEUE_SIZE).expect("set");
        let rings = VringConfigData {
            queue_max_size: QUEUE_SIZE,
            queue_size: QUEUE_SIZE,
            flags: 0,
            desc_table_addr: base,
            used_ring_addr: base + 0x2000,
            avail_ring_addr: base + 0x1000,
            log_addr: None,
        };
        front.set_vring_addr(0, &rings).expect("set");
        front.set_vring_base(0, 0).expect("set");
        front.set_vring_call(0, &events[0]).expect("set");
        front.set_vring_kick(0, &events[1]).expect("set");
        front.set_vring_enable(0, true).expect("set");
        Self { _front: front, _memory: memory, _events: events }
    }
}

#[test]
fn a_disk_that_a_front_end_uses_is_detached_only_by_force() {
    let bench = Bench::new();
    let image = bench.image("a.img", 1 << 20);
    let daemon = bench.start(&["--disk", &bench.disk("a", &image)]);
    let connected = |is: bool| {
        support::eventually("the connection is noticed", || {
            daemon.get("/v1/disks/a")["connected"] == json!(is)
        });
    };
    let idle = Idle::connect(&bench.path("a.sock"));
    connected(true);
    let message = daemon.refused("DELETE", "/v1/disks/a", &NONE, 409, "busy");
    assert!(message.contains("front end") && message.contains("force"), "{message}");
    connected(true);
    drop(idle);
    daemon.ok("DELETE", "/v1/disks/a", &NONE);

    daemon.ok("POST", "/v1/disks", &bench.attach("a", &image));
    let _idle = Idle::connect(&bench.path("a.sock"));
    connected(true);
    let (_, metrics) = daemon.send("GET", "/metrics", "");
    assert!(metrics.contains("blockd_disk_connected{disk=\"a\"} 1\n"), "{metrics}");
    daemon.ok("DELETE", "/v1/disks/a?force=true", &NONE);
    let (_, events) = daemon.send("GET", "/v1/events", "");
    let kinds: Vec<_> = events
        .lines()
        .map(|line| {
            serde_json::from_str::<Value>(line).expect("JSON")["kind"].as_str().expect("a kind").to_owned()
        })
        .collect();
    assert_eq!(
        kinds[..6],
        [
            "disk-attached",
            "disk-connected",
            "disk-disconnected",
            "disk-detached",
            "disk-attached",
            "disk-connected"
        ]
    );
    assert!(kinds.contains(&"disk-detached".to_owned()));
    daemon.end();
}

#[test]
fn a_front_end_that_stays_does_not_hold_up_the_end() {
    let bench = Bench::new();
    let image = bench.image("a.img", 1 << 20);
    let daemon = bench.start(&["--disk", &bench.disk("a", &image)]);
    let _idle = Idle::connect(&bench.path("a.sock"));
    support::eventually("connected", || daemon.get("/v1/disks/a")["connected"] == json!(true));
    let begun = std::time::Instant::now();
    daemon.end();
    assert!(begun.elapsed() < std::time::Duration::from_secs(10), "{:?}", begun.elapsed());
}
