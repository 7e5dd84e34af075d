//! A disk goes on in a new image while its guest writes, and the daemon dies around that.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::path::{Path, PathBuf};
use std::time::Duration;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use system_tests::PATIENCE;
use system_tests::daemon::Program;
use system_tests::ring::{FLUSH, IO_ERROR, OK, READ, WRITE};
use system_tests::{Daemon, FrontEnd, Image, LoadOptions, Mix, Options, Request, VerifiedLoad};

const SIZE: u64 = 128 << 20;
const SECTORS: u64 = SIZE / 512;
/// The formats that can have parents.
const KINDS: [Image; 2] = [Image::DynamicVhdx, Image::DynamicVhd];

fn is_reference() -> bool {
    let is = Daemon::program() == Program::Reference;
    if is {
        println!("SKIPPED: the reference makes no snapshots in this way");
    }
    is
}

fn start_load(daemon: &Daemon, options: LoadOptions) -> VerifiedLoad {
    let front = Options { queues: 2, memory: vec![64 << 20, 128 << 20], ..Options::default() };
    VerifiedLoad::new(FrontEnd::start(&daemon.socket("disk"), front).unwrap(), options).unwrap()
}

fn child(daemon: &Daemon, kind: Image, n: usize) -> PathBuf {
    daemon.dir().join(format!("child-{n}.{}", kind.name()))
}

/// What is in the images by themselves: the daemon ends cleanly, another one opens them anew and everything is read.
fn compare_cold(daemon: &mut Daemon, mut load: VerifiedLoad) {
    load.verify_all().unwrap();
    let model = load.model;
    drop(load.front);
    for cleanly in [true, false] {
        if cleanly {
            assert!(daemon.terminate().unwrap(), "the daemon failed at its end");
        } else {
            daemon.kill9();
        }
        daemon.restart().unwrap();
        let mut again = start_load(daemon, LoadOptions::new(77, SECTORS));
        again.model = model.clone();
        again.verify_all().unwrap();
    }
}

#[test]
fn guests_notice_nothing_of_snapshots() {
    if is_reference() {
        return;
    }
    for kind in KINDS {
        let mut daemon = Daemon::with_disk(kind, SIZE, 2).unwrap();
        let options =
            LoadOptions { rate: Some(5000.0), depth: 16, max_sectors: 32, ..LoadOptions::new(61, SECTORS) };
        let load = start_load(&daemon, options).spawn();
        load.wait_requests(3000, PATIENCE).unwrap();
        load.mark("snapshots");
        for n in 0..50 {
            let disk = daemon.snapshot("disk", &child(&daemon, kind, n)).unwrap();
            assert_eq!((disk.chain.len(), disk.generation), (n + 2, n as u64 + 1));
            assert_eq!(disk.image, child(&daemon, kind, n).to_string_lossy());
            load.wait_requests(150, PATIENCE).unwrap();
        }
        load.mark("after");
        load.wait_requests(1000, PATIENCE).unwrap();
        let load = load.stop().unwrap();
        for (phase, histogram) in load.phases() {
            println!("{kind:?}, {phase}: {histogram}");
        }
        let disk = daemon.disk("disk").unwrap();
        assert_eq!((disk.errors, disk.failed), (0, None));
        compare_cold(&mut daemon, load);
    }
}

#[test]
fn the_daemons_death_around_snapshots_loses_nothing() {
    if is_reference() {
        return;
    }
    for kind in KINDS {
        let mut random = ChaCha8Rng::seed_from_u64(system_tests::seed(62));
        let mut daemon = Daemon::with_disk(kind, SIZE, 2).unwrap();
        let options = LoadOptions { depth: 16, mix: Mix::ALL, ..LoadOptions::new(63, SECTORS) };
        let load = start_load(&daemon, options).spawn();
        let (mut made, mut interrupted) = (0, 0);
        // How long the daemon lives at most after it was asked, in microseconds: aims at the middle of its work.
        let mut reach = 25_000;
        for n in 0..40 {
            if load.wait_requests(random.random_range(50..300), PATIENCE).is_err() {
                break;
            }
            let (api, to) = (daemon.api(), child(&daemon, kind, n));
            let asked = std::thread::spawn(move || {
                let body = format!("{{\"to\":{:?}}}", to.to_string_lossy());
                system_tests::http::call(&api, "POST", "/v1/disks/disk/snapshot", Some(&body))
            });
            std::thread::sleep(Duration::from_micros(random.random_range(0..reach)));
            daemon.kill9();
            match asked.join().unwrap() {
                Ok((200, _)) => (made, reach) = (made + 1, reach * 2 / 3),
                Ok((status, body)) => panic!("{status}: {body}"),
                Err(_) => (interrupted, reach) = (interrupted + 1, reach * 5 / 4),
            }
            daemon.restart().unwrap();
            let disk = daemon.disk("disk").unwrap();
            assert_eq!(disk.failed, None, "{}", daemon.log_tail());
        }
        let mut load = load.stop().unwrap();
        load.verify_all().unwrap();
        let disk = daemon.disk("disk").unwrap();
        println!(
            "{kind:?}: {made} snapshots answered, {interrupted} interrupted, a chain of {}: {}",
            disk.chain.len(),
            load.counts()
        );
        assert!(interrupted > 0 && disk.chain.len() > 1);
        compare_cold(&mut daemon, load);
    }
}

