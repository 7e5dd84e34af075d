//! After a restart: which image is the disk, and what is left to do. Decided by the journals alone.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use blockd_api::{ErrorInfo, Job};
use formats::ErrorKind;
use mirror::{Record, Recovery};

use super::control::{remove_durably, rename_durably};
use super::journal_file::{EXTENSION, JournalFile};
use super::layering::Layering;
use super::{MovePlan, NewImage, texts};
use crate::daemon::fence;
use crate::disk::DiskError;

/// What the journals say.
#[derive(Debug, Default)]
pub struct Recovered {
    /// Moves that are over.
    pub jobs: Vec<Job>,
    /// Disks whose image is another than their record may say.
    pub images: BTreeMap<String, NewImage>,
    /// Moves to begin again from the start, once their disk is served.
    pub restart: Vec<MovePlan>,
}

/// Writes durably that a disk, by its name, is another image now.
pub type Adopt<'a> = dyn Fn(&str, &NewImage) -> io::Result<()> + 'a;

/// Reads all journals, finishes what was committed and undoes what was not. To be called before any disk is opened.
/// `adopt` is called for each disk whose move was committed but not finished; where it fails, the journal is left as it
/// is, so that the next start comes to the same end again.
///
/// # Errors
/// A journal that cannot be read or is damaged, and files that cannot be renamed or deleted: guessing which image is
/// the disk could lose data, so nothing is served before that is mended.
pub fn recover(moves_dir: &Path, adopt: &Adopt<'_>) -> Result<Recovered, DiskError> {
    let mut recovered = Recovered::default();
    let mut paths = Vec::new();
    let listed = std::fs::read_dir(moves_dir).and_then(Iterator::collect::<io::Result<Vec<_>>>);
    for entry in listed.map_err(|e| DiskError::new(ErrorKind::Io, format!("{}: {e}", moves_dir.display())))? {
        let path = entry.path();
        if path.extension().is_some_and(|e| e == EXTENSION) {
            let age = entry.metadata().and_then(|m| m.modified()).ok();
            paths.push((age, path));
        }
    }
    // In the order in which they ended, so that the last move of a disk has the last word.
    paths.sort();
    for (_, path) in paths {
        one(moves_dir, &path, adopt, &mut recovered)
            .map_err(|e| DiskError::new(e.kind, format!("the journal {}: {}", path.display(), e.message)))?;
    }
    Ok(recovered)
}

fn one(moves_dir: &Path, path: &Path, adopt: &Adopt<'_>, recovered: &mut Recovered) -> Result<(), DiskError> {
    let corrupt = |e: &dyn std::fmt::Display| DiskError::new(ErrorKind::Corrupt, e.to_string());
    let failed = |e: io::Error| DiskError::new(ErrorKind::Io, e.to_string());
    let bytes = std::fs::read(path).map_err(failed)?;
    let (records, _) = mirror::decode_all(&bytes).map_err(|e| corrupt(&e))?;
    let decision = mirror::recover(&records).map_err(|e| corrupt(&e))?;
    let Some(plan) = records.iter().rev().find_map(|r| match r {
        Record::Plan { plan, .. } => Some(plan),
        _ => None,
    }) else {
        // Nothing had begun.
        return remove_durably(path).map_err(failed);
    };
    let json = plan.details.get("plan").ok_or_else(|| corrupt(&"its plan has no details"))?;
    let plan: MovePlan = serde_json::from_str(json).map_err(|e| corrupt(&e))?;
    let job = path.file_stem().and_then(|s| s.to_str()).unwrap_or_default();
    let append = |records: &[Record]| -> Result<(), DiskError> {
        let mut journal = JournalFile::open(moves_dir, job)?;
        records.iter().try_for_each(|r| journal.append(r)).map_err(failed)
    };
    match decision {
        Recovery::Nothing => recovered.jobs.push(over(&plan, &records)),
        Recovery::SourceIsDisk { finish_copy: true, .. } => {
            for (from, to) in plan.made_files() {
                if let Err(e) = rename_durably(&from, &to) {
                    tracing::error!(job, "the copy {} cannot become {}: {e}", from.display(), to.display());
                    return Ok(());
                }
            }
            let receipt = mirror::Receipt { verified: plan.verify, ..mirror::Receipt::default() };
            append(&[Record::TargetFinished, Record::Done { receipt }])?;
            recovered.jobs.push(over(&plan, &records));
        }
        Recovery::SourceIsDisk { restart, .. } => {
            for (temporary, _) in plan.made_files().iter().rev() {
                if let Err(e) = remove_durably(temporary) {
                    // A leftover under its temporary name harms nobody; that its storage is away must not hold up other
                    // disks.
                    tracing::warn!(job, "the unfinished target {} is left: {e}", temporary.display());
                }
            }
            if restart {
                tracing::info!(job, disk = plan.disk, "the move was interrupted and begins again");
                recovered.restart.push(plan);
            } else {
                recovered.jobs.push(over(&plan, &records));
            }
        }
        Recovery::TargetIsDisk { finish, delete_source } => {
            tracing::info!(job, disk = plan.disk, "the move was committed and is finished now");
            let further = finish_move(&plan, adopt, finish, delete_source, recovered);
            append(&further)?;
            if matches!(further.last(), Some(Record::Done { .. })) {
                recovered.jobs.push(over(&plan, &records));
            }
        }
    }
    Ok(())
}

