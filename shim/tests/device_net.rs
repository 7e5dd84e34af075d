//! A network card on a real tap: frames both ways, pauses, a move to another process, announcements.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

mod device_rig;

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{Read, Write};
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering, fence};
use std::time::{Duration, Instant};

use device_rig::driver::{read32, write32};
use device_rig::{eventually, memory};
use shim::device::Device;
use shim::device::net::{Mac, NetDevice, NetOptions, announcement};
use shim::memory::GuestRam;
use shim::pages::PageSet;
use vm_memory::{Bytes, GuestAddress};

const MAC: Mac = Mac([0x52, 0x54, 0, 0xaa, 0xbb, 0xcc]);
/// For local experiments (IEEE 802): nothing else on the tap has it.
const TEST_TYPE: [u8; 2] = [0x88, 0xb5];
const SIZE: u16 = 32;
const HEADER: usize = 12;

/// A card on a tap of its own, or `None` (and a word about it) where none can be made.
fn card(ram: &Arc<GuestRam>) -> Option<(Arc<NetDevice>, String)> {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let number = COUNT.fetch_add(1, Ordering::Relaxed);
    let tap = format!("shim{}n{number}", std::process::id());
    match NetDevice::new(NetOptions { tap: tap.clone(), mac: MAC }, ram.clone()) {
        Ok(card) => Some((card, tap)),
        Err(e) => {
            eprintln!("SKIPPED: no tap can be made here: {e:#}");
            None
        }
    }
}

/// The host's end of the tap.
struct Host(File);

impl Host {
    fn new(tap: &str) -> Self {
        // SAFETY: plain system calls with valid arguments; results are checked.
        unsafe {
            let flags = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
            let protocol = (libc::ETH_P_ALL as u16).to_be();
            // Without a protocol it hears nothing; with one it would hear every interface until it is bound to its own.
            let fd = libc::socket(libc::AF_PACKET, flags, 0);
            assert!(fd >= 0, "{}", std::io::Error::last_os_error());
            let mut address: libc::sockaddr_ll = std::mem::zeroed();
            address.sll_family = libc::AF_PACKET as u16;
            address.sll_protocol = protocol;
            let name = std::ffi::CString::new(tap).unwrap();
            address.sll_ifindex = libc::if_nametoindex(name.as_ptr()) as i32;
            let len = std::mem::size_of_val(&address) as u32;
            assert_eq!(libc::bind(fd, (&raw const address).cast(), len), 0);
            Self(File::from_raw_fd(fd))
        }
    }

    fn send(&self, body: &[u8]) {
        let mut frame = MAC.0.to_vec();
        frame.extend([2, 0, 0, 0, 0, 1]);
        frame.extend(TEST_TYPE);
        frame.extend(body);
        frame.resize(frame.len().max(60), 0);
        (&self.0).write_all(&frame).unwrap();
    }

    /// The next frame from the guest of that type.
    fn receive(&self, kind: [u8; 2], time: Duration) -> Option<Vec<u8>> {
        let until = Instant::now() + time;
        let mut buffer = [0; 2048];
        while Instant::now() < until {
            let mut fd = libc::pollfd { fd: self.0.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: one valid entry.
            unsafe { libc::poll(&mut fd, 1, 50) };
            if let Ok(len) = (&self.0).read(&mut buffer)
                && buffer[12..14] == kind
                && buffer[6..12] == MAC.0
            {
                return Some(buffer[..len].to_vec());
            }
        }
        None
    }
}

/// One queue of the guest's driver: descriptor `i` is always the buffer `i`.
#[derive(Clone)]
struct Queue {
    index: u16,
    base: u64,
    next_avail: u16,
    next_used: u16,
}

impl Queue {
    fn set_up(device: &dyn Device, index: u16) -> Self {
        let queue =
            Self { index, base: (1 << 20) + u64::from(index) * (1 << 19), next_avail: 0, next_used: 0 };
        write32(device, 0x30, u32::from(index));
        write32(device, 0x38, u32::from(SIZE));
        for (at, page) in [(0x80, 0), (0x90, 1), (0xa0, 2)] {
            write32(device, at, (queue.base + page * 4096) as u32);
            write32(device, at + 4, 0);
        }
        write32(device, 0x44, 1);
        assert_eq!(read32(device, 0x44), 1);
        queue
    }

    fn buffer(&self, slot: u16) -> u64 {
        self.base + (3 + u64::from(slot)) * 4096
    }

    fn u16(&self, ram: &GuestRam, at: u64) -> u16 {
        ram.memory().load(GuestAddress(self.base + at), Ordering::Acquire).unwrap()
    }

