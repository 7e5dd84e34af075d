//! Children that are written to, killed, resized, compacted and relinked in turns, against a flat model.

use std::sync::Arc;

use formats::vhdx::{Vhdx, check, compact, inspect, relink, resize, resize_over};
use formats::{Chain, ErrorKind, Image, ImageType, LayerOptions, NotesFile, ZeroMode};
use formats_tests::{SimStorage, read_payload, write_payload, zero_payload};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::image::{MIB, Taken, create, link, shared};

struct Bench {
    parent: Arc<SimStorage>,
    child: Arc<SimStorage>,
    notes: Arc<SimStorage>,
    model: Vec<u8>,
    sector: usize,
}

impl Bench {
    fn new(random: &mut ChaCha8Rng, parent_size: u64, size: u64, sector: u32) -> Self {
        let parent = create(ImageType::Dynamic, parent_size, sector);
        let image = Vhdx::open(shared(&parent), false).unwrap();
        let mut model = vec![0; parent_size as usize];
        for _ in 0..10 {
            let at = random.random_range(0..parent_size / 4096 - 40) * 4096;
            let data: Vec<u8> = (0..random.random_range(1..40) * 4096).map(|_| random.random()).collect();
            write_payload(&image, at, &data).unwrap();
            model[at as usize..at as usize + data.len()].copy_from_slice(&data);
        }
        image.close().unwrap();
        model.resize(size as usize, 0);
        let child = create(ImageType::Differencing, size, sector);
        Self { parent, child, notes: SimStorage::new(), model, sector: sector as usize }
    }

    fn open(&self) -> Chain {
        let notes = NotesFile {
            storage: self.notes.clone(),
            boot_id: "11111111-2222-4333-8444-555555555555".parse().unwrap(),
        };
        let options = LayerOptions { notes: Some(notes), ..LayerOptions::default() };
        let top = Arc::new(Vhdx::open_layer(shared(&self.child), &options).unwrap());
        let base = Arc::new(Vhdx::open(shared(&self.parent), true).unwrap());
        Chain::new(top, vec![base]).unwrap()
    }

    /// Some writes, and an end: a close, or the death of the process.
    fn use_it(&mut self, random: &mut ChaCha8Rng) {
        let image = self.open();
        for _ in 0..10 {
            let at = random.random_range(0..self.model.len() / self.sector) * self.sector;
            let most = if random.random_ratio(1, 4) { 2 << 20 } else { 20 * self.sector };
            let len = random.random_range(1..=most / self.sector) * self.sector;
            let len = len.min(self.model.len() - at);
            match random.random_range(0..6) {
                0..3 => {
                    let data: Vec<u8> = (0..len).map(|_| random.random()).collect();
                    write_payload(&image, at as u64, &data).unwrap();
                    self.model[at..at + len].copy_from_slice(&data);
                }
                3 => {
                    let mode = if random.random() { ZeroMode::Unmap } else { ZeroMode::Keep };
                    zero_payload(&image, at as u64, len as u64, mode).unwrap();
                    self.model[at..at + len].fill(0);
                }
                4 => image.maintain(&|| ()).unwrap(),
                _ => image.commit().unwrap(),
            }
        }
        if random.random_ratio(2, 3) {
            image.close().unwrap();
        }
    }

    fn size_it(&mut self, random: &mut ChaCha8Rng, unfinished: bool) {
        let size = random.random_range(1..=12 * MIB as usize / self.sector) * self.sector;
        if unfinished {
            // What the notes know would be lost.
            let refused = resize(&shared(&self.child), size as u64, true).unwrap_err();
            assert_eq!(refused.kind, ErrorKind::NeedsRepair);
            return;
        }
        let emptied = size < self.model.len() && random.random();
        if emptied {
            let image = self.open();
            let len = self.model.len() - size;
            zero_payload(&image, size as u64, len as u64, ZeroMode::Unmap).unwrap();
            image.close().unwrap();
            self.model[size..].fill(0);
        }
        let base = Vhdx::open(shared(&self.parent), true).unwrap();
        let knows_parent: bool = random.random();
        let done = if !knows_parent {
            resize(&shared(&self.child), size as u64, true)
        } else {
            resize_over(&shared(&self.child), size as u64, true, &|span| {
                let inside = base.geometry().virtual_size.saturating_sub(span.offset).min(span.len);
                Ok(read_payload(&base, span.offset, inside as usize)?.iter().all(|b| *b == 0))
            })
        };
        let lost = self.model.get(size..).is_some_and(|tail| tail.iter().any(|b| *b != 0));
        assert!(!lost || done.is_err(), "data was cut off");
        if size > self.model.len() || (emptied && knows_parent) {
            done.as_ref().unwrap();
        }
        if done.is_ok() {
            self.model.resize(size, 0);
        }
    }
}

#[test]
fn children_that_die_and_are_resized_and_compacted_keep_every_write() {
    let (mut cut, mut moved) = (0, 0);
    for seed in 0..24 {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let sector = if seed % 3 == 0 { 4096 } else { 512 };
        let mut bench = Bench::new(&mut random, 8 * MIB + 4096, 6 * MIB + 12288, sector);
        for round in 0..12 {
            bench.use_it(&mut random);
            let unfinished = inspect(&shared(&bench.child)).unwrap().facts.was_dirty;
            let before = bench.model.len();
            let what = random.random_range(0..4);
            match what {
                0 | 1 => bench.size_it(&mut random, unfinished),
                2 => moved += compact(&shared(&bench.child), &mut |_, _| ()).unwrap().moved_bytes,
                _ => relink(&shared(&bench.child), &link(&"x".repeat(round * 40 + 1))).unwrap(),
            }
            cut += u32::from(bench.model.len() < before);
            let image = bench.open();
            assert_eq!(image.geometry().virtual_size, bench.model.len() as u64);
            let read = read_payload(&image, 0, bench.model.len()).unwrap();
            let differs = (0..read.len()).find(|at| read[*at] != bench.model[*at]);
            assert_eq!(differs, None, "seed {seed}, {round}: operation {what}, unfinished: {unfinished}");
            image.close().unwrap();
            // A killed process leaves space that nothing uses.
            assert!(check(shared(&bench.child), round % 2 == 0).unwrap().is_sound());
            let base = Taken::of(&bench.parent).content(&[]);
            assert!(
                Taken::of(&bench.child).content(&base) == bench.model,
                "seed {seed}, {round}, taken apart"
            );
        }
    }
    println!("{cut} were made smaller, {moved} bytes were moved");
    assert!(cut > 5 && moved > 0);
}
