//! Disks are moved while a verified load runs on them.
//!
//! Whatever happens to a move, every sector holds what was acknowledged; when it is done the target, read by another
//! program, holds the same.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use blockd_api::{Job, JobSettings, MoveRequest};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use system_tests::PATIENCE;
use system_tests::daemon::{DiskSpec, Program, in_memory};
use system_tests::{Daemon, FrontEnd, Image, LoadOptions, Options, RunningLoad, VerifiedLoad};

const SIZE: u64 = 64 << 20;
const SECTORS: u64 = SIZE / 512;

/// The reference has another way of moving.
fn is_reference() -> bool {
    let is = Daemon::program() == Program::Reference;
    if is {
        println!("SKIPPED: the reference has another way of moving");
    }
    is
}

/// A daemon, its disk, and a load on it that has already written to much of it.
struct Bench {
    daemon: Daemon,
    kind: Image,
    moves: u32,
}

impl Bench {
    fn new(kind: Image) -> Self {
        Self::new_in(&std::env::temp_dir(), kind)
    }

    fn new_in(folder: &Path, kind: Image) -> Self {
        Self { daemon: Daemon::with_disk_in(folder, kind, SIZE, 2).unwrap(), kind, moves: 0 }
    }

    fn load(&self, seed: u64) -> RunningLoad {
        self.load_with(LoadOptions { depth: 8, ..LoadOptions::new(seed, SECTORS) })
    }

    fn load_with(&self, options: LoadOptions) -> RunningLoad {
        let front = Options { queues: 2, ..Options::default() };
        let front = FrontEnd::start(&self.daemon.socket("disk"), front).unwrap();
        let mut load = VerifiedLoad::new(front, options).unwrap();
        load.run_requests(1500).unwrap();
        load.spawn()
    }

    /// A new place for the disk in this format.
    fn place(&mut self, kind: Image) -> PathBuf {
        self.moves += 1;
        self.daemon.dir().join(format!("moved-{}.{}", self.moves, kind.name()))
    }

    fn request(&mut self, kind: Image, change: impl FnOnce(&mut MoveRequest)) -> MoveRequest {
        let mut request = MoveRequest {
            disks: vec!["disk".into()],
            to: self.place(kind).display().to_string(),
            format: Some(kind.name().into()),
            image_type: (kind != Image::Raw).then(|| kind.layout().into()),
            block_size: None,
            mirror: "after-copy".into(),
            switch: "auto".into(),
            verify: "full".into(),
            bandwidth: None,
            max_guest_p99_us: None,
            keep_source: false,
            copy_only: false,
            flatten: false,
            files: Vec::new(),
            on_target_error: "pause".into(),
        };
        change(&mut request);
        request
    }

    fn image(&self) -> PathBuf {
        self.daemon.disk("disk").unwrap().image.into()
    }

    fn wait(&self, job: &Job, what: impl Fn(&Job) -> bool) -> Job {
        self.daemon.wait_job(&job.job, PATIENCE, what).unwrap()
    }

    fn wait_done(&self, job: &Job) -> Job {
        let done = self.wait(job, |job| job.state == "done");
        assert!(done.error.is_none(), "{done:?}");
        done
    }

    /// Ends the load, reads the whole disk, ends the daemon, and compares the image.
    fn finish(&mut self, load: RunningLoad, kind: Image) -> VerifiedLoad {
        let mut load = load.stop().unwrap();
        load.verify_all().unwrap();
        let image = self.image();
        assert!(self.daemon.terminate().unwrap(), "the daemon failed at its end");
        compare(&load, kind, &image);
        load
    }
}

fn compare(load: &VerifiedLoad, kind: Image, image: &Path) {
    let raw = image.with_extension("copy");
    kind.to_raw(image, &raw).unwrap();
    load.check_file(&raw).unwrap();
    kind.check(image).unwrap();
    std::fs::remove_file(raw).unwrap();
}

fn leftovers(dir: &Path) -> Vec<String> {
    let names =
        std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.contains("incomplete")).collect()
}

