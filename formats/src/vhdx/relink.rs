//! Telling a differencing image that nobody uses where its parent is now.

use std::sync::Arc;

use super::le::put;
use super::locator;
use super::metadata::{Item, PARENT_LOCATOR, TABLE_SIZE, valid_items};
use super::offline::{Content, Offline, Pages, read};
use crate::{ErrorKind, ImageError, NewParentLink, Storage};

/// Bytes of an entry of the metadata table, and of the header before the first.
const ENTRY: u64 = 32;

/// Replaces what a differencing image says of its parent (2.6.2.6), durably. A crash leaves the old words or the new ones.
///
/// The image's own content id stays, so its children stay children. That the parent is the right one is the caller's to
/// know: with another one the disk holds something else. A log that was left is replayed first.
///
/// # Errors
/// [`ErrorKind::InvalidParameter`] when the image is not differencing or the link cannot be written; what is wrong with the
/// image, or keeps it from being written; what the file says.
pub fn relink(storage: &Arc<dyn Storage>, link: &NewParentLink) -> Result<(), ImageError> {
    let mut image = Offline::open(storage)?;
    if !image.parsed.metadata.has_parent {
        let message = "the image is not a differencing one, so it has no parent to name";
        return Err(ImageError::new(ErrorKind::InvalidParameter, message));
    }
    let content = locator::encode(link)?;
    let region = image.parsed.regions.metadata;
    let items = valid_items(&**storage, region)?;
    let is_locator = |item: &Item| item.id == PARENT_LOCATOR && !item.is_user();
    let index = items.iter().position(is_locator).expect("a differencing image has a locator");
    if unchanged(&**storage, region.offset, &items[index], &content)? {
        return Ok(());
    }
    let offset = place(&items, index, content.len() as u32, region.len)?;
    let mut entry = [0; 8];
    put(&mut entry, 0, &offset.to_le_bytes());
    put(&mut entry, 4, &(content.len() as u32).to_le_bytes());
    image.begin(Content::Stays)?;
    let mut pages = Pages::default();
    pages.put(&**storage, region.offset + u64::from(offset), &content)?;
    pages.put(&**storage, region.offset + ENTRY * (1 + index as u64) + 16, &entry)?;
    image.commit(pages)?;
    image.close()
}

/// Whether the item has this content already.
fn unchanged(storage: &dyn Storage, region: u64, item: &Item, content: &[u8]) -> Result<bool, ImageError> {
    let mut old = vec![0; item.len as usize];
    read(storage, &mut old, region + u64::from(item.offset))?;
    Ok(old == content)
}

/// Where in the region item `index` may lie when it has `len` bytes: where it is, or else in the first gap.
fn place(items: &[Item], index: usize, len: u32, region_len: u32) -> Result<u32, ImageError> {
    let mut others: Vec<(u64, u64)> = items
        .iter()
        .enumerate()
        .filter(|(n, item)| *n != index && item.len != 0)
        .map(|(_, item)| (u64::from(item.offset), u64::from(item.offset) + u64::from(item.len)))
        .collect();
    others.push((region_len.into(), u64::MAX));
    others.sort_unstable();
    let fits = |start: u64| {
        let next = others.iter().find(|(_, end)| *end > start).map_or(u64::MAX, |(from, _)| *from);
        start + u64::from(len) <= next
    };
    let ends = others.iter().map(|(_, end)| *end).filter(|end| *end < region_len.into());
    // Items begin on 8 bytes here, though nothing asks for it.
    let gaps = std::iter::once(TABLE_SIZE as u64).chain(ends).map(|start| start.next_multiple_of(8));
    let current = u64::from(items[index].offset);
    std::iter::once(current).filter(|at| *at != 0).chain(gaps).find(|start| fits(*start)).map_or_else(
        || {
            let message = format!(
                "the metadata region of {region_len} bytes has no room for a parent locator of {len} bytes; convert the \
                 image to a new one"
            );
            Err(ImageError::new(ErrorKind::Unsupported, message))
        },
        |start| Ok(start as u32),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vhdx::Guid;

    const REGION: u32 = 1 << 20;

    fn items(list: &[(u32, u32)]) -> Vec<Item> {
        list.iter().map(|(offset, len)| Item::new(Guid::ZERO, *offset, *len, 0)).collect()
    }

    #[test]
    fn a_locator_stays_where_it_is_as_long_as_it_fits() {
        let list = items(&[(0x10000, 8), (0x10008, 100), (0x10100, 8)]);
        assert_eq!(place(&list, 1, 248, REGION).unwrap(), 0x10008);
        assert_eq!(place(&list, 1, 249, REGION).unwrap(), 0x10108);
    }

    #[test]
    fn a_locator_that_grows_goes_to_the_first_gap_or_is_refused() {
        let list = items(&[(0x10000, 100), (0x18000, 0xE8000), (0, 0)]);
        assert_eq!(place(&list, 0, 0x8000, REGION).unwrap(), 0x10000);
        assert_eq!(place(&list, 2, 0x1000, REGION).unwrap(), 0x10068);
        let full = items(&[(0x10000, 100), (0x10064, 0xEFF00)]);
        let error = place(&full, 0, 200, REGION).unwrap_err();
        assert!(error.message.contains("no room"), "{error}");
    }
}
