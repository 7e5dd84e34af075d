//! The messages of a migration: a fixed header, a body of bounded length, and a checksum over both.
//!
//! ```text
//! 0  magic  u32      "KSMG"
//! 4  format u16      of this header: 1
//! 6  kind   u16
//! 8  flags  u32      0
//! 12 length u32      bytes of the body
//! 16 crc32c u32      of bytes 0 to 15 and the body
//! 20 body            JSON, but for pages, the machine's state, handed over storage and sets of pages
//! ```
//!
//! All numbers are little-endian. A kind that is not known ends the connection: both sides agreed on a version before.

use anyhow::{Context, Result, bail, ensure};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::batch::BATCH_BODY_MAX;
use crate::machine::{CompatibilityReport, Description};
use crate::memory::MEMORY_MAX_BYTES;
use crate::pages::{PAGE_BYTES, PageSet};

/// First bytes of each message.
pub const MAGIC: u32 = u32::from_le_bytes(*b"KSMG");
/// Version of the header's format.
pub const HEADER_FORMAT: u16 = 1;
/// Bytes of the header.
pub const HEADER_BYTES: usize = 20;
/// Oldest version of the protocol that is spoken here.
pub const PROTOCOL_MIN: u32 = 1;
/// Newest version of the protocol that is spoken here.
pub const PROTOCOL_MAX: u32 = 1;

/// Most bytes of a small control message.
pub const CONTROL_MAX: usize = 64 << 10;
/// Most bytes of a machine's description, and of what a target finds about it.
pub const DESCRIPTION_MAX: usize = 4 << 20;
/// Most bytes of the state of processors and devices.
pub const STATE_MAX: usize = 64 << 20;
/// Most bytes of what a source hands over with its storage.
pub const HANDOVER_MAX: usize = 1 << 20;
/// Most bytes of a set of pages: one bit for each page of the largest memory, and their number.
pub const PAGE_SET_MAX: usize = (MEMORY_MAX_BYTES as usize / PAGE_BYTES).div_ceil(8) + 8;
/// Most pages that one message asks for.
pub const REQUEST_PAGES_MAX: usize = 256;
/// Most characters of a reason that is sent or shown.
pub const REASON_MAX: usize = 4096;

/// Name of one attempt to move a machine. Each attempt has its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MigrationId(Uuid);

impl MigrationId {
    /// One that nobody has used.
    pub fn new() -> Self {
        Self(Uuid::new_v4())
    }

    /// One made of 16 bytes.
    pub fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(Uuid::from_bytes(bytes))
    }
}

impl Default for MigrationId {
    fn default() -> Self {
        Self::new()
    }
}

impl std::fmt::Display for MigrationId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.hyphenated().fmt(f)
    }
}

impl From<MigrationId> for String {
    fn from(id: MigrationId) -> Self {
        id.to_string()
    }
}

impl TryFrom<String> for MigrationId {
    type Error = uuid::Error;

    fn try_from(text: String) -> Result<Self, uuid::Error> {
        Uuid::parse_str(&text).map(Self)
    }
}

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// The one that leads a migration.
    Control,
    /// Asks whether the target could run a machine; nothing moves.
    Check,
    /// Carries pages of a migration that was begun.
    Pages,
    /// Carries the pages that the target's processors wait for.
    Faults,
    /// Comes back after a loss, to find out who runs the machine.
    Resolve,
}

/// The first message of each connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Oldest version of the protocol that the source speaks.
    pub protocol_min: u32,
    /// Newest one.
    pub protocol_max: u32,
    /// What the connection is for.
    pub role: Role,
    /// Which of several of its role, from 0.
    pub index: u32,
    /// The attempt.
    pub migration: MigrationId,
    /// What only the source and the target of this attempt know: it binds the connections together.
    pub secret: String,
    /// Earlier attempts that the source has given up for good: it went on by itself.
    #[serde(default)]
    pub given_up: Vec<MigrationId>,
}

/// What the source wants to send, and how.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// The machine.
    pub machine: Description,
    /// Connections for pages that are going to come.
    pub connections: u32,
    /// Whether the machine may run before all its pages are there.
    pub postcopy: bool,
}

