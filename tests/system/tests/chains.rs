//! Chains of differencing images under a verified load: merged, moved with all their images, made one image.
//!
//! Whatever happens, every sector holds what was acknowledged; at the end the files, read by the library alone, hold the
//! same.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Duration;

use blockd_api::{
    DiskInfo, FilePlace, Job, MergeRequest, MoveRequest, ResizeRequest, Resized, SnapshotRequest,
};
use formats::{CreateOptions, Format, OpenOptions};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use system_tests::PATIENCE;
use system_tests::daemon::Program;
use system_tests::{Daemon, FrontEnd, Image, LoadOptions, Options, RunningLoad, VerifiedLoad};

const SIZE: u64 = 64 << 20;
const SECTORS: u64 = SIZE / 512;

/// The reference knows no chains.
fn is_reference() -> bool {
    let is = Daemon::program() == Program::Reference;
    if is {
        println!("SKIPPED: the reference knows no chains");
    }
    is
}

struct Bench {
    daemon: Daemon,
    kind: Image,
    files: u32,
}

impl Bench {
    fn new(kind: Image) -> Self {
        Self { daemon: Daemon::with_disk(kind, SIZE, 2).unwrap(), kind, files: 0 }
    }

    fn load(&self, seed: u64) -> RunningLoad {
        let options = LoadOptions { depth: 8, ..LoadOptions::new(seed, SECTORS) };
        let front = Options { queues: 2, ..Options::default() };
        let front = FrontEnd::start(&self.daemon.socket("disk"), front).unwrap();
        let mut load = VerifiedLoad::new(front, options).unwrap();
        load.run_requests(1000).unwrap();
        load.spawn()
    }

    /// A disk whose chain has so many images, each with some of what was written.
    fn with_chain(kind: Image, images: u32, seed: u64) -> (Self, RunningLoad) {
        let mut bench = Self::new(kind);
        let load = bench.load(seed);
        for _ in 1..images {
            bench.snapshot();
            load.wait_requests(300, PATIENCE).unwrap();
        }
        assert_eq!(bench.chain().len(), images as usize);
        (bench, load)
    }

    fn disk(&self) -> DiskInfo {
        self.daemon.disk("disk").unwrap()
    }

    fn chain(&self) -> Vec<PathBuf> {
        self.disk().chain.into_iter().map(PathBuf::from).collect()
    }

    fn snapshot(&mut self) {
        self.files += 1;
        let name = format!("snapshot-{}.{}", self.files, self.kind.name());
        let to = self.daemon.dir().join(name).display().to_string();
        let _: DiskInfo =
            self.daemon.call("POST", "/v1/disks/disk/snapshot", Some(&SnapshotRequest { to })).unwrap();
    }

    fn merge(&self, into: Option<&Path>) -> Job {
        let request = MergeRequest {
            into: into.map(|path| path.display().to_string()),
            bandwidth: None,
            max_guest_p99_us: None,
            verify: "full".into(),
        };
        self.daemon.call("POST", "/v1/disks/disk/merge", Some(&request)).unwrap()
    }

    fn folder(&mut self) -> PathBuf {
        self.files += 1;
        let folder = self.daemon.dir().join(format!("folder-{}", self.files));
        std::fs::create_dir(&folder).unwrap();
        folder
    }

    fn request(&self, to: &Path, format: Image, change: impl FnOnce(&mut MoveRequest)) -> MoveRequest {
        let json = serde_json::json!({ "disks": ["disk"], "to": to, "format": format.name() });
        let mut request = serde_json::from_value(json).unwrap();
        change(&mut request);
        request
    }

    fn done(&self, job: &Job) -> Job {
        let done = self.daemon.wait_job(&job.job, PATIENCE, |job| job.state == "done").unwrap();
        assert!(done.error.is_none(), "{done:?}");
        done
    }

    /// Ends the load, reads the whole disk, ends the daemon, and reads the files.
    fn finish(mut self, load: RunningLoad) -> VerifiedLoad {
        let mut load = load.stop().unwrap();
        load.verify_all().unwrap();
        let chain = self.chain();
        assert!(self.daemon.terminate().unwrap(), "the daemon failed at its end");
        assert!(leftovers(self.daemon.dir()).is_empty());
        check_files(&load, &chain, &self.daemon.dir().join("content"));
        load
    }
}