    fn offer(&mut self, ram: &GuestRam, device: &dyn Device, slot: u16, len: usize) {
        let mut desc = [0; 16];
        desc[..8].copy_from_slice(&self.buffer(slot).to_le_bytes());
        desc[8..12].copy_from_slice(&(len as u32).to_le_bytes());
        desc[12] = if self.index == 0 { 2 } else { 0 };
        let memory = ram.memory();
        memory.write_slice(&desc, GuestAddress(self.base + 16 * u64::from(slot))).unwrap();
        let place = GuestAddress(self.base + 4096 + 4 + 2 * u64::from(self.next_avail % SIZE));
        memory.write_obj(slot, place).unwrap();
        let old = self.next_avail;
        self.next_avail = old.wrapping_add(1);
        memory.store(self.next_avail, GuestAddress(self.base + 4096 + 2), Ordering::Release).unwrap();
        fence(Ordering::SeqCst);
        let event = self.u16(ram, 2 * 4096 + 4 + 8 * u64::from(SIZE));
        if self.next_avail.wrapping_sub(event).wrapping_sub(1) < 1 {
            write32(device, 0x50, u32::from(self.index));
        }
    }

    /// Waits for the device to be done with a buffer, by the interrupt; returns which, and the bytes written.
    fn wait(&mut self, ram: &GuestRam, device: &dyn Device, time: Duration) -> Option<(u16, usize)> {
        let call = device.calls().remove(usize::from(self.index));
        let until = Instant::now() + time;
        loop {
            let event = GuestAddress(self.base + 4096 + 4 + 2 * u64::from(SIZE));
            ram.memory().store(self.next_used, event, Ordering::Release).unwrap();
            fence(Ordering::SeqCst);
            if self.u16(ram, 2 * 4096 + 2) != self.next_used {
                let element = GuestAddress(self.base + 2 * 4096 + 4 + 8 * u64::from(self.next_used % SIZE));
                let [id, len]: [u32; 2] = ram.memory().read_obj(element).unwrap();
                self.next_used = self.next_used.wrapping_add(1);
                return Some((id as u16, len as usize));
            }
            let left = until.saturating_duration_since(Instant::now());
            let mut fd = libc::pollfd { fd: call.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: one valid entry.
            if left.is_zero() || unsafe { libc::poll(&mut fd, 1, left.as_millis() as i32 + 1) } == 0 {
                return None;
            }
            let _ = call.read();
        }
    }
}

#[derive(Clone)]
struct Guest {
    receive: Queue,
    send: Queue,
}

impl Guest {
    fn set_up(device: &dyn Device, ram: &GuestRam) -> Self {
        write32(device, 0x70, 0);
        assert_eq!(read32(device, 8), 1);
        write32(device, 0x70, 3);
        let features: u64 = 1 << 32 | 1 << 29 | 1 << 5;
        for half in 0..2 {
            write32(device, 0x24, half);
            write32(device, 0x20, (features >> (32 * half)) as u32);
        }
        write32(device, 0x70, 11);
        assert_eq!(read32(device, 0x70), 11);
        let zeroes = vec![0; 3 * 4096];
        for base in [1 << 20, (1 << 20) + (1 << 19)] {
            ram.memory().write_slice(&zeroes, GuestAddress(base)).unwrap();
        }
        let guest = Self { receive: Queue::set_up(device, 0), send: Queue::set_up(device, 1) };
        write32(device, 0x70, 15);
        guest
    }

    fn offer_buffers(&mut self, ram: &GuestRam, device: &dyn Device, slots: std::ops::Range<u16>) {
        for slot in slots {
            self.receive.offer(ram, device, slot, 1526);
        }
    }

