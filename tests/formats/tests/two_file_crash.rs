//! Power cuts in the middle of what concerns two files at once: a new image put on one that is written to, and a child
//! merged into its parent.
//!
//! Every write, and every sync of one of the files, is a step. After each step a power cut keeps some of what was not synced
//! in either file: nothing, all, all of one of them, and seeded subsets sector by sector. The chain that is left has to open,
//! its child has to know its parent, and each sector has to hold what was flushed or what was written later.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex};

use formats::vhd::Vhd;
use formats::vhdx::Vhdx;
use formats::{
    AllocState, Chain, Format, Image, ImageType, Layer, LayerOptions, NewParentLink, Storage, read_payload,
    write_payload, zero_payload,
};
use formats_tests::{SimDisk, SimStorage};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use uuid::Uuid;

const SIZE: u64 = 8 << 20;
const PAGE: u64 = 4096;
const CHILD: usize = 0;
const PARENT: usize = 1;

#[derive(Debug, Clone)]
enum Step {
    Write(u64, Vec<u8>),
    Punch(u64, u64),
    SetLen(u64),
    Sync,
    /// The guest may see this content of a page from here on.
    May(u64, u8),
    /// The guest was told that it is durable: of all pages the last content counts.
    Flushed,
}

type Log = Arc<Mutex<Vec<(usize, Step)>>>;

/// One of the two files, which writes down what is done to it.
#[derive(Debug)]
struct Logged {
    sim: Arc<SimStorage>,
    file: usize,
    log: Log,
}

impl Logged {
    fn note(&self, step: Step) {
        self.log.lock().unwrap().push((self.file, step));
    }
}

impl Storage for Logged {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.sim.read_at(buf, offset)
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.note(Step::Write(offset, buf.to_vec()));
        self.sim.write_at(buf, offset)
    }
    fn len(&self) -> io::Result<u64> {
        self.sim.len()
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.note(Step::SetLen(len));
        self.sim.set_len(len)
    }
    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.note(Step::Punch(offset, len));
        self.sim.punch(offset, len)
    }
    fn sync(&self) -> io::Result<()> {
        self.note(Step::Sync);
        self.sim.sync()
    }
    fn next_data(&self, offset: u64) -> io::Result<Option<(u64, u64)>> {
        self.sim.next_data(offset)
    }
    fn file(&self) -> Option<&File> {
        None
    }
}

fn open(format: Format, storage: Arc<dyn Storage>, options: &LayerOptions) -> Arc<dyn Layer> {
    match format {
        Format::Vhd => Arc::new(Vhd::open_layer(storage, options).unwrap()),
        _ => Arc::new(Vhdx::open_layer(storage, options).unwrap()),
    }
}

fn create(format: Format, storage: &dyn Storage, parent: Option<NewParentLink>) {
    let image_type = if parent.is_some() { ImageType::Differencing } else { ImageType::Dynamic };
    match format {
        Format::Vhd => {
            let params = formats::vhd::CreateParams {
                image_type,
                virtual_size: SIZE,
                block_size: Some(512 << 10),
                parent,
            };
            formats::vhd::create(storage, &params).unwrap();
        }
        _ => {
            let params = formats::vhdx::CreateParams {
                image_type,
                virtual_size: SIZE,
                block_size: Some(1 << 20),
                logical_sector_size: 512,
                physical_sector_size: 4096,
                log_size: Some(1 << 20),
                parent,
            };
            formats::vhdx::create(storage, &params).unwrap();
        }
    }
}

fn link(id: Uuid, next_id: Option<Uuid>) -> NewParentLink {
    NewParentLink { id, next_id, relative: Some("parent".into()), absolute: "/parent".into() }
}

fn relink(format: Format, storage: &Arc<dyn Storage>, link: &NewParentLink) {
    match format {
        Format::Vhd => formats::vhd::relink(&**storage, link).unwrap(),
        _ => formats::vhdx::relink(storage, link).unwrap(),
    }
}

/// Two files, and what each page of the disk may hold.
struct Bench {
    format: Format,
    log: Log,
    files: [Arc<dyn Storage>; 2],
    /// Before the first step that is looked at.
    before: [SimDisk; 2],
    sims: [Arc<SimStorage>; 2],
}

impl Bench {
    fn new(format: Format) -> Self {
        let log = Log::default();
        let sims = [SimStorage::new(), SimStorage::new()];
        let file = |file: usize| -> Arc<dyn Storage> {
            Arc::new(Logged { sim: sims[file].clone(), file, log: log.clone() })
        };
        let files = [file(CHILD), file(PARENT)];
        Self { format, log, files, before: [SimDisk::new(), SimDisk::new()], sims }
    }

    /// From here on power cuts are looked at; everything so far is durable.
    fn begin(&mut self) {
        self.before = [CHILD, PARENT].map(|file| self.sims[file].contents());
        self.log.lock().unwrap().clear();
    }

    fn layer(&self, file: usize, options: &LayerOptions) -> Arc<dyn Layer> {
        open(self.format, self.files[file].clone(), options)
    }

