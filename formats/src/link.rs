//! How a differencing image names its parent, in the words that both formats share.

use std::sync::Arc;

use uuid::Uuid;

use crate::{Format, Storage};

/// What a differencing image says of its parent. Its texts are untrusted: they are shown, and looked for only inside
/// folders that the operator named.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParentLink {
    /// The parent has the same format.
    pub format: Format,
    /// The ids that the parent's content may have, the usual one first: `parent_linkage` and, while a merge is under
    /// way, `parent_linkage2` of a VHDX (MS-VHDX 2.6.2.6.3); the parent unique id of a VHD.
    pub ids: Vec<Uuid>,
    /// Where the parent is said to be, in the order in which it is to be looked for.
    pub paths: Vec<ParentPath>,
}

/// One path of a parent, as the image has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParentPath {
    /// What kind of path.
    pub kind: ParentPathKind,
    /// The text, with backslashes if that is what the image has.
    pub text: String,
}

/// The kinds of paths that images have of their parents.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ParentPathKind {
    /// Relative to the folder of the child: `relative_path` (VHDX), `W2ru` (VHD).
    Relative,
    /// Absolute, on a Windows machine: `volume_path`, `absolute_win32_path`, `W2ku`, or a file URL (`MacX`).
    Absolute,
    /// A name alone, as the header of a VHD has it (it may be an absolute path as well).
    Name,
}

/// What a child is to say of its parent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewParentLink {
    /// The parent's [`crate::Image::content_id`].
    pub id: Uuid,
    /// An id that the parent's content is about to get: `parent_linkage2` of a VHDX while its parent is written to. A VHD
    /// has no such field and needs none.
    pub next_id: Option<Uuid>,
    /// The parent's path from the folder of the child, with slashes, such as `../base/disk.vhdx`. Written with backslashes.
    pub relative: Option<String>,
    /// The parent's absolute path, with slashes.
    pub absolute: String,
}

/// How a single layer is opened by its codec.
#[derive(Debug, Clone, Default)]
pub struct LayerOptions {
    /// Refuse writes, and never write to the file.
    pub read_only: bool,
    /// Put a VHD's lost footer back, see [`crate::OpenOptions::recover`].
    pub recover: bool,
    /// The id that the content gets with the first change, instead of a random one (VHDX).
    pub next_content_id: Option<Uuid>,
    /// Where a differencing image notes the sectors that are written, but not yet durable, so that the death of the
    /// process loses none. Without it they are kept in memory alone, and what was not flushed is lost with the process.
    pub notes: Option<NotesFile>,
}

/// A file for such notes, which belongs to one image alone and may be empty.
#[derive(Debug, Clone)]
pub struct NotesFile {
    /// The file.
    pub storage: Arc<dyn Storage>,
    /// Identifies the running system: notes are worth something only as long as the kernel that took the writes runs, since
    /// a power cut may have kept a note and lost what it is about.
    pub boot_id: Uuid,
}
