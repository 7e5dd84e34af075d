//! What the tests of the gate share: images that say of their parent what a test wants, and a witness of what is opened.
#![allow(dead_code, reason = "each test program uses another part of it")]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use formats::{
    CreateOptions, FileStorage, Format, Image, ImageType, LayerOptions, NewParentLink, OpenError,
    OpenOptions, Storage, create, open, vhd, vhdx,
};
use formats_tests::write_payload;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tempfile::TempDir;
use uuid::Uuid;

/// Size of the disks, in bytes.
pub const SIZE: u64 = 4 << 20;
/// Both formats that have chains.
pub const FORMATS: [Format; 2] = [Format::Vhd, Format::Vhdx];

/// A folder with a base image in `in/`, and room for what must not be opened in `out/`.
pub struct Scene {
    pub folder: TempDir,
    pub format: Format,
}

impl Scene {
    pub fn new(format: Format) -> Self {
        let folder = TempDir::new().unwrap();
        for name in ["in", "out"] {
            std::fs::create_dir(folder.path().join(name)).unwrap();
        }
        Self { folder, format }
    }

    /// A path below the scene; `NAME.*` gets the format's ending.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name.replace(".*", &format!(".{}", self.format)))
    }

    /// A base image that is full of `byte`.
    pub fn base(&self, name: &str, byte: u8) -> PathBuf {
        let path = self.path(name);
        create(&path, &CreateOptions::new(self.format, SIZE)).unwrap();
        let image = open(&path, &OpenOptions::default()).unwrap();
        write_payload(&*image, 0, &vec![byte; SIZE as usize]).unwrap();
        image.close().unwrap();
        path
    }

    /// A child of `parent`, made as users make it.
    pub fn child(&self, name: &str, parent: &Path) -> PathBuf {
        let path = self.path(name);
        create(&path, &CreateOptions::on_parent(self.format, parent)).unwrap();
        path
    }

    /// A child that says of its parent what the test wants.
    pub fn child_saying(&self, name: &str, link: NewParentLink) -> PathBuf {
        self.child_like(name, link, SIZE, 512)
    }

    pub fn child_like(&self, name: &str, link: NewParentLink, size: u64, sector: u32) -> PathBuf {
        let path = self.path(name);
        make(self.format, &storage(&path), size, sector, Some(link));
        path
    }

    /// What a child has to say of the image at `parent`, by other paths.
    pub fn link(&self, parent: &Path, relative: &str, absolute: &str) -> NewParentLink {
        NewParentLink {
            id: content_id(self.format, parent),
            next_id: None,
            relative: Some(relative.to_owned()),
            absolute: absolute.to_owned(),
        }
    }
}

/// Makes an image by its codec.
pub fn make(
    format: Format,
    storage: &Arc<dyn Storage>,
    virtual_size: u64,
    sector: u32,
    parent: Option<NewParentLink>,
) {
    let image_type = if parent.is_some() { ImageType::Differencing } else { ImageType::Dynamic };
    match format {
        Format::Vhd => {
            let params = vhd::CreateParams { image_type, virtual_size, block_size: None, parent };
            vhd::create(&**storage, &params).unwrap();
        }
        Format::Vhdx => {
            let params = vhdx::CreateParams {
                image_type,
                virtual_size,
                block_size: None,
                logical_sector_size: sector,
                physical_sector_size: 4096,
                log_size: None,
                parent,
            };
            vhdx::create(&**storage, &params).unwrap();
        }
        Format::Raw => panic!("raw images have no parents"),
    }
}

/// The file at `path`, made if it is not there.
pub fn storage(path: &Path) -> Arc<dyn Storage> {
    let file = File::options().read(true).write(true).create(true).truncate(false).open(path).unwrap();
    Arc::new(FileStorage::new(file))
}

/// The id by which children know an image.
pub fn content_id(format: Format, path: &Path) -> Uuid {
    let options = LayerOptions { read_only: true, ..LayerOptions::default() };
    let id = match format {
        Format::Vhd => vhd::Vhd::open_layer(storage(path), &options).unwrap().content_id(),
        Format::Vhdx => vhdx::Vhdx::open_layer(storage(path), &options).unwrap().content_id(),
        Format::Raw => None,
    };
    id.unwrap()
}

/// Gives an image another id, as if it were another image.
pub fn set_content_id(format: Format, path: &Path, id: Uuid) {
    if format == Format::Vhdx {
        let options = LayerOptions { next_content_id: Some(id), ..LayerOptions::default() };
        let image = vhdx::Vhdx::open_layer(storage(path), &options).unwrap();
        image.begin_changes().unwrap();
        image.close().unwrap();
        return;
    }
    let file = File::options().read(true).write(true).open(path).unwrap();
    for at in [0, file.metadata().unwrap().len() - 512] {
        patch_checked(&file, at, 512, 64, 68, id.as_bytes());
    }
}

/// Writes `bytes` at `field` of a structure of a VHD, and its checksum anew.
pub fn patch_checked(file: &File, at: u64, len: usize, checksum_at: usize, field: usize, bytes: &[u8]) {
    let mut raw = vec![0; len];
    file.read_exact_at(&mut raw, at).unwrap();
    raw[field..field + bytes.len()].copy_from_slice(bytes);
    raw[checksum_at..checksum_at + 4].fill(0);
    let sum = !raw.iter().map(|b| u32::from(*b)).sum::<u32>();
    raw[checksum_at..checksum_at + 4].copy_from_slice(&sum.to_be_bytes());
    file.write_all_at(&raw, at).unwrap();
}

/// Replaces a text of a child, in UTF-16, by units of the same number. No checksum covers it in either format.
pub fn replace_text(path: &Path, old: &str, new: &[u16]) {
    let bytes = |units: &[u16]| units.iter().flat_map(|u| u.to_le_bytes()).collect::<Vec<u8>>();
    let old = bytes(&old.encode_utf16().collect::<Vec<u16>>());
    let new = bytes(new);
    assert_eq!(old.len(), new.len(), "texts of one length");
    let mut content = std::fs::read(path).unwrap();
    let places: Vec<usize> =
        (0..content.len() - old.len()).filter(|at| content[*at..].starts_with(&old)).collect();
    assert!(!places.is_empty(), "the text is there");
    for at in places {
        content[at..at + old.len()].copy_from_slice(&new);
    }
    std::fs::write(path, content).unwrap();
}

/// For reading, with these places of parents.
pub fn within<const N: usize>(parents: [&Path; N]) -> OpenOptions {
    let parents = parents.iter().map(|p| p.to_path_buf()).collect();
    OpenOptions { parents, ..OpenOptions::read_only() }
}

/// The error that opening must end with.
#[track_caller]
pub fn refused(path: &Path, options: &OpenOptions) -> OpenError {
    let e = open(path, options).map(drop).expect_err("must be refused");
    let text = e.to_string();
    assert!(!text.contains('\n') && !text.contains('\u{1b}'), "one line, and nothing for a terminal: {text}");
    e
}

/// Sees which files of a folder are opened.
pub struct Witness(Inotify);

impl Witness {
    pub fn of(folder: &Path) -> Self {
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC).unwrap();
        inotify.add_watch(folder, AddWatchFlags::IN_OPEN).unwrap();
        Self(inotify)
    }

    /// What was opened since this was last asked.
    pub fn opened(&self) -> Vec<String> {
        let events = self.0.read_events().unwrap_or_default();
        events.into_iter().map(|e| e.name.unwrap_or_default().to_string_lossy().into_owned()).collect()
    }
}
