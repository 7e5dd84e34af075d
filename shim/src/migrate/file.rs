//! Quick migration: a machine is saved to a file, and goes on elsewhere from it.
//!
//! ```text
//! "KSHIMSV1" | head: JSON | runs of pages ... | end of runs | tail: state | tail: handover of the storage
//! ```
//!
//! Each part has its length and its CRC-32C before it. The file gets its name when it is whole and durable; only then does the
//! machine end. A machine is woken once: the file is renamed, durably, before anything is taken or runs, and of two who try one
//! finds it. If it can't be woken the file gets its name back.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use super::batch::is_zero;
use super::wire::{DESCRIPTION_MAX, HANDOVER_MAX, STATE_MAX};
use crate::machine::{Description, MachineState, SourceMachine, TargetHost, TargetMachine};
use crate::memory::GuestRam;
use crate::pages::PAGE_BYTES;

/// What a file begins with; the last digit is the version.
const MAGIC: &[u8; 8] = b"KSHIMSV1";
/// Most pages of a run.
const RUN_PAGES: usize = 256;
/// What a file is called while a machine is woken from it.
const WAKING: &str = "waking";
/// What it is called afterwards.
const USED: &str = "used";

#[derive(Debug, Serialize, Deserialize)]
struct Head {
    machine: Description,
}

fn with_ending(path: &Path, ending: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(".");
    name.push(ending);
    name.into()
}

fn sync_folder(path: &Path) -> Result<()> {
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let synced = File::open(folder).and_then(|folder| folder.sync_all());
    synced.with_context(|| format!("make the folder {} durable", folder.display()))
}

fn rename(from: &Path, to: &Path) -> Result<()> {
    std::fs::rename(from, to).with_context(|| format!("rename {} to {}", from.display(), to.display()))?;
    sync_folder(to)
}

fn write_part(out: &mut impl Write, bytes: &[u8]) -> Result<()> {
    out.write_all(&(bytes.len() as u64).to_le_bytes())?;
    out.write_all(&crc32c::crc32c(bytes).to_le_bytes())?;
    Ok(out.write_all(bytes)?)
}

fn read_part(input: &mut impl Read, most: usize, what: &str) -> Result<Vec<u8>> {
    let (mut len, mut crc) = ([0; 8], [0; 4]);
    input.read_exact(&mut len).with_context(|| format!("the file ends before {what}"))?;
    input.read_exact(&mut crc).with_context(|| format!("the file ends before {what}"))?;
    let len = u64::from_le_bytes(len);
    ensure!(len <= most as u64, "the file is damaged: {what} has {len} bytes, more than {most}");
    let mut bytes = vec![0; len as usize];
    input.read_exact(&mut bytes).with_context(|| format!("the file ends in {what}"))?;
    ensure!(
        crc32c::crc32c(&bytes) == u32::from_le_bytes(crc),
        "the file is damaged: the checksum of {what} is wrong"
    );
    Ok(bytes)
}

/// Saves a machine to a new file and ends it. Pages of zeroes are left out.
///
/// # Errors
/// If the file exists or can't be written, or the storage can't be released. The machine goes on then, if it ran.
pub fn save(machine: &dyn SourceMachine, path: &Path) -> Result<()> {
    for name in [path.to_owned(), with_ending(path, WAKING)] {
        ensure!(!name.exists(), "{} exists already; take another name", name.display());
    }
    let unfinished = with_ending(path, "incomplete");
    let file = OpenOptions::new().write(true).create_new(true).open(&unfinished);
    let file = file.with_context(|| format!("make the file {}", unfinished.display()))?;
    let mut released = false;
    let saved = machine
        .pause()
        .context("pause the machine")
        .and_then(|()| write_all(machine, file, &mut released))
        .and_then(|()| rename(&unfinished, path));
    if let Err(error) = saved {
        let _ = std::fs::remove_file(&unfinished);
        if released {
            machine.reclaim_storage().context("take the storage back")?;
        }
        machine.resume().context("go on after the machine could not be saved")?;
        return Err(error.context(format!("save the machine to {}", path.display())));
    }
    machine.end();
    Ok(())
}

fn write_all(machine: &dyn SourceMachine, file: File, released: &mut bool) -> Result<()> {
    let mut out = BufWriter::with_capacity(1 << 20, file);
    let head = Head { machine: machine.description()? };
    out.write_all(MAGIC)?;
    write_part(&mut out, &serde_json::to_vec(&head)?)?;
    write_pages(&mut out, machine.ram())?;
    write_part(&mut out, &machine.save()?.0)?;
    let handover = machine.release_storage().context("release the storage")?;
    *released = true;
    write_part(&mut out, &handover)?;
    let file = out.into_inner().map_err(std::io::IntoInnerError::into_error)?;
    file.sync_all().context("make the file durable")
}