fn move_there_and_on(from: Image, mirror: &str) {
    if is_reference() {
        return;
    }
    for to in Image::formats() {
        let mut bench = Bench::new(from);
        let load = bench.load(41);
        let source = bench.image();
        let request = bench.request(to, |r| r.mirror = mirror.into());
        let start = Instant::now();
        load.mark("move");
        let job = bench.daemon.start_move(&request).unwrap();
        let job = bench.wait_done(&job);
        load.mark("after");
        let took = start.elapsed();
        load.wait_requests(500, PATIENCE).unwrap();
        assert_eq!(bench.image(), Path::new(&request.to));
        assert!(job.source_deleted && !source.exists(), "the source is deleted");
        assert_eq!(job.verified, "full");
        assert!(leftovers(bench.daemon.dir()).is_empty());
        let load = bench.finish(load, to);
        println!(
            "{from:?} to {to:?}, mirror {mirror}: {took:.1?}, {} MiB copied, {} KiB mirrored, {} passes; during the \
             move {}",
            job.bytes_copied >> 20,
            job.bytes_mirrored >> 10,
            job.passes,
            load.phases()[1].1
        );
    }
}

#[test]
fn a_raw_disk_moves_to_every_format() {
    move_there_and_on(Image::Raw, "after-copy");
}

#[test]
fn a_raw_disk_moves_to_every_format_mirrored_from_the_start() {
    move_there_and_on(Image::Raw, "from-start");
}

#[test]
fn a_vhd_moves_to_every_format() {
    move_there_and_on(Image::DynamicVhd, "after-copy");
}

#[test]
fn a_vhd_moves_to_every_format_mirrored_from_the_start() {
    move_there_and_on(Image::DynamicVhd, "from-start");
}

#[test]
fn a_vhdx_moves_to_every_format() {
    move_there_and_on(Image::DynamicVhdx, "after-copy");
}

#[test]
fn a_vhdx_moves_to_every_format_mirrored_from_the_start() {
    move_there_and_on(Image::DynamicVhdx, "from-start");
}

#[test]
fn fixed_images_move_too() {
    if is_reference() {
        return;
    }
    for (from, to) in [(Image::FixedVhd, Image::FixedVhdx), (Image::FixedVhdx, Image::FixedVhd)] {
        if !Image::formats().iter().any(|f| f.name() == "vhdx") {
            continue;
        }
        let mut bench = Bench::new(from);
        let load = bench.load(42);
        let request = bench.request(to, |_| ());
        let job = bench.daemon.start_move(&request).unwrap();
        bench.wait_done(&job);
        load.wait_requests(300, PATIENCE).unwrap();
        bench.finish(load, to);
    }
}

#[test]
fn a_manual_switch_waits_until_it_is_told() {
    if is_reference() {
        return;
    }
    for mirror in ["after-copy", "from-start"] {
        let mut bench = Bench::new(Image::Raw);
        let load = bench.load(43);
        let source = bench.image();
        let request = bench.request(Image::DynamicVhd, |r| {
            r.switch = "manual".into();
            r.mirror = mirror.into();
        });
        let job = bench.daemon.start_move(&request).unwrap();
        bench.wait(&job, |job| job.state == "synced");
        load.wait_requests(2000, PATIENCE).unwrap();
        let waiting = bench.daemon.job(&job.job).unwrap();
        assert_eq!(waiting.state, "synced", "{waiting:?}");
        assert_eq!(bench.image(), source, "the source is the disk until the switch");
        bench.daemon.job_verb(&job.job, "switch").unwrap();
        let job = bench.wait_done(&job);
        assert_eq!(bench.image(), Path::new(&request.to));
        load.wait_requests(500, PATIENCE).unwrap();
        let load = bench.finish(load, Image::DynamicVhd);
        println!("switched by hand, mirror {mirror}: {:?}; {}", job.switch, load.counts());
    }
}