/// What a target says of one attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TargetStatus {
    /// It has everything and waits for the commit.
    Prepared,
    /// It runs the machine, or has run it.
    Running,
    /// It could not take the machine, and never will in this attempt.
    Refused,
    /// It will never run the machine in this attempt.
    Discarded,
}

/// The end of a round on one connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RoundEnd {
    /// The round, from 0.
    pub round: u32,
    /// Batches that went over this connection in it.
    pub batches: u64,
    /// Pages in them, zero pages included.
    pub pages: u64,
}

/// A message. Pages have a form of their own, see [`super::batch`].
#[derive(Debug, Clone, PartialEq)]
pub enum Message {
    /// First message of a connection.
    Hello(Hello),
    /// Answer to it: the version of the protocol that both speak.
    Welcome(u32),
    /// What the source wants to send.
    Plan(Box<Plan>),
    /// What the target found.
    Compatibility(CompatibilityReport),
    /// The machine is made and waits for its memory.
    Created,
    /// Pages of a round follow on the other connections.
    RoundBegin(u32),
    /// No more pages of the round on this connection.
    RoundEnd(RoundEnd),
    /// All pages of the round, of all connections, are in the target's memory. How many there were.
    RoundReceived(RoundEnd),
    /// The machine stands still on the source.
    Paused,
    /// State of processors and devices.
    State(Vec<u8>),
    /// The target has everything, says so durably, and does not run.
    Prepared,
    /// The source has given the machine away: its storage, as the source handed it over.
    Commit(Vec<u8>),
    /// The target runs the machine.
    Running,
    /// The source has ended its machine and will not ask again.
    Gone,
    /// The target does not take the machine.
    Refused(String),
    /// The sender ends this attempt.
    Abort(String),
    /// Who runs the machine?
    Ask,
    /// What the target knows about it.
    Status(TargetStatus),
    /// Still there.
    Alive,
    /// The machine is to run before these pages are there.
    Missing(PageSet),
    /// Pages that the target's processors wait for.
    Request(Vec<u64>),
    /// Pages that are still missing after a loss of the connection in post-copy.
    StillMissing(PageSet),
    /// All pages are there.
    Complete,
    /// Missing pages are waited for from here on by who touches them.
    Armed,
}

/// Kind of a message that carries pages.
pub const KIND_PAGES: u16 = 7;
/// Kind of the state, of which files have one as well.
pub const KIND_STATE: u16 = 11;
/// Kind of what is handed over with the storage, of which files have one as well.
pub const KIND_COMMIT: u16 = 13;
/// Kind that begins a saved machine, in files only.
pub const KIND_SAVE_BEGIN: u16 = 40;
/// Kind that ends a saved machine, in files only.
pub const KIND_SAVE_END: u16 = 41;

/// Name and limit of each kind.
const KINDS: &[(u16, &str, usize)] = &[
    (1, "hello", CONTROL_MAX),
    (2, "welcome", CONTROL_MAX),
    (3, "plan", DESCRIPTION_MAX),
    (4, "compatibility", DESCRIPTION_MAX),
    (5, "created", CONTROL_MAX),
    (6, "round-begin", CONTROL_MAX),
    (KIND_PAGES, "pages", BATCH_BODY_MAX),
    (8, "round-end", CONTROL_MAX),
    (9, "round-received", CONTROL_MAX),
    (10, "paused", CONTROL_MAX),
    (KIND_STATE, "state", STATE_MAX),
    (12, "prepared", CONTROL_MAX),
    (KIND_COMMIT, "commit", HANDOVER_MAX),
    (14, "running", CONTROL_MAX),
    (15, "gone", CONTROL_MAX),
    (16, "refused", CONTROL_MAX),
    (17, "abort", CONTROL_MAX),
    (18, "ask", CONTROL_MAX),
    (19, "status", CONTROL_MAX),
    (20, "alive", CONTROL_MAX),
    (21, "missing", PAGE_SET_MAX),
    (22, "request", CONTROL_MAX),
    (23, "still-missing", PAGE_SET_MAX),
    (24, "complete", CONTROL_MAX),
    (25, "armed", CONTROL_MAX),
    (KIND_SAVE_BEGIN, "save-begin", DESCRIPTION_MAX),
    (KIND_SAVE_END, "save-end", CONTROL_MAX),
];

