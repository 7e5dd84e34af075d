//! A disk in files of a folder, a chain if it comes to that, and the bytes that it has to hold.
#![allow(dead_code, reason = "each of the tests uses its part")]

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use formats::vhdx::Vhdx;
use formats::{
    AllocState, ByteSpan, CreateOptions, FileStorage, Format, Image, ImageType, LayerOptions, OpenOptions,
    Pieces, Place, RebaseOptions, ZeroMode,
};
use formats_tests::{readers, write_payload, zero_payload};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// A reader's answer, to be the model; or that it is not here.
pub type Answer = Option<Result<Vec<u8>, String>>;

/// What a disk has to hold, and its files: the newest first.
pub struct Disk {
    pub folder: tempfile::TempDir,
    pub format: Format,
    pub chain: Vec<PathBuf>,
    pub image: Option<Arc<dyn Image>>,
    pub model: Vec<u8>,
    pub sector: u64,
    pub rng: ChaCha8Rng,
    /// It has not the size any more that it was made with. libvhdi gives a VHD the size that it had at first, and vhd-lib takes
    /// one that was larger for an error.
    pub resized: bool,
}

impl Disk {
    /// A new image that reads as zeroes.
    pub fn new(options: &CreateOptions, seed: u64) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(format!("disk-0.{}", options.format));
        formats::create(&path, options).unwrap();
        let mut disk = Self {
            folder,
            format: options.format,
            chain: vec![path],
            image: None,
            model: vec![0; options.virtual_size as usize],
            sector: options.logical_sector_size.into(),
            rng: ChaCha8Rng::seed_from_u64(seed),
            resized: false,
        };
        disk.open();
        disk
    }

    pub fn top(&self) -> &Path {
        &self.chain[0]
    }

    pub fn image(&self) -> &dyn Image {
        &**self.image.as_ref().unwrap()
    }

    pub fn notes_dir(&self) -> PathBuf {
        self.folder.path().join("notes")
    }

    pub fn open_options(&self, read_only: bool) -> OpenOptions {
        OpenOptions {
            read_only,
            parents: vec![self.folder.path().to_owned()],
            notes_dir: (!read_only).then(|| self.notes_dir()),
            ..OpenOptions::default()
        }
    }

    pub fn open(&mut self) {
        self.image = None;
        self.image = Some(formats::open(self.top(), &self.open_options(false)).unwrap());
    }

    pub fn close(&mut self) {
        let image = self.image.take().unwrap();
        image.close().unwrap();
    }

    /// Closes the disk, and has it go on in a child at `path` (below the folder) with blocks of this size.
    pub fn grow_child(&mut self, path: &str, block_size: Option<u32>, virtual_size: u64) {
        self.close();
        let path = self.folder.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        let options =
            CreateOptions { block_size, virtual_size, ..CreateOptions::on_parent(self.format, self.top()) };
        formats::create(&path, &options).unwrap();
        self.chain.insert(0, path);
        self.open();
        self.model.resize(self.image().geometry().virtual_size as usize, 0);
    }

    /// Some range of whole sectors, now and then a long one, now and then on a round offset.
    pub fn some_range(&mut self, longest: u64) -> (u64, u64) {
        let sectors = self.model.len() as u64 / self.sector;
        let most = if self.rng.random_ratio(1, 10) { longest / self.sector } else { 24 };
        let count = self.rng.random_range(1..=most.min(sectors));
        let mut first = self.rng.random_range(0..=sectors - count);
        if self.rng.random_ratio(1, 4) {
            first -= first % ((512 << 10) / self.sector);
        }
        (first * self.sector, count * self.sector)
    }

    pub fn write(&mut self, at: u64, len: u64) {
        let mut data = vec![0; len as usize];
        // Zeroes that are written are content too.
        if !self.rng.random_ratio(1, 12) {
            self.rng.fill(&mut data[..]);
        }
        write_payload(self.image(), at, &data).unwrap();
        self.model[at as usize..][..data.len()].copy_from_slice(&data);
    }

    pub fn zero(&mut self, at: u64, len: u64, mode: ZeroMode) {
        zero_payload(self.image(), at, len, mode).unwrap();
        self.model[at as usize..][..len as usize].fill(0);
    }

    /// Writes, zeroes and discards, with a flush now and then.
    pub fn scribble(&mut self, steps: u32) {
        for step in 0..steps {
            let (at, len) = self.some_range(3 << 20);
            match self.rng.random_range(0..8) {
                0 => self.zero(at, len, ZeroMode::Unmap),
                1 => self.zero(at, len, ZeroMode::Keep),
                _ => self.write(at, len),
            }
            if step % 30 == 29 {
                self.image().commit().unwrap();
                self.image().maintain(&|| ()).unwrap();
            }
        }
    }

    /// Compares all that the disk holds with the model, and what it says of its extents.
    pub fn agree(&self, when: &str) {
        let data = read_all(self.image());
        self.assert_same(&data, when);
        let image = self.image();
        let mut at = 0;
        while let Some(extent) = image.next_extent(at).unwrap() {
            assert_eq!(extent.span.offset, at, "{when}");
            let range = at as usize..(at + extent.span.len) as usize;
            if extent.state != AllocState::Data {
                assert!(self.model[range].iter().all(|b| *b == 0), "{when}: {extent:?} is not zero");
            }
            at += extent.span.len;
        }
        assert_eq!(at, self.model.len() as u64, "{when}: extents end elsewhere");
    }

    pub fn assert_same(&self, data: &[u8], who: &str) {
        assert_eq!(data.len(), self.model.len(), "{who}: another size");
        let step = self.sector as usize;
        let wrong = (0..data.len())
            .step_by(step)
            .find(|&at| data[at..(at + step).min(data.len())] != self.model[at..(at + step).min(data.len())]);
        if let Some(at) = wrong {
            let [got, want] = [data, &self.model].map(|d| format!("{:02x?}", &d[at..at + 16]));
            panic!(
                "{who}: the sector at {at:#x} of {:#x} holds {got}, not {want}; {}",
                data.len(),
                self.kept()
            );
        }
    }

    /// Keeps the files of a disk that is wrong, where asked to.
    fn kept(&self) -> String {
        match std::env::var_os("BLOCKD_KEEP") {
            Some(keep) => {
                let to = PathBuf::from(keep).join(self.folder.path().file_name().unwrap());
                copy_tree(self.folder.path(), &to);
                format!("its files are kept in {}", to.display())
            }
            None => "BLOCKD_KEEP=FOLDER keeps its files".into(),
        }
    }

    /// Every file is sound by itself, and as others see it.
    pub fn sound(&self, when: &str) {
        for path in &self.chain {
            let report = formats::check(path, None, false).unwrap();
            assert!(report.is_sound(), "{when}: {}: {report:?}", path.display());
        }
    }

    fn is_differencing(&self) -> bool {
        self.chain.len() > 1
    }

    /// All files in one folder, under names of their own, for readers that look for parents nowhere else.
    fn together(&self, folder: &Path) -> Vec<PathBuf> {
        let to = |path: &PathBuf| {
            let link = folder.join(path.file_name().unwrap());
            std::fs::hard_link(path, &link).unwrap();
            link
        };
        self.chain.iter().map(to).collect()
    }

    /// The newest of a chain of VHDXs that are all in one folder: these, or copies that are told of their new neighbours.
    fn side_by_side(&self, folder: &Path) -> PathBuf {
        if self.chain.iter().all(|path| path.parent() == self.top().parent()) {
            return self.top().to_owned();
        }
        let to = |path: &PathBuf| folder.join(path.file_name().unwrap());
        for (n, path) in self.chain.iter().enumerate().rev() {
            std::fs::copy(path, to(path)).unwrap();
            if let Some(parent) = self.chain.get(n + 1) {
                let options = RebaseOptions { parents: vec![folder.to_owned()], ..RebaseOptions::default() };
                formats::rebase(to(path), to(parent), &options).unwrap();
            }
        }
        to(&self.chain[0])
    }

    /// Has everybody read the disk who can be trusted with it, closed as it is, and compares. Returns who agreed.
    pub fn ask_others(&self) -> Vec<&'static str> {
        assert!(self.image.is_none(), "others read closed images only");
        let mut agreed = Vec::new();
        let mut compare = |who: &'static str, answer: Answer| {
            if let Some(answer) = answer {
                let data = answer.unwrap_or_else(|e| panic!("{who}: {e}; {}", self.kept()));
                self.assert_same(&data, who);
                agreed.push(who);
            }
        };
        let scratch = tempfile::tempdir_in(self.folder.path()).unwrap();
        let whole_mib = self.model.len().is_multiple_of(1 << 20);
        match self.format {
            Format::Raw => compare("read(2)", Some(std::fs::read(self.top()).map_err(|e| e.to_string()))),
            Format::Vhd => {
                if self.sizes_never_grow() {
                    compare("7-Zip", readers::seven_zip(&self.together(scratch.path())[0]));
                }
                if self.is_differencing() {
                    compare("vhd-lib", self.through_vhd_lib(scratch.path()));
                } else {
                    compare("QEMU", self.through_qemu());
                    if !self.resized {
                        compare("libvhdi", readers::libvhdi(&[self.top()]));
                    }
                }
                self.vhd_util_agrees();
            }
            Format::Vhdx => {
                let never_grow = self.sizes_never_grow();
                let known = whole_mib || self.sector == 512 && self.model.len().is_multiple_of(4096);
                if never_grow && known {
                    compare("7-Zip", readers::seven_zip(&self.side_by_side(scratch.path())));
                }
                if never_grow {
                    compare("libvhdi", self.through_libvhdi());
                }
                if never_grow && self.chain.len() <= 2 {
                    compare("dissect", readers::dissect(self.top()));
                }
                if !self.is_differencing() && self.sector == 512 {
                    compare("QEMU", self.through_qemu());
                    if let Some(said) = readers::qemu_check(self.top()) {
                        said.unwrap_or_else(|e| panic!("{e}"));
                    }
                }
            }
        }
        agreed
    }

    /// Whether no parent is smaller than its child: not everybody reads zeroes behind its end.
    fn sizes_never_grow(&self) -> bool {
        let sizes: Vec<u64> =
            self.chain.iter().map(|path| formats::info(path, None).unwrap().virtual_size).collect();
        sizes.windows(2).all(|pair| pair[0] <= pair[1])
    }

    fn through_qemu(&self) -> Answer {
        let mut answer = readers::qemu(self.top(), self.format);
        if let Some(Ok(data)) = &mut answer {
            // QEMU may round a VHD's size up to its geometry; what lies beyond is zero.
            if data.len() > self.model.len() && data[self.model.len()..].iter().all(|b| *b == 0) {
                data.truncate(self.model.len());
            }
        }
        answer
    }

    /// A chain of VHDXs as libvhdi reads it, which looks in the parent where a child says that a block is zeroes, and takes the
    /// beginning of the file for a bitmap where there is none. These blocks, and such files, are left to the others.
    fn through_libvhdi(&self) -> Answer {
        let chain: Vec<&Path> = self.chain.iter().map(PathBuf::as_path).collect();
        if !self.chain[..self.chain.len() - 1].iter().all(|path| has_bitmap(path)) {
            return None;
        }
        let mut answer = readers::libvhdi(&chain);
        if let Some(Ok(data)) = &mut answer {
            for path in &self.chain[..self.chain.len() - 1] {
                for block in zero_blocks(path) {
                    let end = block.end.min(data.len());
                    let block = block.start.min(end)..end;
                    data[block.clone()].copy_from_slice(&self.model[block]);
                }
            }
        }
        answer
    }

    /// The chain as vhd-lib flattens it, which knows blocks of one size only, and a dynamic disk below them.
    fn through_vhd_lib(&self, scratch: &Path) -> Answer {
        let infos: Vec<_> = self.chain.iter().map(|path| formats::info(path, None).unwrap()).collect();
        let alike = infos
            .iter()
            .all(|info| info.block_size == infos[0].block_size && info.virtual_size == infos[0].virtual_size);
        if !alike || self.resized || infos.last()?.image_type != ImageType::Dynamic {
            return None;
        }
        let flat = scratch.join("flat.vhd");
        let chain: Vec<&Path> = self.chain.iter().map(PathBuf::as_path).collect();
        match readers::vhd_lib_flatten(&flat, &chain)? {
            Ok(_) => readers::seven_zip(&flat),
            Err(e) => Some(Err(e)),
        }
    }

    fn vhd_util_agrees(&self) {
        for path in &self.chain {
            if formats::info(path, None).unwrap().image_type == ImageType::Fixed {
                continue;
            }
            if let Some(said) = readers::vhd_util_check(path) {
                said.unwrap_or_else(|e| panic!("{e}"));
            }
        }
    }
}

