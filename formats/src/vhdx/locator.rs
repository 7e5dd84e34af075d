//! The parent locator of a differencing image (2.6.2.6). Its paths are only ever shown, never opened from here.

use std::collections::BTreeSet;

use uuid::Uuid;

use super::corruption::Corruption;
use super::guid::Guid;
use super::le::{bytes_at, u16_at, u32_at};
use crate::{ErrorKind, Format, ImageError, NewParentLink, ParentLink, ParentPath, ParentPathKind};

const VHDX_PARENT: Guid = Guid::from_digits(0xB04AEFB7_D19E_4A81_B789_25B8E9445913);
const MAX_PAIRS: usize = 256;
const MAX_BYTES: usize = 64 << 10;
const RELATIVE: &str = "relative_path";
const ABSOLUTE: &str = "absolute_win32_path";
const PATH_KEYS: [&str; 3] = [RELATIVE, "volume_path", ABSOLUTE];
/// Bytes of a path that are written at most, before it becomes UTF-16.
const MAX_PATH: usize = 4096;

/// Who the parent is, as the child has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParentLocator {
    /// The parent's DataWriteGuid when this image was made.
    pub linkage: Guid,
    /// A second one, while a merge is under way.
    pub linkage2: Option<Guid>,
    /// Key and text of each path, in the order in which they are to be tried.
    pub paths: Vec<(String, String)>,
}

fn bad(reason: impl Into<String>) -> Corruption {
    Corruption::Locator { reason: reason.into() }
}

impl ParentLocator {
    /// Decodes and validates an item's bytes.
    pub(super) fn decode(item: &[u8]) -> Result<Self, Corruption> {
        if item.len() < 20 || item.len() > MAX_BYTES {
            return Err(bad(format!("it has {} bytes; 20 to {MAX_BYTES} are allowed", item.len())));
        }
        let kind = Guid(bytes_at(item, 0));
        if kind != VHDX_PARENT {
            return Err(bad(format!("LocatorType {kind} is not that of a VHDX parent")));
        }
        let count = usize::from(u16_at(item, 18));
        if count > MAX_PAIRS || 20 + count * 12 > item.len() {
            let len = item.len();
            return Err(bad(format!(
                "KeyValueCount {count} does not fit {len} bytes or the limit {MAX_PAIRS}"
            )));
        }
        let mut keys = BTreeSet::new();
        let mut pairs = Vec::with_capacity(count);
        for index in 0..count {
            let entry = &item[20 + index * 12..32 + index * 12];
            let key = text(item, u32_at(entry, 0), u16_at(entry, 8), index, "key")?;
            let value = text(item, u32_at(entry, 4), u16_at(entry, 10), index, "value")?;
            if !keys.insert(key.clone()) {
                return Err(bad(format!("key {key:?} is there twice")));
            }
            pairs.push((key, value));
        }
        Self::from_pairs(&pairs)
    }

    fn from_pairs(pairs: &[(String, String)]) -> Result<Self, Corruption> {
        let find = |key: &str| pairs.iter().find(|(k, _)| k == key).map(|(_, v)| v.as_str());
        let guid = |key: &str, value: &str| {
            Guid::parse(value).ok_or_else(|| bad(format!("{key} is {value:?}, which is no GUID")))
        };
        let linkage = find("parent_linkage").ok_or_else(|| bad("it has no parent_linkage"))?;
        let linkage = guid("parent_linkage", linkage)?;
        // Some versions of Windows write zeroes where there is none.
        let linkage2 = match find("parent_linkage2") {
            Some(value) => Some(guid("parent_linkage2", value)?).filter(|g| !g.is_zero()),
            None => None,
        };
        let paths: Vec<_> =
            PATH_KEYS.iter().filter_map(|key| Some(((*key).to_owned(), find(key)?.to_owned()))).collect();
        if paths.is_empty() {
            return Err(bad("it names no path of the parent"));
        }
        Ok(Self { linkage, linkage2, paths })
    }

