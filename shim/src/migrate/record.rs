//! What each side remembers of a migration across the death of its process: one small file, whole or not there.
//!
//! The source has one file for each machine, with its last attempt; the target one for each attempt.

use std::fs::{self, File, TryLockError};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::wire::{HANDOVER_MAX, MigrationId, TargetStatus};

/// Version of the records' format.
pub const RECORD_VERSION: u32 = 1;
/// Most earlier attempts that a source remembers.
pub const GIVEN_UP_MAX: usize = 64;
/// Most bytes of a record. What was handed over stands in it as hexadecimal digits.
const RECORD_MAX: u64 = 2 * HANDOVER_MAX as u64 + (64 << 10);
/// Most records of attempts that a target keeps; the oldest that are settled go first.
pub const TARGET_RECORDS_MAX: usize = 256;

/// How long the right to say where a machine is is waited for.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);
/// How often it is looked at meanwhile.
const LOCK_REST: Duration = Duration::from_millis(10);

/// Where a machine is, as its source wrote it down.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Place {
    /// Here: no attempt has gone further than copying.
    Here,
    /// A target was told to run it, or was going to be.
    HandedOver,
    /// A target runs it.
    Gone,
}

/// What a source remembers of a machine's last attempt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceRecord {
    /// [`RECORD_VERSION`].
    pub version: u32,
    /// Name of the machine.
    pub machine: String,
    /// The attempt.
    pub migration: MigrationId,
    /// Its secret, with which the target can be asked.
    pub secret: String,
    /// Where the machine is.
    pub place: Place,
    /// Address of the target.
    pub to: String,
    /// The target was to run it before all pages were there, and may still need pages from here.
    #[serde(default)]
    pub postcopy: bool,
    /// Earlier attempts, the oldest first: the machine went on here after each of them.
    #[serde(default)]
    pub given_up: Vec<MigrationId>,
    /// What was handed over with the storage.
    #[serde(with = "hex")]
    pub handover: Vec<u8>,
}

/// What a machine that runs at a target had of its memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Pages {
    /// All of it when it began to run.
    #[default]
    All,
    /// It began to run without some pages, and they have not all come since.
    Missing,
    /// It began to run without some pages, which have come since.
    Complete,
}

/// What a target remembers of an attempt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TargetRecord {
    /// [`RECORD_VERSION`].
    pub version: u32,
    /// Name of the machine, if it was told.
    pub machine: Option<String>,
    /// The attempt.
    pub migration: MigrationId,
    /// Where it stands.
    pub status: TargetStatus,
    /// What a machine that runs had of its memory.
    #[serde(default)]
    pub pages: Pages,
    /// The source knows and will not ask again.
    #[serde(default)]
    pub settled: bool,
}

/// The right to say where a machine is, held by whoever moves it or settles where it is.
#[derive(Debug)]
pub struct SourceLock {
    /// Unlocked when it is closed, or its process dies.
    _file: File,
}

/// The records in one directory.
#[derive(Debug, Clone)]
pub struct Records {
    directory: PathBuf,
}

