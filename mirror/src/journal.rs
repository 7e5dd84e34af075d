//! The records of a move's journal, and what they say after a restart.
//!
//! One file per move; one line per record: CRC-32C of the JSON in eight hexadecimal digits, a space, the JSON, a line
//! feed. A record is durable before what it permits is done, so the records alone say which image is the disk:
//!
//! ```text
//!   no Committed                     the source       (Cancelled, Failed: the move is over)
//!   Committed                        the target, which may still have its temporary name
//!   Committed, TargetFinished        the target; the source may still exist
//!   ..., Done                        nothing is left to do
//! ```
//!
//! After an append that failed the next one (the same record or another) goes *to the same offset*: otherwise torn
//! remains would stand in the middle of the file. A record may also stand there twice, when the first append was durable though it was reported as failed.

use serde::{Deserialize, Serialize};

use crate::config::{Config, MirrorMode, OnTargetError, Plan, SwitchMode, Verify};

/// The version of the records.
const JOURNAL_VERSION: u32 = 1;
/// Digits of the checksum and the space.
const PREFIX_BYTES: usize = 9;

/// Parameters of a move that a restart needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecordedOptions {
    /// Bytes of the disk.
    pub disk_size: u64,
    /// Bytes of an extent.
    pub extent_size: u64,
    /// When guest writes begin to go to both disks.
    pub mode: MirrorMode,
    /// Who says when the target becomes the disk.
    pub switch: SwitchMode,
    /// How much is verified.
    pub verify: Verify,
    /// A copy at one point in time.
    pub copy_only: bool,
    /// The source stays.
    pub keep_source: bool,
    /// What an error of the target does.
    pub on_target_error: OnTargetError,
    /// Bytes a second at most.
    pub bandwidth: Option<u64>,
    /// What the guest's 99th percentile may be, in microseconds.
    #[serde(default)]
    pub max_guest_p99_us: Option<u64>,
}

impl RecordedOptions {
    /// The parameters of this move.
    pub fn of(config: &Config) -> Self {
        Self {
            disk_size: config.disk_size,
            extent_size: config.extent_size,
            mode: config.mode,
            switch: config.switch,
            verify: config.verify,
            copy_only: config.copy_only,
            keep_source: config.keep_source,
            on_target_error: config.on_target_error,
            bandwidth: config.bandwidth,
            max_guest_p99_us: config.max_guest_p99_us,
        }
    }
}

/// A phase that was reached; for people who read the journal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RecordedPhase {
    /// The first copy is through; guest writes go to both disks.
    Mirroring,
    /// Both sides are equal.
    Synced,
}

/// What a finished move did.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Receipt {
    /// Bytes of the disk.
    pub bytes_total: u64,
    /// Bytes that copies wrote to the target.
    pub bytes_copied: u64,
    /// Bytes that guest writes wrote to both disks.
    pub bytes_mirrored: u64,
    /// Bytes that did not have to be copied.
    pub bytes_skipped_zero: u64,
    /// Bytes that were read back and compared.
    pub bytes_verified: u64,
    /// How much was to be verified.
    pub verified: Verify,
    /// Sweeps over the disk.
    pub passes: u32,
    /// Microseconds from the plan to the end.
    pub duration_us: u64,
    /// Microseconds from the flush before the commit until the target was the disk.
    pub commit_us: u64,
    /// Whether the source was deleted.
    pub source_deleted: bool,
    /// What went wrong on the way and was overcome, or why the source was not deleted.
    pub warning: Option<String>,
}

