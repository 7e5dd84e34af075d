//! Prints what is owed for every image of the corpus, and what is done with it: a table of tab-separated columns.
//!
//! ```text
//!   BLOCKD_CORPUS=FOLDER cargo run --release -p formats-tests --example corpus_table
//! ```
//!
//! Real images have to read as the manifest says, hostile ones to be opened or refused as their list says. Ends with 1 where
//! a line is wrong.
#![allow(clippy::unwrap_used, reason = "what fails here fails the run")]

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use formats::{AllocState, Format, Image, OpenError, OpenOptions};
use formats_tests::corpus;

/// What a line of the list of hostile images asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Owed {
    Open,
    /// For reading; for writing it may, or must, be refused.
    OpenForReading,
    Reject,
    Either,
}

impl Owed {
    fn of(name: &str, text: &str) -> Self {
        match text {
            _ if name.starts_with("x06-") => Self::OpenForReading,
            _ if text.contains(" or ") => Self::Either,
            _ if text.starts_with("REJECT") => Self::Reject,
            _ if text.contains("read-only") => Self::OpenForReading,
            _ => Self::Open,
        }
    }

    fn is_met(self, reading: bool, writing: bool) -> bool {
        match self {
            Self::Open => reading && writing,
            Self::OpenForReading => reading,
            Self::Reject => !reading && !writing,
            Self::Either => true,
        }
    }
}

fn main() -> ExitCode {
    let Some(folder) = corpus::corpus("image") else { return ExitCode::FAILURE };
    println!("case\towed\tfor reading\tfor writing\tfile\tms\tverdict");
    let work = tempfile::tempdir().unwrap();
    let mut wrong = real_images(&folder, work.path());
    wrong += hostile_images(&folder.join("hostile"), &work.path().join("hostile"));
    eprintln!("{wrong} wrong");
    if wrong == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Writes the image that is packed at `from` to `to`, with its zeroes as holes.
fn unpack(from: &Path, to: &Path) {
    use std::os::unix::fs::FileExt;
    let bytes = corpus::unpack(from).unwrap();
    std::fs::create_dir_all(to.parent().unwrap()).unwrap();
    let file = std::fs::File::create(to).unwrap();
    file.set_len(bytes.len() as u64).unwrap();
    for (n, page) in bytes.chunks(4096).enumerate().filter(|(_, page)| page.iter().any(|b| *b != 0)) {
        file.write_all_at(page, n as u64 * 4096).unwrap();
    }
}

fn open(path: &Path, read_only: bool) -> Result<std::sync::Arc<dyn Image>, OpenError> {
    let options = OpenOptions {
        // The one name that says "raw" is that of a broken VHD.
        format: formats::format_by_name(path).filter(|format| *format != Format::Raw).or(Some(Format::Vhd)),
        read_only,
        parents: vec![path.parent().unwrap().to_owned()],
        ..OpenOptions::default()
    };
    formats::open(path, &options)
}

fn real_images(folder: &Path, work: &Path) -> usize {
    let rows = corpus::table(&folder.join("manifest.tsv")).unwrap();
    let name_of = |packed: &str| -> PathBuf {
        let name = packed.strip_suffix(".bz2").or_else(|| packed.strip_suffix(".gz")).unwrap_or(packed);
        work.join(name)
    };
    for row in &rows {
        unpack(&folder.join(&row[0]), &name_of(&row[0]));
    }
    let mut wrong = 0;
    for row in &rows {
        let path = name_of(&row[0]);
        let begun = Instant::now();
        // No content is listed for what nobody reads, and all readers but one refuse wrong checksums, as is owed.
        let readable =
            !row[6].is_empty() && !row.get(9).is_some_and(|who| who.contains("reject: bad footer"));
        let said = open(&path, true).map(|image| {
            let size = image.geometry().virtual_size;
            (size.to_string() == row[6] && has_content(&*image, row), size)
        });
        let (good, text) = match &said {
            Ok((true, size)) => (true, format!("{size} bytes, as owed")),
            Ok((false, size)) => (false, format!("{size} bytes, DIFFERENT")),
            Err(e) => (!readable, refusal(e)),
        };
        wrong += usize::from(!good);
        let owed = if readable { format!("{} bytes with their hash", row[6]) } else { "REJECT".into() };
        line(&row[0], &owed, &text, "", "", begun.elapsed(), good);
    }
    wrong
}

/// Whether an image holds what its row says: by the hash of what is not zero where there is one, else by that of all. A huge disk
/// that has only the latter must hold nothing, since taking it would take minutes.
fn has_content(image: &dyn Image, row: &[String]) -> bool {
    match row.get(8).filter(|hash| !hash.is_empty()) {
        Some(sparse) => corpus::sparse64k_of(image) == *sparse,
        None if image.geometry().virtual_size > 16 << 30 => {
            let mut at = 0;
            while let Some(extent) = image.next_extent(at).unwrap() {
                if extent.state == AllocState::Data {
                    return false;
                }
                at += extent.span.len;
            }
            at == image.geometry().virtual_size && row[9].contains("all zero")
        }
        None => corpus::sha256_of(image) == row[7],
    }
}

fn hostile_images(folder: &Path, work: &Path) -> usize {
    let rows = corpus::table(&folder.join("cases.tsv")).unwrap();
    for row in &rows {
        unpack(&folder.join(format!("{}.bz2", row[0])), &work.join(&row[0]));
    }
    let mut wrong = 0;
    for row in &rows {
        let path = work.join(&row[0]);
        let before = std::fs::read(&path).unwrap();
        let begun = Instant::now();
        let reading = used(&path, true);
        let untouched = std::fs::read(&path).unwrap() == before;
        let writing = used(&path, false);
        let took = begun.elapsed();
        // What is refused is left as it was, and reading changes nothing.
        let left = writing.is_ok() || std::fs::read(&path).unwrap() == before;
        let owed = Owed::of(&row[0], &row[2]);
        let good = owed.is_met(reading.is_ok(), writing.is_ok()) && untouched && left && took.as_secs() < 5;
        wrong += usize::from(!good);
        let file = match (untouched, left) {
            (true, true) => "left alone",
            (false, _) => "CHANGED BY READING",
            (_, false) => "CHANGED THOUGH REFUSED",
        };
        let text = |said: &Result<(), String>| said.clone().err().unwrap_or_else(|| "opened".into());
        line(&row[0], &row[2], &text(&reading), &text(&writing), file, took, good);
        std::fs::write(&path, before).unwrap();
    }
    wrong
}

/// Opens an image, reads all that it says to have, up to 64 MiB, and closes it.
fn used(path: &Path, read_only: bool) -> Result<(), String> {
    let image = open(path, read_only).map_err(|e| refusal(&e))?;
    let size = image.geometry().virtual_size.min(64 << 20);
    let mut buf = vec![0; 1 << 20];
    for at in (0..size).step_by(1 << 20) {
        let n = (size - at).min(1 << 20) as usize;
        formats::read_payload(&*image, at, &mut buf[..n]).map_err(|e| format!("opened; reading: {e}"))?;
    }
    image.close().map_err(|e| format!("opened; closing: {e}"))
}

fn refusal(e: &OpenError) -> String {
    format!("{:?}: {}", e.kind, e.message.replace(['\t', '\n'], " "))
}

fn line(case: &str, owed: &str, reading: &str, writing: &str, file: &str, took: Duration, good: bool) {
    let verdict = if good { "ok" } else { "WRONG" };
    println!("{case}\t{owed}\t{reading}\t{writing}\t{file}\t{}\t{verdict}", took.as_millis());
}
