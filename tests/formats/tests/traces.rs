//! Random lives of disks of every format and type: written, zeroed, discarded, flushed, put on and merged into parents, made
//! larger and smaller, compacted, moved, closed and killed. All that they hold is compared with a flat model again and again,
//! and at the end with what other people's tools read.
//!
//! `BLOCKD_TRACE_SEED` is the first seed (1), `BLOCKD_TRACE_RUNS` how many there are for each kind of disk (2), and
//! `BLOCKD_TRACE_STEPS` how long each is (150). A failure prints its seed and the steps up to it.
#![allow(clippy::unwrap_used, reason = "what fails in a helper of a test fails the test")]

mod cross;

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use cross::{Disk, read_all};
use formats::vhd::Vhd;
use formats::vhdx::Vhdx;
use formats::{
    AllocState, CreateOptions, ErrorKind, FileStorage, Format, Image, ImageType, LayerOptions, MergeChain,
    MergeSides, OpenOptions, RebaseOptions, ZeroMode,
};
use formats_tests::{read_payload, write_payload, zero_payload};
use rand::Rng;

const MIB: u64 = 1 << 20;
/// No disk becomes larger.
const MAX_SIZE: u64 = 28 * MIB;
/// No chain becomes longer.
const MAX_CHAIN: usize = 5;

#[derive(Debug, Clone, Copy)]
struct Kind {
    format: Format,
    image_type: ImageType,
    sector: u32,
}

/// What becomes of a merge of a disk that is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum MergeEnd {
    Complete,
    /// Half way.
    GivenUp,
    /// Half way.
    Death,
}

struct Trace {
    kind: Kind,
    seed: u64,
    disk: Disk,
    /// What was done, for whoever has to find out why it went wrong.
    steps: Vec<String>,
    /// Number of the next image.
    next: usize,
    merges: usize,
}

impl Drop for Trace {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let Kind { format, image_type, sector } = self.kind;
            println!(
                "{format} {image_type} with sectors of {sector}, seed {}: {} steps, the last of them",
                self.seed,
                self.steps.len()
            );
            for step in self.steps.iter().rev().take(40).rev() {
                println!("  {step}");
            }
        }
    }
}

impl Trace {
    fn new(kind: Kind, seed: u64) -> Self {
        let base =
            if kind.image_type == ImageType::Differencing { ImageType::Dynamic } else { kind.image_type };
        let size = 14 * MIB + if seed.is_multiple_of(2) { 5 * 4096 } else { 0 };
        let options = CreateOptions {
            image_type: base,
            logical_sector_size: kind.sector,
            ..CreateOptions::new(kind.format, size)
        };
        let disk = Disk::new(&options, seed << 8 | u64::from(kind.sector >> 9));
        let mut trace = Self { kind, seed, disk, steps: Vec::new(), next: 1, merges: 0 };
        if kind.image_type == ImageType::Differencing {
            trace.disk.scribble(20);
            trace.snapshot_closed();
        }
        trace
    }

    fn is_raw(&self) -> bool {
        self.kind.format == Format::Raw
    }

    /// Whether its sizes stay as they are, so that everybody can read it.
    fn is_plain(&self) -> bool {
        !self.seed.is_multiple_of(2)
    }

    fn did(&mut self, what: impl Into<String>) {
        self.steps.push(what.into());
    }

    fn chance(&mut self, of: u32) -> bool {
        self.disk.rng.random_ratio(1, of)
    }

    fn parents(&self) -> Vec<PathBuf> {
        let mut folders = vec![self.disk.folder.path().to_owned()];
        folders.extend(self.disk.chain.iter().skip(1).cloned());
        folders
    }

    fn options(&self) -> OpenOptions {
        OpenOptions { parents: self.parents(), ..self.disk.open_options(false) }
    }

    fn open(&mut self) {
        self.disk.image = None;
        let image = formats::open(self.disk.top(), &self.options());
        self.disk.image = Some(image.unwrap_or_else(|e| panic!("opening: {e}")));
    }

    fn agree(&self) {
        self.disk.agree(self.steps.last().map_or("new", |step| step));
    }