/// What a differencing VHDX says to be zeroes without having it.
fn zero_blocks(path: &Path) -> Vec<Range<usize>> {
    let storage = Arc::new(FileStorage::new(File::open(path).unwrap()));
    let options = LayerOptions { read_only: true, ..LayerOptions::default() };
    let layer = Vhdx::open_layer(storage, &options).unwrap();
    let mut pieces = Pieces::new();
    layer.map_read(ByteSpan::new(0, layer.geometry().virtual_size), &mut pieces).unwrap();
    let mut at = 0;
    let mut zeroes = Vec::new();
    for piece in pieces.as_slice() {
        let end = at + piece.len as usize;
        if piece.place == Place::Zero {
            zeroes.push(at..end);
        }
        at = end;
    }
    zeroes
}

/// Whether the first chunk of a differencing VHDX, which is all of a small one, has a sector bitmap. The place of its entry
/// is the specification's (2.5).
fn has_bitmap(path: &Path) -> bool {
    const BAT: [u8; 16] =
        [0x66, 0x77, 0xC2, 0x2D, 0x23, 0xF6, 0x00, 0x42, 0x9D, 0x64, 0x11, 0x5E, 0x9B, 0xFD, 0x4A, 0x08];
    let file = File::open(path).unwrap();
    let mut regions = [0; 4096];
    file.read_exact_at(&mut regions, 192 << 10).unwrap();
    let region = regions[16..].chunks(32).find(|region| region[..16] == BAT).unwrap();
    let table = u64::from_le_bytes(region[16..24].try_into().unwrap());
    let info = formats::info(path, None).unwrap();
    let chunk = (u64::from(info.logical_sector_size) << 23) / u64::from(info.block_size);
    let mut entry = [0; 8];
    file.read_exact_at(&mut entry, table + chunk * 8).unwrap();
    entry[0] & 7 == 6
}

/// All that an image holds.
pub fn read_all(image: &dyn Image) -> Vec<u8> {
    let size = image.geometry().virtual_size;
    let mut data = vec![0; size as usize];
    let mut pieces = Pieces::new();
    let mut at = 0;
    while at < size {
        let len = (size - at).min(4 << 20);
        pieces.clear();
        image.map_read(ByteSpan::new(at, len), &mut pieces).unwrap();
        let end = at + len;
        for piece in pieces.as_slice() {
            let part = &mut data[at as usize..(at + piece.len) as usize];
            match piece.place {
                Place::File { file, offset } => {
                    image.files()[usize::from(file.0)].read_at(part, offset).unwrap();
                }
                Place::Zero => {}
                Place::Parent => panic!("only whole chains are read"),
            }
            at += piece.len;
        }
        assert_eq!(at, end, "the map left a gap");
    }
    data
}

fn copy_tree(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_tree(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}
