//! What a differencing disk says of its parent: the name and the eight locators of its header, and the paths that the
//! locators point to (specification, "Dynamic Disk Header Format" and "Parent Locator Entry").
//!
//! ```text
//!   header    parent unique id │ name (UTF-16, big-endian) │ 8 × { code, space, length, offset } ──┐
//!   elsewhere in the file   path (W2ru, W2ku: UTF-16, little-endian; MacX: a file URL in UTF-8) ◄──┘
//! ```
//!
//! Of what software writes, `W2ru` (relative) and `W2ku` (absolute) are read everywhere, by 7-Zip and blktap too, so
//! these two are written. Paths are only text here: opening a parent is the business of whoever names the folders in
//! which it may be.

use uuid::Uuid;

use crate::{ErrorKind, ImageError, NewParentLink, ParentLink, ParentPath, ParentPathKind, Storage};

use super::bytes::{put, u32_at, u64_at};
use super::corruption::Fault;
use super::footer::checksum;
use super::grow::PAGE;
use super::header::{CHECKSUM_AT, HEADER_LEN, Header};
use super::{Corruption, SECTOR};

/// How many locators a header has.
const LOCATOR_COUNT: usize = 8;
const LOCATORS_AT: usize = 576;
const LOCATOR_LEN: usize = 24;
const ID_AT: usize = 40;
const TIME_AT: usize = 56;
const NAME_AT: usize = 64;
const NAME_LEN: usize = 512;
/// Longest path of a parent in bytes: 4096 characters of UTF-16.
pub(super) const MAX_LOCATOR_LEN: u32 = 8192;

/// The bytes of a header.
pub(super) type RawHeader = [u8; HEADER_LEN as usize];

/// Where one of the parent's paths is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Locator {
    /// Which of the eight.
    pub(super) index: usize,
    /// Platform code, such as `W2ru`.
    pub(super) code: [u8; 4],
    /// Length of the path in bytes.
    pub(super) len: u32,
    /// The space that is reserved for it, in bytes by some writers and in sectors by others.
    space: u32,
    /// Where the path is in the file.
    pub(super) offset: u64,
}

impl Locator {
    /// The locators of a header that are in use.
    pub(super) fn all(raw: &RawHeader) -> Vec<Self> {
        (0..LOCATOR_COUNT).filter_map(|index| Self::parse(raw, index)).collect()
    }

    fn parse(raw: &RawHeader, index: usize) -> Option<Self> {
        let entry = &raw[LOCATORS_AT + LOCATOR_LEN * index..][..LOCATOR_LEN];
        let code = [entry[0], entry[1], entry[2], entry[3]];
        (code != [0; 4]).then(|| Self {
            index,
            code,
            len: u32_at(entry, 8),
            space: u32_at(entry, 4),
            offset: u64_at(entry, 16),
        })
    }

    /// Where the space ends that whoever wrote the locator may use for a longer path: new blocks keep off it. Numbers below
    /// 512 are sectors. What leaves the file (`limit`) is not believed.
    pub(super) fn reserved_end(&self, limit: u64) -> u64 {
        let space = u64::from(self.space);
        let space = if space < SECTOR { space * SECTOR } else { space };
        let end = self.offset.saturating_add(u64::from(self.len).max(space));
        if end <= limit { end } else { 0 }
    }

    /// Whether it is a path of Windows in UTF-16, relative or absolute.
    pub(super) fn is_utf16(&self) -> bool {
        matches!(&self.code, b"W2ru" | b"W2ku")
    }

    /// The path that it points to; `None` of the kinds that are not read, and of file URLs that are not UTF-8.
    pub(super) fn path(&self, storage: &dyn Storage) -> Result<Option<ParentPath>, Fault> {
        let kind = match &self.code {
            b"W2ru" => ParentPathKind::Relative,
            b"W2ku" | b"MacX" => ParentPathKind::Absolute,
            _ => return Ok(None),
        };
        let mut raw = vec![0; self.len as usize];
        storage
            .read_at(&mut raw, self.offset)
            .map_err(|e| ImageError::io(format!("reading parent locator {}", self.index), e))?;
        let text = if self.is_utf16() { Some(self.utf16(&raw)?) } else { url(raw) };
        Ok(text.filter(|text| !text.is_empty()).map(|text| ParentPath { kind, text }))
    }

    fn utf16(&self, raw: &[u8]) -> Result<String, Corruption> {
        let mut units: Vec<u16> = raw.chunks_exact(2).map(|p| u16::from_le_bytes([p[0], p[1]])).collect();
        // A terminating NUL is not asked for, but some writers count it.
        while units.last() == Some(&0) {
            units.pop();
        }
        match String::from_utf16(&units) {
            Ok(path) if !path.contains('\0') => Ok(path),
            _ => Err(Corruption::LocatorText { index: self.index }),
        }
    }
}

