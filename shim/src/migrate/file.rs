//! Quick migration: a machine is paused, saved to a file, and goes on elsewhere.
//!
//! A file is [`FILE_MAGIC`], then messages as on the wire, each with its checksum: save-begin, pages, state, commit (what was
//! handed over with the storage), save-end. It appears under its name whole or not at all.
//!
//! A machine is in one place: while its file has its name it runs nowhere, and who restores it takes the name away, durably,
//! before it runs. A file is restored once; a copy of it would make the machine run twice, on one disk.

use std::fs::{self, File};
use std::io::{BufReader, BufWriter, ErrorKind, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use serde::{Deserialize, Serialize};

use super::batch::{BatchBuilder, Compression, Packer, Unpacker};
use super::presence::Presence;
use super::record::{create_private, sync_directory};
use super::wire::{
    HANDOVER_MAX, HEADER_BYTES, Header, KIND_COMMIT, KIND_PAGES, KIND_SAVE_BEGIN, KIND_SAVE_END, KIND_STATE,
    MigrationId, STATE_MAX, kind_name,
};
use crate::machine::{Description, MachineState, SourceMachine, TargetHost, TargetMachine};
use crate::memory::GuestRam;

/// First bytes of a file.
pub const FILE_MAGIC: [u8; 16] = *b"kvm-shim saved\n\0";
/// Version of the file's format.
pub const FILE_VERSION: u32 = 1;
/// What a file's name ends with after the machine was restored from it.
pub const RESTORED_SUFFIX: &str = ".restored";
/// What it ends with while it is written.
const UNFINISHED_SUFFIX: &str = ".unfinished";
/// Words of the bitmap of pages that are looked at together.
const CHUNK_WORDS: u64 = 16;
/// Bytes that one read asks for at most, so that a length is believed only as far as bytes follow it.
const READ_BYTES: usize = 1 << 20;

/// How a file begins.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Begin {
    version: u32,
    id: MigrationId,
    machine: Description,
}

/// How it ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct End {
    batches: u64,
    pages: u64,
}

/// A machine was saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SaveReport {
    /// Pages with content.
    pub pages: u64,
    /// Bytes of the file.
    pub bytes: u64,
}

/// A machine that runs here, from a file.
pub struct Restored {
    /// The machine.
    pub machine: Box<dyn TargetMachine>,
    /// What it is made of.
    pub description: Description,
    /// The file's name now.
    pub file: PathBuf,
}

/// Pauses a machine, writes it to a file of this name, and ends it.
///
/// # Errors
/// If there is such a file, or it cannot be written: the machine goes on then. If not even that is possible it stays paused,
/// which is said.
pub fn save(machine: &dyn SourceMachine, path: &Path, compression: Compression) -> Result<SaveReport> {
    ensure!(fs::symlink_metadata(path).is_err(), "{} is there already: take another name", path.display());
    let unfinished = with_suffix(path, &format!(".{}{UNFINISHED_SUFFIX}", MigrationId::new()));
    let mut done = Done::default();
    machine.pause().context("pause the machine")?;
    match write(machine, path, &unfinished, compression, &mut done) {
        Ok(report) => {
            machine.end();
            Ok(report)
        }
        Err(error) => {
            let back = go_on(machine, path, &unfinished, done);
            Err(match back {
                Ok(()) => error.context(format!("save the machine to {}; it goes on", path.display())),
                Err(trouble) => error.context(format!(
                    "save the machine to {}; it stays paused, because it cannot go on either: {trouble:#}",
                    path.display()
                )),
            })
        }
    }
}

/// What was done so far that has to be undone before a machine may go on.
#[derive(Debug, Clone, Copy, Default)]
struct Done {
    /// The storage was given away, perhaps in part.
    released: bool,
    /// The file was given its name, or that was tried.
    published: bool,
}

/// No file that another could restore; then the machine goes on.
fn go_on(machine: &dyn SourceMachine, path: &Path, unfinished: &Path, done: Done) -> Result<()> {
    let was_there = |name: &Path| match fs::remove_file(name) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error).with_context(|| format!("remove {}", name.display())),
    };
    let withdrawn = was_there(unfinished)? || !done.published || was_there(path)?;
    ensure!(withdrawn, "{} has gone: another may have restored the machine from it", path.display());
    // A directory that is not there has no file either.
    if directory(path).is_dir() {
        sync_directory(directory(path))?;
    }
    if done.released {
        machine.reclaim_storage().context("take the storage back")?;
    }
    machine.resume().context("let the machine go on")
}