    /// A guest's write of a page, or, with 0, of zeroes.
    fn write(&self, images: &[&dyn Image], page: u64, byte: u8) {
        self.log.lock().unwrap().push((0, Step::May(page, byte)));
        for image in images {
            match byte {
                0 => zero_payload(*image, page * PAGE, PAGE).unwrap(),
                _ => write_payload(*image, page * PAGE, &[byte; PAGE as usize]).unwrap(),
            }
        }
    }

    fn flush(&self, images: &[&dyn Image]) {
        images.iter().for_each(|image| image.commit().unwrap());
        self.log.lock().unwrap().push((0, Step::Flushed));
    }

    /// Puts a power cut after every step from `child_from` on. Returns how many different states that gave.
    fn explore(&self, pages: &[(u64, u8)], child_from: usize) -> usize {
        let steps = self.log.lock().unwrap().clone();
        let mut may: Vec<Vec<u8>> = vec![vec![0]; (SIZE / PAGE) as usize];
        pages.iter().for_each(|&(page, byte)| may[page as usize] = vec![byte]);
        let mut durable = self.before.clone();
        let mut pending: [Vec<Step>; 2] = [Vec::new(), Vec::new()];
        let mut seen = HashSet::new();
        for (n, (file, step)) in steps.iter().enumerate() {
            match step {
                Step::May(page, byte) => may[*page as usize].push(*byte),
                Step::Flushed => may.iter_mut().for_each(|may| drop(may.drain(..may.len() - 1))),
                Step::Sync => {
                    let done = std::mem::take(&mut pending[*file]);
                    done.iter().for_each(|step| apply(&mut durable[*file], step));
                }
                step => pending[*file].extend(units(step)),
            }
            if n + 1 < child_from {
                continue;
            }
            for kept in subsets(pending[CHILD].len(), pending[PARENT].len(), n as u64) {
                let mut disks = durable.clone();
                for file in [CHILD, PARENT] {
                    let units = pending[file].iter().zip(&kept[file]);
                    units.filter(|(_, kept)| **kept).for_each(|(unit, _)| apply(&mut disks[file], unit));
                }
                if seen.insert((disks[0].fingerprint(), disks[1].fingerprint(), n)) {
                    self.check(disks, &may, n);
                }
            }
        }
        seen.len()
    }

    fn check(&self, disks: [SimDisk; 2], may: &[Vec<u8>], n: usize) {
        let [child, parent] = disks.map(SimStorage::from_disk);
        let options = LayerOptions { read_only: true, recover: true, ..LayerOptions::default() };
        let (child, parent) = (open(self.format, child, &options), open(self.format, parent, &options));
        let ids = &child.parent_link().unwrap().ids;
        let id = parent.content_id().unwrap();
        assert!(
            ids.contains(&id),
            "{}: after step {n} the child names {ids:?}, and its parent is {id}",
            self.format
        );
        let chain = Chain::new(child, vec![parent]).unwrap();
        let mut content = vec![0; SIZE as usize];
        read_payload(&chain, 0, &mut content).unwrap();
        for (page, may) in content.chunks(PAGE as usize).zip(may) {
            for sector in page.chunks(512) {
                let found = sector[0];
                assert!(
                    sector.iter().all(|b| *b == found) && may.contains(&found),
                    "{}: after step {n} a sector holds {found}, and only {may:?} are right",
                    self.format
                );
            }
        }
    }
}

/// What may be kept of a step by itself.
fn units(step: &Step) -> Vec<Step> {
    match step {
        Step::Write(offset, data) => {
            let mut units = Vec::new();
            let mut at = 0;
            while at < data.len() {
                let n = (512 - (*offset as usize + at) % 512).min(data.len() - at);
                units.push(Step::Write(offset + at as u64, data[at..at + n].to_vec()));
                at += n;
            }
            units
        }
        other => vec![other.clone()],
    }
}

fn apply(disk: &mut SimDisk, step: &Step) {
    match step {
        Step::Write(offset, data) => disk.write(*offset, data),
        Step::Punch(offset, len) => disk.zero(*offset, (*len).min(disk.len().saturating_sub(*offset))),
        Step::SetLen(len) => disk.set_len(*len),
        Step::Sync | Step::May(..) | Step::Flushed => {}
    }
}

fn subsets(child: usize, parent: usize, seed: u64) -> Vec<[Vec<bool>; 2]> {
    let all = |child_kept, parent_kept| [vec![child_kept; child], vec![parent_kept; parent]];
    let mut sets = vec![all(false, false), all(true, true), all(true, false), all(false, true)];
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    for _ in 0..6 {
        let density = random.random_range(1..10);
        let mut some = |n| (0..n).map(|_| random.random_range(0..10) < density).collect();
        sets.push([some(child), some(parent)]);
    }
    sets
}