/// One record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "record")]
pub enum Record {
    /// What is going to be done. The first record.
    Plan {
        /// Version of the records: 1.
        version: u32,
        /// Who and where.
        plan: Plan,
        /// How.
        options: RecordedOptions,
    },
    /// A phase was reached.
    Phase {
        /// Which one.
        phase: RecordedPhase,
    },
    /// The target is the disk.
    Committed {
        /// The disk's generation from now on.
        generation: u64,
    },
    /// The copy at one point in time is complete and durable under its temporary name.
    CopyComplete,
    /// The target is durable under its final name.
    TargetFinished,
    /// The source is deleted.
    SourceDeleted,
    /// All is done.
    Done {
        /// What was done.
        receipt: Receipt,
    },
    /// The move was cancelled and the target discarded.
    Cancelled,
    /// The move failed and the target was discarded.
    Failed {
        /// Why.
        reason: String,
    },
}

impl Record {
    /// The first record of a move.
    pub fn plan(config: &Config) -> Self {
        Self::Plan {
            version: JOURNAL_VERSION,
            plan: config.plan.clone(),
            options: RecordedOptions::of(config),
        }
    }
}

/// How the journal's end was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tail {
    /// The last line is whole.
    Whole,
    /// The last append did not get through: the bytes from `offset` on are to be cut off (or overwritten).
    Torn {
        /// Where the last line begins, in bytes.
        offset: u64,
    },
}

/// Why a journal can't be relied on. No image may be opened for writing on its word.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JournalError {
    /// A line that is not the last one is damaged.
    #[error(
        "line {line} (offset {offset}) of the journal is damaged though another follows: restore it from a backup"
    )]
    Damaged {
        /// Which line, from 1.
        line: usize,
        /// Its offset in bytes.
        offset: u64,
    },
    /// The checksum is right, but this program does not know the record.
    #[error(
        "line {line} of the journal is a record that this version does not know ({message}): use a newer one"
    )]
    Unknown {
        /// Which line, from 1.
        line: usize,
        /// What the parser said.
        message: String,
    },
    /// The records contradict each other.
    #[error("record {index} of the journal contradicts an earlier one: {what}")]
    Contradiction {
        /// Which record, from 0.
        index: usize,
        /// In which way.
        what: &'static str,
    },
}

/// The line of a record.
pub fn encode(record: &Record) -> Vec<u8> {
    let json = serde_json::to_string(record).expect("records have string keys and no non-finite numbers");
    format!("{:08x} {json}\n", crc32c::crc32c(json.as_bytes())).into_bytes()
}

/// The records of a journal, and whether its last append was torn.
///
/// # Errors
/// [`JournalError::Damaged`] for a damaged line with another one after it, [`JournalError::Unknown`] for a sound line
/// of another version.
pub fn decode_all(bytes: &[u8]) -> Result<(Vec<Record>, Tail), JournalError> {
    let mut records = Vec::new();
    let mut offset = 0;
    while offset < bytes.len() {
        let rest = &bytes[offset..];
        let line_end = rest.iter().position(|&byte| byte == b'\n');
        let json = line_end.and_then(|end| checked_json(&rest[..end]));
        let line = records.len() + 1;
        match (json, line_end) {
            (Some(json), Some(end)) => {
                records.push(parse(json, line)?);
                offset += end + 1;
            }
            (None, Some(end)) if offset + end + 1 < bytes.len() => {
                return Err(JournalError::Damaged { line, offset: offset as u64 });
            }
            _ => return Ok((records, Tail::Torn { offset: offset as u64 })),
        }
    }
    Ok((records, Tail::Whole))
}

/// The JSON of a line whose checksum is right.
fn checked_json(line: &[u8]) -> Option<&str> {
    let (digits, json) = (line.get(..PREFIX_BYTES)?, line.get(PREFIX_BYTES..)?);
    let digits = std::str::from_utf8(digits).ok()?.strip_suffix(' ')?;
    let is_hex = digits.bytes().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f'));
    let stored = u32::from_str_radix(digits, 16).ok()?;
    if !is_hex || stored != crc32c::crc32c(json) { None } else { std::str::from_utf8(json).ok() }
}