    /// The next test frame that the host sent; its buffer is offered again. Others are passed over.
    fn receive(&mut self, ram: &GuestRam, device: &dyn Device) -> Vec<u8> {
        loop {
            let done = self.receive.wait(ram, device, Duration::from_secs(60));
            let (slot, len) = done.expect("a frame within a minute");
            let mut frame = vec![0; len];
            ram.memory().read_slice(&mut frame, GuestAddress(self.receive.buffer(slot))).unwrap();
            self.receive.offer(ram, device, slot, 1526);
            if frame[HEADER + 12..HEADER + 14] == TEST_TYPE {
                assert_eq!(frame[..HEADER], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
                return frame[HEADER..].to_vec();
            }
        }
    }

    fn send(&mut self, ram: &GuestRam, device: &dyn Device, frame: &[u8]) {
        let slot = self.send.next_avail % SIZE;
        let mut bytes = vec![0xff; HEADER];
        bytes.extend(frame);
        ram.memory().write_slice(&bytes, GuestAddress(self.send.buffer(slot))).unwrap();
        self.send.offer(ram, device, slot, bytes.len());
    }
}

fn frame_of(number: u32) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend(MAC.0);
    frame.extend(TEST_TYPE);
    frame.extend(number.to_be_bytes());
    frame.resize(60 + number as usize * 7 % 1400, 0x11);
    frame
}

#[test]
fn frames_go_both_ways() {
    let ram = memory();
    let Some((device, tap)) = card(&ram) else { return };
    let host = Host::new(&tap);
    let mut guest = Guest::set_up(&*device, &ram);
    let mut mac = [0; 6];
    device.read(0x100, &mut mac);
    assert_eq!(mac, MAC.0);
    guest.offer_buffers(&ram, &*device, 0..SIZE);
    for number in 0..200u32 {
        host.send(&number.to_be_bytes());
        assert_eq!(guest.receive(&ram, &*device)[14..18], number.to_be_bytes());
        guest.send(&ram, &*device, &frame_of(number));
        let (_, written) = guest.send.wait(&ram, &*device, Duration::from_secs(60)).expect("a completion");
        assert_eq!(written, 0);
        let arrived = host.receive(TEST_TYPE, Duration::from_secs(60)).expect("a frame from the guest");
        assert_eq!(arrived, frame_of(number));
    }
}

#[test]
fn a_guest_without_buffers_gets_its_frames_when_it_has_some() {
    let ram = memory();
    let Some((device, tap)) = card(&ram) else { return };
    let host = Host::new(&tap);
    let mut guest = Guest::set_up(&*device, &ram);
    for number in 0..5u32 {
        host.send(&number.to_be_bytes());
    }
    std::thread::sleep(Duration::from_millis(20));
    guest.offer_buffers(&ram, &*device, 0..1);
    for number in 0..5u32 {
        assert_eq!(guest.receive(&ram, &*device)[14..18], number.to_be_bytes(), "one at a time");
    }
}

#[test]
fn a_paused_card_touches_nothing_and_goes_on_elsewhere() {
    let ram = memory();
    let Some((source, tap)) = card(&ram) else { return };
    let host = Host::new(&tap);
    let mut guest = Guest::set_up(&*source, &ram);
    guest.offer_buffers(&ram, &*source, 0..SIZE);
    for number in 0..20u32 {
        host.send(&number.to_be_bytes());
        guest.receive(&ram, &*source);
        guest.send(&ram, &*source, &frame_of(number));
        guest.send.wait(&ram, &*source, Duration::from_secs(60)).unwrap();
    }
    let mut own = PageSet::empty(ram.pages());
    source.pause().unwrap();
    ram.take_own_writes(&mut own);
    let mut before = vec![0; ram.bytes() as usize];
    ram.read_pages(0, &mut before);
    host.send(b"late");
    guest.send(&ram, &*source, &frame_of(77));
    std::thread::sleep(Duration::from_millis(30));
    own.clear();
    ram.take_own_writes(&mut own);
    let state = source.save().unwrap();
    // The driver of the test wrote a frame and made it available; the card wrote nothing.
    let touched: BTreeSet<_> = own.iter().collect();
    let send = &guest.send;
    let driver: BTreeSet<_> = [send.base, send.base + 4096, send.buffer(20)].map(|at| at / 4096).into();
    assert_eq!(touched, driver);

    let target_ram = memory();
    let mut bytes = vec![0; ram.bytes() as usize];
    ram.read_pages(0, &mut bytes);
    target_ram.write_pages(0, &bytes);
    let Some((target, tap)) = card(&target_ram) else { return };
    let host = Host::new(&tap);
    target.restore(&serde_json::from_value(serde_json::to_value(&state).unwrap()).unwrap()).unwrap();
    assert!(
        host.receive(TEST_TYPE, Duration::from_millis(50)).is_none(),
        "nothing runs before it is told to"
    );
    target.resume().unwrap();
    let arrived =
        host.receive(TEST_TYPE, Duration::from_secs(60)).expect("what was made available meanwhile");
    assert_eq!(arrived, frame_of(77));
    guest.send.wait(&target_ram, &*target, Duration::from_secs(60)).unwrap();
    host.send(b"here");
    assert_eq!(guest.receive(&target_ram, &*target)[14..18], *b"here");
    guest.send(&target_ram, &*target, &frame_of(78));
    assert_eq!(host.receive(TEST_TYPE, Duration::from_secs(60)).unwrap(), frame_of(78));
    assert!(target.restore(&state).is_err(), "a card in use is not restored");
    // The source may go on instead.
    source.resume().unwrap();
    drop(source);
}

#[test]
fn what_the_card_writes_is_noted() {
    let ram = memory();
    let Some((device, tap)) = card(&ram) else { return };
    let host = Host::new(&tap);
    let mut guest = Guest::set_up(&*device, &ram);
    guest.offer_buffers(&ram, &*device, 0..SIZE);
    let mut dirty = PageSet::full(ram.pages());
    let copy = memory();
    let mut page = vec![0; 4096];
    for round in 0..100u32 {
        for index in dirty.iter() {
            ram.read_pages(index, &mut page);
            copy.write_pages(index, &page);
        }
        if round == 99 {
            break;
        }
        host.send(&round.to_be_bytes());
        guest.receive(&ram, &*device);
        guest.send(&ram, &*device, &frame_of(round));
        if round == 98 {
            device.pause().unwrap();
        }
        dirty.clear();
        ram.take_own_writes(&mut dirty);
    }
    let (mut a, mut b) = (vec![0; ram.bytes() as usize], vec![0; ram.bytes() as usize]);
    ram.read_pages(0, &mut a);
    copy.read_pages(0, &mut b);
    assert!(a == b, "the copy differs");
}

#[test]
fn the_network_is_told_where_the_guest_is() {
    let ram = memory();
    let Some((device, tap)) = card(&ram) else { return };
    let host = Host::new(&tap);
    device.announce().unwrap();
    let rarp = host.receive([0x80, 0x35], Duration::from_secs(60)).expect("a RARP");
    assert_eq!(rarp, announcement(MAC, &[])[0]);
    let mut guest = Guest::set_up(&*device, &ram);
    let address = Ipv4Addr::new(192, 0, 2, 7);
    guest.send(&ram, &*device, &announcement(MAC, &[address])[1]);
    guest.send.wait(&ram, &*device, Duration::from_secs(60)).unwrap();
    assert_eq!(device.addresses(), [address]);
    assert!(host.receive([8, 6], Duration::from_secs(60)).is_some(), "that was the guest's own");
    let mut rounds = 0;
    eventually("an announcement after the first is over", || {
        device.announce().unwrap();
        host.receive([8, 6], Duration::from_millis(50)).is_some()
    });
    while let Some(arp) = host.receive([8, 6], Duration::from_millis(500)) {
        assert_eq!(arp, announcement(MAC, &[address])[1]);
        rounds += 1;
    }
    assert_eq!(rounds, 4, "five rounds, of which the first was seen before");
}

#[test]
fn a_guest_whose_rings_are_broken_is_told_and_can_begin_anew() {
    let ram = memory();
    let Some((device, tap)) = card(&ram) else { return };
    let host = Host::new(&tap);
    let mut guest = Guest::set_up(&*device, &ram);
    // More available than the ring has places.
    ram.memory().write_obj(1000u16, GuestAddress(guest.send.base + 4096 + 2)).unwrap();
    write32(&*device, 0x50, 1);
    eventually("the guest is told", || read32(&*device, 0x70) & 64 != 0);
    guest = Guest::set_up(&*device, &ram);
    guest.send(&ram, &*device, &frame_of(1));
    assert_eq!(host.receive(TEST_TYPE, Duration::from_secs(60)).unwrap(), frame_of(1));
    // Buffers that lie nowhere, in a chain that never ends.
    for (address, next) in [(u64::MAX - 5, 0u16), (0x1000, 3)] {
        let mut desc = [0; 16];
        desc[..8].copy_from_slice(&address.to_le_bytes());
        desc[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
        desc[12] = 1;
        desc[14..].copy_from_slice(&next.to_le_bytes());
        ram.memory().write_slice(&desc, GuestAddress(guest.send.base + 16 * 3)).unwrap();
        let place = guest.send.base + 4096 + 4 + 2 * u64::from(guest.send.next_avail % SIZE);
        ram.memory().write_obj(3u16, GuestAddress(place)).unwrap();
        let place = GuestAddress(guest.send.base + 4096 + 2);
        ram.memory().store(guest.send.next_avail.wrapping_add(1), place, Ordering::Release).unwrap();
        write32(&*device, 0x50, 1);
        std::thread::sleep(Duration::from_millis(20));
        guest = Guest::set_up(&*device, &ram);
    }
    guest.send(&ram, &*device, &frame_of(2));
    assert_eq!(host.receive(TEST_TYPE, Duration::from_secs(60)).unwrap(), frame_of(2));
}