/// A new image is put on one that guests write to, as a snapshot does.
#[test]
fn a_power_cut_around_a_snapshot_leaves_each_sector_old_or_new() {
    for format in [Format::Vhd, Format::Vhdx] {
        let mut bench = Bench::new(format);
        create(format, &*bench.files[PARENT], None);
        let old = bench.layer(PARENT, &LayerOptions::default());
        let before = [(0, 1), (3, 2), (300, 3), (700, 4)];
        before
            .iter()
            .for_each(|&(page, byte)| write_payload(&*old, page * PAGE, &[byte; PAGE as usize]).unwrap());
        old.commit().unwrap();
        bench.begin();
        // The guest goes on writing while the new image is made.
        bench.write(&[&*old], 0, 11);
        bench.write(&[&*old], 1, 12);
        old.begin_changes().unwrap();
        create(format, &*bench.files[CHILD], Some(link(old.content_id().unwrap(), None)));
        // Only now does anybody know of the new image.
        let known = bench.log.lock().unwrap().len();
        bench.write(&[&*old], 1000, 13);
        let new = bench.layer(CHILD, &LayerOptions::default());
        let chain = Chain::new(new, vec![old.clone() as Arc<dyn Image>]).unwrap();
        bench.write(&[&*old], 3, 14);
        bench.write(&[&chain], 300, 15);
        bench.write(&[&chain], 701, 16);
        bench.write(&[&chain], 700, 0);
        // A flush reaches both as long as the old one settles.
        bench.flush(&[&chain, &*old]);
        old.close().unwrap();
        bench.write(&[&chain], 3, 17);
        bench.write(&[&chain], 1, 0);
        bench.flush(&[&chain]);
        bench.write(&[&chain], 301, 18);
        chain.close().unwrap();
        let states = bench.explore(&before, known);
        println!("{format}: {states} different states");
        assert!(states > 200);
    }
}

/// A child is merged into its parent while a guest writes to both, as a merge does.
#[test]
fn a_power_cut_during_a_merge_leaves_each_sector_old_or_new() {
    for format in [Format::Vhd, Format::Vhdx] {
        let mut bench = Bench::new(format);
        create(format, &*bench.files[PARENT], None);
        let parent = bench.layer(PARENT, &LayerOptions::default());
        for page in [0, 1, 2, 3, 300, 301, 1000] {
            write_payload(&*parent, page * PAGE, &[1; PAGE as usize]).unwrap();
        }
        parent.close().unwrap();
        let id = parent.content_id().unwrap();
        create(format, &*bench.files[CHILD], Some(link(id, None)));
        let child = bench.layer(CHILD, &LayerOptions::default());
        let chain = Chain::new(child, vec![parent as Arc<dyn Image>]).unwrap();
        for (page, byte) in [(1, 2), (301, 3), (700, 4)] {
            write_payload(&chain, page * PAGE, &[byte; PAGE as usize]).unwrap();
        }
        zero_payload(&chain, 1000 * PAGE, PAGE).unwrap();
        chain.close().unwrap();
        drop(chain);
        let before = [(0, 1), (1, 2), (2, 1), (3, 1), (300, 1), (301, 3), (700, 4), (1000, 0)];
        bench.begin();

        let next_id = Uuid::new_v4();
        relink(format, &bench.files[CHILD], &link(id, Some(next_id)));
        let options = LayerOptions { next_content_id: Some(next_id), ..LayerOptions::default() };
        let parent = bench.layer(PARENT, &options);
        parent.begin_changes().unwrap();
        let child = bench.layer(CHILD, &LayerOptions::default());
        let chain = Chain::new(child, vec![parent.clone() as Arc<dyn Image>]).unwrap();
        bench.write(&[&chain], 2, 20);
        // What the child has is copied.
        copy_own(&chain, &*parent);
        bench.write(&[&chain], 3, 21);
        bench.flush(&[&chain]);
        copy_own(&chain, &*parent);
        // From here on writes go to both, in either order.
        bench.write(&[&chain, &*parent], 0, 22);
        bench.write(&[&*parent, &chain], 302, 23);
        bench.write(&[&chain, &*parent], 301, 0);
        bench.write(&[&*parent, &chain], 1000, 24);
        bench.flush(&[&chain, &*parent]);
        bench.write(&[&*parent, &chain], 2, 25);
        parent.commit().unwrap();
        let states = bench.explore(&before, 0);
        println!("{format}: {states} different states");
        assert!(states > 200);
        // Now the parent alone may become the disk.
        let (mut alone, mut whole) = (vec![0; SIZE as usize], vec![0; SIZE as usize]);
        read_payload(&*parent, 0, &mut alone).unwrap();
        read_payload(&chain, 0, &mut whole).unwrap();
        assert_eq!(alone, whole);
    }
}

fn copy_own(chain: &Chain, parent: &dyn Image) {
    let mut at = 0;
    while let Some(extent) = chain.next_own_extent(1, at).unwrap() {
        let (offset, len) = (extent.span.offset, extent.span.len);
        match extent.state {
            AllocState::Absent => {}
            AllocState::Zero => zero_payload(parent, offset, len).unwrap(),
            AllocState::Data => {
                let mut data = vec![0; len as usize];
                read_payload(chain, offset, &mut data).unwrap();
                write_payload(parent, offset, &data).unwrap();
            }
        }
        at = offset + len;
    }
}