    fn step(&mut self) {
        match self.disk.rng.random_range(0..100) {
            0..44 => self.write(),
            44..52 => self.zero(ZeroMode::Keep),
            52..62 => self.zero(ZeroMode::Unmap),
            62..68 => self.flush(),
            68..71 => self.maintain(),
            71..76 => self.reopen(),
            76..82 => self.die(),
            82..87 => self.snapshot(),
            87..89 => self.merge(),
            89..93 => self.merge_served(),
            93..95 => self.grow(),
            95..97 => self.shrink(),
            97..99 => self.compact(),
            _ => self.move_away(),
        }
    }

    fn write(&mut self) {
        let (at, len) = self.disk.some_range(3 * MIB);
        self.did(format!("write {at:#x}+{len:#x}"));
        self.disk.write(at, len);
        if self.chance(6) {
            let read = read_payload(self.disk.image(), at, len as usize).unwrap();
            assert!(read == self.disk.model[at as usize..(at + len) as usize], "not what was just written");
        }
    }

    fn zero(&mut self, mode: ZeroMode) {
        let (at, len) = self.disk.some_range(5 * MIB);
        self.did(format!("zero {at:#x}+{len:#x} {mode:?}"));
        self.disk.zero(at, len, mode);
    }

    fn flush(&mut self) {
        self.did("flush");
        if self.chance(2) {
            return self.disk.image().commit().unwrap();
        }
        let image = self.disk.image();
        let (mut token, mut syncs) = (Some(image.sync_begin()), 0);
        while let Some(begun) = token {
            image.files()[0].sync().unwrap();
            syncs += 1;
            token = image.sync_done(begun).unwrap();
        }
        assert!(syncs <= 2, "a flush took {syncs} syncs");
    }

    fn maintain(&mut self) {
        self.did("maintain");
        self.disk.image().maintain(&|| ()).unwrap();
    }

    fn reopen(&mut self) {
        self.did("close and open");
        self.disk.close();
        self.open();
        self.agree();
    }

    /// The process dies: nothing is closed, and what was acknowledged has to be there.
    fn die(&mut self) {
        self.did("die and open");
        self.open();
        self.agree();
    }

    fn snapshot(&mut self) {
        if self.disk.chain.len() >= MAX_CHAIN {
            return self.merge();
        }
        if self.chance(2) {
            self.snapshot_closed()
        } else {
            self.snapshot_served()
        }
        self.agree();
    }

    fn child_path(&mut self) -> PathBuf {
        self.next += 1;
        self.disk.folder.path().join(format!("disk-{}.{}", self.next - 1, self.kind.format))
    }

    /// A new image on the closed one, as `blockctl image create --parent` makes it.
    fn snapshot_closed(&mut self) {
        let path = self.child_path();
        let blocks: &[u32] = if self.kind.format == Format::Vhd {
            &[512 << 10, 2 << 20, 2 << 20]
        } else {
            &[1 << 20, 2 << 20, 8 << 20]
        };
        let block = blocks[if self.is_plain() { 1 } else { self.disk.rng.random_range(0..blocks.len()) }];
        self.did(format!(
            "close, {} with blocks of {block} on {}",
            path.display(),
            self.disk.top().display()
        ));
        self.disk.close();
        let options = CreateOptions {
            block_size: Some(block).filter(|_| !self.is_raw()),
            ..CreateOptions::on_parent(self.kind.format, self.disk.top())
        };
        let made = formats::create(&path, &options);
        if self.is_raw() {
            made.unwrap_err();
        } else {
            made.unwrap();
            self.disk.chain.insert(0, path);
        }
        self.open();
    }

    /// A new image on the open one, as the daemon makes it.
    fn snapshot_served(&mut self) {
        let path = self.child_path();
        self.did(format!("{} on {}, open", path.display(), self.disk.top().display()));
        let notes = self.disk.notes_dir();
        let old = self.disk.image.take().unwrap();
        let made = formats::create_over(&path, &old, self.disk.top(), Some(&notes));
        if self.is_raw() {
            assert_eq!(made.unwrap_err().kind, ErrorKind::Unsupported);
            self.disk.image = Some(old);
            return;
        }
        let new = made.unwrap();
        if self.chance(2) {
            // A write that was on its way when the disk went on in its child.
            let (at, len) = self.disk.some_range(MIB);
            self.disk.image = Some(old.clone());
            self.disk.write(at, len);
        }
        old.close().unwrap();
        formats::remove_notes(&*old, &notes);
        formats::share(&*old).unwrap();
        self.disk.image = Some(new);
        self.disk.chain.insert(0, path);
    }