impl Records {
    /// Those in this directory, which is made if it is not there.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn open(directory: &Path) -> Result<Self> {
        fs::create_dir_all(directory).with_context(|| {
            format!("make the directory {} for records of migrations", directory.display())
        })?;
        Ok(Self { directory: directory.to_owned() })
    }

    /// What the source remembers of a machine.
    ///
    /// # Errors
    /// If there is a record that cannot be read: then nobody knows where the machine is.
    pub fn source(&self, machine: &str) -> Result<Option<SourceRecord>> {
        let path = self.source_path(machine);
        let Some(record) = read::<SourceRecord>(&path)? else { return Ok(None) };
        check_version(record.version, &path)?;
        Ok(Some(record))
    }

    /// Writes it. When this returns it survives a loss of power.
    ///
    /// # Errors
    /// If it cannot be written; it may be there all the same.
    pub fn write_source(&self, record: &SourceRecord) -> Result<()> {
        self.write(&self.source_path(&record.machine), record)
    }

    /// Takes the right to say where a machine is. Waits for a moment: the process that it has just come from may still be
    /// about to say that it is gone.
    ///
    /// # Errors
    /// If another process has it.
    pub fn lock_source(&self, machine: &str) -> Result<SourceLock> {
        let path = self.source_path(machine).with_extension("lock");
        let file = open_lock(&path)?;
        let until = Instant::now() + LOCK_PATIENCE;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(SourceLock { _file: file }),
                Err(TryLockError::WouldBlock) => {
                    ensure!(
                        Instant::now() < until,
                        "a process that sends the machine {machine} lives and has not finished: ask it by its --api ({} is locked)",
                        path.display()
                    );
                    std::thread::sleep(LOCK_REST);
                }
                Err(TryLockError::Error(error)) => {
                    return Err(error).with_context(|| format!("lock {}", path.display()));
                }
            }
        }
    }

    fn source_path(&self, machine: &str) -> PathBuf {
        // A name may have any characters; the file's name has those that mean nothing to anybody.
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
        let name: String = machine
            .bytes()
            .map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02x}") })
            .collect();
        self.directory.join(format!("outgoing-{name}.json"))
    }

    /// What the target remembers of an attempt.
    ///
    /// # Errors
    /// If there is a record that cannot be read.
    pub fn target(&self, migration: MigrationId) -> Result<Option<TargetRecord>> {
        let path = self.target_path(migration);
        let Some(record) = read::<TargetRecord>(&path)? else { return Ok(None) };
        check_version(record.version, &path)?;
        Ok(Some(record))
    }

    /// As [`Records::write_source`].
    ///
    /// # Errors
    /// As [`Records::write_source`].
    pub fn write_target(&self, record: &TargetRecord) -> Result<()> {
        self.write(&self.target_path(record.migration), record)?;
        self.forget_oldest();
        Ok(())
    }

    fn target_path(&self, migration: MigrationId) -> PathBuf {
        self.directory.join(format!("incoming-{migration}.json"))
    }

    fn write<T: Serialize>(&self, path: &Path, record: &T) -> Result<()> {
        let text = serde_json::to_vec_pretty(record).context("write a record as JSON")?;
        write_durably(path, &text).with_context(|| format!("write the record {}", path.display()))
    }

    /// Attempts have names that are used once: an old record that is settled is asked for no more.
    fn forget_oldest(&self) {
        let Ok(entries) = fs::read_dir(&self.directory) else { return };
        let mut found: Vec<_> = entries
            .flatten()
            .filter(|entry| entry.file_name().to_string_lossy().starts_with("incoming-"))
            .filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path())))
            .filter(|(_, path)| {
                // Without the record of a machine that ran, its source would be told that it never will.
                let record = read::<TargetRecord>(path).ok().flatten();
                record.is_some_and(|record| record.settled || record.status != TargetStatus::Running)
            })
            .collect();
        if found.len() <= TARGET_RECORDS_MAX {
            return;
        }
        found.sort();
        for (_, path) in &found[..found.len() - TARGET_RECORDS_MAX] {
            // One that stays is looked at again the next time.
            let _ = fs::remove_file(path);
        }
    }
}

fn check_version(version: u32, path: &Path) -> Result<()> {
    ensure!(
        version == RECORD_VERSION,
        "the record {} has version {version}, this program reads {RECORD_VERSION}: use the version that wrote it",
        path.display()
    );
    Ok(())
}

fn read<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    let length = match fs::metadata(path) {
        Ok(found) => found.len(),
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).with_context(|| format!("look for the record {}", path.display())),
    };
    ensure!(length <= RECORD_MAX, "the record {} has {length} bytes: it is none", path.display());
    let text = fs::read(path).with_context(|| format!("read the record {}", path.display()))?;
    let record = serde_json::from_slice(&text).with_context(|| {
        format!(
            "the record {} is damaged: find out which host runs the machine, then remove the file",
            path.display()
        )
    })?;
    Ok(Some(record))
}

/// Writes a file so that it is there whole or not at all, whatever happens, and stays once this has returned.
///
/// # Errors
/// If the disk refuses; the new content may be there all the same.
pub(super) fn write_durably(path: &Path, content: &[u8]) -> Result<()> {
    let Some(directory) = path.parent() else { bail!("{} is in no directory", path.display()) };
    let temporary = path.with_extension("new");
    // Left by a process that died.
    match fs::remove_file(&temporary) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("remove the old {}", temporary.display()));
        }
        _ => {}
    }
    let mut file = create_private(&temporary)?;
    file.write_all(content)?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    sync_directory(directory)
}

/// A new file that only its owner can read: secrets and guests' memory go into it. What is there under this name already is
/// somebody else's, who could read along.
///
/// # Errors
/// If something of this name is there, or the file can't be made.
pub(super) fn create_private(path: &Path) -> Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    let mut options = File::options();
    options.write(true).create_new(true).mode(0o600);
    options.open(path).with_context(|| format!("make the file {}", path.display()))
}