/// Does what a committed move left to do. Returns the records of what is done; what could not be done now is left to the
/// next start, and to nobody's harm: the target is the disk all the same.
fn finish_move(
    plan: &MovePlan,
    adopt: &Adopt<'_>,
    finish: bool,
    delete_source: bool,
    recovered: &mut Recovered,
) -> Vec<Record> {
    let mut done = Vec::new();
    let mut files = plan.target_files();
    let mut is_away = false;
    for (from, to) in plan.made_files().into_iter().filter(|_| finish) {
        if let Err(e) = rename_durably(&from, &to) {
            tracing::error!(job = plan.job, "{} cannot become {}: {e}", from.display(), to.display());
            if !from.exists() {
                is_away = true;
                continue;
            }
            // Under the name that it has, it is a file of the disk.
            files.iter_mut().filter(|file| **file == to).for_each(|file| file.clone_from(&from));
        }
    }
    is_away |= delete_source && files.iter().any(|file| !file.exists());
    let image = NewImage { files, format: plan.format, generation: plan.generation + 1 };
    recovered.images.insert(plan.disk.clone(), image.clone());
    // Before the journal says that there is nothing left to do: from then on the disk's record alone counts.
    if let Err(e) = adopt(&plan.disk, &image) {
        tracing::error!(job = plan.job, disk = plan.disk, "the disk's record cannot be written: {e}");
        return done;
    }
    if is_away {
        // Its storage may not be mounted yet. It gets its name at a start that finds it, and the source is all there is till then.
        tracing::error!(
            job = plan.job,
            disk = plan.disk,
            "the target is not there, so the source is not deleted"
        );
        return done;
    }
    if finish {
        done.push(Record::TargetFinished);
    }
    let mut warning = "finished after a restart".to_owned();
    let mut deleted = false;
    if delete_source {
        deleted = true;
        // Whether other disks have the same parents is not known this early.
        let is_chain = matches!(plan.layering, Layering::Chain(_));
        let files = plan.source_files();
        for path in files.iter().take(if is_chain { 1 } else { files.len() }) {
            let fence = fence::path_of(path);
            if let Err(e) = remove_durably(path) {
                warning = format!("the source {} cannot be deleted: {e}", path.display());
                tracing::warn!(job = plan.job, "{warning}");
                deleted = false;
                break;
            }
            fence::remove_free(&fence);
        }
        if deleted {
            done.push(Record::SourceDeleted);
            let left: Vec<_> =
                files.iter().skip(1).filter(|f| is_chain && f.exists()).map(|f| f.display()).collect();
            if !left.is_empty() {
                let left = left.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
                warning = format!(
                    "finished after a restart; the parents {left} are left: delete them if nothing else needs them"
                );
                tracing::warn!(job = plan.job, "{warning}");
            }
        }
    }
    let receipt = mirror::Receipt {
        verified: plan.verify,
        source_deleted: deleted,
        warning: Some(warning),
        ..mirror::Receipt::default()
    };
    done.push(Record::Done { receipt });
    done
}

/// A move that is over, as its journal tells.
fn over(plan: &MovePlan, records: &[Record]) -> Job {
    let cancelled = records.contains(&Record::Cancelled);
    let failed = records.iter().find_map(|r| match r {
        Record::Failed { reason } => Some(reason.clone()),
        _ => None,
    });
    let receipt = records.iter().find_map(|r| match r {
        Record::Done { receipt } => Some(receipt.clone()),
        _ => None,
    });
    let receipt = receipt.unwrap_or_default();
    let is_done = !cancelled && failed.is_none();
    Job {
        job: plan.job.clone(),
        disks: vec![plan.disk.clone()],
        state: if cancelled {
            "cancelled"
        } else if failed.is_some() {
            "failed"
        } else {
            "done"
        }
        .into(),
        source: texts(&plan.source_files()),
        target: texts(&plan.target_files()),
        bytes_total: receipt.bytes_total,
        bytes_copied: receipt.bytes_copied,
        bytes_mirrored: receipt.bytes_mirrored,
        bytes_skipped_zero: receipt.bytes_skipped_zero,
        bytes_verified: receipt.bytes_verified,
        passes: receipt.passes,
        verified: format!("{:?}", plan.verify).to_lowercase(),
        source_deleted: is_done && !plan.keep_source && !plan.copy_only && !plan.source.exists(),
        error: failed.map(|message| ErrorInfo { kind: "io".into(), message }),
        ..Job::default()
    }
}
