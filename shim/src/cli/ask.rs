//! The commands that ask a process with a machine.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};

use super::Exit;
use super::args::{Api, CompressArgument, Guest, OnTimeoutArgument, Resolve, Save, Send};
use super::parts::TlsArgument;
use super::show::{self, Progress};
use crate::api::client::Client;
use crate::api::{ErrorInfo, GuestRequest, MigrationInfo, SaveRequest, SendRequest, TlsFiles, VmInfo};
use crate::control;
use crate::guest::Report;
use crate::machine::CompatibilityReport;
use crate::migrate::{self, CancelToken, Resolved, SendOptions};

/// How often a migration's progress is asked for.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// How long saving, or verifying everything in the guest, may take.
const LONG: Duration = Duration::from_secs(3600);

fn print_json<T: serde::Serialize>(value: &T) -> Result<()> {
    println!("{}", serde_json::to_string(value)?);
    Ok(())
}

fn request(send: &Send) -> SendRequest {
    let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
    SendRequest {
        to: send.to.clone(),
        downtime_ms: millis(send.downtime),
        timeout_ms: send.timeout.map(millis),
        on_timeout: match send.on_timeout {
            OnTimeoutArgument::Cancel => "cancel",
            OnTimeoutArgument::Force => "force",
        }
        .into(),
        connections: send.connections,
        bandwidth: send.bandwidth,
        compress: match send.compress {
            CompressArgument::None => "none",
            CompressArgument::Lz4 => "lz4",
            CompressArgument::Zstd => "zstd",
        }
        .into(),
        postcopy: send.postcopy,
        auto_converge: send.auto_converge,
        tls: send.tls.as_ref().map(tls_files),
        insecure_plain_tcp: send.insecure_plain_tcp,
        storage: send.storage.name().into(),
    }
}

/// Paths are made absolute: the process that opens the files may be in another folder.
pub fn tls_files(tls: &TlsArgument) -> TlsFiles {
    let absolute = |path: &std::path::Path| std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    TlsFiles {
        ca: absolute(&tls.ca),
        cert: absolute(&tls.cert),
        key: absolute(&tls.key),
        name: tls.name.clone(),
    }
}

/// `send`.
///
/// # Errors
/// If the process can't be asked, or the migration fails.
pub fn send(send: &Send, json: bool) -> Result<Exit> {
    let client = Client::new(&send.api.api).with_timeout(LONG);
    let request = request(send);
    if send.check {
        let report: CompatibilityReport = client.post("/v1/check", Some(&request))?;
        if json {
            print_json(&report)?;
        } else {
            println!("{}", show::report(&report));
        }
        return Ok(if report.is_compatible() { Exit::Done } else { Exit::Different });
    }
    let mut info: MigrationInfo = client.post("/v1/migration", Some(&request))?;
    if send.detach {
        if json {
            print_json(&info)?
        } else {
            println!("migration {} has begun", info.id)
        }
        return Ok(Exit::Done);
    }
    let mut progress = Progress::default();
    while info.state == "running" {
        if !json {
            progress.show(&info);
        }
        std::thread::sleep(LOOK_EVERY);
        info = client.get("/v1/migration")?;
    }
    ended(&info, &mut progress, json)
}

fn ended(info: &MigrationInfo, progress: &mut Progress, json: bool) -> Result<Exit> {
    if json {
        print_json(info)?;
    } else {
        progress.end(info);
    }
    match info.state.as_str() {
        "done" => Ok(Exit::Done),
        state => {
            let kind = if state == "cancelled" { "cancelled" } else { "failed" };
            let message = info.error.clone().unwrap_or_else(|| format!("the migration is {state}"));
            Err(ErrorInfo { kind: kind.into(), message }.into())
        }
    }
}

/// `save`.
///
/// # Errors
/// If the process can't be asked, or the file can't be written; the machine goes on then.
pub fn save(save: &Save, json: bool) -> Result<Exit> {
    let client = Client::new(&save.api.api).with_timeout(LONG);
    let path = std::path::absolute(&save.file)?;
    let request = SaveRequest { path, storage: save.storage.name().into() };
    let info: MigrationInfo = client.post("/v1/vm/save", Some(&request))?;
    if json {
        print_json(&info)?;
    } else {
        println!("saved to {}: {} of memory", request.path.display(), show::size(info.memory_bytes));
    }
    Ok(Exit::Done)
}

/// `status`.
///
/// # Errors
/// If the process can't be asked.
pub fn status(api: &Api, json: bool) -> Result<Exit> {
    let client = Client::new(&api.api);
    let vm: VmInfo = client.get("/v1/vm")?;
    let migration: MigrationInfo = client.get("/v1/migration")?;
    if json {
        print_json(&serde_json::json!({ "vm": vm, "migration": migration }))?;
        return Ok(Exit::Done);
    }
    println!("{}", show::machine(&vm));
    if !migration.id.is_empty() {
        let why = migration.error.as_ref().map_or_else(String::new, |e| format!(": {e}"));
        println!("migration {} to {}: {}{why}", migration.id, migration.to, migration.state);
    }
    Ok(Exit::Done)
}

