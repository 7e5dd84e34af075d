//! blockd, moving over its control API.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use blockd_api::MoveRequest;
use system_tests::daemon::Program;
use system_tests::{Daemon, DiskSpec, Image};

use crate::events::Events;
use crate::server::{Plan, Server, Told, Watch};

const DISK: &str = "disk";

/// The daemon and its disk.
#[derive(Debug)]
pub struct Blockd {
    daemon: Daemon,
}

impl Blockd {
    /// Starts the daemon in `dir`.
    ///
    /// # Errors
    /// When it is not found or does not come up; its log is in the message.
    pub fn start(dir: &Path, kind: Image, image: &Path) -> Result<Self> {
        let disk = DiskSpec { id: DISK.into(), image: image.to_owned(), kind, queues: 1, read_only: false };
        Ok(Self { daemon: Daemon::start_program(Program::Blockd, dir, vec![disk])? })
    }

    fn request(plan: &Plan, target: &Path) -> MoveRequest {
        MoveRequest {
            disks: vec![DISK.into()],
            to: target.to_string_lossy().into_owned(),
            format: Some(plan.to.name().into()),
            image_type: Some(plan.to.layout().into()),
            block_size: None,
            mirror: "after-copy".into(),
            switch: "auto".into(),
            verify: plan.verify.clone(),
            bandwidth: None,
            max_guest_p99_us: plan.max_guest_p99_us,
            keep_source: false,
            copy_only: false,
            flatten: false,
            files: Vec::new(),
            on_target_error: "pause".into(),
        }
    }

    /// Waits for the job's end; returns when it was equal on both sides, and when the switch was recorded.
    fn follow(
        &self,
        job: &str,
        events: &Events,
        watch: &mut Watch<'_>,
    ) -> Result<(Instant, Instant, Instant)> {
        let (mut synced, mut committed) = (None, None);
        loop {
            watch.look()?;
            let Some((at, event)) = events.next(Duration::from_millis(20)) else { continue };
            if event.job.as_deref() != Some(job) {
                continue;
            }
            match event.message.as_str() {
                "mirroring" => watch.mark("mirroring", at)?,
                "synced" => {
                    synced = Some(at);
                    watch.mark("verify", at)?;
                }
                "committed" => committed = Some(at),
                "done" => {
                    let committed = committed.unwrap_or(at);
                    return Ok((synced.unwrap_or(committed), committed, at));
                }
                "queued" | "copying" => {}
                other => bail!("the move did not end: {other}"),
            }
        }
    }
}

impl Server for Blockd {
    fn socket(&self) -> PathBuf {
        self.daemon.socket(DISK)
    }

    fn pid(&self) -> Result<u32> {
        self.daemon.pid().context("blockd does not run")
    }

    fn run_move(&mut self, plan: &Plan, target: &Path, watch: &mut Watch<'_>) -> Result<Told> {
        let events = Events::follow(&self.daemon.api())?;
        watch.mark("copying", Instant::now())?;
        let job = self.daemon.start_move(&Self::request(plan, target))?.job;
        let (synced, committed, done) = self.follow(&job, &events, watch)?;
        let job = self.daemon.job(&job)?;
        // There is no event between the end of the verification and the switch: the daemon's own clock tells it.
        let commit = Duration::from_micros(job.switch.commit_us);
        let decided = committed.checked_sub(commit).map_or(synced, |at| at.max(synced));
        watch.mark("switch", decided)?;
        watch.mark("done", done)?;
        ensure!(job.source_deleted, "the move is done and its source is still there: {job:?}");
        Ok(Told {
            bytes_copied: Some(job.bytes_copied),
            passes: Some(job.passes),
            commit_us: Some(job.switch.commit_us),
            longest_guest_wait_us: Some(job.switch.longest_guest_wait_us),
            verify_s: job.phases.verify_s,
            verified: job.verified,
            source_deleted: job.source_deleted,
            note: None,
        })
    }

    fn stop(&mut self) -> Result<()> {
        ensure!(self.daemon.terminate()?, "blockd did not end well:\n{}", self.daemon.log_tail());
        Ok(())
    }

    fn log(&self) -> String {
        self.daemon.log_tail()
    }
}
