//! The parent locator of a differencing image (2.6.2.6). Its paths are only ever shown, never opened from here.

use std::collections::BTreeSet;

use super::corruption::Corruption;
use super::guid::Guid;
use super::le::{bytes_at, u16_at, u32_at};

const VHDX_PARENT: Guid = Guid::from_digits(0xB04AEFB7_D19E_4A81_B789_25B8E9445913);
const MAX_PAIRS: usize = 256;
const MAX_BYTES: usize = 64 << 10;
const PATH_KEYS: [&str; 3] = ["relative_path", "volume_path", "absolute_win32_path"];

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
        let utf16 = |s: &str| s.encode_utf16().flat_map(u16::to_le_bytes).collect::<Vec<u8>>();
        let mut head = VHDX_PARENT.0.to_vec();
        head.extend([0, 0]);
        head.extend((pairs.len() as u16).to_le_bytes());
        let mut body = Vec::new();
        for (key, value) in pairs {
            let (key, value) = (utf16(key), utf16(value));
            let at = (20 + pairs.len() * 12 + body.len()) as u32;
            head.extend(at.to_le_bytes());
            head.extend((at + key.len() as u32).to_le_bytes());
            head.extend((key.len() as u16).to_le_bytes());
            head.extend((value.len() as u16).to_le_bytes());
            body.extend(key);
            body.extend(value);
        }
        head.extend(body);
        head
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
}