#[test]
fn what_an_interrupted_attempt_left_is_replaced_and_other_files_are_left_alone() {
    if is_reference() {
        return;
    }
    for kind in KINDS {
        let mut daemon = Daemon::with_disk(kind, SIZE, 2).unwrap();
        let mut load = start_load(&daemon, LoadOptions::new(64, SECTORS));
        load.run_requests(500).unwrap();
        load.drain().unwrap();
        // A death after the new image was made, and before the record names it.
        let record = daemon.dir().join("state/disks/disk.json");
        let before = std::fs::read(&record).unwrap();
        let to = child(&daemon, kind, 0);
        daemon.snapshot("disk", &to).unwrap();
        daemon.kill9();
        std::fs::write(&record, before).unwrap();
        daemon.restart().unwrap();
        load.run_requests(500).unwrap();
        let disk = daemon.snapshot("disk", &to).unwrap();
        assert_eq!(disk.chain.len(), 2);
        load.run_requests(500).unwrap();
        // What holds something is never replaced.
        let error = daemon.snapshot("disk", &to).unwrap_err().to_string();
        assert!(error.contains("exists"), "{error}");
        let foreign = daemon.dir().join(format!("foreign.{}", kind.name()));
        std::fs::write(&foreign, "precious").unwrap();
        daemon.snapshot("disk", &foreign).unwrap_err();
        assert_eq!(std::fs::read(&foreign).unwrap(), b"precious");
        load.run_requests(500).unwrap();
        compare_cold(&mut daemon, load);
    }
}

#[test]
fn the_image_that_was_left_behind_can_be_read_by_others_and_is_what_it_was() {
    if is_reference() {
        return;
    }
    for kind in KINDS {
        let daemon = Daemon::with_disk(kind, SIZE, 2).unwrap();
        let mut load = start_load(&daemon, LoadOptions::new(65, SECTORS));
        load.run_requests(2000).unwrap();
        load.drain().unwrap();
        let then = load.model.clone();
        daemon.snapshot("disk", &child(&daemon, kind, 0)).unwrap();
        load.run_requests(2000).unwrap();
        load.drain().unwrap();
        let (raw, copy) = (daemon.dir().join("then.raw"), daemon.dir().join("then.copy"));
        let parent = &daemon.disks()[0].image;
        // QEMU's tools take a shared lock on the whole file for a writer's.
        std::fs::copy(parent, &copy).unwrap();
        kind.to_raw(&copy, &raw).unwrap();
        then.check_file(&raw).unwrap();
        kind.check(&copy).unwrap();
        assert!(is_readable_with_a_lock(parent));
        assert!(is_locked_for_writing(parent), "nobody may write to a parent");
        load.verify_all().unwrap();
    }
}

/// Whether another process cannot get an exclusive lock.
fn is_locked_for_writing(path: &Path) -> bool {
    !can_lock(path, libc::F_WRLCK)
}

/// Whether another process gets a shared lock.
fn is_readable_with_a_lock(path: &Path) -> bool {
    can_lock(path, libc::F_RDLCK)
}

fn can_lock(path: &Path, how: libc::c_int) -> bool {
    let file = std::fs::File::options().read(true).write(true).open(path).unwrap();
    let whole = libc::flock {
        l_type: how as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_OFD_SETLK(&whole)).is_ok()
}

#[test]
fn a_parent_that_is_cut_short_is_an_error_of_the_request_and_of_nothing_else() {
    if is_reference() {
        return;
    }
    for kind in KINDS {
        let mut daemon = Daemon::with_disk(kind, SIZE, 2).unwrap();
        let mix = Mix { read: 0, write: 1, zero: 0, discard: 0, flush: 0 };
        let mut load = start_load(&daemon, LoadOptions { mix, ..LoadOptions::new(66, SECTORS) });
        load.run_requests(1500).unwrap();
        load.drain().unwrap();
        daemon.snapshot("disk", &child(&daemon, kind, 0)).unwrap();
        let parent = std::fs::File::options().write(true).open(&daemon.disks()[0].image).unwrap();
        parent.set_len(4 << 20).unwrap();
        load.verify_all().unwrap_err();
        assert!(daemon.is_alive());
        let disk = daemon.disk("disk").unwrap();
        assert!(disk.errors > 0 && disk.failed.is_none());
        // The new image takes writes as before.
        let mut fresh = start_load(&daemon, LoadOptions { mix, ..LoadOptions::new(67, SECTORS) });
        drop(load.front);
        fresh.run_requests(500).unwrap();
        fresh.drain().unwrap();
    }
}