/// Reads the chain without the daemon, and checks each of its files.
fn check_files(load: &VerifiedLoad, chain: &[PathBuf], raw: &Path) {
    let options = OpenOptions { parents: chain[1..].to_vec(), ..OpenOptions::read_only() };
    let image = formats::open(&chain[0], &options).unwrap();
    assert_eq!(image.as_chain().map_or(1, |c| c.layers().len()), chain.len());
    formats::create(raw, &CreateOptions::new(Format::Raw, SIZE)).unwrap();
    let copy =
        formats::open(raw, &OpenOptions { format: Some(Format::Raw), ..OpenOptions::default() }).unwrap();
    formats::copy(&*image, &*copy, &mut |_| ControlFlow::Continue(())).unwrap();
    copy.close().unwrap();
    load.check_file(raw).unwrap();
    std::fs::remove_file(raw).unwrap();
    drop(image);
    for file in chain {
        let report = formats::check(file, None, false).unwrap();
        assert!(report.is_sound(), "{}: {:?}", file.display(), report.findings);
    }
}

fn leftovers(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    entries.filter(|path| path.display().to_string().contains("incomplete")).collect()
}

fn formats_with_chains() -> impl Iterator<Item = Image> {
    [Image::DynamicVhd, Image::DynamicVhdx].into_iter()
}

#[test]
fn the_newest_image_is_merged_into_its_parent_while_the_guest_writes() {
    if is_reference() {
        return;
    }
    for kind in formats_with_chains() {
        let (bench, load) = Bench::with_chain(kind, 3, 61);
        let before = bench.chain();
        let job = bench.done(&bench.merge(None));
        assert!(job.source_deleted && !before[0].exists());
        assert_eq!(
            (bench.chain(), job.target[0].as_str()),
            (before[1..].to_vec(), before[1].to_str().unwrap())
        );
        load.wait_requests(500, PATIENCE).unwrap();
        let again = bench.done(&bench.merge(None));
        assert_eq!(bench.chain(), before[2..]);
        load.wait_requests(500, PATIENCE).unwrap();
        println!("{kind:?}: {} KiB copied, then {} KiB", job.bytes_copied >> 10, again.bytes_copied >> 10);
        bench.finish(load);
    }
}

#[test]
fn several_images_are_merged_into_one_that_is_named() {
    if is_reference() {
        return;
    }
    for kind in formats_with_chains() {
        let (bench, load) = Bench::with_chain(kind, 5, 62);
        let before = bench.chain();
        bench.done(&bench.merge(Some(&before[3])));
        assert_eq!(bench.chain(), before[3..]);
        assert!(before[..3].iter().all(|file| !file.exists()), "what was merged is deleted");
        load.wait_requests(500, PATIENCE).unwrap();
        bench.finish(load);
    }
}

#[test]
fn a_merge_that_was_cancelled_leaves_the_chain_and_the_next_one_succeeds() {
    if is_reference() {
        return;
    }
    for kind in formats_with_chains() {
        let (mut bench, load) = Bench::with_chain(kind, 3, 63);
        for _ in 0..4 {
            let before = bench.chain();
            let request =
                MergeRequest { bandwidth: Some(1 << 20), verify: "full".into(), ..MergeRequest::default() };
            let job: Job = bench.daemon.call("POST", "/v1/disks/disk/merge", Some(&request)).unwrap();
            bench.daemon.wait_job(&job.job, PATIENCE, |job| job.bytes_copied > 0).unwrap();
            bench.daemon.job_verb(&job.job, "cancel").unwrap();
            let job = bench.daemon.wait_job(&job.job, PATIENCE, Job::is_over).unwrap();
            assert_eq!(job.state, "cancelled", "{job:?}");
            assert_eq!(bench.chain(), before);
            load.wait_requests(200, PATIENCE).unwrap();
            bench.snapshot();
            load.wait_requests(200, PATIENCE).unwrap();
        }
        let before = bench.chain();
        bench.done(&bench.merge(Some(before.last().unwrap())));
        assert_eq!(bench.chain(), before[before.len() - 1..]);
        load.wait_requests(200, PATIENCE).unwrap();
        bench.finish(load);
    }
}

#[test]
fn the_daemons_death_during_merges_loses_nothing() {
    if is_reference() {
        return;
    }
    for kind in formats_with_chains() {
        let mut random = ChaCha8Rng::seed_from_u64(system_tests::seed(64));
        let (mut bench, load) = Bench::with_chain(kind, 2, 64);
        let mut kills = 0;
        for _ in 0..6 {
            let request =
                MergeRequest { bandwidth: Some(64 << 20), verify: "full".into(), ..MergeRequest::default() };
            let job: Job = bench.daemon.call("POST", "/v1/disks/disk/merge", Some(&request)).unwrap();
            for _ in 0..2 {
                std::thread::sleep(Duration::from_micros(random.random_range(0..700_000)));
                bench.daemon.kill9();
                kills += 1;
                bench.daemon.restart().unwrap();
                if load.wait_reconnects(kills, PATIENCE).is_err() {
                    load.stop().unwrap();
                    unreachable!("the load had failed");
                }
            }
            let ended = bench.daemon.wait_job(&job.job, PATIENCE, Job::is_over).unwrap();
            assert_eq!(ended.state, "done", "the merge goes on after the restart: {ended:?}");
            assert_eq!(bench.chain().len(), 1);
            load.wait_requests(100, PATIENCE).unwrap();
            bench.snapshot();
            load.wait_requests(300, PATIENCE).unwrap();
        }
        let load = bench.finish(load);
        println!("{kind:?}: {kills} kills: {}", load.counts());
    }
}