fn write(
    machine: &dyn SourceMachine,
    path: &Path,
    unfinished: &Path,
    compression: Compression,
    done: &mut Done,
) -> Result<SaveReport> {
    let mut writer = Writer { file: BufWriter::new(create_private(unfinished)?), bytes: 0 };
    writer.write(&FILE_MAGIC)?;
    let begin = Begin { version: FILE_VERSION, id: MigrationId::new(), machine: machine.description()? };
    writer.message(KIND_SAVE_BEGIN, &[&serde_json::to_vec(&begin)?])?;
    let end = write_pages(&mut writer, machine.ram(), compression)?;
    let state = machine.save().context("save the state of processors and devices")?.0;
    ensure!(
        state.len() <= STATE_MAX,
        "the state has {} bytes, more than the {STATE_MAX} of a file",
        state.len()
    );
    writer.message(KIND_STATE, &[&state])?;
    // Also if it fails: it may be given away in part.
    done.released = true;
    let handover = machine.release_storage().context("give the storage away")?;
    ensure!(handover.len() <= HANDOVER_MAX, "the storage hands over more than {HANDOVER_MAX} bytes");
    writer.message(KIND_COMMIT, &[&handover])?;
    writer.message(KIND_SAVE_END, &[&serde_json::to_vec(&end)?])?;
    let bytes = writer.bytes;
    let file = writer.file.into_inner().map_err(|error| error.into_error()).context("write the file")?;
    file.sync_all().context("write the file")?;
    done.published = true;
    rename_new(unfinished, path)?;
    sync_directory(directory(path))?;
    Ok(SaveReport { pages: end.pages, bytes })
}

struct Writer {
    file: BufWriter<File>,
    bytes: u64,
}

impl Writer {
    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.bytes += bytes.len() as u64;
        self.file.write_all(bytes).context("write the file")
    }

    fn message(&mut self, kind: u16, parts: &[&[u8]]) -> Result<()> {
        self.write(&Header::encode(kind, parts)?)?;
        parts.iter().try_for_each(|part| self.write(part))
    }
}

fn write_pages(writer: &mut Writer, ram: &GuestRam, compression: Compression) -> Result<End> {
    let (mut packer, mut builder, mut head) = (Packer::new(compression)?, BatchBuilder::new(0), Vec::new());
    let mut end = End { batches: 0, pages: 0 };
    let mut flush = |builder: &mut BatchBuilder| -> Result<()> {
        if builder.is_empty() {
            return Ok(());
        }
        let content = builder.encode(&mut packer, &mut head)?;
        writer.message(KIND_PAGES, &[&head, content])?;
        end.batches += 1;
        end.pages += builder.data_pages();
        builder.clear(0);
        Ok(())
    };
    let (words, mut presence) = (ram.pages().div_ceil(64), Presence::default());
    for at in (0..words).step_by(CHUNK_WORDS as usize) {
        let first = at * 64;
        for (i, word) in
            presence.pages(ram, first, CHUNK_WORDS.min(words - at) as usize).into_iter().enumerate()
        {
            for bit in (0..64).filter(|bit| word >> bit & 1 == 1) {
                let page = first + i as u64 * 64 + bit;
                if page >= ram.pages() {
                    break;
                }
                if builder.is_full() {
                    flush(&mut builder)?;
                }
                builder.take_page(ram, page);
            }
        }
    }
    flush(&mut builder)?;
    Ok(end)
}

