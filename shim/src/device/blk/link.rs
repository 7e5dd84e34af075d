//! A connection to the backend: opened, negotiated, and asked with an end to every wait.
//!
//! The front end of the `vhost` crate waits for an answer without an end, so it lives in a thread of its own. Whoever waits
//! for that thread in vain gives the connection up by closing its own half: the backend sees the end, drains its rings and
//! closes the other half, and only then is it known that it touches the guest's memory no more. That is why a new
//! connection is made only after the former has closed.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use vhost::VhostBackend;
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};

use super::super::mmio::QUEUES_MAX;
use super::offer::{CONFIG_BYTES, KNOWN_FEATURES, Offer};

/// VHOST_F_LOG_ALL: every write to guest memory is logged.
pub(super) const F_LOG_ALL: u64 = 1 << 26;
/// VHOST_USER_F_PROTOCOL_FEATURES.
pub(super) const F_PROTOCOL: u64 = 1 << 30;
/// How often it is tried whether a socket is there.
pub(super) const RETRY: Duration = Duration::from_millis(20);

type Job = Box<dyn FnOnce(&mut Frontend) + Send>;

/// A negotiated connection.
pub(super) struct Link {
    stream: Arc<UnixStream>,
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

/// Connects, without waiting for a backend that does not accept.
fn connect_now(path: &Path) -> Result<UnixStream> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    connect(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
    let stream = UnixStream::from(fd);
    stream.set_nonblocking(false)?;
    Ok(stream)
}

impl Link {
    /// Connects to `path` and negotiates, all of it before `until`. One attempt only.
    pub(super) fn open(path: &Path, queues: u16, until: Instant) -> Result<(Self, Offer)> {
        let stream = connect_now(path)?;
        let theirs = stream.try_clone()?;
        let (jobs, inbox) = channel::<Job>();
        let thread = std::thread::Builder::new().name("vhost-front".into()).spawn(move || {
            let mut frontend = Frontend::from_stream(theirs, 1);
            while let Ok(job) = inbox.recv() {
                job(&mut frontend);
            }
        })?;
        let link = Self { stream: Arc::new(stream), jobs: Some(jobs), thread: Some(thread) };
        let offer = link.call(until, move |frontend| negotiate(frontend, queues))?;
        Ok((link, offer))
    }

    /// Has the front end do something. If that fails the connection is of no use any more: the caller gives it up.
    pub(super) fn call<T: Send + 'static>(
        &self,
        until: Instant,
        what: impl FnOnce(&mut Frontend) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let (done, answer) = channel();
        let job: Job = Box::new(move |frontend| {
            // Nobody listens any more when the wait was over before.
            let _ = done.send(what(frontend));
        });
        let jobs = self.jobs.as_ref().ok_or_else(|| anyhow!("the connection is closed"))?;
        jobs.send(job).map_err(|_| anyhow!("the connection is closed"))?;
        match answer.recv_timeout(until.saturating_duration_since(Instant::now())) {
            Ok(result) => result,
            Err(_) => bail!("the backend did not answer in time"),
        }
    }

    /// The socket, for those who watch it.
    pub(super) fn stream(&self) -> Arc<UnixStream> {
        self.stream.clone()
    }

    /// Gives the connection up without breaking off what the backend does: see the module's documentation.
    pub(super) fn give_up(&self) {
        let _ = self.stream.shutdown(std::net::Shutdown::Write);
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            // Its last wait ended with the connection.
            let _ = thread.join();
        }
    }
}

/// What every backend has to have, since without it a guest's writes could be lost when the backend or the machine moves.
fn needed() -> VhostUserProtocolFeatures {
    VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::LOG_SHMFD
        | VhostUserProtocolFeatures::INFLIGHT_SHMFD
}

fn negotiate(frontend: &mut Frontend, queues: u16) -> Result<Offer> {
    let features = frontend.get_features().context("GET_FEATURES")?;
    ensure!(
        features & F_PROTOCOL != 0 && features & F_LOG_ALL != 0,
        "the backend's features {features:#x} lack the protocol features (bit 30) or the dirty log (bit 26)"
    );
    let protocol = frontend.get_protocol_features().context("GET_PROTOCOL_FEATURES")?;
    let missing = needed() - protocol;
    ensure!(missing.is_empty(), "the backend lacks the protocol features {missing:?}");
    let chosen = needed() | protocol & VhostUserProtocolFeatures::MQ;
    frontend.set_protocol_features(chosen).context("SET_PROTOCOL_FEATURES")?;
    frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    let mut served = 1;
    if chosen.contains(VhostUserProtocolFeatures::MQ) {
        let number = frontend.get_queue_num().context("GET_QUEUE_NUM")?;
        served = u16::try_from(number).unwrap_or(QUEUES_MAX).min(QUEUES_MAX);
    }
    ensure!(served >= queues, "the backend has {served} queues and {queues} are asked for");
    frontend.set_owner().context("SET_OWNER")?;
    let (_, config) = frontend
        .get_config(0, CONFIG_BYTES as u32, VhostUserConfigFlags::WRITABLE, &[0; CONFIG_BYTES])
        .context("GET_CONFIG")?;
    ensure!(config.len() == CONFIG_BYTES, "the backend has {} bytes of configuration", config.len());
    Ok(Offer { features: features & KNOWN_FEATURES, queues: served, config })
}

/// Whether the other side has closed the connection.
pub(super) fn is_closed(stream: &UnixStream) -> bool {
    matches!(wait(Some(stream), None, Some(Duration::ZERO)), Ok(true))
}

/// Waits until the other side of `stream` has closed it or `wake` is signalled; `None` for the time waits without an end.
/// Returns whether it was closed.
pub(super) fn wait(
    stream: Option<&UnixStream>,
    wake: Option<RawFd>,
    time: Option<Duration>,
) -> io::Result<bool> {
    // A negative descriptor is passed over. Answers make the stream readable all the time: only its end is waited for.
    let fd = |fd: Option<RawFd>, events| libc::pollfd { fd: fd.unwrap_or(-1), events, revents: 0 };
    let mut fds = [fd(stream.map(AsRawFd::as_raw_fd), 0), fd(wake, libc::POLLIN)];
    // Rounded up, so that what is left of a millisecond does not become a busy loop.
    let time = time.map_or(-1, |time| i32::try_from(time.as_micros().div_ceil(1000)).unwrap_or(i32::MAX));
    // SAFETY: `fds` is valid for two entries.
    if unsafe { libc::poll(fds.as_mut_ptr(), 2, time) } < 0 {
        let error = io::Error::last_os_error();
        return if error.kind() == io::ErrorKind::Interrupted { Ok(false) } else { Err(error) };
    }
    Ok(fds[0].revents != 0)
}