#[test]
fn a_move_pauses_resumes_and_keeps_to_its_bandwidth() {
    if is_reference() {
        return;
    }
    let mut bench = Bench::new(Image::Raw);
    let load = bench.load(44);
    let request = bench.request(Image::DynamicVhd, |r| r.bandwidth = Some(4 << 20));
    let job = bench.daemon.start_move(&request).unwrap();
    bench.wait(&job, |job| job.bytes_copied > 2 << 20);
    let (from, start) = (bench.daemon.job(&job.job).unwrap().bytes_copied, Instant::now());
    std::thread::sleep(Duration::from_secs(2));
    let copied = bench.daemon.job(&job.job).unwrap().bytes_copied - from;
    let rate = copied as f64 / start.elapsed().as_secs_f64() / f64::from(1 << 20);
    println!("4 MiB/s asked for, {rate:.1} MiB/s measured");
    assert!((2.0..6.0).contains(&rate), "{rate} MiB/s");
    bench.daemon.job_verb(&job.job, "pause").unwrap();
    bench.wait(&job, |job| job.state == "paused");
    std::thread::sleep(Duration::from_millis(300));
    let before = bench.daemon.job(&job.job).unwrap().bytes_copied;
    load.wait_requests(500, PATIENCE).unwrap();
    assert_eq!(bench.daemon.job(&job.job).unwrap().bytes_copied, before, "nothing is copied while paused");
    bench.daemon.job_verb(&job.job, "resume").unwrap();
    let settings = JobSettings { bandwidth: Some(0), ..JobSettings::default() };
    let _: Job = bench.daemon.call("PATCH", &format!("/v1/jobs/{}", job.job), Some(&settings)).unwrap();
    let start = Instant::now();
    bench.wait_done(&job);
    println!("without a limit it took {:.1?} more", start.elapsed());
    load.wait_requests(300, PATIENCE).unwrap();
    bench.finish(load, Image::DynamicVhd);
}

#[test]
fn a_cancelled_move_leaves_the_source_and_no_trace_and_the_next_one_succeeds() {
    if is_reference() {
        return;
    }
    let mut bench = Bench::new(Image::DynamicVhd);
    let load = bench.load(45);
    let source = bench.image();
    for mirror in ["after-copy", "from-start"] {
        for synced in [false, true] {
            let request = bench.request(Image::Raw, |r| {
                r.mirror = mirror.into();
                r.switch = "manual".into();
                r.bandwidth = (!synced).then_some(4 << 20);
            });
            let job = bench.daemon.start_move(&request).unwrap();
            bench.wait(&job, |job| if synced { job.state == "synced" } else { job.bytes_copied > 1 << 20 });
            load.wait_requests(200, PATIENCE).unwrap();
            bench.daemon.job_verb(&job.job, "cancel").unwrap();
            let ended = bench.wait(&job, Job::is_over);
            assert_eq!(ended.state, "cancelled", "{ended:?}");
            assert_eq!(bench.image(), source);
            assert!(!Path::new(&request.to).exists() && leftovers(bench.daemon.dir()).is_empty());
            load.wait_requests(200, PATIENCE).unwrap();
        }
    }
    let request = bench.request(Image::Raw, |_| ());
    let job = bench.daemon.start_move(&request).unwrap();
    bench.wait_done(&job);
    load.wait_requests(200, PATIENCE).unwrap();
    let load = bench.finish(load, Image::Raw);
    println!("4 cancelled, the fifth done; {}", load.counts());
}

#[test]
fn a_disk_moves_again_and_again() {
    if is_reference() {
        return;
    }
    let mut bench = Bench::new(Image::Raw);
    let load = bench.load(46);
    let generation = bench.daemon.disk("disk").unwrap().generation;
    let mut to = Image::Raw;
    let formats = Image::formats();
    for round in 0..6 {
        to = formats[(round + 1) % formats.len()];
        let request = bench.request(to, |r| r.mirror = ["after-copy", "from-start"][round % 2].into());
        let job = bench.daemon.start_move(&request).unwrap();
        bench.wait_done(&job);
        load.wait_requests(200, PATIENCE).unwrap();
    }
    assert_eq!(
        bench.daemon.disk("disk").unwrap().generation,
        generation + 6,
        "each move counts the generation up"
    );
    let load = bench.finish(load, to);
    println!("6 moves; {}", load.counts());
}

#[test]
fn a_kept_source_stays_as_it_was_at_the_switch() {
    if is_reference() {
        return;
    }
    let mut bench = Bench::new(Image::Raw);
    let load = bench.load(47);
    let source = bench.image();
    // Nothing is written from before the switch on, so what the source holds is known.
    let mut load = load.stop().unwrap();
    let request = bench.request(Image::DynamicVhd, |r| r.keep_source = true);
    let job = bench.daemon.start_move(&request).unwrap();
    let job = bench.wait_done(&job);
    assert!(!job.source_deleted && source.exists());
    let before = load.model.clone();
    load.run_requests(1000).unwrap();
    load.verify_all().unwrap();
    before.check_file(&source).unwrap();
    bench.finish(load.spawn(), Image::DynamicVhd);
}