    /// What it says, in the words that all formats share.
    pub(super) fn link(&self) -> ParentLink {
        let path = |(key, text): &(String, String)| {
            let kind = if key == RELATIVE { ParentPathKind::Relative } else { ParentPathKind::Absolute };
            ParentPath { kind, text: text.clone() }
        };
        ParentLink {
            format: Format::Vhdx,
            ids: std::iter::once(self.linkage)
                .chain(self.linkage2)
                .map(|id| Uuid::from_bytes_le(id.0))
                .collect(),
            paths: self.paths.iter().map(path).collect(),
        }
    }
}

/// The metadata item that names a parent (2.6.2.6), at most some 17 KiB long.
///
/// Keys come in the order in which Windows writes them. A path of this machine has no drive, so `absolute_win32_path` is
/// the path with its slashes turned: a reader that turns them back finds the file, and Windows takes it as one of the
/// current drive, after `relative_path` has been tried.
///
/// # Errors
/// [`ErrorKind::InvalidParameter`] for a path that cannot be said so.
pub(super) fn encode(link: &NewParentLink) -> Result<Vec<u8>, ImageError> {
    let id = |id: &Uuid| format!("{{{}}}", id.hyphenated());
    let mut pairs = vec![("parent_linkage", id(&link.id))];
    pairs.extend(link.next_id.as_ref().map(|next| ("parent_linkage2", id(next))));
    if let Some(path) = &link.relative {
        let path = turned(path)?;
        // As Windows does it: a name in the same folder begins with a dot.
        let here = !path.starts_with(".\\") && !path.starts_with("..\\");
        pairs.push((RELATIVE, if here { format!(".\\{path}") } else { path }));
    }
    pairs.push((ABSOLUTE, turned(&link.absolute)?));
    Ok(encode_pairs(&pairs))
}

/// A path with backslashes for its slashes.
fn turned(path: &str) -> Result<String, ImageError> {
    let reason = if path.is_empty() {
        "it is empty"
    } else if path.len() > MAX_PATH {
        "it is longer than 4096 bytes"
    } else if path.contains('\\') {
        "it contains a backslash, which parts folders there"
    } else if path.contains('\0') {
        "it contains a NUL"
    } else {
        return Ok(path.replace('/', "\\"));
    };
    Err(ImageError::new(
        ErrorKind::InvalidParameter,
        format!("{path:?} can't be written into a VHDX as the path of its parent: {reason}"),
    ))
}

fn encode_pairs(pairs: &[(&str, String)]) -> Vec<u8> {
    let utf16 = |text: &str| text.encode_utf16().flat_map(u16::to_le_bytes).collect::<Vec<u8>>();
    let mut head = VHDX_PARENT.0.to_vec();
    head.extend([0, 0]);
    head.extend((pairs.len() as u16).to_le_bytes());
    let texts = 20 + pairs.len() * 12;
    let mut body = Vec::new();
    for (key, value) in pairs {
        let (key, value) = (utf16(key), utf16(value));
        let at = (texts + body.len()) as u32;
        head.extend(at.to_le_bytes());
        head.extend((at + key.len() as u32).to_le_bytes());
        head.extend((key.len() as u16).to_le_bytes());
        head.extend((value.len() as u16).to_le_bytes());
        body.extend(key);
        body.extend(value);
    }
    head.extend(body);
    assert!(head.len() <= MAX_BYTES, "paths are limited");
    head
}

