//! A closed VHD that is resized, compacted and given other parents between sessions does what a flat array of bytes does.
#![allow(clippy::unwrap_used, reason = "what fails in a helper of a test fails the test")]

mod vhd_offline;

use std::sync::Arc;

use formats::vhd::{self, CreateParams, Vhd};
use formats::{ByteSpan, Chain, ErrorKind, Image, ImageType, LayerOptions, ZeroMode};
use formats_tests::{SimStorage, read_payload, write_payload, zero_payload};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use vhd_offline::{arc, link, see, sound};

/// A disk, over a parent or not, and what it holds.
struct World {
    rng: ChaCha8Rng,
    sim: Arc<SimStorage>,
    parent: Option<(Arc<SimStorage>, Vec<u8>)>,
    model: Vec<u8>,
    block: u64,
    tag: u8,
}

fn create(image_type: ImageType, block: Option<u32>, size: u64) -> Arc<SimStorage> {
    let sim = SimStorage::new();
    let parent = (image_type == ImageType::Differencing).then(|| link(1));
    let block_size = block.filter(|_| image_type != ImageType::Fixed);
    vhd::create(&*sim, &CreateParams { image_type, virtual_size: size, block_size, parent }).unwrap();
    sim
}

fn layer(sim: &Arc<SimStorage>, read_only: bool) -> Arc<Vhd> {
    let options = LayerOptions { read_only, ..LayerOptions::default() };
    Arc::new(Vhd::open_layer(arc(sim), &options).unwrap())
}

impl World {
    fn new(seed: u64, image_type: ImageType, block: u32, size: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let sim = create(image_type, Some(block), size);
        let mut model = vec![0; size as usize];
        let parent = (image_type == ImageType::Differencing).then(|| {
            let parent_size = [size / 2 / 512 * 512, size, size * 2][seed as usize % 3];
            let below = create(ImageType::Dynamic, Some(4096), parent_size);
            let image = layer(&below, false);
            let mut content = vec![0; parent_size as usize];
            for _ in 0..20 {
                let at = rng.random_range(0..parent_size / 512) * 512;
                content[at as usize..at as usize + 512].fill(0xbb);
                write_payload(&*image, at, &[0xbb; 512]).unwrap();
            }
            image.close().unwrap();
            let shared = content.len().min(model.len());
            model[..shared].copy_from_slice(&content[..shared]);
            (below, content)
        });
        Self { rng, sim, parent, model, block: u64::from(block), tag: 1 }
    }

    fn open(&self, read_only: bool) -> Arc<dyn Image> {
        let top = layer(&self.sim, read_only);
        match &self.parent {
            Some((parent, _)) => Arc::new(Chain::new(top, vec![layer(parent, true)]).unwrap()),
            None => top,
        }
    }

    /// A session of writes and zeroes, which may end in the death of the process.
    fn session(&mut self) {
        let image = self.open(false);
        let sectors = self.model.len() as u64 / 512;
        for _ in 0..self.rng.random_range(1..6) {
            let first = self.rng.random_range(0..sectors);
            let count = self.rng.random_range(1..=(sectors - first).min(24));
            let range = (first * 512) as usize..((first + count) * 512) as usize;
            if self.rng.random_range(0..3) == 0 {
                zero_payload(&*image, first * 512, count * 512, ZeroMode::Unmap).unwrap();
                self.model[range].fill(0);
            } else {
                let mut data = vec![0; range.len()];
                self.rng.fill(&mut data[..]);
                write_payload(&*image, first * 512, &data).unwrap();
                self.model[range].copy_from_slice(&data);
            }
        }
        if self.rng.random_range(0..3) > 0 { image.close() } else { image.commit() }.unwrap();
    }

    /// Resizes, with the parent at hand or without.
    fn resize(&self, size: u64, known: bool) -> Result<(), formats::ImageError> {
        let zero = |at: ByteSpan| {
            let content = self.parent.as_ref().map_or(&[][..], |(_, content)| content);
            let of = |at: u64| content.len().min(at as usize);
            Ok(content[of(at.offset)..of(at.offset + at.len)].iter().all(|&b| b == 0))
        };
        if known {
            vhd::resize_over(&arc(&self.sim), size, true, &zero)
        } else {
            vhd::resize(&arc(&self.sim), size, true)
        }
    }

