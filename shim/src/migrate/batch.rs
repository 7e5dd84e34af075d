//! Pages on the wire: runs of pages, of which zero pages have no content, and the content of the others, compressed where
//! that pays.
//!
//! ```text
//! 0  round u32 │ 4 encoding u8, 3 × 0 │ 8 runs u32 │ 12 bytes of content, uncompressed, u32
//! 16 runs: first page u64, pages u32, kind u32 (0 zero, 1 data)
//! .. content of the data runs in their order
//! ```

use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::memory::GuestRam;
use crate::pages::PAGE_BYTES;

/// Most pages with content in one batch.
pub const BATCH_PAGES_MAX: usize = 256;
/// Most bytes of content in one batch.
pub const BATCH_BYTES_MAX: usize = BATCH_PAGES_MAX * PAGE_BYTES;
/// Most runs in one batch.
pub const BATCH_RUNS_MAX: usize = 1024;
/// Most pages of one run of zero pages.
pub const ZERO_RUN_MAX: u32 = 1 << 18;
/// Bytes before the runs.
pub const BATCH_HEAD_BYTES: usize = 16;
/// Bytes of one run.
pub const RUN_BYTES: usize = 16;
/// Most bytes of a whole batch: compression that does not pay is not used.
pub const BATCH_BODY_MAX: usize = BATCH_HEAD_BYTES + BATCH_RUNS_MAX * RUN_BYTES + BATCH_BYTES_MAX;

/// Least share of a batch that compression has to save, as one of so many parts. Below it is sent as it is.
const COMPRESSION_PAYS: usize = 16;

/// How contents of pages are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    /// Not at all.
    #[default]
    None,
    /// LZ4: fast.
    Lz4,
    /// Zstandard, level 1: smaller.
    Zstd,
}

impl std::str::FromStr for Compression {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "none" => Ok(Self::None),
            "lz4" => Ok(Self::Lz4),
            "zstd" => Ok(Self::Zstd),
            other => bail!("{other} is no compression: say none, lz4 or zstd"),
        }
    }
}

const RAW: u8 = 0;
const LZ4: u8 = 1;
const ZSTD: u8 = 2;

/// Pages that follow each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// The first.
    pub first: u64,
    /// How many.
    pub pages: u32,
    /// Whether all are zero; else their content is in the batch.
    pub zero: bool,
}

/// A batch that is being put together.
#[derive(Debug)]
pub struct BatchBuilder {
    round: u32,
    runs: Vec<Run>,
    content: Vec<u8>,
    zero_pages: u64,
}

impl BatchBuilder {
    /// An empty one.
    pub fn new(round: u32) -> Self {
        Self { round, runs: Vec::new(), content: Vec::with_capacity(BATCH_BYTES_MAX), zero_pages: 0 }
    }

    /// Empties it for the next.
    pub fn clear(&mut self, round: u32) {
        self.round = round;
        self.runs.clear();
        self.content.clear();
        self.zero_pages = 0;
    }

    /// Whether nothing is in it.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// Whether it has to be sent before another page is put in.
    pub fn is_full(&self) -> bool {
        self.content.len() >= BATCH_BYTES_MAX || self.runs.len() >= BATCH_RUNS_MAX
    }

    /// Pages with content.
    pub fn data_pages(&self) -> u64 {
        (self.content.len() / PAGE_BYTES) as u64
    }

    /// Zero pages.
    pub fn zero_pages(&self) -> u64 {
        self.zero_pages
    }

    /// Reads a page of memory. It is kept if it has content, and says so; a zero page is left to the caller.
    ///
    /// # Panics
    /// If the batch is full or there is no such page.
    pub fn take_page(&mut self, ram: &GuestRam, page: u64) -> bool {
        assert!(!self.is_full(), "a full batch");
        let at = self.content.len();
        self.content.resize(at + PAGE_BYTES, 0);
        ram.read_pages(page, &mut self.content[at..]);
        if is_zero(&self.content[at..]) {
            self.content.truncate(at);
            return false;
        }
        self.note(page, false);
        true
    }

    /// Notes a zero page.
    ///
    /// # Panics
    /// If the batch is full.
    pub fn put_zero(&mut self, page: u64) {
        assert!(!self.is_full(), "a full batch");
        self.note(page, true);
        self.zero_pages += 1;
    }