fn parse(json: &str, line: usize) -> Result<Record, JournalError> {
    let record: Record = serde_json::from_str(json)
        .map_err(|error| JournalError::Unknown { line, message: error.to_string() })?;
    match record {
        Record::Plan { version, .. } if version != JOURNAL_VERSION => {
            Err(JournalError::Unknown { line, message: format!("a plan of version {version}") })
        }
        record => Ok(record),
    }
}

/// Which image is the disk after a restart, and what is left to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Recovery {
    /// The move is over, and whoever recorded its end had done everything; or it never began. The disk's record is right.
    Nothing,
    /// The source is the disk. An unfinished target must not be used as a disk.
    SourceIsDisk {
        /// The move is to be begun anew (it was neither cancelled nor did it fail).
        restart: bool,
        /// The copy is complete: give it its final name instead of beginning anew, and record the end.
        finish_copy: bool,
    },
    /// The target is the disk.
    TargetIsDisk {
        /// It may still have its temporary name: give it the final one, durably, and record that.
        finish: bool,
        /// The source may still exist though it was to be deleted. Only to be done after `finish`.
        delete_source: bool,
    },
}

/// Which image is the disk: the rule of the authoritative image, from nothing but the records.
///
/// # Errors
/// [`JournalError::Contradiction`] when no move could have written these records in this order.
pub fn recover(records: &[Record]) -> Result<Recovery, JournalError> {
    let mut seen = Seen::default();
    for (index, record) in records.iter().enumerate() {
        seen.take(record).map_err(|what| JournalError::Contradiction { index, what })?;
    }
    let Some(options) = &seen.options else { return Ok(Recovery::Nothing) };
    Ok(if seen.done {
        Recovery::Nothing
    } else if seen.committed.is_some() {
        let delete_source = !options.keep_source && !seen.source_deleted;
        Recovery::TargetIsDisk { finish: !seen.finished, delete_source }
    } else {
        Recovery::SourceIsDisk {
            restart: !seen.given_up && !seen.copy_complete,
            finish_copy: seen.copy_complete,
        }
    })
}

/// What the records so far have said.
#[derive(Default)]
struct Seen {
    options: Option<RecordedOptions>,
    generation: u64,
    committed: Option<u64>,
    copy_complete: bool,
    finished: bool,
    source_deleted: bool,
    given_up: bool,
    done: bool,
}