    fn grow(&mut self) {
        let most = [3, 40, 600][self.rng.random_range(0..3)];
        let more = self.rng.random_range(1..=most) * 512;
        let size = self.model.len() as u64 + more;
        let known = self.rng.random_range(0..4) > 0;
        self.resize(size, known).unwrap();
        self.model.resize(size as usize, 0);
    }

    fn shrink(&mut self) {
        let old = self.model.len() as u64;
        let size = old - 512 * self.rng.random_range(0..=(old / 512 - 1).min(60));
        let tail = self.model[size as usize..].chunks(512).position(|s| s.iter().any(|&b| b != 0));
        let in_the_way = tail.map(|sector| size + sector as u64 * 512);
        let (before, known) = (self.sim.contents().fingerprint(), self.rng.random_range(0..4) > 0);
        match self.resize(size, known) {
            Ok(()) => {
                assert_eq!(in_the_way, None, "data was cut off");
                self.model.truncate(size as usize);
            }
            Err(e) if known || self.parent.is_none() => {
                let at = in_the_way.unwrap_or_else(|| panic!("nothing was in the way of {size}: {e}"));
                assert_eq!(e.kind, ErrorKind::InvalidParameter);
                let said = e.message.split("data at ").nth(1).unwrap().split(';').next().unwrap();
                let said: u64 = said.parse().unwrap();
                // Of what is the parent's, the first of several sectors may be named.
                assert!(said == at || (self.parent.is_some() && said < at), "{e}: {at}");
                assert_eq!(self.sim.contents().fingerprint(), before);
            }
            Err(e) => assert_eq!(e.kind, ErrorKind::InvalidParameter),
        }
    }

    fn compact(&mut self) {
        let old = self.sim.contents().len();
        let mut last = (0, 0);
        let outcome = vhd::compact(&arc(&self.sim), &mut |done, total| {
            assert!(done >= last.0 && total >= last.1 && done <= total, "{last:?}, {done} {total}");
            last = (done, total);
        });
        let (outcome, new) = (outcome.unwrap(), self.sim.contents().len());
        assert!(new <= old && outcome.freed_bytes >= old - new, "{outcome:?} from {old} to {new}");
        assert_eq!(last.0, last.1, "the progress ends where it should");
        let again = vhd::compact(&arc(&self.sim), &mut |_, _| ()).unwrap();
        assert_eq!((again.freed_bytes, again.moved_bytes), (0, 0), "there was more to do");
    }

    fn step(&mut self) {
        match self.rng.random_range(0..12) {
            0..5 => self.session(),
            5 | 6 => self.grow(),
            7 | 8 => self.shrink(),
            9 | 10 => self.compact(),
            _ if self.parent.is_some() => {
                self.tag = self.rng.random_range(2..200);
                vhd::relink(&*self.sim, &link(self.tag)).unwrap();
            }
            _ => {}
        }
    }

    fn verify(&self) {
        sound("model", &self.sim, false);
        let size = self.model.len();
        let image = self.open(true);
        assert_eq!(image.geometry().virtual_size, size as u64);
        assert!(read_payload(&*image, 0, size).unwrap() == self.model, "the content differs");
        let seen = see(&self.sim.contents()).unwrap();
        assert_eq!(seen.size, size as u64);
        for (sector, data) in &seen.sectors {
            let at = *sector as usize * 512;
            assert!(self.model[at..at + 512] == data[..], "sector {sector} as others see it");
        }
        if let Some(link) = &seen.link {
            assert_eq!((link.id[0], &link.name), (self.tag, &format!("parent{}.vhd", self.tag)));
            assert_eq!(link.paths.len(), 2);
        }
    }
}