/// A header that was checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Kind of the message.
    pub kind: u16,
    /// Bytes of its body.
    pub length: usize,
    /// Checksum of header and body.
    pub crc: u32,
    /// Checksum of the header alone, to go on from.
    pub crc_of_header: u32,
}

impl Header {
    /// Takes a header apart.
    ///
    /// # Errors
    /// If it is none, is of another format, or its kind is not known or longer than allowed.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self> {
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        ensure!(
            word(0) == MAGIC,
            "the peer does not speak this protocol: its message begins with {:#010x} instead of {MAGIC:#010x}",
            word(0)
        );
        ensure!(
            half(4) == HEADER_FORMAT,
            "the peer's messages have format {}, this program reads format {HEADER_FORMAT}",
            half(4)
        );
        let (kind, length) = (half(6), word(12) as usize);
        let Some((_, name, limit)) = KINDS.iter().find(|(known, ..)| *known == kind) else {
            bail!("the peer sent a message of kind {kind}, which this version does not know");
        };
        ensure!(
            word(8) == 0,
            "the {name} message has flags {:#x}, which this version does not know",
            word(8)
        );
        ensure!(length <= *limit, "the {name} message has {length} bytes, more than the {limit} allowed");
        Ok(Self { kind, length, crc: word(16), crc_of_header: crc32c::crc32c(&bytes[..16]) })
    }

    /// A header for a body whose parts are given, which are in the checksum in this order.
    ///
    /// # Errors
    /// If the body is longer than its kind may be.
    pub fn encode(kind: u16, parts: &[&[u8]]) -> Result<[u8; HEADER_BYTES]> {
        let length: usize = parts.iter().map(|part| part.len()).sum();
        let (name, limit) = KINDS
            .iter()
            .find(|(known, ..)| *known == kind)
            .map_or(("unknown", 0), |(_, name, limit)| (*name, *limit));
        ensure!(length <= limit, "a {name} message of {length} bytes is longer than the {limit} allowed");
        let mut bytes = [0; HEADER_BYTES];
        bytes[0..4].copy_from_slice(&MAGIC.to_le_bytes());
        bytes[4..6].copy_from_slice(&HEADER_FORMAT.to_le_bytes());
        bytes[6..8].copy_from_slice(&kind.to_le_bytes());
        bytes[12..16].copy_from_slice(&(length as u32).to_le_bytes());
        let crc =
            parts.iter().fold(crc32c::crc32c(&bytes[..16]), |crc, part| crc32c::crc32c_append(crc, part));
        bytes[16..20].copy_from_slice(&crc.to_le_bytes());
        Ok(bytes)
    }

    /// Checks the body.
    ///
    /// # Errors
    /// If it was damaged on its way.
    pub fn check(&self, body: &[u8]) -> Result<()> {
        let crc = crc32c::crc32c_append(self.crc_of_header, body);
        ensure!(
            crc == self.crc,
            "a {} message of {} bytes was damaged on its way (checksum {crc:#010x}, {:#010x} expected)",
            kind_name(self.kind),
            self.length,
            self.crc
        );
        Ok(())
    }
}

/// What a kind is called.
pub fn kind_name(kind: u16) -> &'static str {
    KINDS.iter().find(|(known, ..)| *known == kind).map_or("unknown", |(_, name, _)| name)
}

impl Message {
    /// The kind on the wire.
    pub fn kind(&self) -> u16 {
        match self {
            Self::Hello(_) => 1,
            Self::Welcome(_) => 2,
            Self::Plan(_) => 3,
            Self::Compatibility(_) => 4,
            Self::Created => 5,
            Self::RoundBegin(_) => 6,
            Self::RoundEnd(_) => 8,
            Self::RoundReceived(_) => 9,
            Self::Paused => 10,
            Self::State(_) => 11,
            Self::Prepared => 12,
            Self::Commit(_) => 13,
            Self::Running => 14,
            Self::Gone => 15,
            Self::Refused(_) => 16,
            Self::Abort(_) => 17,
            Self::Ask => 18,
            Self::Status(_) => 19,
            Self::Alive => 20,
            Self::Missing(_) => 21,
            Self::Request(_) => 22,
            Self::StillMissing(_) => 23,
            Self::Complete => 24,
            Self::Armed => 25,
        }
    }