/// A guest that writes a MiB at a time, filled with one byte.
struct Filler {
    front: FrontEnd,
    buffer: u64,
}

impl Filler {
    const BYTES: u32 = 1 << 20;
    const SECTORS: u64 = Self::BYTES as u64 / 512;

    fn start(daemon: &Daemon) -> Self {
        let front = FrontEnd::start(&daemon.socket("disk"), Options::default()).unwrap();
        let buffer = front.memory.alloc(0, u64::from(Self::BYTES), 4096);
        Self { front, buffer }
    }

    fn run(&mut self, kind: u32, mib: u64) -> u8 {
        let data = [(self.buffer, Self::BYTES)];
        let data = if kind == FLUSH { &data[..0] } else { &data[..] };
        let sector = if kind == FLUSH { 0 } else { mib * Self::SECTORS };
        self.front.rings[0].run(&Request { kind, sector, data }).status
    }

    fn write(&mut self, mib: u64, value: u8) -> u8 {
        self.front.memory.fill(self.buffer, Self::BYTES as usize, value);
        self.run(WRITE, mib)
    }

    /// Every sector is one of these values throughout.
    fn expect(&mut self, mib: u64, allowed: &[u8]) {
        assert_eq!(self.run(READ, mib), OK);
        let mut bytes = vec![0; Self::BYTES as usize];
        self.front.memory.read(self.buffer, &mut bytes);
        for sector in bytes.chunks(512) {
            assert!(allowed.contains(&sector[0]) && sector.iter().all(|b| *b == sector[0]), "MiB {mib}");
        }
    }
}

#[test]
fn a_new_image_without_space_fails_writes_and_neither_loses_nor_mixes_anything() {
    if is_reference() {
        return;
    }
    for kind in KINDS {
        let mut daemon = Daemon::with_disk(kind, SIZE, 1).unwrap();
        let place = daemon.dir().join("small");
        std::fs::create_dir(&place).unwrap();
        let Some(_mount) = Tmpfs::mount(&place, 48 << 20) else { return };
        let mut guest = Filler::start(&daemon);
        let mibs = SIZE >> 20;
        for mib in 0..mibs {
            assert_eq!(guest.write(mib, 0x11), OK);
        }
        daemon.snapshot("disk", &place.join(format!("child.{}", kind.name()))).unwrap();
        let hog = place.join("hog");
        std::fs::write(&hog, vec![1; 24 << 20]).unwrap();
        let mut written = Vec::new();
        for mib in (0..mibs).step_by(2) {
            match guest.write(mib, 0x22) {
                OK => written.push(mib),
                IO_ERROR => break,
                other => panic!("status {other}"),
            }
        }
        println!("{kind:?}: {} MiB fitted", written.len());
        assert!(!written.is_empty() && written.len() < mibs as usize / 2);
        let check = |guest: &mut Filler| {
            for mib in 0..mibs {
                let failed = written.last().is_some_and(|last| mib == last + 2);
                match (written.contains(&mib), failed) {
                    (true, _) => guest.expect(mib, &[0x22]),
                    (false, true) => guest.expect(mib, &[0x11, 0x22]),
                    (false, false) => guest.expect(mib, &[0x11]),
                }
            }
        };
        check(&mut guest);
        drop(guest);
        // Killed on the full file system, and back once there is room: applying a log may need some.
        daemon.kill9();
        std::fs::remove_file(&hog).unwrap();
        daemon.restart().unwrap();
        let mut guest = Filler::start(&daemon);
        check(&mut guest);
        let next = written.last().unwrap() + 2;
        assert_eq!((guest.write(next, 0x33), guest.run(FLUSH, 0)), (OK, OK), "there is room again");
        guest.expect(next, &[0x33]);
        assert_eq!(daemon.disk("disk").unwrap().failed, None);
        drop(guest);
        assert!(daemon.terminate().unwrap(), "the daemon failed at its end");
    }
}

/// A file system in memory with a size, mounted until this is dropped.
struct Tmpfs(PathBuf);

impl Tmpfs {
    fn mount(at: &Path, size: u64) -> Option<Self> {
        let output = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"])
            .arg(at)
            .output();
        match output {
            Ok(output) if output.status.success() => Some(Self(at.to_owned())),
            other => {
                eprintln!("SKIPPED: a small file system can't be mounted (are you root?): {other:?}");
                None
            }
        }
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg("-l").arg(&self.0).status();
    }
}