#[test]
fn of_a_source_that_is_a_symbolic_link_the_file_is_deleted_and_not_only_the_link() {
    if is_reference() {
        return;
    }
    let dir = tempfile::Builder::new().prefix("blockd-test-").tempdir().unwrap();
    let mut disk = DiskSpec::create(dir.path(), "disk", Image::DynamicVhdx, SIZE, 2).unwrap();
    let (file, link) = (disk.image.clone(), dir.path().join("link.vhdx"));
    std::os::unix::fs::symlink(&file, &link).unwrap();
    disk.image.clone_from(&link);
    let daemon = Daemon::start(dir.path(), vec![disk]).unwrap();
    let mut bench = Bench { daemon, kind: Image::DynamicVhdx, moves: 0 };
    let load = bench.load(48);
    let request = bench.request(Image::DynamicVhdx, |_| {});
    let job = bench.wait_done(&bench.daemon.start_move(&request).unwrap());
    assert!(job.source_deleted && !file.exists() && !link.is_symlink(), "{job:?}");
    bench.finish(load, Image::DynamicVhdx);
}

#[test]
fn a_disk_moves_out_of_memory_and_back() {
    let Some(memory) = in_memory() else { return };
    if is_reference() {
        return;
    }
    for (from, to) in [(Image::Raw, Image::DynamicVhdx), (Image::DynamicVhd, Image::Raw)] {
        let mut bench = Bench::new(from);
        let load = bench.load(49);
        let elsewhere = tempfile::Builder::new().prefix("blockd-test-").tempdir_in(memory).unwrap();
        let there = elsewhere.path().join(format!("there.{}", to.name()));
        for mirror in ["after-copy", "from-start"] {
            let request = bench.request(to, |r| {
                r.to = there.display().to_string();
                r.mirror = mirror.into();
            });
            bench.wait_done(&bench.daemon.start_move(&request).unwrap());
            load.wait_requests(500, PATIENCE).unwrap();
            let back = bench.request(to, |r| r.mirror = mirror.into());
            bench.wait_done(&bench.daemon.start_move(&back).unwrap());
            load.wait_requests(500, PATIENCE).unwrap();
        }
        bench.finish(load, to);
    }
}

#[test]
fn disks_in_memory_move() {
    let Some(memory) = in_memory() else { return };
    if is_reference() {
        return;
    }
    for kind in Image::formats() {
        let mut bench = Bench::new_in(memory, kind);
        let load = bench.load(50);
        for to in Image::formats() {
            let request = bench.request(to, |_| {});
            bench.wait_done(&bench.daemon.start_move(&request).unwrap());
        }
        let last = *Image::formats().last().unwrap();
        bench.finish(load, last);
    }
}

#[test]
fn a_copy_is_of_one_point_in_time_and_the_disk_stays() {
    if is_reference() {
        return;
    }
    for mirror in ["after-copy", "from-start"] {
        let mut bench = Bench::new(Image::DynamicVhd);
        let load = bench.load(48);
        let source = bench.image();
        let request = bench.request(Image::Raw, |r| {
            r.copy_only = true;
            r.switch = "manual".into();
            r.mirror = mirror.into();
        });
        let job = bench.daemon.start_move(&request).unwrap();
        bench.wait(&job, |job| job.state == "synced");
        load.wait_requests(300, PATIENCE).unwrap();
        // The moment: nothing is in flight, so the copy has to hold exactly this.
        let mut load = load.stop().unwrap();
        bench.daemon.job_verb(&job.job, "switch").unwrap();
        bench.wait_done(&job);
        let then = load.model.clone();
        load.run_requests(1000).unwrap();
        then.check_file(Path::new(&request.to)).unwrap();
        assert_eq!(bench.image(), source);
        let load = bench.finish(load.spawn(), Image::DynamicVhd);
        println!("copied, mirror {mirror}; {}", load.counts());
    }
}