    /// What the message is called.
    pub fn name(&self) -> &'static str {
        kind_name(self.kind())
    }

    /// The body.
    pub(super) fn encode(&self) -> Result<Vec<u8>> {
        Ok(match self {
            Self::Hello(hello) => json(hello)?,
            Self::Welcome(version) => json(version)?,
            Self::Plan(plan) => json(plan)?,
            Self::Compatibility(report) => json(report)?,
            Self::RoundBegin(round) => json(round)?,
            Self::RoundEnd(end) | Self::RoundReceived(end) => json(end)?,
            Self::State(bytes) | Self::Commit(bytes) => bytes.clone(),
            Self::Refused(reason) | Self::Abort(reason) => json(&shortened(reason))?,
            Self::Status(status) => json(status)?,
            Self::Missing(set) | Self::StillMissing(set) => encode_set(set),
            Self::Request(pages) => pages.iter().flat_map(|page| page.to_le_bytes()).collect(),
            Self::Created
            | Self::Paused
            | Self::Prepared
            | Self::Running
            | Self::Gone
            | Self::Ask
            | Self::Alive
            | Self::Complete
            | Self::Armed => Vec::new(),
        })
    }

    /// A message from its kind and body.
    pub(super) fn decode(kind: u16, body: Vec<u8>) -> Result<Self> {
        let name = kind_name(kind);
        let message = match kind {
            1 => Self::Hello(from_json(name, &body)?),
            2 => Self::Welcome(from_json(name, &body)?),
            3 => Self::Plan(from_json(name, &body)?),
            4 => Self::Compatibility(from_json(name, &body)?),
            6 => Self::RoundBegin(from_json(name, &body)?),
            8 => Self::RoundEnd(from_json(name, &body)?),
            9 => Self::RoundReceived(from_json(name, &body)?),
            11 => return Ok(Self::State(body)),
            13 => return Ok(Self::Commit(body)),
            16 => Self::Refused(shortened(&from_json::<String>(name, &body)?)),
            17 => Self::Abort(shortened(&from_json::<String>(name, &body)?)),
            19 => Self::Status(from_json(name, &body)?),
            21 => Self::Missing(decode_set(&body)?),
            22 => Self::Request(decode_request(&body)?),
            23 => Self::StillMissing(decode_set(&body)?),
            _ => return Self::decode_empty(kind, &body),
        };
        Ok(message)
    }

    fn decode_empty(kind: u16, body: &[u8]) -> Result<Self> {
        let message = match kind {
            5 => Self::Created,
            10 => Self::Paused,
            12 => Self::Prepared,
            14 => Self::Running,
            15 => Self::Gone,
            18 => Self::Ask,
            20 => Self::Alive,
            24 => Self::Complete,
            25 => Self::Armed,
            _ => bail!("the peer sent a {} message (kind {kind}) where none belongs", kind_name(kind)),
        };
        ensure!(
            body.is_empty(),
            "the {} message has a body of {} bytes, but none belongs there",
            message.name(),
            body.len()
        );
        Ok(message)
    }
}

/// A reason as it is sent and shown: not longer than [`REASON_MAX`], without control characters of a peer's choice.
fn shortened(reason: &str) -> String {
    reason.chars().map(|c| if c.is_control() { ' ' } else { c }).take(REASON_MAX).collect()
}

fn json<T: Serialize>(value: &T) -> Result<Vec<u8>> {
    serde_json::to_vec(value).context("write a message as JSON")
}

fn from_json<T: DeserializeOwned>(name: &str, body: &[u8]) -> Result<T> {
    serde_json::from_slice(body).with_context(|| format!("the {name} message is not what it should be"))
}

/// A set of pages: their number, then a bit for each.
fn encode_set(set: &PageSet) -> Vec<u8> {
    let words = set.words().iter().flat_map(|word| word.to_le_bytes());
    set.pages().to_le_bytes().into_iter().chain(words).collect()
}

