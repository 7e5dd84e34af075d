//! A differencing image together with its parents, as one disk.
//!
//! ```text
//!   read   layer 0 ─► its own sectors │ zeroes │ "the parent has it" ─► layer 1 ─► … ─► the base, which has an answer
//!   write  layer 0 alone: the parents never change
//! ```
//!
//! The codecs know nothing of each other: a layer answers [`Place::Parent`] for what it does not have, and the chain asks
//! the next one. A parent may be smaller than its child (what it lacks reads as zeroes) or larger (it is clipped).

use std::sync::Arc;

use crate::{
    AllocState, ByteSpan, ErrorKind, Extent, FileIndex, Format, Geometry, Image, ImageError, ImageType,
    ParentLink, Piece, Pieces, Place, Storage, SyncToken, ZeroMode,
};

/// The most images of a chain, the first child and the base included.
pub const CHAIN_MAX: usize = 64;

/// An image that can be the top of a chain.
pub trait Layer: Image {
    /// [`Image::map_zero`] for a layer over a parent. `below` tells whether the parent reads as zeroes throughout: where
    /// the layer holds nothing, nothing needs to be done then.
    fn map_zero_over(
        &self,
        at: ByteSpan,
        mode: ZeroMode,
        below: &dyn Fn(ByteSpan) -> Result<bool, ImageError>,
        out: &mut Pieces,
    ) -> Result<(), ImageError>;
}

/// A differencing image on its parents.
#[derive(Debug)]
pub struct Chain {
    top: Arc<dyn Layer>,
    /// The top first, the base last.
    layers: Vec<Arc<dyn Image>>,
    sizes: Vec<u64>,
    files: Vec<Arc<dyn Storage>>,
}

impl Chain {
    /// Puts `top` on its `parents`, the nearest first. That they are the right ones is the caller's to know.
    ///
    /// # Errors
    /// [`ErrorKind::Parent`] when there are too many ([`CHAIN_MAX`]), when one but the last is no differencing image or the
    /// last is one, and when sectors differ in size.
    pub fn new(top: Arc<dyn Layer>, parents: Vec<Arc<dyn Image>>) -> Result<Self, ImageError> {
        let mut layers: Vec<Arc<dyn Image>> = vec![top.clone()];
        layers.extend(parents);
        let refuse = |message: String| Err(ImageError::new(ErrorKind::Parent, message));
        if layers.len() > CHAIN_MAX {
            return refuse(format!(
                "the chain has {} images; at most {CHAIN_MAX} are possible",
                layers.len()
            ));
        }
        for (level, layer) in layers.iter().enumerate() {
            let last = level + 1 == layers.len();
            if last == (layer.image_type() == ImageType::Differencing) {
                return refuse(format!(
                    "image {level} of a chain of {} is a {} one",
                    layers.len(),
                    layer.image_type()
                ));
            }
        }
        let sector = top.geometry().logical_sector_size;
        if let Some(other) = layers.iter().map(|l| l.geometry().logical_sector_size).find(|s| *s != sector) {
            return refuse(format!("the image has sectors of {sector} bytes, and a parent of {other}"));
        }
        let sizes = layers.iter().map(|l| l.geometry().virtual_size).collect();
        let files = layers.iter().flat_map(|l| l.files().iter().cloned()).collect::<Vec<_>>();
        assert_eq!(files.len(), layers.len(), "a layer is one file");
        Ok(Self { top, layers, sizes, files })
    }

    /// The images, the top first.
    pub fn layers(&self) -> &[Arc<dyn Image>] {
        &self.layers
    }

    /// The image that is written to.
    pub fn top(&self) -> &Arc<dyn Layer> {
        &self.top
    }

    /// Appends where the bytes of `at` are, as the layers from `level` on have them.
    fn resolve(&self, level: usize, at: ByteSpan, out: &mut Pieces) -> Result<(), ImageError> {
        let inside = self.sizes[level].saturating_sub(at.offset).min(at.len);
        if inside > 0 {
            let layer = &self.layers[level];
            let pieces = out.apart(|out| layer.map_read(ByteSpan::new(at.offset, inside), out))?;
            let mut offset = at.offset;
            for piece in &pieces {
                match piece.place {
                    Place::File { offset, .. } => {
                        let file = FileIndex(level as u16);
                        out.push(Piece { len: piece.len, place: Place::File { file, offset } });
                    }
                    Place::Zero => out.push(*piece),
                    Place::Parent => self.resolve(level + 1, ByteSpan::new(offset, piece.len), out)?,
                }
                offset += piece.len;
            }
            out.put_back(pieces);
        }
        out.push(Piece { len: at.len - inside, place: Place::Zero });
        Ok(())
    }