    fn note(&mut self, page: u64, zero: bool) {
        if let Some(last) = self.runs.last_mut()
            && last.zero == zero
            && last.first + u64::from(last.pages) == page
            && last.pages < ZERO_RUN_MAX
        {
            last.pages += 1;
            return;
        }
        self.runs.push(Run { first: page, pages: 1, zero });
    }

    /// Head and content as they go over the wire.
    ///
    /// # Errors
    /// If the compressor fails.
    pub fn encode<'a>(&'a self, packer: &'a mut Packer, head: &mut Vec<u8>) -> Result<&'a [u8]> {
        let (encoding, content) = packer.pack(&self.content)?;
        head.clear();
        head.extend(self.round.to_le_bytes());
        head.extend([encoding, 0, 0, 0]);
        head.extend((self.runs.len() as u32).to_le_bytes());
        head.extend((self.content.len() as u32).to_le_bytes());
        for run in &self.runs {
            head.extend(run.first.to_le_bytes());
            head.extend(run.pages.to_le_bytes());
            head.extend(u32::from(!run.zero).to_le_bytes());
        }
        Ok(content)
    }
}

/// Whether all bytes are zero. The length is a multiple of 64.
pub fn is_zero(page: &[u8]) -> bool {
    // Whole lines of the cache at once: the compiler makes vector instructions of it, and most pages differ in the first.
    page.chunks(64).all(|line| line.iter().fold(0, |any, byte| any | byte) == 0)
}

/// What compresses.
pub struct Packer {
    kind: Compression,
    out: Vec<u8>,
    zstd: Option<zstd::bulk::Compressor<'static>>,
}

impl Packer {
    /// One of this kind.
    ///
    /// # Errors
    /// If the library has no memory for it.
    pub fn new(kind: Compression) -> Result<Self> {
        let zstd = match kind {
            Compression::Zstd => Some(zstd::bulk::Compressor::new(1).context("make a zstd compressor")?),
            _ => None,
        };
        let room = match kind {
            Compression::None => 0,
            Compression::Lz4 => lz4_flex::block::get_maximum_output_size(BATCH_BYTES_MAX),
            Compression::Zstd => zstd::zstd_safe::compress_bound(BATCH_BYTES_MAX),
        };
        Ok(Self { kind, out: vec![0; room], zstd })
    }

    fn pack<'a>(&'a mut self, content: &'a [u8]) -> Result<(u8, &'a [u8])> {
        let (encoding, len) = match (self.kind, &mut self.zstd) {
            _ if content.is_empty() => return Ok((RAW, content)),
            (Compression::Lz4, _) => (
                LZ4,
                lz4_flex::block::compress_into(content, &mut self.out).context("compress pages with lz4")?,
            ),
            (Compression::Zstd, Some(zstd)) => (
                ZSTD,
                zstd.compress_to_buffer(content, &mut self.out[..]).context("compress pages with zstd")?,
            ),
            _ => return Ok((RAW, content)),
        };
        if len > content.len() - content.len() / COMPRESSION_PAYS {
            return Ok((RAW, content));
        }
        Ok((encoding, &self.out[..len]))
    }
}

/// What takes batches apart.
pub struct Unpacker {
    content: Vec<u8>,
    runs: Vec<Run>,
    zstd: Option<zstd::bulk::Decompressor<'static>>,
}

/// A batch that was checked: its runs lie within the memory, in their order, and the content has the bytes of its data runs.
#[derive(Debug)]
pub struct Batch<'a> {
    /// The round it belongs to.
    pub round: u32,
    /// What it has.
    pub runs: &'a [Run],
    /// Content of the data runs.
    pub content: &'a [u8],
}

impl Unpacker {
    /// One that has unpacked nothing yet.
    pub fn new() -> Self {
        Self { content: Vec::new(), runs: Vec::new(), zstd: None }
    }