fn decode_set(body: &[u8]) -> Result<PageSet> {
    let (words, rest) = body.as_chunks::<8>();
    let Some((pages, bits)) = words.split_first() else { bail!("a set of pages without their number") };
    let pages = u64::from_le_bytes(*pages);
    ensure!(
        rest.is_empty()
            && pages <= MEMORY_MAX_BYTES / PAGE_BYTES as u64
            && bits.len() as u64 == pages.div_ceil(64),
        "a set of {pages} pages has {} bytes, which do not belong together",
        body.len()
    );
    let mut set = PageSet::empty(pages);
    let bits: Vec<u64> = bits.iter().map(|word| u64::from_le_bytes(*word)).collect();
    set.insert_bits(0, &bits);
    Ok(set)
}

fn decode_request(body: &[u8]) -> Result<Vec<u64>> {
    let (pages, rest) = body.as_chunks::<8>();
    ensure!(
        rest.is_empty() && pages.len() <= REQUEST_PAGES_MAX,
        "a request of {} bytes is not one for up to {REQUEST_PAGES_MAX} pages",
        body.len()
    );
    Ok(pages.iter().map(|page| u64::from_le_bytes(*page)).collect())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn hello() -> Message {
        Message::Hello(Hello {
            protocol_min: 1,
            protocol_max: 3,
            role: Role::Pages,
            index: 2,
            migration: MigrationId::from_bytes([7; 16]),
            secret: "s".into(),
            given_up: vec![MigrationId::from_bytes([8; 16])],
        })
    }

    #[test]
    fn each_message_comes_back_as_it_was_sent() {
        let mut set = PageSet::empty(130);
        set.insert(0);
        set.insert(129);
        let end = RoundEnd { round: 3, batches: 4, pages: 5 };
        let all = [
            hello(),
            Message::Welcome(1),
            Message::Compatibility(CompatibilityReport::default()),
            Message::Created,
            Message::RoundBegin(7),
            Message::RoundEnd(end),
            Message::RoundReceived(end),
            Message::Paused,
            Message::State(vec![1, 2]),
            Message::Prepared,
            Message::Commit(vec![]),
            Message::Running,
            Message::Gone,
            Message::Refused("no \"room\"".into()),
            Message::Abort("stop".into()),
            Message::Ask,
            Message::Status(TargetStatus::Discarded),
            Message::Alive,
            Message::Missing(set.clone()),
            Message::Request(vec![1, u64::MAX]),
            Message::StillMissing(set),
            Message::Complete,
            Message::Armed,
        ];
        for message in all {
            let body = message.encode().expect("encodes");
            let header = Header::encode(message.kind(), &[&body]).expect("within its limit");
            let header = Header::decode(&header).expect("a header");
            header.check(&body).expect("not damaged");
            assert_eq!(Message::decode(header.kind, body).expect("decodes"), message);
        }
    }

    #[test]
    fn what_is_wrong_with_a_header_is_said() {
        let good = Header::encode(5, &[]).expect("header");
        let cases: [(usize, u8, &str); 5] = [
            (0, 0, "does not speak this protocol"),
            (4, 9, "format 9"),
            (6, 99, "kind 99"),
            (8, 1, "flags 0x1"),
            (15, 1, "more than the"),
        ];
        for (at, byte, part) in cases {
            let mut bytes = good;
            bytes[at] = byte;
            let error = Header::decode(&bytes).expect_err("it is damaged").to_string();
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn a_damaged_body_is_found() {
        let body = hello().encode().expect("body");
        let header = Header::decode(&Header::encode(1, &[&body]).expect("header")).expect("header");
        for at in 0..body.len() {
            let mut damaged = body.clone();
            damaged[at] ^= 1;
            assert!(header.check(&damaged).is_err());
        }
    }

    #[test]
    fn a_set_that_lies_about_its_size_is_refused() {
        let mut body = encode_set(&PageSet::full(100));
        body[0] = 200;
        assert!(decode_set(&body).is_err());
        body[..8].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(decode_set(&body).is_err());
        assert!(decode_set(&[]).is_err());
    }

    proptest! {
        #[test]
        fn no_body_makes_the_reader_panic(kind in 0u16..30, body in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Message::decode(kind, body);
        }

        #[test]
        fn no_header_makes_the_reader_panic(bytes in any::<[u8; HEADER_BYTES]>()) {
            let _ = Header::decode(&bytes);
        }
    }
}