fn text(item: &[u8], offset: u32, len: u16, index: usize, what: &str) -> Result<String, Corruption> {
    let range = (offset as usize).checked_add(len.into()).map(|end| offset as usize..end);
    let bytes = range.and_then(|r| item.get(r)).filter(|b| !b.is_empty() && b.len() % 2 == 0);
    let bytes = bytes.ok_or_else(|| {
        bad(format!(
            "the {what} of pair {index} at {offset:#x} of {len} bytes is empty, odd or outside the item"
        ))
    })?;
    let units = bytes.chunks_exact(2).map(|c| u16::from_le_bytes([c[0], c[1]]));
    let text: Result<String, _> = char::decode_utf16(units).collect();
    let text = text.map_err(|_| bad(format!("the {what} of pair {index} is not valid UTF-16")))?;
    if text.contains('\0') {
        return Err(bad(format!("the {what} of pair {index} contains a NUL")));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item(pairs: &[(&str, &str)]) -> Vec<u8> {
        encode_pairs(&pairs.iter().map(|(key, value)| (*key, (*value).to_owned())).collect::<Vec<_>>())
    }

    const LINKAGE: (&str, &str) = ("parent_linkage", "{83ed3e5e-5a8e-4a4e-9b5b-2c9f4f1f1c11}");

    #[test]
    fn paths_come_in_the_order_of_the_specification() {
        let paths = [("absolute_win32_path", "C:\\a b\\p.vhdx"), LINKAGE, ("relative_path", ".\\p.vhdx")];
        let locator = ParentLocator::decode(&item(&paths)).unwrap();
        let keys: Vec<_> = locator.paths.iter().map(|(k, _)| k.as_str()).collect();
        assert_eq!(keys, ["relative_path", "absolute_win32_path"]);
    }

    #[test]
    fn a_zero_second_linkage_is_none() {
        let zero = ("parent_linkage2", "{00000000-0000-0000-0000-000000000000}");
        let locator = ParentLocator::decode(&item(&[LINKAGE, zero, ("relative_path", "p")])).unwrap();
        assert_eq!(locator.linkage2, None);
    }

    #[test]
    fn unsound_locators_are_refused_by_name() {
        let cases = [
            (item(&[("relative_path", "p")]), "no parent_linkage"),
            (item(&[LINKAGE]), "names no path"),
            (item(&[LINKAGE, LINKAGE, ("relative_path", "p")]), "twice"),
            (item(&[("parent_linkage", "x"), ("relative_path", "p")]), "no GUID"),
            (item(&[LINKAGE, ("relative_path", "p\0q")]), "NUL"),
            (item(&[LINKAGE])[..30].to_vec(), "KeyValueCount"),
            (vec![0; 20], "LocatorType"),
            (vec![0; 19], "19 bytes"),
        ];
        for (bytes, expected) in cases {
            let error = ParentLocator::decode(&bytes).unwrap_err().to_string();
            assert!(error.contains(expected), "{error} / {expected}");
        }
    }

    #[test]
    fn what_is_written_of_a_parent_is_read_again() {
        let id = Uuid::from_u128(0x83ed3e5e_5a8e_4a4e_9b5b_2c9f4f1f1c11);
        let next = Uuid::from_u128(0x11223344_5566_7788_99aa_bbccddeeff00);
        for (relative, written) in [("base.vhdx", ".\\base.vhdx"), ("../a b/ü.vhdx", "..\\a b\\ü.vhdx")] {
            let link = NewParentLink {
                id,
                next_id: Some(next),
                relative: Some(relative.into()),
                absolute: "/srv/a b/ü.vhdx".into(),
            };
            let locator = ParentLocator::decode(&encode(&link).unwrap()).unwrap();
            assert_eq!(locator.linkage.to_string(), "83ed3e5e-5a8e-4a4e-9b5b-2c9f4f1f1c11");
            let read = locator.link();
            assert_eq!((read.format, &read.ids[..]), (Format::Vhdx, &[id, next][..]));
            let paths: Vec<_> = read.paths.iter().map(|p| (p.kind, p.text.as_str())).collect();
            let expected =
                [(ParentPathKind::Relative, written), (ParentPathKind::Absolute, "\\srv\\a b\\ü.vhdx")];
            assert_eq!(paths, expected);
        }
    }

    #[test]
    fn a_path_that_backslashes_would_change_is_refused() {
        for path in ["", "/a\\b", "/a\0", &"/a".repeat(2049)] {
            let link = NewParentLink {
                id: Uuid::from_u128(1),
                next_id: None,
                relative: None,
                absolute: path.into(),
            };
            assert_eq!(encode(&link).unwrap_err().kind, ErrorKind::InvalidParameter, "{path:?}");
        }
    }
}