/// Runs of pages that are not zeroes, each with its first page and its number of pages; a run of none ends them.
fn write_pages(out: &mut impl Write, ram: &GuestRam) -> Result<()> {
    let mut buffer = vec![0; RUN_PAGES * PAGE_BYTES];
    let mut first = 0;
    while first < ram.pages() {
        let count = (ram.pages() - first).min(RUN_PAGES as u64);
        let bytes = &mut buffer[..count as usize * PAGE_BYTES];
        ram.read_pages(first, bytes);
        let zero: Vec<_> = bytes.chunks_exact(PAGE_BYTES).map(is_zero).collect();
        let mut at = 0;
        while at < zero.len() {
            let end = zero[at..].iter().position(|z| *z != zero[at]).map_or(zero.len(), |n| at + n);
            if !zero[at] {
                out.write_all(&(first + at as u64).to_le_bytes())?;
                write_part(out, &bytes[at * PAGE_BYTES..end * PAGE_BYTES])?;
            }
            at = end;
        }
        first += count;
    }
    out.write_all(&u64::MAX.to_le_bytes())?;
    Ok(())
}

fn read_pages(input: &mut impl Read, ram: &GuestRam) -> Result<()> {
    loop {
        let mut first = [0; 8];
        input.read_exact(&mut first).context("the file ends among the pages")?;
        let first = u64::from_le_bytes(first);
        if first == u64::MAX {
            return Ok(());
        }
        let bytes = read_part(input, RUN_PAGES * PAGE_BYTES, "a run of pages")?;
        let pages = (bytes.len() / PAGE_BYTES) as u64;
        ensure!(
            bytes.len().is_multiple_of(PAGE_BYTES)
                && pages > 0
                && first.checked_add(pages).is_some_and(|end| end <= ram.pages()),
            "the file is damaged: it has {} bytes at page {first} of {}",
            bytes.len(),
            ram.pages()
        );
        ram.write_pages(first, &bytes);
    }
}

/// Wakes a machine from a file, which is used up: it gets the ending `.used`.
///
/// # Errors
/// If the file is damaged or was used, this host can't run the machine, or its storage can't be had. The file has its name
/// again then.
pub fn restore(path: &Path, host: &dyn TargetHost) -> Result<Box<dyn TargetMachine>> {
    let (waking, used) = (with_ending(path, WAKING), with_ending(path, USED));
    if !path.exists() && (waking.exists() || used.exists()) {
        let found = if waking.exists() { &waking } else { &used };
        bail!(
            "{} was used: {} is there; a machine goes on once. If that one has certainly not run, rename the file back",
            path.display(),
            found.display()
        );
    }
    let file = File::open(path).with_context(|| format!("open the saved machine {}", path.display()))?;
    rename(path, &waking)?;
    match wake(file, host) {
        Ok(machine) => {
            // It runs: whether the name changes or not, nobody takes it for a machine that can be woken.
            if let Err(error) = rename(&waking, &used) {
                tracing::warn!(error = format!("{error:#}"), "the used file keeps its name");
            }
            Ok(machine)
        }
        Err(error) => {
            rename(&waking, path)?;
            Err(error.context(format!("wake the machine in {}", path.display())))
        }
    }
}

fn wake(file: File, host: &dyn TargetHost) -> Result<Box<dyn TargetMachine>> {
    let mut input = BufReader::with_capacity(1 << 20, file);
    let mut magic = [0; 8];
    input.read_exact(&mut magic).context("read the first bytes")?;
    ensure!(&magic == MAGIC, "the file holds no machine of a version that is known here");
    let head: Head = serde_json::from_slice(&read_part(&mut input, DESCRIPTION_MAX, "the description")?)
        .context("the description is not one of this version")?;
    let mut machine = host.create(&head.machine)?;
    read_pages(&mut input, machine.ram())?;
    let state = read_part(&mut input, STATE_MAX, "the state")?;
    let handover = read_part(&mut input, HANDOVER_MAX, "the handover of the storage")?;
    machine.restore(&MachineState(state))?;
    machine.take_storage(&handover).context("take the storage over")?;
    let started = machine.resume().and_then(|()| machine.start_devices());
    if let Err(error) = started {
        machine.return_storage().context("give the storage back")?;
        return Err(error);
    }
    if let Err(error) = machine.announce() {
        tracing::warn!(error = format!("{error:#}"), "the network does not know of the machine");
    }
    Ok(machine)
}