#[test]
fn a_copy_that_ends_by_itself_mixes_no_times() {
    if is_reference() {
        return;
    }
    let mut bench = Bench::new(Image::Raw);
    let options = LoadOptions { depth: 8, history: true, ..LoadOptions::new(49, SECTORS) };
    let load = bench.load_with(options);
    for round in 0..5 {
        let request = bench.request(Image::Raw, |r| {
            r.copy_only = true;
            r.mirror = ["after-copy", "from-start"][round % 2].into();
        });
        let job = bench.daemon.start_move(&request).unwrap();
        bench.wait_done(&job);
        load.wait_requests(300, PATIENCE).unwrap();
    }
    let mut load = load.stop().unwrap();
    load.verify_all().unwrap();
    for copy in 1..=5 {
        let path = bench.daemon.dir().join(format!("moved-{copy}.raw"));
        let writes = load.model.check_copy(&path).unwrap();
        println!("copy {copy} holds the disk between {writes:?} of its writes");
    }
}

#[test]
fn a_target_without_space_pauses_the_move_and_not_the_guest() {
    if is_reference() {
        return;
    }
    let mut bench = Bench::new(Image::Raw);
    let place = bench.daemon.dir().join("small");
    std::fs::create_dir(&place).unwrap();
    let Some(_mount) = Tmpfs::mount(&place, 100 << 20) else { return };
    let load = bench.load(51);
    let source = bench.image();
    for to in Image::formats() {
        let target = place.join(format!("disk.{}", to.name()));
        let request = bench.request(to, |r| {
            r.to = target.display().to_string();
            r.bandwidth = Some(16 << 20);
        });
        let job = bench.daemon.start_move(&request).unwrap();
        bench.wait(&job, |job| job.bytes_copied > 1 << 20);
        // Somebody else takes the space that the plan had counted on.
        let hog = place.join("hog");
        let _ = std::fs::write(&hog, vec![1; 99 << 20]);
        let paused = bench.wait(&job, |job| job.state == "paused");
        let error = paused.error.clone().expect("a reason");
        println!("{to:?}: paused: {}: {}", error.kind, error.message);
        assert_eq!(error.kind, "no-space");
        assert_eq!(bench.image(), source);
        load.wait_requests(500, PATIENCE).unwrap();
        std::fs::remove_file(&hog).unwrap();
        bench.daemon.job_verb(&job.job, "resume").unwrap();
        let settings = JobSettings { bandwidth: Some(0), ..JobSettings::default() };
        let _: Job = bench.daemon.call("PATCH", &format!("/v1/jobs/{}", job.job), Some(&settings)).unwrap();
        bench.wait_done(&job);
        load.wait_requests(200, PATIENCE).unwrap();
        // Back to where there is room, for the next format.
        let request = bench.request(Image::Raw, |r| r.to = source.display().to_string());
        let job = bench.daemon.start_move(&request).unwrap();
        bench.wait_done(&job);
    }
    let load = bench.finish(load, Image::Raw);
    println!("{}", load.counts());
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

/// Kills the daemon at random moments of moves to and fro.
fn survive_kills(formats: [Image; 2], mirror: &str, rounds: u64) {
    if is_reference() {
        return;
    }
    let mut random = ChaCha8Rng::seed_from_u64(system_tests::seed(rounds));
    let mut bench = Bench::new(formats[0]);
    let load = bench.load(52);
    let (mut kills, mut at) = (0, 0);
    let mut killed_in: std::collections::BTreeMap<String, u32> = Default::default();
    for round in 0..rounds {
        let to = 1 - at;
        let request = bench.request(formats[to], |r| {
            r.mirror = mirror.into();
            r.bandwidth = Some(128 << 20);
        });
        let job = bench.daemon.start_move(&request).unwrap();
        for _ in 0..1 + round % 2 {
            std::thread::sleep(Duration::from_micros(random.random_range(0..900_000)));
            let state = bench.daemon.job(&job.job).unwrap().state;
            *killed_in.entry(state).or_default() += 1;
            bench.daemon.kill9();
            kills += 1;
            bench.daemon.restart().unwrap();
            if load.wait_reconnects(kills, PATIENCE).is_err() {
                load.stop().unwrap();
                unreachable!("the load had failed");
            }
        }
        let ended = bench.wait(&job, Job::is_over);
        assert_eq!(ended.state, "done", "the move goes on after the restart: {ended:?}");
        at = to;
        assert_eq!(bench.image(), Path::new(&request.to));
        assert!(leftovers(bench.daemon.dir()).is_empty());
        load.wait_requests(100, PATIENCE).unwrap();
    }
    let load = bench.finish(load, formats[at]);
    println!("{rounds} moves, killed in {killed_in:?}, mirror {mirror}: {}", load.counts());
}

#[test]
fn the_daemons_death_during_moves_between_raw_and_vhd_loses_nothing() {
    survive_kills([Image::Raw, Image::DynamicVhd], "after-copy", 10);
}

#[test]
fn the_daemons_death_during_mirrored_moves_between_raw_and_vhd_loses_nothing() {
    survive_kills([Image::DynamicVhd, Image::Raw], "from-start", 10);
}

#[test]
fn the_daemons_death_during_moves_between_vhd_and_vhdx_loses_nothing() {
    survive_kills([Image::DynamicVhd, Image::DynamicVhdx], "after-copy", 10);
}

#[test]
fn the_daemons_death_during_mirrored_moves_between_vhdx_and_vhdx_loses_nothing() {
    survive_kills([Image::DynamicVhdx, Image::DynamicVhdx], "from-start", 10);
}

#[test]
fn front_ends_come_and_go_while_a_disk_moves() {
    if is_reference() {
        return;
    }
    for mirror in ["after-copy", "from-start"] {
        let mut bench = Bench::new(Image::DynamicVhd);
        let mut load = bench.load(55).stop().unwrap();
        let request = bench.request(Image::Raw, |r| {
            r.mirror = mirror.into();
            r.bandwidth = Some(48 << 20);
        });
        let job = bench.daemon.start_move(&request).unwrap();
        let (mut rounds, mut stops) = (0, 0);
        let until = Instant::now() + PATIENCE;
        while !bench.daemon.job(&job.job).unwrap().is_over() {
            assert!(Instant::now() < until, "the move does not end");
            load.run_requests(150).unwrap();
            if rounds % 3 == 0 {
                load.front.vanish();
            } else {
                let queue = rounds % 2;
                let base = load.front.stop_ring(queue).unwrap();
                load.front.start_ring(queue, base).unwrap();
                stops += 1;
            }
            rounds += 1;
        }
        bench.wait_done(&job);
        println!("{stops} stops of rings, mirror {mirror}: {}", load.counts());
        bench.finish(load.spawn(), Image::Raw);
    }
}

#[test]
fn a_daemon_that_is_asked_to_end_goes_on_with_its_move_when_it_is_back() {
    if is_reference() {
        return;
    }
    for mirror in ["after-copy", "from-start"] {
        let mut bench = Bench::new(Image::Raw);
        let load = bench.load(56);
        let request = bench.request(Image::DynamicVhd, |r| {
            r.mirror = mirror.into();
            r.bandwidth = Some(24 << 20);
        });
        let job = bench.daemon.start_move(&request).unwrap();
        for end in 1..=3 {
            load.wait_requests(300, PATIENCE).unwrap();
            assert!(bench.daemon.terminate().unwrap(), "the daemon failed at its end");
            bench.daemon.restart().unwrap();
            load.wait_reconnects(end, PATIENCE).unwrap();
        }
        bench.wait_done(&job);
        load.wait_requests(100, PATIENCE).unwrap();
        let load = bench.finish(load, Image::DynamicVhd);
        println!("3 ends during a move, mirror {mirror}: {}", load.counts());
    }
}

#[test]
fn a_paused_move_survives_the_daemons_death() {
    if is_reference() {
        return;
    }
    let mut bench = Bench::new(Image::Raw);
    let load = bench.load(57);
    let source = bench.image();
    let request = bench.request(Image::DynamicVhd, |r| r.bandwidth = Some(4 << 20));
    let job = bench.daemon.start_move(&request).unwrap();
    bench.wait(&job, |job| job.bytes_copied > 1 << 20);
    bench.daemon.job_verb(&job.job, "pause").unwrap();
    bench.wait(&job, |job| job.state == "paused");
    bench.daemon.kill9();
    bench.daemon.restart().unwrap();
    load.wait_reconnects(1, PATIENCE).unwrap();
    load.wait_requests(300, PATIENCE).unwrap();
    let after = bench.daemon.job(&job.job).unwrap();
    println!("after the restart it is {}", after.state);
    assert_eq!(bench.image(), source);
    if after.state == "paused" {
        bench.daemon.job_verb(&job.job, "resume").unwrap();
    }
    let settings = JobSettings { bandwidth: Some(0), ..JobSettings::default() };
    let _: Job = bench.daemon.call("PATCH", &format!("/v1/jobs/{}", job.job), Some(&settings)).unwrap();
    bench.wait_done(&job);
    bench.finish(load, Image::DynamicVhd);
}

#[test]
fn what_the_source_does_not_hold_takes_no_space_on_the_target() {
    if is_reference() {
        return;
    }
    const BIG: u64 = 2 << 30;
    for from in Image::formats() {
        for to in Image::formats() {
            let dir = tempfile::Builder::new().prefix("blockd-test-").tempdir().unwrap();
            let disk = DiskSpec::create(dir.path(), "disk", from, BIG, 1).unwrap();
            let daemon = Daemon::start(dir.path(), vec![disk]).unwrap();
            let mut bench = Bench { daemon, kind: from, moves: 0 };
            // 8 MiB of data in the middle, and some of it zeroed again.
            let range = (BIG / 1024)..(BIG / 1024) + (8 << 11);
            let front = FrontEnd::start(&bench.daemon.socket("disk"), Options::default()).unwrap();
            let mut load =
                VerifiedLoad::new(front, LoadOptions { range, ..LoadOptions::new(53, BIG / 512) }).unwrap();
            load.run_requests(500).unwrap();
            let running = load.spawn();
            let request = bench.request(to, |_| ());
            let start = Instant::now();
            let job = bench.daemon.start_move(&request).unwrap();
            let job = bench.wait_done(&job);
            let took = start.elapsed();
            let load = running.stop().unwrap();
            let taken = std::fs::metadata(&request.to).unwrap().blocks() * 512;
            println!(
                "{:?} to {to:?}: {} KiB of {} MiB taken, {} MiB copied, {took:.1?}; {}",
                bench.kind,
                taken >> 10,
                BIG >> 20,
                job.bytes_copied >> 20,
                load.counts()
            );
            assert!(taken < 24 << 20, "{} MiB were taken for 8 MiB of data", taken >> 20);
            assert!(job.bytes_copied < 256 << 20, "{} MiB were copied", job.bytes_copied >> 20);
        }
    }
}

#[test]
fn a_move_that_cannot_be_made_is_refused_at_once_and_says_why() {
    if is_reference() {
        return;
    }
    let mut bench = Bench::new(Image::Raw);
    let load = bench.load(54);
    let taken = bench.daemon.dir().join("taken.raw");
    std::fs::write(&taken, b"precious").unwrap();
    let here = bench.image();
    type Change<'a> = &'a dyn Fn(&mut MoveRequest);
    let tries: [(&str, Change<'_>); 6] = [
        ("exists", &|r| r.to = taken.display().to_string()),
        ("exists", &|r| r.to = here.display().to_string()),
        ("not-found", &|r| r.to = "/no/such/folder/disk.raw".into()),
        ("not-found", &|r| r.disks = vec!["nobody".into()]),
        ("invalid", &|r| r.mirror = "sideways".into()),
        ("invalid", &|r| r.to = "relative.raw".into()),
    ];
    for (kind, change) in tries {
        let request = bench.request(Image::Raw, change);
        let answer: Result<Job, _> = bench.daemon.try_call("POST", "/v1/moves", Some(&request)).unwrap();
        let refusal = answer.expect_err("refused").error;
        println!("{}: {}", refusal.kind, refusal.message);
        assert_eq!(refusal.kind, kind, "{}", refusal.message);
    }
    assert_eq!(std::fs::read(&taken).unwrap(), b"precious");
    let first = bench.request(Image::Raw, |r| r.switch = "manual".into());
    let job = bench.daemon.start_move(&first).unwrap();
    let second = bench.request(Image::Raw, |_| ());
    let answer: Result<Job, _> = bench.daemon.try_call("POST", "/v1/moves", Some(&second)).unwrap();
    assert_eq!(answer.expect_err("one move at a time").error.kind, "busy");
    bench.daemon.job_verb(&job.job, "cancel").unwrap();
    bench.wait(&job, Job::is_over);
    bench.finish(load, Image::Raw);
}
