//! qemu-storage-daemon, set up as somebody would who wants it fast: past the page cache, with io_uring, and the disk in
//! a thread of its own as long as it lives through that; moving by a mirror job over QMP.
//!
//! Its mirror copies what guests write in the background, and may so never catch up with a busy guest. When it has not
//! within the given time, it is told to mirror writes at once, as its users do then, and the report says so.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use system_tests::Image;

use crate::interrupt;
use crate::qmp::{Qmp, job_status};
use crate::server::{Plan, Server, Told, Watch};

const JOB: &str = "move";
/// How long it may take to start or to end.
const START_TIMEOUT: Duration = Duration::from_secs(60);
/// How many times the patience with the default mode it may take with writes mirrored at once.
const SYNCHRONOUS_FACTOR: u32 = 10;

/// The daemon and its disk.
#[derive(Debug)]
pub struct Rival {
    dir: PathBuf,
    child: Child,
    qmp: Qmp,
}

/// A path within QEMU's options, where a comma has to be doubled.
fn escaped(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

impl Rival {
    /// Starts the daemon in `dir`; the disk gets an iothread, or shares the main loop with the monitor.
    ///
    /// # Errors
    /// When it does not come up; its log is in the message.
    pub fn start(dir: &Path, kind: Image, image: &Path, own_thread: bool) -> Result<Self> {
        let log = File::create(dir.join("rival.log"))?;
        let monitor = dir.join("qmp.sock");
        let thread = if own_thread { ",iothread=io" } else { "" };
        let mut child = Command::new("qemu-storage-daemon")
            .args(["--chardev", &format!("socket,id=qmp,path={},server=on,wait=off", escaped(&monitor))])
            .args(["--monitor", "chardev=qmp", "--object", "iothread,id=io"])
            .args(["--blockdev", &format!(
                "driver=file,node-name=source-file,filename={},cache.direct=on,aio=io_uring,discard=unmap",
                escaped(image)
            )])
            .args(["--blockdev", &format!(
                "driver={},node-name=disk,file=source-file,cache.direct=on,discard=unmap",
                kind.qemu_name()
            )])
            .args(["--export", &format!(
                "type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={},writable=on,num-queues=1{thread}",
                escaped(&dir.join("disk.sock"))
            )])
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("qemu-storage-daemon (package qemu-utils)")?;
        match Self::connect(dir, &mut child) {
            Ok(qmp) => Ok(Self { dir: dir.to_owned(), child, qmp }),
            Err(error) => {
                let _ = child.kill();
                let _ = child.wait();
                Err(error.context(tail(dir)))
            }
        }
    }

    fn connect(dir: &Path, child: &mut Child) -> Result<Qmp> {
        let until = Instant::now() + START_TIMEOUT;
        while !(dir.join("qmp.sock").exists() && dir.join("disk.sock").exists()) {
            interrupt::check()?;
            ensure!(child.try_wait()?.is_none(), "qemu-storage-daemon ended while starting");
            ensure!(Instant::now() < until, "qemu-storage-daemon was not ready within {START_TIMEOUT:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
        Qmp::connect(&dir.join("qmp.sock"))
    }

    fn add_target(&mut self, plan: &Plan, target: &Path) -> Result<()> {
        plan.to.create(target, plan.size)?;
        let file = json!({
            "driver": "file", "node-name": "target-file", "filename": target, "aio": "io_uring",
            "cache": {"direct": true}, "discard": "unmap"
        });
        self.qmp.call("blockdev-add", file)?;
        let node = json!({
            "driver": plan.to.qemu_name(), "node-name": "target", "file": "target-file",
            "cache": {"direct": true}, "discard": "unmap"
        });
        self.qmp.call("blockdev-add", node)?;
        Ok(())
    }

    /// Waits until the job has this status; `false` when it has not within `limit`.
    fn wait_status(&mut self, wanted: &str, limit: Duration, watch: &mut Watch<'_>) -> Result<bool> {
        let until = Instant::now() + limit;
        while Instant::now() < until {
            watch.look()?;
            let Some(event) = self.qmp.event()? else { continue };
            match job_status(&event, JOB) {
                Some(status) if status == wanted => return Ok(true),
                Some("aborting" | "concluded") => bail!("the mirror job failed: {}", self.job_error()?),
                _ => {}
            }
        }
        Ok(false)
    }

    /// As [`Rival::wait_status`], with help for a job that doesn't get there. Returns whether it needed it.
    fn wait_helped(
        &mut self,
        wanted: &str,
        plan: &Plan,
        helped: bool,
        watch: &mut Watch<'_>,
    ) -> Result<bool> {
        if !helped && self.wait_status(wanted, plan.patience, watch)? {
            return Ok(false);
        }
        if !helped {
            let change = json!({"id": JOB, "type": "mirror", "copy-mode": "write-blocking"});
            self.qmp.call("block-job-change", change)?;
        }
        let limit = plan.patience * SYNCHRONOUS_FACTOR;
        ensure!(
            self.wait_status(wanted, limit, watch)?,
            "the mirror job was not {wanted} within {limit:?} more"
        );
        Ok(true)
    }

    fn job_error(&mut self) -> Result<String> {
        let jobs = self.qmp.call("query-jobs", json!({}))?;
        let ours = jobs.as_array().into_iter().flatten().find(|job| job["id"] == JOB);
        Ok(ours.and_then(|job| job["error"].as_str()).unwrap_or("without a reason").to_owned())
    }

    fn bytes_copied(&mut self) -> Result<Option<u64>> {
        let jobs = self.qmp.call("query-block-jobs", json!({}))?;
        Ok(jobs.as_array().and_then(|jobs| jobs.first()).and_then(|job| job["offset"].as_u64()))
    }

    fn complete(&mut self, plan: &Plan, helped: bool, watch: &mut Watch<'_>) -> Result<bool> {
        watch.mark("switch", Instant::now())?;
        self.qmp.call("job-complete", json!({"id": JOB}))?;
        let helped = self.wait_helped("concluded", plan, helped, watch)? || helped;
        watch.mark("done", Instant::now())?;
        let jobs = self.qmp.call("query-jobs", json!({}))?;
        let failed =
            jobs.as_array().into_iter().flatten().find_map(|job| job["error"].as_str().map(str::to_owned));
        if let Some(error) = failed {
            bail!("the mirror job failed: {error}");
        }
        self.qmp.call("job-dismiss", json!({"id": JOB}))?;
        Ok(helped)
    }
}

impl Server for Rival {
    fn socket(&self) -> PathBuf {
        self.dir.join("disk.sock")
    }

    fn pid(&self) -> Result<u32> {
        Ok(self.child.id())
    }

    fn run_move(&mut self, plan: &Plan, target: &Path, watch: &mut Watch<'_>) -> Result<Told> {
        watch.mark("copying", Instant::now())?;
        self.add_target(plan, target)?;
        let mirror: Value = json!({
            "job-id": JOB, "device": "disk", "target": "target", "sync": "full", "auto-dismiss": false
        });
        self.qmp.call("blockdev-mirror", mirror)?;
        let helped = self.wait_helped("ready", plan, false, watch)?;
        watch.mark("ready", Instant::now())?;
        let bytes_copied = self.bytes_copied()?;
        let helped = self.complete(plan, helped, watch)?;
        let note = helped.then(|| {
            format!(
                "In its default mode the mirror did not catch up with the guest within {} s; it was then told to mirror \
                 writes at once (block-job-change, copy-mode write-blocking).",
                plan.patience.as_secs()
            )
        });
        let verified = "none".into();
        Ok(Told { bytes_copied, verified, note, ..Told::default() })
    }

    fn stop(&mut self) -> Result<()> {
        let _ = self.qmp.call("quit", json!({}));
        let until = Instant::now() + START_TIMEOUT;
        while Instant::now() < until {
            if let Some(status) = self.child.try_wait()? {
                ensure!(status.success(), "qemu-storage-daemon ended with {status}: {}", tail(&self.dir));
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        bail!("qemu-storage-daemon did not end within {START_TIMEOUT:?}")
    }

    fn log(&self) -> String {
        tail(&self.dir)
    }
}

impl Drop for Rival {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn tail(dir: &Path) -> String {
    let log = std::fs::read(dir.join("rival.log")).unwrap_or_default();
    let end = &log[log.len().saturating_sub(4000)..];
    format!("qemu-storage-daemon's log: {}", String::from_utf8_lossy(end).trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commas_in_paths_are_doubled() {
        assert_eq!(escaped(Path::new("/a,b/c")), "/a,,b/c");
    }
}