impl Seen {
    fn take(&mut self, record: &Record) -> Result<(), &'static str> {
        let over = self.done || self.given_up;
        if let Record::Plan { plan, options, .. } = record {
            if self.options.as_ref().is_some_and(|known| known != options) {
                return Err("a second plan with other options");
            }
            if self.committed.is_some() || self.copy_complete || over {
                return Err("a plan after the move was decided");
            }
            self.generation = plan.generation;
            self.options = Some(options.clone());
            return Ok(());
        }
        let Some(options) = &self.options else {
            // The plan could not be recorded, so nothing was begun, and the end was recorded in its place.
            let is_end = matches!(record, Record::Cancelled | Record::Failed { .. });
            return if is_end { Ok(()) } else { Err("there is no plan before it") };
        };
        match record {
            Record::Plan { .. } => {}
            Record::Phase { .. } => {
                if over || self.committed.is_some() {
                    return Err("a phase after the move was decided");
                }
            }
            Record::Committed { generation } => {
                if over || options.copy_only {
                    return Err("a commit of a copy, or of a move that was given up");
                }
                if self.generation.checked_add(1) != Some(*generation) {
                    return Err("the commit's generation is not the plan's generation and 1");
                }
                self.committed = Some(*generation);
            }
            Record::CopyComplete => {
                if over || !options.copy_only {
                    return Err("a completed copy though none was planned, or it was given up");
                }
                self.copy_complete = true;
            }
            Record::TargetFinished => {
                if self.given_up || !(self.committed.is_some() || self.copy_complete) {
                    return Err("a finished target without a commit");
                }
                self.finished = true;
            }
            Record::SourceDeleted => {
                if !self.finished || self.committed.is_none() || options.keep_source {
                    return Err(
                        "a deleted source though the target was not finished, or the source was to stay",
                    );
                }
                self.source_deleted = true;
            }
            Record::Done { .. } => {
                if !self.finished {
                    return Err("the end of a move whose target was not finished");
                }
                self.done = true;
            }
            Record::Cancelled | Record::Failed { .. } => {
                if self.committed.is_some() || self.done || self.finished {
                    return Err("a move given up after its commit");
                }
                self.given_up = true;
                self.copy_complete = false;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> Config {
        let plan = Plan {
            job: "j".into(),
            disk: "d".into(),
            generation: 7,
            source: "a.vhdx".into(),
            ..Plan::default()
        };
        Config { plan, ..Config::default() }
    }

    fn plan() -> Record {
        Record::plan(&config())
    }

    fn done() -> Record {
        Record::Done { receipt: Receipt::default() }
    }

    const COMMITTED: Record = Record::Committed { generation: 8 };

    fn all_records() -> Vec<Record> {
        vec![
            plan(),
            Record::Phase { phase: RecordedPhase::Mirroring },
            COMMITTED,
            Record::TargetFinished,
            Record::SourceDeleted,
            done(),
            Record::Failed { reason: "a \n line feed and an \u{e9}".into() },
            Record::Cancelled,
            Record::CopyComplete,
        ]
    }

    #[test]
    fn records_come_back_as_they_were_written() {
        let bytes: Vec<u8> = all_records().iter().flat_map(encode).collect();
        assert_eq!(decode_all(&bytes), Ok((all_records(), Tail::Whole)));
        assert_eq!(decode_all(b""), Ok((vec![], Tail::Whole)));
        assert_eq!(bytes.iter().filter(|&&byte| byte == b'\n').count(), all_records().len());
    }

    #[test]
    fn a_plan_of_before_there_were_budgets_is_understood() {
        let options = RecordedOptions::of(&Config { max_guest_p99_us: Some(9), ..Config::default() });
        let mut json = serde_json::to_value(&options).expect("plain data");
        json.as_object_mut().expect("fields").remove("max_guest_p99_us");
        let older: RecordedOptions = serde_json::from_value(json).expect("an older plan");
        assert_eq!(older, RecordedOptions { max_guest_p99_us: None, ..options });
    }

    #[test]
    fn a_journal_cut_at_any_byte_yields_the_whole_records_before_the_cut() {
        let lines: Vec<Vec<u8>> = all_records().iter().map(encode).collect();
        let bytes = lines.concat();
        for cut in 0..=bytes.len() {
            let mut whole = 0;
            let mut start = 0;
            while whole < lines.len() && start + lines[whole].len() <= cut {
                start += lines[whole].len();
                whole += 1;
            }
            let tail = if start == cut { Tail::Whole } else { Tail::Torn { offset: start as u64 } };
            assert_eq!(
                decode_all(&bytes[..cut]),
                Ok((all_records()[..whole].to_vec(), tail)),
                "cut at {cut}"
            );
            let mut zero_filled = bytes[..cut].to_vec();
            zero_filled.extend([0; 600]);
            let expected = Ok((all_records()[..whole].to_vec(), Tail::Torn { offset: start as u64 }));
            assert_eq!(decode_all(&zero_filled), expected, "zeroes from {cut}");
        }
    }

    #[test]
    fn any_flipped_bit_is_noticed() {
        let lines: Vec<Vec<u8>> = all_records().iter().map(encode).collect();
        let bytes = lines.concat();
        for index in 0..bytes.len() {
            for bit in 0..8 {
                let mut bad = bytes.clone();
                bad[index] ^= 1 << bit;
                match decode_all(&bad) {
                    Err(JournalError::Damaged { .. }) => {}
                    Ok((records, Tail::Torn { offset })) => {
                        assert!(offset as usize <= index);
                        assert_eq!(records, all_records()[..records.len()]);
                        assert!(records.len() >= lines.len() - 1 || bytes[index] == b'\n');
                    }
                    other => panic!("bit {bit} of byte {index}: {other:?}"),
                }
            }
        }
    }

    #[test]
    fn a_sound_record_of_another_version_is_refused() {
        let json = r#"{"record":"teleported"}"#;
        let line = format!("{:08x} {json}\n", crc32c::crc32c(json.as_bytes()));
        assert!(matches!(decode_all(line.as_bytes()), Err(JournalError::Unknown { line: 1, .. })));
        let Record::Plan { plan, options, .. } = plan() else { unreachable!() };
        let newer = encode(&Record::Plan { version: 2, plan, options });
        assert!(matches!(decode_all(&newer), Err(JournalError::Unknown { line: 1, .. })));
    }

    #[test]
    fn the_commit_record_alone_decides_which_image_is_the_disk() {
        let restart = Ok(Recovery::SourceIsDisk { restart: true, finish_copy: false });
        let over = Ok(Recovery::SourceIsDisk { restart: false, finish_copy: false });
        let target = |finish, delete_source| Ok(Recovery::TargetIsDisk { finish, delete_source });
        assert_eq!(recover(&[]), Ok(Recovery::Nothing));
        assert_eq!(recover(&[Record::Cancelled]), Ok(Recovery::Nothing));
        assert_eq!(recover(&[plan()]), restart);
        assert_eq!(recover(&[plan(), plan(), Record::Phase { phase: RecordedPhase::Synced }]), restart);
        assert_eq!(recover(&[plan(), Record::Cancelled]), over);
        assert_eq!(recover(&[plan(), Record::Failed { reason: String::new() }]), over);
        assert_eq!(recover(&[plan(), COMMITTED]), target(true, true));
        assert_eq!(recover(&[plan(), COMMITTED, COMMITTED]), target(true, true));
        assert_eq!(recover(&[plan(), COMMITTED, Record::TargetFinished]), target(false, true));
        let records = [plan(), COMMITTED, Record::TargetFinished, Record::SourceDeleted];
        assert_eq!(recover(&records), target(false, false));
        assert_eq!(recover(&[plan(), COMMITTED, Record::TargetFinished, done()]), Ok(Recovery::Nothing));
        let keeping = Record::plan(&Config { keep_source: true, ..config() });
        assert_eq!(recover(&[keeping, COMMITTED, Record::TargetFinished]), target(false, false));
        let copying = Record::plan(&Config { copy_only: true, ..config() });
        let finish_copy = Ok(Recovery::SourceIsDisk { restart: false, finish_copy: true });
        assert_eq!(recover(&[copying.clone(), Record::CopyComplete]), finish_copy);
        assert_eq!(
            recover(&[copying, Record::CopyComplete, Record::TargetFinished, done()]),
            Ok(Recovery::Nothing)
        );
    }

    #[test]
    fn records_that_no_move_writes_are_refused() {
        let copying = Record::plan(&Config { copy_only: true, ..config() });
        for (records, index) in [
            (vec![COMMITTED], 0),
            (vec![plan(), Record::Committed { generation: 9 }], 1),
            (vec![plan(), Record::TargetFinished], 1),
            (vec![plan(), COMMITTED, Record::SourceDeleted], 2),
            (vec![plan(), COMMITTED, Record::Cancelled], 2),
            (vec![plan(), COMMITTED, plan()], 2),
            (vec![plan(), Record::Cancelled, COMMITTED], 2),
            (vec![plan(), COMMITTED, done()], 2),
            (vec![plan(), Record::CopyComplete], 1),
            (vec![copying, COMMITTED], 1),
        ] {
            match recover(&records) {
                Err(JournalError::Contradiction { index: found, .. }) => {
                    assert_eq!(found, index, "{records:?}")
                }
                other => panic!("{records:?} gave {other:?}"),
            }
        }
    }
}