/// `pause`, `resume`, `stop`.
///
/// # Errors
/// If the process can't be asked, or refuses.
pub fn verb(api: &Api, verb: &str, json: bool) -> Result<Exit> {
    let vm: VmInfo = Client::new(&api.api).post::<(), _>(&format!("/v1/vm/{verb}"), None)?;
    if json {
        print_json(&vm)?;
    } else {
        println!("{}", show::machine(&vm));
    }
    Ok(Exit::Done)
}

/// `cancel`.
///
/// # Errors
/// If the process can't be asked, or has nothing to cancel.
pub fn migration_verb(api: &Api, verb: &str, json: bool) -> Result<Exit> {
    let client = Client::new(&api.api).with_timeout(LONG);
    let info: MigrationInfo = client.post::<(), _>(&format!("/v1/migration/{verb}"), None)?;
    if json {
        print_json(&info)?;
    } else {
        println!("migration {}: {}", info.id, info.state);
    }
    Ok(Exit::Done)
}

/// `resolve`.
///
/// # Errors
/// If the process can't be asked, or there is nothing to resolve, or it stays unresolved.
pub fn resolve(resolve: &Resolve, json: bool) -> Result<Exit> {
    if let Some(state_dir) = &resolve.state_dir {
        return resolve_records(resolve, state_dir, json);
    }
    let Some(api) = resolve.api.clone() else {
        let message = "whom to ask? give --api, or --state-dir if the process that sent the machine is dead";
        return Err(ErrorInfo { kind: "usage".into(), message: message.into() }.into());
    };
    let api = Api { api };
    if resolve.discard {
        let vm: VmInfo = Client::new(&api.api).post::<(), _>("/v1/migration/discard", None)?;
        if json {
            print_json(&vm)?;
        } else {
            println!("given up; {}", vm.state);
        }
        return Ok(Exit::Done);
    }
    migration_verb(&api, if resolve.retry { "retry" } else { "resume-here" }, json)
}

/// The process that sent the machine is dead: what it wrote down tells whom to ask.
fn resolve_records(resolve: &Resolve, state_dir: &Path, json: bool) -> Result<Exit> {
    let name = &resolve.name;
    let lock = migrate::lock(state_dir, name)?;
    let last = migrate::last_attempt(state_dir, name)?
        .with_context(|| format!("{} knows of no attempt to move the machine {name}", state_dir.display()))?;
    let mut options = SendOptions::new(last.to.parse()?, state_dir.to_owned());
    options.security =
        control::security(resolve.tls.as_ref().map(tls_files).as_ref(), resolve.insecure_plain_tcp);
    let how = if resolve.retry { migrate::Resolve::Ask } else { migrate::Resolve::ForceHere };
    let resolved = migrate::resolve(None, name, &options, how, &CancelToken::new())?;
    drop(lock);
    let runs_there = resolved == Resolved::Gone;
    if json {
        let place = if runs_there { "gone" } else { "here" };
        let (to, postcopy) = (&last.to, last.postcopy);
        print_json(&serde_json::json!({ "machine": name, "place": place, "to": to, "postcopy": postcopy }))?;
    } else if runs_there && last.postcopy {
        // Whether the last of them got there died with the process that sent them.
        println!(
            "the machine {name} was let run at {} before all of its memory was there: it runs there if the rest came before its \
             source died, and is lost otherwise",
            last.to
        );
    } else if runs_there {
        println!("the machine {name} runs at {}", last.to);
    } else {
        let disks = if last.handover.is_empty() {
            ""
        } else {
            "; its disks were let go for it: take them back first (`blockctl disk reclaim`)"
        };
        println!(
            "the machine {name} does not run at {} and never will: it may be started here{disks}",
            last.to
        );
    }
    Ok(Exit::Done)
}

/// `guest`.
///
/// # Errors
/// If the process can't be asked, or does not run the test guest.
pub fn guest(guest: &Guest, json: bool) -> Result<Exit> {
    let client = Client::new(&guest.api.api).with_timeout(LONG);
    let stop = if guest.stop { Some(true) } else { guest.go_on.then_some(false) };
    let request = GuestRequest { verify: guest.verify, rate: guest.rate, stop };
    let report: Report = if request == GuestRequest::default() {
        client.get("/v1/guest")?
    } else {
        client.post("/v1/guest", Some(&request))?
    };
    if json {
        print_json(&report)?;
    } else {
        println!("{}", serde_json::to_string_pretty(&report)?);
    }
    let wrong = report.mismatches + report.disk_errors > 0;
    Ok(if wrong { Exit::Different } else { Exit::Done })
}