#[test]
fn random_changes_of_closed_disks_agree_with_a_flat_model() {
    let mut steps = 0;
    for seed in 0..40 {
        for (image_type, block, size) in [
            (ImageType::Fixed, 0, 40 * 512),
            (ImageType::Dynamic, 4096, 20 * 4096 + 1024),
            (ImageType::Dynamic, 512, 70 * 512),
            (ImageType::Dynamic, 65536, 5 * 65536),
            (ImageType::Differencing, 4096, 20 * 4096 + 512),
            (ImageType::Differencing, 16384, 6 * 16384),
            (ImageType::Differencing, 8 << 20, 100 * 1024),
        ] {
            let mut world = World::new(seed, image_type, block, size);
            for step in 0..25 {
                world.step();
                let at = std::panic::AssertUnwindSafe(|| world.verify());
                if let Err(e) = std::panic::catch_unwind(at) {
                    println!("seed {seed}, {image_type} of blocks of {}, step {step}", world.block);
                    std::panic::resume_unwind(e);
                }
                steps += 1;
            }
        }
    }
    println!("{steps} steps");
}

#[test]
fn sizes_that_cannot_be_are_refused_and_change_nothing() {
    for (image_type, block) in
        [(ImageType::Fixed, None), (ImageType::Dynamic, Some(4096)), (ImageType::Differencing, Some(4096))]
    {
        let sim = create(image_type, block, 65536);
        let before = sim.contents().fingerprint();
        for size in [0, 513, (2040 << 30) + 512, u64::MAX - 511] {
            let e = vhd::resize(&arc(&sim), size, true).unwrap_err();
            assert_eq!(e.kind, ErrorKind::InvalidParameter, "{size}: {e}");
        }
        let e = vhd::resize(&arc(&sim), 32768, false).unwrap_err();
        assert_eq!(e.kind, ErrorKind::InvalidParameter);
        assert!(e.message.contains("--shrink"), "{e}");
        if block.is_some() {
            let e = vhd::resize(&arc(&sim), 20 << 30, false).unwrap_err();
            assert!(e.kind == ErrorKind::InvalidParameter && e.message.contains("larger blocks"), "{e}");
        }
        if image_type != ImageType::Differencing {
            assert_eq!(vhd::relink(&*sim, &link(2)).unwrap_err().kind, ErrorKind::InvalidParameter);
        }
        vhd::resize(&arc(&sim), 65536, false).unwrap();
        assert_eq!(sim.contents().fingerprint(), before);
    }
}

#[test]
fn the_largest_disk_is_reached_by_growing() {
    let sim = create(ImageType::Dynamic, Some(2 << 20), 10 << 20);
    let image = layer(&sim, false);
    write_payload(&*image, 3 << 20, &[7; 1024]).unwrap();
    image.close().unwrap();
    vhd::resize(&arc(&sim), 2040 << 30, false).unwrap();
    let image = layer(&sim, false);
    assert_eq!(image.geometry().virtual_size, 2040 << 30);
    write_payload(&*image, (2040 << 30) - 1024, &[8; 1024]).unwrap();
    image.close().unwrap();
    let image = layer(&sim, true);
    assert_eq!(read_payload(&*image, 3 << 20, 1024).unwrap(), [7; 1024]);
    assert_eq!(read_payload(&*image, (2040 << 30) - 1024, 1024).unwrap(), [8; 1024]);
    sound("largest", &sim, true);
}

#[test]
fn disks_that_are_not_to_be_touched_are_not() {
    let mut disk = vhd_offline::empty(ImageType::Differencing, 65536);
    for at in [0, disk.len() - 512] {
        disk.write(at + 84, &[1]);
        vhd_offline::seal(&mut disk, at, 512, 64);
    }
    let mut cut = vhd_offline::empty(ImageType::Differencing, 65536);
    cut.set_len(cut.len() - 512);
    for (disk, kind) in [(disk, ErrorKind::Unsupported), (cut, ErrorKind::NeedsRepair)] {
        let sim = SimStorage::from_disk(disk);
        let before = sim.contents().fingerprint();
        let kinds = [
            vhd::resize(&arc(&sim), 1 << 20, true).unwrap_err().kind,
            vhd::compact(&arc(&sim), &mut |_, _| ()).unwrap_err().kind,
            vhd::relink(&*sim, &link(2)).unwrap_err().kind,
        ];
        assert_eq!(kinds, [kind; 3]);
        assert_eq!(sim.contents().fingerprint(), before);
    }
}