    /// What the layers from `level` on know of the bytes from `offset` on, up to `end` (above `offset`).
    fn extent(&self, level: usize, offset: u64, end: u64) -> Result<Extent, ImageError> {
        let absent = Extent { span: ByteSpan::new(offset, end - offset), state: AllocState::Absent };
        let Some(layer) = self.layers.get(level) else { return Ok(absent) };
        let Some(found) = layer.next_extent(offset)? else { return Ok(absent) };
        let len = found.span.len.min(end - offset);
        match found.state {
            AllocState::Absent => self.extent(level + 1, offset, offset + len),
            state => Ok(Extent { span: ByteSpan::new(offset, len), state }),
        }
    }

    /// What the first `levels` layers have of their own at `offset`, zeroes included: the run of one state that begins
    /// there, [`AllocState::Absent`] where they leave it to the layers below. `None` at the disk's end.
    ///
    /// # Errors
    /// What the layers say.
    pub fn next_own_extent(&self, levels: usize, offset: u64) -> Result<Option<Extent>, ImageError> {
        let size = self.sizes[0];
        if offset >= size {
            return Ok(None);
        }
        let mut found = Extent { span: ByteSpan::new(offset, size - offset), state: AllocState::Absent };
        for layer in &self.layers[..levels.min(self.layers.len())] {
            // What a smaller layer below lacks reads as zeroes, which are its own.
            let own = layer.next_extent(offset)?;
            let (len, state) = own.map_or((found.span.len, AllocState::Zero), |e| (e.span.len, e.state));
            found.span.len = found.span.len.min(len);
            if state != AllocState::Absent {
                found.state = state;
                break;
            }
        }
        Ok(Some(found))
    }

    /// Whether the parents of the top read as zeroes in all of `at`, as far as the maps tell. It may lie beyond their ends.
    pub(crate) fn is_zero_below(&self, at: ByteSpan) -> Result<bool, ImageError> {
        self.is_zero(1, at)
    }

    /// Whether the layers from `level` on read as zeroes in all of `at`, as far as the maps tell.
    fn is_zero(&self, level: usize, at: ByteSpan) -> Result<bool, ImageError> {
        let (mut offset, end) = (at.offset, at.offset + at.len);
        while offset < end {
            let found = self.extent(level, offset, end)?;
            if found.state == AllocState::Data {
                return Ok(false);
            }
            offset += found.span.len;
        }
        Ok(true)
    }
}

impl Image for Chain {
    fn format(&self) -> Format {
        self.top.format()
    }

    fn image_type(&self) -> ImageType {
        self.top.image_type()
    }

    fn geometry(&self) -> Geometry {
        let aligns = self.layers.iter().map(|l| l.geometry().payload_align);
        Geometry { payload_align: aligns.min().unwrap_or(1), ..self.top.geometry() }
    }

    fn is_read_only(&self) -> bool {
        self.top.is_read_only()
    }

    fn files(&self) -> &[Arc<dyn Storage>] {
        &self.files
    }

    fn map_read(&self, at: ByteSpan, out: &mut Pieces) -> Result<(), ImageError> {
        crate::flat::check_span(at, self.sizes[0], self.top.geometry().logical_sector_size)?;
        self.resolve(0, at, out)
    }

    fn map_write(&self, at: ByteSpan, out: &mut Pieces) -> Result<(), ImageError> {
        self.top.map_write(at, out)
    }

    fn map_zero(&self, at: ByteSpan, mode: ZeroMode, out: &mut Pieces) -> Result<(), ImageError> {
        self.top.map_zero_over(at, mode, &|span| self.is_zero(1, span), out)
    }

    fn wrote(&self, at: ByteSpan) -> Result<(), ImageError> {
        self.top.wrote(at)
    }

    fn sync_begin(&self) -> SyncToken {
        self.top.sync_begin()
    }

    fn sync_done(&self, token: SyncToken) -> Result<Option<SyncToken>, ImageError> {
        self.top.sync_done(token)
    }

    fn sync_failed(&self, why: &str) {
        self.top.sync_failed(why);
    }

    fn wants_maintenance(&self) -> bool {
        self.top.wants_maintenance()
    }

    fn maintain(&self, quiesce: &dyn Fn()) -> Result<(), ImageError> {
        self.top.maintain(quiesce)
    }

    fn commit(&self) -> Result<(), ImageError> {
        self.top.commit()
    }

    fn close(&self) -> Result<(), ImageError> {
        self.top.close()
    }

    fn next_extent(&self, offset: u64) -> Result<Option<Extent>, ImageError> {
        let end = self.sizes[0];
        if offset >= end { Ok(None) } else { self.extent(0, offset, end).map(Some) }
    }

    fn content_id(&self) -> Option<uuid::Uuid> {
        self.top.content_id()
    }

    fn parent_link(&self) -> Option<&ParentLink> {
        self.top.parent_link()
    }

    fn begin_changes(&self) -> Result<(), ImageError> {
        self.top.begin_changes()
    }

    fn as_chain(&self) -> Option<&Chain> {
        Some(self)
    }
}