/// Makes a machine from a file and lets it run. The file has another name afterwards ([`RESTORED_SUFFIX`]): nobody restores it
/// again.
///
/// If the process dies after the file was renamed and before this returns, the machine may or may not have run for a moment.
/// Who knows that it has not may give the file its name back.
///
/// # Errors
/// If the file is damaged, of another version, or no longer there, or this host cannot run the machine. The file keeps its name
/// then, and the machine runs nowhere.
pub fn restore(path: &Path, host: &dyn TargetHost) -> Result<Restored> {
    let restored = || -> Result<Restored> {
        let file = File::open(path).context("open the file")?;
        let inode = file.metadata().context("look at the file")?.ino();
        let mut reader = Reader::new(file)?;
        let (mut machine, description, id) = reader.machine(host)?;
        let handover = reader.rest(machine.as_mut())?;
        let claimed = claim(path, inode, id)?;
        if let Err(error) = run(machine.as_mut(), &handover) {
            // Nothing has run: the next may try.
            let freed = machine.return_storage();
            drop(machine);
            let back = rename_new(&claimed, path).and_then(|()| sync_directory(directory(path)));
            let error = [freed.context("give the storage back"), back]
                .into_iter()
                .filter_map(Result::err)
                .fold(error, |error, trouble| error.context(format!("and then: {trouble:#}")));
            return Err(error);
        }
        if let Err(error) = machine.start_devices() {
            tracing::error!("the machine runs here, but not all of its devices: {error:#}");
        }
        if let Err(error) = machine.announce() {
            tracing::warn!("the network was not told where the machine is now: {error:#}");
        }
        Ok(Restored { machine, description, file: claimed })
    };
    restored().with_context(|| format!("restore the machine from {}", path.display()))
}

fn run(machine: &mut dyn TargetMachine, handover: &[u8]) -> Result<()> {
    machine.take_storage(handover).context("take the storage over")?;
    machine.resume().context("let the machine run")
}

/// Takes the file's name away, so that nobody else restores it.
fn claim(path: &Path, inode: u64, id: MigrationId) -> Result<PathBuf> {
    // Others that were saved under the same name before have been here.
    let claimed = with_suffix(path, &format!(".{id}{RESTORED_SUFFIX}"));
    rename_new(path, &claimed).context("claim the file: another may have restored the machine from it")?;
    // Somebody may have put another file there since it was opened.
    let same = fs::symlink_metadata(&claimed).is_ok_and(|found| found.ino() == inode);
    if !same {
        rename_new(&claimed, path)?;
        bail!("the file was replaced while it was read: try again");
    }
    sync_directory(directory(path))?;
    Ok(claimed)
}

/// Renames a file to a name that nothing has.
fn rename_new(from: &Path, to: &Path) -> Result<()> {
    renameat2(AT_FDCWD, from, AT_FDCWD, to, RenameFlags::RENAME_NOREPLACE)
        .with_context(|| format!("rename {} to {}", from.display(), to.display()))
}