    /// Takes the body of a pages message apart, for a memory of so many pages.
    ///
    /// # Errors
    /// If it is not well-formed, and what is wrong with it.
    pub fn unpack<'a>(&'a mut self, body: &'a [u8], pages: u64) -> Result<Batch<'a>> {
        let head = body.first_chunk::<BATCH_HEAD_BYTES>().context("a batch of pages without a head")?;
        let word = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let (round, encoding, runs, bytes) = (word(0), head[4], word(8) as usize, word(12) as usize);
        ensure!(
            (1..=BATCH_RUNS_MAX).contains(&runs) && bytes <= BATCH_BYTES_MAX && head[5..8] == [0; 3],
            "a batch of {runs} runs with {bytes} bytes is none (up to {BATCH_RUNS_MAX} runs, {BATCH_BYTES_MAX} bytes)"
        );
        let (list, payload) = body[BATCH_HEAD_BYTES..]
            .split_at_checked(runs * RUN_BYTES)
            .context("a batch of pages that ends within its list of runs")?;
        self.read_runs(list, pages, bytes)?;
        let content = match encoding {
            RAW => {
                ensure!(
                    payload.len() == bytes,
                    "a batch has {} bytes of content instead of {bytes}",
                    payload.len()
                );
                payload
            }
            _ => decompress(&mut self.content, &mut self.zstd, encoding, payload, bytes)?,
        };
        Ok(Batch { round, runs: &self.runs, content })
    }

    fn read_runs(&mut self, list: &[u8], pages: u64, bytes: usize) -> Result<()> {
        self.runs.clear();
        let (mut content_pages, mut next) = (0u64, 0);
        let (entries, _) = list.as_chunks::<RUN_BYTES>();
        for entry in entries {
            let (first, rest) = entry.split_first_chunk::<8>().context("a run of a batch")?;
            let (count, kind) = rest.split_first_chunk::<4>().context("a run of a batch")?;
            let (first, count) = (u64::from_le_bytes(*first), u32::from_le_bytes(*count));
            let zero = match kind {
                [0, 0, 0, 0] => true,
                [1, 0, 0, 0] => false,
                _ => bail!("a run of pages of an unknown kind ({kind:?})"),
            };
            let end = first.checked_add(u64::from(count)).filter(|end| *end <= pages);
            let Some(end) = end.filter(|_| count > 0 && count <= ZERO_RUN_MAX && first >= next) else {
                bail!("a run of {count} pages at page {first} does not fit a memory of {pages} pages");
            };
            next = end;
            content_pages += if zero { 0 } else { u64::from(count) };
            self.runs.push(Run { first, pages: count, zero });
        }
        ensure!(
            content_pages * PAGE_BYTES as u64 == bytes as u64,
            "a batch with runs of {content_pages} pages says that it has {bytes} bytes of content"
        );
        Ok(())
    }
}

/// Decompresses into `room`, of which the first `bytes` are the content afterwards.
fn decompress<'a>(
    room: &'a mut Vec<u8>,
    zstd: &mut Option<zstd::bulk::Decompressor<'static>>,
    encoding: u8,
    payload: &[u8],
    bytes: usize,
) -> Result<&'a [u8]> {
    room.resize(BATCH_BYTES_MAX, 0);
    let room = &mut room[..bytes];
    let len = match encoding {
        LZ4 => {
            lz4_flex::block::decompress_into(payload, room).context("a batch that lz4 cannot decompress")?
        }
        ZSTD => {
            if zstd.is_none() {
                *zstd = Some(zstd::bulk::Decompressor::new().context("make a zstd decompressor")?);
            }
            let zstd = zstd.as_mut().expect("was just made");
            zstd.decompress_to_buffer(payload, room).context("a batch that zstd cannot decompress")?
        }
        other => bail!("a batch in an unknown encoding ({other})"),
    };
    ensure!(len == bytes, "a batch decompresses to {len} bytes instead of {bytes}");
    Ok(room)
}

impl Default for Unpacker {
    fn default() -> Self {
        Self::new()
    }
}