fn url(mut raw: Vec<u8>) -> Option<String> {
    while raw.last() == Some(&0) {
        raw.pop();
    }
    String::from_utf8(raw).ok().filter(|url| !url.contains('\0'))
}

/// The parent's name, UTF-16 big-endian up to a NUL. Only shown, and looked for inside folders of the operator's, so what
/// is not valid is replaced.
pub(super) fn parent_name(raw: &RawHeader) -> String {
    let units: Vec<u16> = raw[NAME_AT..NAME_AT + NAME_LEN]
        .chunks_exact(2)
        .map(|pair| u16::from_be_bytes([pair[0], pair[1]]))
        .take_while(|&unit| unit != 0)
        .collect();
    String::from_utf16_lossy(&units)
}

/// The parent's unique id.
pub(super) fn parent_id(raw: &RawHeader) -> Uuid {
    let mut id = [0; 16];
    id.copy_from_slice(&raw[ID_AT..ID_AT + 16]);
    Uuid::from_bytes(id)
}

/// A link in the order in which parents are to be looked for: relative paths, absolute ones, the name in the header.
pub(super) fn link_of(header: &Header, paths: &[ParentPath]) -> ParentLink {
    let of = |kind| paths.iter().filter(move |p| p.kind == kind).cloned();
    let name = ParentPath { kind: ParentPathKind::Name, text: header.parent_name.clone() };
    let paths = of(ParentPathKind::Relative)
        .chain(of(ParentPathKind::Absolute))
        .chain(Some(name).filter(|name| !name.text.is_empty()))
        .collect();
    ParentLink { format: crate::Format::Vhd, ids: vec![header.parent_id], paths }
}

/// A path of the parent, ready to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct EncodedPath {
    code: [u8; 4],
    /// The path, at most [`MAX_LOCATOR_LEN`] bytes.
    pub(super) bytes: Vec<u8>,
}

impl EncodedPath {
    /// What it takes in the file, in bytes: whole pages, as Windows has it.
    pub(super) fn space(&self) -> u64 {
        (self.bytes.len() as u64).next_multiple_of(PAGE)
    }
}

/// What is to be said of a parent, in the bytes of the format.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct EncodedLink {
    id: Uuid,
    name: [u8; NAME_LEN],
    /// The absolute path, then the relative one, as Windows orders them.
    pub(super) paths: Vec<EncodedPath>,
}

impl EncodedLink {
    /// Turns paths with slashes into those of the format.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidParameter`] for paths that are empty, too long, or hold what a VHD cannot say.
    pub(super) fn new(link: &NewParentLink) -> Result<Self, ImageError> {
        let mut paths = vec![EncodedPath { code: *b"W2ku", bytes: windows_path(&link.absolute, "")? }];
        if let Some(relative) = &link.relative {
            let plain = relative.trim_start_matches("./");
            paths.push(EncodedPath { code: *b"W2ru", bytes: windows_path(plain, ".\\")? });
        }
        let name = link.absolute.rsplit('/').next().unwrap_or_default();
        let units: Vec<u8> = name.encode_utf16().flat_map(u16::to_be_bytes).collect();
        // One more for the NUL that ends it.
        if units.is_empty() || units.len() + 2 > NAME_LEN {
            return Err(invalid(format!(
                "the parent's file name {name:?} has {} characters, must have 1 to {}",
                units.len() / 2,
                NAME_LEN / 2 - 1
            )));
        }
        let mut field = [0; NAME_LEN];
        put(&mut field, 0, &units);
        Ok(Self { id: link.id, name: field, paths })
    }

    /// Writes id, name and locators to the fields of a header, the paths being at `places` of the file, in their order,
    /// and renews its checksum. The parent's time stays 0, as Windows has it: nothing that is known goes by it.
    pub(super) fn put(&self, raw: &mut RawHeader, places: &[u64]) {
        assert_eq!(places.len(), self.paths.len(), "each path has its place");
        put(raw, ID_AT, self.id.as_bytes());
        put(raw, TIME_AT, &[0; 4]);
        put(raw, NAME_AT, &self.name);
        put(raw, LOCATORS_AT, &[0; LOCATOR_LEN * LOCATOR_COUNT]);
        for (n, (path, &offset)) in self.paths.iter().zip(places).enumerate() {
            let at = LOCATORS_AT + LOCATOR_LEN * n;
            let len = u32::try_from(path.bytes.len()).expect("paths are bounded");
            let space = u32::try_from(path.space()).expect("paths are bounded");
            put(raw, at, &path.code);
            put(raw, at + 4, &space.to_be_bytes());
            put(raw, at + 8, &len.to_be_bytes());
            put(raw, at + 16, &offset.to_be_bytes());
        }
        let sum = checksum(raw, CHECKSUM_AT);
        put(raw, CHECKSUM_AT, &sum.to_be_bytes());
    }
}