    /// The newest image becomes one with its parent, which is made as large before.
    fn merge(&mut self) {
        let least = if self.kind.image_type == ImageType::Differencing { 3 } else { 2 };
        if self.disk.chain.len() < least {
            return;
        }
        self.did(format!("merge {} into its parent", self.disk.top().display()));
        self.disk.close();
        let top = self.disk.chain.remove(0);
        let size = self.disk.model.len() as u64;
        let parent_size = formats::info(self.disk.top(), None).unwrap().virtual_size;
        if parent_size < size {
            formats::resize_with_parents(self.disk.top(), None, size, false, &self.parents()).unwrap();
        }
        self.open();
        merge_layer(&*layer(&top), self.disk.image());
        if parent_size > size {
            zero_payload(self.disk.image(), size, parent_size - size, ZeroMode::Unmap).unwrap();
            self.disk.model.resize(parent_size as usize, 0);
        }
        std::fs::remove_file(top).unwrap();
        self.agree();
        self.merges += 1;
        if parent_size > size {
            self.shrink_to(size);
        }
    }

    /// The newest images are merged into the one below them while the disk is used, as the daemon does it.
    fn merge_served(&mut self) {
        let least = if self.kind.image_type == ImageType::Differencing { 3 } else { 2 };
        if self.disk.chain.len() < least {
            return;
        }
        let levels = self.disk.rng.random_range(1..=self.disk.chain.len() + 1 - least);
        let size = self.disk.model.len() as u64;
        let layers = self.disk.image().as_chain().unwrap().layers();
        if layers[..=levels].iter().any(|layer| layer.geometry().virtual_size != size) {
            return;
        }
        if self.chance(3) {
            // The process dies half way, and its successor takes it up again.
            self.merge_levels(levels, MergeEnd::Death);
        }
        let end = if self.chance(3) { MergeEnd::GivenUp } else { MergeEnd::Complete };
        self.merge_levels(levels, end);
    }

    fn merge_levels(&mut self, levels: usize, end: MergeEnd) {
        let size = self.disk.model.len() as u64;
        let old = self.disk.image.take().unwrap();
        let chain = old.as_chain().unwrap();
        let (paths, notes) = (self.disk.chain.clone(), self.disk.notes_dir());
        self.did(format!("merge {levels} into {}, open: {end:?}", paths[levels].display()));
        let merge = MergeChain { chain, paths: &paths, levels, notes_dir: Some(&notes) };
        let files = merge.take_files().unwrap();
        old.close().unwrap();
        let sides = merge.open(files).unwrap_or_else(|refused| panic!("{}", refused.error));
        self.disk.image = Some(sides.chain.clone());
        self.agree();
        self.copy_beside_writes(&sides, levels, if end == MergeEnd::Complete { size } else { size / 2 });
        match end {
            MergeEnd::Complete => {
                sides.target.commit().unwrap();
                formats::remove_notes(&*sides.chain, &notes);
                self.disk.image = Some(sides.target);
                for path in self.disk.chain.drain(..levels) {
                    std::fs::remove_file(path).unwrap();
                }
                self.merges += 1;
            }
            MergeEnd::GivenUp => {
                sides.target.close().unwrap();
                sides.chain.close().unwrap();
                let chain = sides.chain.as_chain().unwrap();
                self.disk.image = Some(MergeChain { chain, ..merge }.give_up().unwrap());
            }
            MergeEnd::Death => {
                self.disk.image = None;
                drop((sides, old));
                self.open();
            }
        }
        self.agree();
    }

    /// Writes what the newest images have to the target of a merge, and what the guest writes meanwhile to both.
    fn copy_beside_writes(&mut self, sides: &MergeSides, levels: usize, end: u64) {
        let chain = sides.chain.as_chain().unwrap();
        let target = &*sides.target;
        let mut at = 0;
        while at < end {
            let extent = chain.next_own_extent(levels, at).unwrap().unwrap();
            let len = extent.span.len.min(MIB);
            match extent.state {
                AllocState::Absent => {}
                AllocState::Zero => zero_payload(target, at, len, ZeroMode::Unmap).unwrap(),
                AllocState::Data => {
                    write_payload(target, at, &read_payload(chain, at, len as usize).unwrap()).unwrap();
                }
            }
            at += len;
            if self.chance(6) {
                let (at, len) = self.disk.some_range(MIB);
                self.disk.write(at, len);
                write_payload(target, at, &self.disk.model[at as usize..(at + len) as usize]).unwrap();
            }
        }
    }