fn directory(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

struct Reader {
    file: BufReader<File>,
}

impl Reader {
    fn new(file: File) -> Result<Self> {
        let mut reader = Self { file: BufReader::new(file) };
        let mut magic = [0; FILE_MAGIC.len()];
        let read = reader.file.read_exact(&mut magic);
        ensure!(read.is_ok() && magic == FILE_MAGIC, "it is no saved machine");
        Ok(reader)
    }

    /// The next message: its kind and its body.
    fn message(&mut self) -> Result<(u16, Vec<u8>)> {
        let mut header = [0; HEADER_BYTES];
        self.file.read_exact(&mut header).context("the file ends before the machine does: it is damaged")?;
        let header = Header::decode(&header).context("the file is damaged")?;
        let mut body = Vec::new();
        while body.len() < header.length {
            let (have, more) = (body.len(), (header.length - body.len()).min(READ_BYTES));
            body.resize(have + more, 0);
            self.file
                .read_exact(&mut body[have..])
                .context("the file ends within the machine: it is damaged")?;
        }
        header.check(&body).context("the file is damaged")?;
        Ok((header.kind, body))
    }

    fn expect(&mut self, kind: u16) -> Result<Vec<u8>> {
        let (found, body) = self.message()?;
        ensure!(
            found == kind,
            "the file is damaged: it has a {} where a {} belongs",
            kind_name(found),
            kind_name(kind)
        );
        Ok(body)
    }

    /// A machine that waits for its memory and state.
    fn machine(
        &mut self,
        host: &dyn TargetHost,
    ) -> Result<(Box<dyn TargetMachine>, Description, MigrationId)> {
        let body = self.expect(KIND_SAVE_BEGIN)?;
        let begin: Begin =
            serde_json::from_slice(&body).context("the file's beginning is not what it should be")?;
        ensure!(
            begin.version == FILE_VERSION,
            "the file has version {}, this program reads {FILE_VERSION}: use the version that wrote it",
            begin.version
        );
        let report = host.check(&begin.machine);
        let fatal: Vec<_> =
            report.findings.iter().filter(|found| found.fatal).map(|found| found.message.as_str()).collect();
        ensure!(fatal.is_empty(), "this host cannot run the machine: {}", fatal.join("; "));
        let machine = host.create(&begin.machine).context("make the machine")?;
        ensure!(
            machine.ram().bytes() == begin.machine.memory_bytes,
            "the machine was made with {} bytes of memory instead of {}",
            machine.ram().bytes(),
            begin.machine.memory_bytes
        );
        Ok((machine, begin.machine, begin.id))
    }

    /// Memory and state. What was handed over with the storage is returned.
    fn rest(&mut self, machine: &mut dyn TargetMachine) -> Result<Vec<u8>> {
        let ram = machine.ram().clone();
        let (mut unpacker, mut seen) = (Unpacker::new(), End { batches: 0, pages: 0 });
        let state = loop {
            match self.message()? {
                (KIND_PAGES, body) => {
                    let batch = unpacker.unpack(&body, ram.pages()).context("the file is damaged")?;
                    batch.apply(&ram)?;
                    seen.batches += 1;
                    seen.pages += batch.pages();
                }
                (KIND_STATE, body) => break body,
                (kind, _) => bail!("the file is damaged: it has a {} where pages belong", kind_name(kind)),
            }
        };
        let handover = self.expect(KIND_COMMIT)?;
        let end: End =
            serde_json::from_slice(&self.expect(KIND_SAVE_END)?).context("the file's end is damaged")?;
        ensure!(end == seen, "the file is damaged: it says that it has {end:?}, and has {seen:?}");
        ensure!(self.file.read(&mut [0])? == 0, "the file is damaged: it goes on after its end");
        machine.restore(&MachineState(state)).context("take over the state of processors and devices")?;
        Ok(handover)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::pages::PageSet;

    /// A machine that only counts how often it went on.
    struct Paused {
        ram: Arc<GuestRam>,
        resumed: std::sync::atomic::AtomicU32,
    }

    impl SourceMachine for Paused {
        fn description(&self) -> Result<Description> {
            bail!("not asked for")
        }
        fn ram(&self) -> &Arc<GuestRam> {
            &self.ram
        }
        fn start_logging(&self) -> Result<()> {
            Ok(())
        }
        fn stop_logging(&self) -> Result<()> {
            Ok(())
        }
        fn collect_dirty(&self, _into: &mut PageSet) -> Result<()> {
            Ok(())
        }
        fn before_copy(&self, _first_page: u64, _bits: &[u64]) -> Result<()> {
            Ok(())
        }
        fn throttle(&self, _percent: u8) {}
        fn pause(&self) -> Result<()> {
            Ok(())
        }
        fn save(&self) -> Result<MachineState> {
            Ok(MachineState::default())
        }
        fn resume(&self) -> Result<()> {
            self.resumed.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
            Ok(())
        }
        fn release_storage(&self) -> Result<Vec<u8>> {
            Ok(vec![])
        }
        fn reclaim_storage(&self) -> Result<()> {
            Ok(())
        }
        fn end(&self) {}
    }

    #[test]
    fn a_machine_whose_file_was_taken_meanwhile_does_not_go_on() {
        let dir = tempfile::tempdir().expect("dir");
        let (path, unfinished) = (dir.path().join("vm"), dir.path().join("vm.unfinished"));
        let machine = Paused { ram: GuestRam::new(2 << 20, false).expect("ram"), resumed: 0.into() };
        let resumed = || machine.resumed.load(std::sync::atomic::Ordering::SeqCst);
        let published = Done { released: true, published: true };
        // Published, and gone since: another has it.
        assert!(go_on(&machine, &path, &unfinished, published).is_err());
        assert_eq!(resumed(), 0);
        // Published, and still there: it is withdrawn.
        fs::write(&path, "").expect("written");
        go_on(&machine, &path, &unfinished, published).expect("goes on");
        assert!(!path.exists());
        // The renaming failed.
        fs::write(&unfinished, "").expect("written");
        go_on(&machine, &path, &unfinished, published).expect("goes on");
        // It did not come that far.
        go_on(&machine, &path, &unfinished, Done::default()).expect("goes on");
        assert_eq!(resumed(), 3);
    }
}