/// A path with slashes as Windows writes it, in UTF-16 little-endian.
fn windows_path(path: &str, prefix: &str) -> Result<Vec<u8>, ImageError> {
    if path.is_empty() || path.contains(['\\', '\0']) {
        return Err(invalid(format!(
            "the parent's path {path:?} must not be empty nor hold a backslash or NUL: in a VHD a backslash parts \
             folders; rename the file or its folder"
        )));
    }
    let text = format!("{prefix}{}", path.replace('/', "\\"));
    let bytes: Vec<u8> = text.encode_utf16().flat_map(u16::to_le_bytes).collect();
    if bytes.len() > MAX_LOCATOR_LEN as usize {
        return Err(invalid(format!(
            "the parent's path has {} characters, at most {} are possible; use shorter names of folders",
            bytes.len() / 2,
            MAX_LOCATOR_LEN / 2
        )));
    }
    Ok(bytes)
}

fn invalid(message: String) -> ImageError {
    ImageError::new(ErrorKind::InvalidParameter, format!("VHD: {message}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(relative: Option<&str>, absolute: &str) -> NewParentLink {
        NewParentLink {
            id: Uuid::from_u128(7),
            next_id: None,
            relative: relative.map(str::to_owned),
            absolute: absolute.to_owned(),
        }
    }

    fn text(path: &EncodedPath) -> String {
        let units: Vec<u16> = path.bytes.chunks_exact(2).map(|p| u16::from_le_bytes([p[0], p[1]])).collect();
        String::from_utf16(&units).unwrap()
    }

    #[test]
    fn paths_are_written_with_backslashes_and_relative_ones_begin_with_a_dot() {
        for (relative, wanted) in [
            ("base.vhd", ".\\base.vhd"),
            ("./base.vhd", ".\\base.vhd"),
            ("../b/x y.vhd", ".\\..\\b\\x y.vhd"),
        ] {
            let encoded = EncodedLink::new(&link(Some(relative), "/disks/base.vhd")).unwrap();
            assert_eq!(text(&encoded.paths[0]), "\\disks\\base.vhd");
            assert_eq!(text(&encoded.paths[1]), wanted);
        }
    }

    #[test]
    fn what_was_put_into_a_header_is_read_from_it() {
        let encoded = EncodedLink::new(&link(Some("ü.vhd"), "/a/ü.vhd")).unwrap();
        let mut raw = Header::dynamic(0x2000, 4, 2 << 20);
        encoded.put(&mut raw, &[0x1000, 0x3000]);
        let header = Header::parse(&raw, 512).unwrap();
        assert_eq!(header.parent_id, Uuid::from_u128(7));
        assert_eq!(header.parent_name, "ü.vhd");
        let seen: Vec<_> = header.locators.iter().map(|l| (l.code, l.len, l.offset)).collect();
        assert_eq!(seen, [(*b"W2ku", 16, 0x1000), (*b"W2ru", 14, 0x3000)]);
    }

    #[test]
    fn reserved_space_is_told_from_sectors_and_bounded_by_the_file() {
        let ends = [8, 4096, 0, 0x8000].map(|space| {
            let locator = Locator { index: 0, code: *b"W2ru", len: 16, space, offset: 0x1000 };
            locator.reserved_end(0x4000)
        });
        assert_eq!(ends, [0x2000, 0x2000, 0x1010, 0]);
    }

    #[test]
    fn paths_that_a_vhd_cannot_say_are_refused() {
        let long = format!("/{}", "x/".repeat(2100));
        let name = format!("/a/{}", "x".repeat(256));
        for absolute in ["", "/a/", "/a\\b.vhd", "/a\0b", &long, &name] {
            let e = EncodedLink::new(&link(None, absolute)).unwrap_err();
            assert_eq!(e.kind, ErrorKind::InvalidParameter, "{absolute:?}: {e}");
        }
        assert!(EncodedLink::new(&link(Some(""), "/a/b.vhd")).is_err());
        assert!(EncodedLink::new(&link(None, &format!("/a/{}", "x".repeat(255)))).is_ok());
    }
}