#[test]
fn a_chain_moves_to_a_folder_in_either_format_and_stays_a_chain() {
    if is_reference() {
        return;
    }
    for (from, to) in [
        (Image::DynamicVhdx, Image::DynamicVhdx),
        (Image::DynamicVhd, Image::DynamicVhdx),
        (Image::DynamicVhdx, Image::DynamicVhd),
        (Image::DynamicVhd, Image::DynamicVhd),
    ] {
        let (mut bench, load) = Bench::with_chain(from, 4, 65);
        let before = bench.chain();
        let sizes: u64 = before.iter().map(|file| file_space(file)).sum();
        let folder = bench.folder();
        let job = bench.daemon.start_move(&bench.request(&folder, to, |_| ())).unwrap();
        let job = bench.done(&job);
        let after = bench.chain();
        assert_eq!(after.len(), 4);
        assert!(after.iter().all(|file| file.starts_with(&folder)), "{after:?}");
        assert!(job.source_deleted && before.iter().all(|file| !file.exists()));
        load.wait_requests(300, PATIENCE).unwrap();
        let moved: u64 = after.iter().map(|file| file_space(file)).sum();
        println!("{from:?} to {to:?}: {} KiB became {} KiB", sizes >> 10, moved >> 10);
        // And a chain that was moved takes snapshots and merges as any other.
        bench.kind = to;
        bench.snapshot();
        load.wait_requests(200, PATIENCE).unwrap();
        let chain = bench.chain();
        bench.done(&bench.merge(Some(&chain[2])));
        load.wait_requests(200, PATIENCE).unwrap();
        bench.finish(load);
    }
}

#[test]
fn a_disk_that_has_grown_keeps_its_size_and_content_when_it_is_merged() {
    if is_reference() {
        return;
    }
    for kind in formats_with_chains() {
        let (bench, load) = Bench::with_chain(kind, 3, 70);
        let before = bench.chain();
        let new_size = SIZE + (48 << 20);
        let request = ResizeRequest { size_bytes: new_size, shrink: false };
        let _: Resized = bench.daemon.call("POST", "/v1/disks/disk/resize", Some(&request)).unwrap();
        load.wait_requests(300, PATIENCE).unwrap();
        // Beyond the end that the parents have.
        let model = load.stop().unwrap().model;
        let front = FrontEnd::start(&bench.daemon.socket("disk"), Options::default()).unwrap();
        let options = LoadOptions { depth: 8, ..LoadOptions::new(71, new_size / 512) };
        let mut beyond = VerifiedLoad::new(front, options).unwrap();
        beyond.model = model.grown(new_size / 512);
        beyond.run_requests(1500).unwrap();
        let beyond = beyond.spawn();
        bench.done(&bench.merge(None));
        beyond.wait_requests(300, PATIENCE).unwrap();
        assert_eq!((bench.disk().size_bytes, bench.chain()), (new_size, before[1..].to_vec()));
        bench.done(&bench.merge(None));
        assert_eq!((bench.disk().size_bytes, bench.chain()), (new_size, before[2..].to_vec()));
        beyond.wait_requests(300, PATIENCE).unwrap();
        beyond.stop().unwrap().verify_all().unwrap();
    }
}

fn file_space(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    path.metadata().unwrap().blocks() * 512
}

#[test]
fn each_file_of_a_chain_goes_where_it_is_told_and_a_shared_base_stays() {
    if is_reference() {
        return;
    }
    for kind in formats_with_chains() {
        let (mut bench, load) = Bench::with_chain(kind, 3, 66);
        let before = bench.chain();
        let (one, other) = (bench.folder(), bench.folder());
        let place = |file: &Path, to: &Path| FilePlace {
            file: file.display().to_string(),
            to: to.display().to_string(),
        };
        let request = bench.request(&one, kind, |r| {
            r.files = vec![place(&before[1], &other), place(&before[2], &before[2])];
        });
        bench.done(&bench.daemon.start_move(&request).unwrap());
        let after = bench.chain();
        assert!(
            after[0].starts_with(&one) && after[1].starts_with(&other) && after[2] == before[2],
            "{after:?}"
        );
        assert!(!before[0].exists() && !before[1].exists() && before[2].exists());
        load.wait_requests(300, PATIENCE).unwrap();
        bench.finish(load);
    }
}