impl Batch<'_> {
    /// Pages in it.
    pub fn pages(&self) -> u64 {
        self.runs.iter().map(|run| u64::from(run.pages)).sum()
    }

    /// Calls for each run with its content, which is empty for a run of zero pages.
    ///
    /// # Errors
    /// What the call returns.
    pub fn for_each(&self, mut call: impl FnMut(&Run, &[u8]) -> Result<()>) -> Result<()> {
        let mut rest = self.content;
        for run in self.runs {
            let len = if run.zero { 0 } else { run.pages as usize * PAGE_BYTES };
            let (content, next) = rest.split_at(len);
            rest = next;
            call(run, content)?;
        }
        Ok(())
    }

    /// Puts the pages into a memory that nobody uses yet.
    ///
    /// # Errors
    /// If the host has no memory left.
    pub fn apply(&self, ram: &GuestRam) -> Result<()> {
        self.for_each(|run, content| {
            if run.zero {
                for page in run.first..run.first + u64::from(run.pages) {
                    ram.write_pages(page, &[0; PAGE_BYTES]);
                }
            } else if ram.huge_pages() {
                ram.write_pages(run.first, content);
            } else {
                // Through the file, as whoever writes to the mapping takes a fault for each page that is not there yet, which
                // costs more than the copy. The kernel does not write files of huge pages.
                ram.file()
                    .write_all_at(content, run.first * PAGE_BYTES as u64)
                    .context("put pages into the guest's memory")?;
            }
            Ok(())
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn filled(ram: &GuestRam) {
        for page in 0..ram.pages() {
            match page % 4 {
                0 => ram.write_pages(page, &[page as u8 | 1; PAGE_BYTES]),
                1 => {
                    let noise: Vec<u8> =
                        (0..PAGE_BYTES as u64).map(|i| ((i * i * 2_654_435_761 + page) >> 7) as u8).collect();
                    ram.write_pages(page, &noise);
                }
                _ => {}
            }
        }
    }

    #[test]
    fn pages_come_back_in_each_compression() {
        let (from, to) =
            (GuestRam::new(4 << 20, false).expect("ram"), GuestRam::new(4 << 20, false).expect("ram"));
        filled(&from);
        for kind in [Compression::None, Compression::Lz4, Compression::Zstd] {
            to.write_pages(0, &vec![0xee; 4 << 20]);
            let mut packer = Packer::new(kind).expect("packer");
            let mut unpacker = Unpacker::new();
            let mut builder = BatchBuilder::new(3);
            let mut head = Vec::new();
            let mut flush = |builder: &mut BatchBuilder| {
                let content = builder.encode(&mut packer, &mut head).expect("packs").to_vec();
                let body = [&head[..], &content].concat();
                assert!(body.len() <= BATCH_BODY_MAX);
                let batch = unpacker.unpack(&body, from.pages()).expect("unpacks");
                assert_eq!(batch.round, 3);
                batch.apply(&to).expect("there is memory");
                builder.clear(3);
            };
            for page in 0..from.pages() {
                if builder.is_full() {
                    flush(&mut builder);
                }
                if !builder.take_page(&from, page) {
                    builder.put_zero(page);
                }
            }
            flush(&mut builder);
            let (mut a, mut b) = (vec![0; 4 << 20], vec![0; 4 << 20]);
            from.read_pages(0, &mut a);
            to.read_pages(0, &mut b);
            assert!(a == b, "{kind:?}");
        }
    }

    #[test]
    fn runs_beyond_the_memory_or_out_of_order_are_refused() {
        let body = |runs: &[(u64, u32, u32)], bytes: u32| {
            let mut body = vec![0; 8];
            body.extend((runs.len() as u32).to_le_bytes());
            body.extend(bytes.to_le_bytes());
            for (first, pages, kind) in runs {
                body.extend(first.to_le_bytes());
                body.extend(pages.to_le_bytes());
                body.extend(kind.to_le_bytes());
            }
            body
        };
        let mut unpacker = Unpacker::new();
        let mut refuses = |body: Vec<u8>| assert!(unpacker.unpack(&body, 100).is_err(), "{body:?}");
        refuses(vec![]);
        refuses(body(&[], 0));
        refuses(body(&[(100, 1, 0)], 0));
        refuses(body(&[(u64::MAX, 2, 0)], 0));
        refuses(body(&[(5, 0, 0)], 0));
        refuses(body(&[(5, 1, 2)], 0));
        refuses(body(&[(5, 2, 0), (6, 1, 0)], 0));
        refuses(body(&[(5, 1, 1)], 0));
        refuses(body(&[(5, 1, 1)], 4096));
        assert!(unpacker.unpack(&body(&[(5, 95, 0)], 0), 100).is_ok());
    }

    proptest! {
        #[test]
        fn no_batch_makes_the_reader_panic(
            mut body in proptest::collection::vec(any::<u8>(), 0..300), encoding in 0u8..4, runs in 0u8..4,
        ) {
            if body.len() > 16 {
                body[4] = encoding;
                body[5..12].copy_from_slice(&[0, 0, 0, runs, 0, 0, 0]);
            }
            let _ = Unpacker::new().unpack(&body, 1000);
        }

        #[test]
        fn a_page_is_zero_only_if_all_bytes_are(at in 0usize..PAGE_BYTES, byte in any::<u8>()) {
            let mut page = [0; PAGE_BYTES];
            page[at] = byte;
            prop_assert_eq!(is_zero(&page), byte == 0);
        }
    }
}