    fn new_size(&mut self, from: u64, to: u64) -> u64 {
        let unit = if self.chance(2) { MIB } else { 4096 };
        self.disk.rng.random_range(from..=to) / unit * unit
    }

    fn grow(&mut self) {
        let size = self.disk.model.len() as u64;
        let new = self.new_size(size, MAX_SIZE);
        if new <= size || self.is_plain() {
            return;
        }
        self.did(format!("grow to {new:#x}"));
        self.resize(new, false).unwrap();
        self.disk.model.resize(new as usize, 0);
        self.agree();
    }

    fn shrink(&mut self) {
        let size = self.disk.model.len() as u64;
        let new = self.new_size(size / 2, size);
        if new < size && !self.is_plain() {
            self.disk.zero(new, size - new, ZeroMode::Unmap);
            self.agree();
            self.shrink_to(new);
        }
    }

    /// Cuts a tail of zeroes off.
    fn shrink_to(&mut self, new: u64) {
        self.did(format!("shrink to {new:#x}"));
        match self.resize(new, true) {
            Ok(()) => self.disk.model.truncate(new as usize),
            // Who does not look at the parents has to take for granted that they hold something there.
            Err((kind, looked)) => {
                let unknown = !looked && self.disk.chain.len() > 1;
                assert!(kind == ErrorKind::InvalidParameter && unknown, "{kind:?}");
                self.did("  was refused");
            }
        }
        self.agree();
    }

    /// An error says whether the parents were looked at.
    fn resize(&mut self, new: u64, shrink: bool) -> Result<(), (ErrorKind, bool)> {
        self.disk.resized = true;
        if self.chance(2) {
            self.disk.close();
            let done = formats::resize_with_parents(self.disk.top(), None, new, shrink, &self.parents());
            self.open();
            return done.map_err(|e| (e.kind, true));
        }
        // As the daemon does it, which never lets go of the file.
        let image = self.disk.image.take().unwrap();
        image.close().unwrap();
        let done = formats::resize_held(&*image, new, shrink);
        let notes = self.disk.notes_dir();
        self.disk.image = Some(formats::reopen(&*image, Some(&notes)).unwrap());
        done.map_err(|e| (e.kind, false))
    }

    /// Any image of the chain, the parents too: their content stays.
    fn compact(&mut self) {
        let which = self.disk.rng.random_range(0..self.disk.chain.len());
        self.did(format!("compact {}", self.disk.chain[which].display()));
        self.disk.close();
        let freed = formats::compact(&self.disk.chain[which], None, &mut |_, _| ()).unwrap();
        self.did(format!("  {freed:?}"));
        self.open();
        self.agree();
    }

    /// The newest image goes to another folder, and is told where its parent is.
    fn move_away(&mut self) {
        self.disk.close();
        let name = self.disk.top().file_name().unwrap().to_owned();
        let away = self.disk.top().parent() == Some(self.disk.folder.path());
        let folder = self.disk.folder.path().join(if away { "elsewhere" } else { "" });
        self.did(format!("move {} to {}", self.disk.top().display(), folder.display()));
        std::fs::create_dir_all(&folder).unwrap();
        let path = folder.join(name);
        std::fs::rename(self.disk.top(), &path).unwrap();
        self.disk.chain[0] = path;
        if self.disk.chain.len() > 1 {
            let options = RebaseOptions { parents: self.parents(), ..RebaseOptions::default() };
            formats::rebase(&self.disk.chain[0], &self.disk.chain[1], &options).unwrap();
        }
        self.open();
        self.agree();
    }

    /// The end: everybody looks at it, and it is copied once.
    fn end(mut self, agreed: &mut BTreeMap<&'static str, usize>) -> usize {
        while self.kind.image_type != ImageType::Differencing && self.disk.chain.len() > 1 {
            self.merge();
        }
        self.did("close");
        self.disk.close();
        self.disk.sound("closed");
        for who in self.disk.ask_others() {
            *agreed.entry(who).or_default() += 1;
        }
        let read_only = OpenOptions { parents: self.parents(), ..self.disk.open_options(true) };
        let image = formats::open(self.disk.top(), &read_only).unwrap();
        assert_eq!(image.image_type(), self.kind.image_type);
        let path = self.disk.folder.path().join("copy.raw");
        formats::create(&path, &CreateOptions::new(Format::Raw, self.disk.model.len() as u64)).unwrap();
        let copy = formats::open(&path, &OpenOptions::default()).unwrap();
        formats::copy(&*image, &*copy, &mut |_| ControlFlow::Continue(())).unwrap();
        self.disk.assert_same(&read_all(&*copy), "a raw copy");
        self.merges
    }
}