/// A file without content, to lock.
fn open_lock(path: &Path) -> Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    let mut options = File::options();
    options.write(true).create(true).truncate(false).mode(0o600).custom_flags(libc::O_NOFOLLOW);
    options.open(path).with_context(|| format!("open the lock {}", path.display()))
}

/// What was renamed in a directory stays so.
pub(super) fn sync_directory(directory: &Path) -> Result<()> {
    let directory = if directory.as_os_str().is_empty() { Path::new(".") } else { directory };
    File::open(directory)?.sync_all().with_context(|| format!("write the directory {}", directory.display()))
}

/// Bytes as hexadecimal digits.
mod hex {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        let digits: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        serializer.serialize_str(&digits)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        let digits = String::deserialize(deserializer)?;
        let (pairs, rest) = digits.as_bytes().as_chunks::<2>();
        if !rest.is_empty() {
            return Err(D::Error::custom("an odd number of hexadecimal digits"));
        }
        pairs
            .iter()
            .map(|pair| {
                let text = std::str::from_utf8(pair).map_err(D::Error::custom)?;
                u8::from_str_radix(text, 16).map_err(D::Error::custom)
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(machine: &str) -> SourceRecord {
        SourceRecord {
            version: RECORD_VERSION,
            machine: machine.into(),
            migration: MigrationId::new(),
            secret: "s".into(),
            place: Place::HandedOver,
            to: "unix:/x".into(),
            postcopy: false,
            given_up: vec![],
            handover: vec![0, 255, 16],
        }
    }

    #[test]
    fn records_come_back_as_they_were_written() {
        let dir = tempfile::tempdir().expect("dir");
        let records = Records::open(&dir.path().join("state")).expect("made");
        for name in ["vm", "../etc/x", "", "ä b"] {
            assert_eq!(records.source(name).expect("none yet"), None);
            let record = record(name);
            records.write_source(&record).expect("written");
            assert_eq!(records.source(name).expect("there"), Some(record));
        }
        let status = TargetStatus::Prepared;
        let record = TargetRecord {
            version: RECORD_VERSION,
            machine: None,
            migration: MigrationId::new(),
            status,
            pages: Pages::Complete,
            settled: false,
        };
        records.write_target(&record).expect("written");
        assert_eq!(records.target(record.migration).expect("there"), Some(record));
    }

    #[test]
    fn a_damaged_record_is_not_taken_for_none() {
        let dir = tempfile::tempdir().expect("dir");
        let records = Records::open(dir.path()).expect("made");
        let path = records.source_path("vm");
        for content in ["", "{", "{\"version\":1}"] {
            fs::write(&path, content).expect("written");
            assert!(records.source("vm").is_err(), "{content}");
        }
        let newer = SourceRecord { version: 2, ..record("vm") };
        records.write_source(&newer).expect("written");
        assert!(records.source("vm").expect_err("newer").to_string().contains("version 2"));
    }

    #[test]
    fn a_target_does_not_collect_records_forever() {
        let dir = tempfile::tempdir().expect("dir");
        let records = Records::open(dir.path()).expect("made");
        for _ in 0..TARGET_RECORDS_MAX + 3 {
            let migration = MigrationId::new();
            let path = records.target_path(migration);
            let record = TargetRecord {
                version: 1,
                machine: None,
                migration,
                status: TargetStatus::Discarded,
                pages: Pages::All,
                settled: false,
            };
            fs::write(path, serde_json::to_vec(&record).expect("json")).expect("written");
        }
        let migration = MigrationId::new();
        let running = TargetRecord {
            version: 1,
            machine: None,
            migration,
            status: TargetStatus::Running,
            pages: Pages::All,
            settled: false,
        };
        fs::write(records.target_path(migration), serde_json::to_vec(&running).expect("json"))
            .expect("written");
        records.forget_oldest();
        assert_eq!(fs::read_dir(dir.path()).expect("listed").count(), TARGET_RECORDS_MAX + 1);
        assert_eq!(records.target(migration).expect("kept"), Some(running));
    }

    #[test]
    fn one_at_a_time_says_where_a_machine_is() {
        let dir = tempfile::tempdir().expect("dir");
        let records = Records::open(dir.path()).expect("records");
        let lock = records.lock_source("vm").expect("free");
        records.lock_source("another").expect("another machine's");
        let waits = std::thread::spawn({
            let records = records.clone();
            move || records.lock_source("vm")
        });
        std::thread::sleep(Duration::from_millis(50));
        drop(lock);
        let lock = waits.join().expect("ends").expect("waited until it was free");
        let error = records.lock_source("vm").expect_err("held");
        assert!(error.to_string().contains("--api"), "{error}");
        drop(lock);
    }
}