#[test]
fn a_parent_that_somebody_else_reads_stays_and_is_named() {
    if is_reference() {
        return;
    }
    let kind = Image::DynamicVhdx;
    let (mut bench, load) = Bench::with_chain(kind, 3, 68);
    let before = bench.chain();
    let reader = formats::open(&before[2], &OpenOptions::read_only()).unwrap();
    let to = bench.folder();
    let job = bench.done(&bench.daemon.start_move(&bench.request(&to, kind, |_| {})).unwrap());
    assert!(!before[0].exists() && !before[1].exists() && before[2].exists());
    assert_eq!(job.sources_kept, [before[2].display().to_string()]);
    drop(reader);
    bench.finish(load);
}

#[test]
fn a_flattened_chain_is_one_image_and_its_parents_stay() {
    if is_reference() {
        return;
    }
    for (from, to) in [
        (Image::DynamicVhdx, Image::DynamicVhdx),
        (Image::DynamicVhd, Image::DynamicVhdx),
        (Image::DynamicVhdx, Image::Raw),
    ] {
        let (bench, load) = Bench::with_chain(from, 3, 67);
        let before = bench.chain();
        let target = bench.daemon.dir().join(format!("flat.{}", to.name()));
        let job = bench.daemon.start_move(&bench.request(&target, to, |r| r.flatten = true)).unwrap();
        bench.done(&job);
        assert_eq!(bench.chain(), [target]);
        assert!(!before[0].exists() && before[1].exists() && before[2].exists());
        load.wait_requests(300, PATIENCE).unwrap();
        bench.finish(load);
    }
}

#[test]
fn a_move_of_a_chain_pauses_and_is_cancelled_while_its_parents_are_copied() {
    if is_reference() {
        return;
    }
    let (mut bench, load) = Bench::with_chain(Image::DynamicVhdx, 3, 68);
    let before = bench.chain();
    let folder = bench.folder();
    let request = bench.request(&folder, Image::DynamicVhdx, |r| r.bandwidth = Some(1 << 20));
    let job = bench.daemon.start_move(&request).unwrap();
    bench.daemon.wait_job(&job.job, PATIENCE, |job| job.bytes_copied > 0).unwrap();
    bench.daemon.job_verb(&job.job, "pause").unwrap();
    bench.daemon.wait_job(&job.job, PATIENCE, |job| job.state == "paused").unwrap();
    std::thread::sleep(Duration::from_millis(200));
    let copied = bench.daemon.job(&job.job).unwrap().bytes_copied;
    load.wait_requests(300, PATIENCE).unwrap();
    assert_eq!(bench.daemon.job(&job.job).unwrap().bytes_copied, copied, "nothing is copied while paused");
    bench.daemon.job_verb(&job.job, "cancel").unwrap();
    let over = bench.daemon.wait_job(&job.job, PATIENCE, Job::is_over).unwrap();
    assert_eq!(over.state, "cancelled", "{over:?}");
    assert_eq!(bench.chain(), before);
    assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 0, "what was made is removed");
    let job = bench.daemon.start_move(&bench.request(&folder, Image::DynamicVhdx, |_| ())).unwrap();
    bench.done(&job);
    load.wait_requests(300, PATIENCE).unwrap();
    bench.finish(load);
}

#[test]
fn the_daemons_death_during_moves_of_a_chain_loses_nothing() {
    if is_reference() {
        return;
    }
    let mut random = ChaCha8Rng::seed_from_u64(system_tests::seed(69));
    let (mut bench, load) = Bench::with_chain(Image::DynamicVhdx, 3, 69);
    let mut kills = 0;
    for round in 0..6 {
        let kind = if round % 2 == 0 { Image::DynamicVhd } else { Image::DynamicVhdx };
        let folder = bench.folder();
        let request = bench.request(&folder, kind, |r| r.bandwidth = Some(64 << 20));
        let job = bench.daemon.start_move(&request).unwrap();
        for _ in 0..2 {
            std::thread::sleep(Duration::from_micros(random.random_range(0..900_000)));
            bench.daemon.kill9();
            kills += 1;
            bench.daemon.restart().unwrap();
            if load.wait_reconnects(kills, PATIENCE).is_err() {
                load.stop().unwrap();
                unreachable!("the load had failed");
            }
        }
        let ended = bench.daemon.wait_job(&job.job, PATIENCE, Job::is_over).unwrap();
        assert_eq!(ended.state, "done", "the move goes on after the restart: {ended:?}");
        let chain = bench.chain();
        assert!(chain.len() == 3 && chain.iter().all(|file| file.starts_with(&folder)), "{chain:?}");
        load.wait_requests(100, PATIENCE).unwrap();
    }
    let load = bench.finish(load);
    println!("{kills} kills: {}", load.counts());
}