/// An image alone, for reading.
fn layer(path: &PathBuf) -> Arc<dyn Image> {
    let storage = Arc::new(FileStorage::new(File::open(path).unwrap()));
    let options = LayerOptions { read_only: true, ..LayerOptions::default() };
    match formats::format_by_name(path).unwrap() {
        Format::Vhd => Arc::new(Vhd::open_layer(storage, &options).unwrap()),
        Format::Vhdx => Arc::new(Vhdx::open_layer(storage, &options).unwrap()),
        Format::Raw => panic!("a raw image is no layer"),
    }
}

/// Writes what `top` has of its own into `below`, zeroes as zeroes.
fn merge_layer(top: &dyn Image, below: &dyn Image) {
    let mut at = 0;
    while let Some(extent) = top.next_extent(at).unwrap() {
        let len = extent.span.len.min(MIB);
        match extent.state {
            AllocState::Absent => {}
            AllocState::Zero => zero_payload(below, at, len, ZeroMode::Unmap).unwrap(),
            AllocState::Data => {
                write_payload(below, at, &read_payload(top, at, len as usize).unwrap()).unwrap();
            }
        }
        at += len;
    }
}

fn number(variable: &str, default: u64) -> u64 {
    match std::env::var(variable) {
        Ok(text) => text.parse().unwrap_or_else(|e| panic!("{variable}={text}: {e}")),
        Err(_) => default,
    }
}

fn live(format: Format, image_type: ImageType, sector: u32) {
    let (begun, first) = (Instant::now(), number("BLOCKD_TRACE_SEED", 1));
    let (runs, steps) = (number("BLOCKD_TRACE_RUNS", 2), number("BLOCKD_TRACE_STEPS", 150));
    let mut agreed = BTreeMap::new();
    let (mut merges, mut longest) = (0, 0);
    for seed in first..first + runs {
        let mut trace = Trace::new(Kind { format, image_type, sector }, seed);
        for _ in 0..steps {
            trace.step();
            longest = longest.max(trace.disk.chain.len());
        }
        merges += trace.end(&mut agreed);
    }
    println!(
        "{format} {image_type}, sectors of {sector}: {runs} traces of {steps} steps from seed {first} in {:.1} s, chains of \
         up to {longest}, {merges} merges; who else reads the same: {agreed:?}",
        begun.elapsed().as_secs_f64()
    );
}

#[test]
fn raw_disks_live_as_the_model_does() {
    live(Format::Raw, ImageType::Fixed, 512);
}

#[test]
fn fixed_vhds_live_as_the_model_does() {
    live(Format::Vhd, ImageType::Fixed, 512);
}

#[test]
fn dynamic_vhds_live_as_the_model_does() {
    live(Format::Vhd, ImageType::Dynamic, 512);
}

#[test]
fn differencing_vhds_live_as_the_model_does() {
    live(Format::Vhd, ImageType::Differencing, 512);
}

#[test]
fn fixed_vhdxs_live_as_the_model_does() {
    live(Format::Vhdx, ImageType::Fixed, 512);
}

#[test]
fn dynamic_vhdxs_live_as_the_model_does() {
    live(Format::Vhdx, ImageType::Dynamic, 512);
}

#[test]
fn differencing_vhdxs_live_as_the_model_does() {
    live(Format::Vhdx, ImageType::Differencing, 512);
}

#[test]
fn fixed_vhdxs_with_large_sectors_live_as_the_model_does() {
    live(Format::Vhdx, ImageType::Fixed, 4096);
}

#[test]
fn dynamic_vhdxs_with_large_sectors_live_as_the_model_does() {
    live(Format::Vhdx, ImageType::Dynamic, 4096);
}

#[test]
fn differencing_vhdxs_with_large_sectors_live_as_the_model_does() {
    live(Format::Vhdx, ImageType::Differencing, 4096);
}
