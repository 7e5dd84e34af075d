//! The socket of a disk, and who of its front ends may run rings.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread::JoinHandle;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use vhost::vhost_user::BackendReqHandler;

use super::channel;
use super::session::Session;
use crate::disk::DiskSpec;
use crate::disk::shared::DiskShared;
use crate::worker::mailbox::Mailbox;

/// Most front ends connected to one disk at a time.
const CONNECTIONS_MAX: usize = 16;

/// Which session's rings run. Two front ends may be connected at once (a machine that is migrated has one on each
/// side); the second one's rings start when the first one's have all stopped.
#[derive(Default)]
pub struct Ownership {
    state: Mutex<OwnerState>,
}

#[derive(Default)]
struct OwnerState {
    owner: Option<u64>,
    waiting: BTreeMap<u64, Weak<Mutex<Session>>>,
}

/// What a session that wants to run a ring is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    /// It may.
    Yes,
    /// It may, and is not told of that in another way: rings that were to wait can start as well.
    YesAfterWaiting,
    /// Not yet. It is told when it may.
    Wait,
}

impl Ownership {
    /// Whether `session` may run rings now.
    pub fn acquire(&self, session: u64, me: &Weak<Mutex<Session>>) -> Turn {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match state.owner {
            Some(owner) if owner != session => {
                state.waiting.insert(session, me.clone());
                Turn::Wait
            }
            _ => {
                state.owner = Some(session);
                // Whoever hands over finds an owner, and wakes nobody.
                if state.waiting.remove(&session).is_some() { Turn::YesAfterWaiting } else { Turn::Yes }
            }
        }
    }

    /// `session` runs no ring any more. The one that waits longest has its turn.
    pub fn release(self: &Arc<Self>, session: u64) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.waiting.remove(&session);
        if state.owner != Some(session) {
            return;
        }
        state.owner = None;
        drop(state);
        self.hand_over();
    }

    /// Lets those who wait try, the longest waiting first, until one of them runs rings. In a thread of its own: the
    /// caller holds its own session's lock.
    fn hand_over(self: &Arc<Self>) {
        let this = self.clone();
        let thread = std::thread::Builder::new().name("vhost-handover".into()).spawn(move || {
            while let Some(next) = this.next_waiting() {
                if let Some(next) = next.upgrade() {
                    next.lock().unwrap_or_else(PoisonError::into_inner).start_rings();
                }
            }
        });
        if let Err(e) = thread {
            tracing::error!("cannot start a thread, so a front end that waits has to connect again: {e}");
        }
    }

    fn next_waiting(&self) -> Option<Weak<Mutex<Session>>> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.owner.is_some() {
            return None;
        }
        state.waiting.pop_first().map(|(_, next)| next)
    }
}

/// What all sessions of a disk share.
pub struct Common {
    /// The disk.
    pub disk: Arc<DiskShared>,
    /// Its workers; queue `i` is served by worker `i % n`.
    pub workers: Vec<Arc<Mailbox>>,
    /// Most queues of a front end.
    pub queues: u16,
    /// Physical sector size in bytes.
    pub physical_sector: u32,
    /// Whose rings run.
    pub ownership: Arc<Ownership>,
}

struct Connection {
    stream: UnixStream,
    thread: JoinHandle<()>,
}

/// The listening socket and its connections.
pub struct Listener {
    stop: Arc<EventFd>,
    path: PathBuf,
    inode: u64,
    accepting: Option<JoinHandle<()>>,
    connections: Arc<Mutex<Vec<Connection>>>,
}

/// Binds `path`. A socket file that nobody listens on, left by a process that died, is replaced.
fn bind(path: &Path) -> io::Result<UnixListener> {
    if let Ok(meta) = std::fs::symlink_metadata(path) {
        if !meta.file_type().is_socket() {
            return Err(io::Error::new(
                io::ErrorKind::AlreadyExists,
                "exists and is not a socket; choose another path",
            ));
        }
        if UnixStream::connect(path).is_ok() {
            return Err(io::Error::new(
                io::ErrorKind::AddrInUse,
                "another process listens there; choose another path",
            ));
        }
        std::fs::remove_file(path)?;
    }
    UnixListener::bind(path)
        .map_err(|e| io::Error::new(e.kind(), format!("cannot listen: {e}; does the folder exist?")))
}

impl Listener {
    /// Binds the disk's socket and accepts front ends in a thread.
    ///
    /// # Errors
    /// When the path is in use or cannot be bound.
    pub fn start(spec: &DiskSpec, disk: Arc<DiskShared>, workers: Vec<Arc<Mailbox>>) -> io::Result<Self> {
        let socket = bind(&spec.socket)?;
        let inode = std::fs::symlink_metadata(&spec.socket)?.ino();
        let stop = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC)?);
        let connections = Arc::new(Mutex::new(Vec::new()));
        let physical_sector = disk.route.load().source().image().geometry().physical_sector_size;
        let common = Arc::new(Common {
            disk,
            workers,
            queues: spec.queues,
            physical_sector,
            ownership: Arc::default(),
        });
        let (stopping, list) = (stop.clone(), connections.clone());
        let accepting = std::thread::Builder::new()
            .name("vhost-accept".into())
            .spawn(move || accept_loop(&socket, &stopping, &list, &common))?;
        Ok(Self { stop, path: spec.socket.clone(), inode, accepting: Some(accepting), connections })
    }

    /// Disconnects all front ends, waits until their rings have drained, and removes the socket.
    pub fn stop(&mut self) {
        let Some(accepting) = self.accepting.take() else { return };
        let _ = self.stop.write(1);
        let _ = accepting.join();
        let connections =
            std::mem::take(&mut *self.connections.lock().unwrap_or_else(PoisonError::into_inner));
        for c in &connections {
            let _ = c.stream.shutdown(std::net::Shutdown::Both);
        }
        for c in connections {
            let _ = c.thread.join();
        }
        // Only our own: somebody may have put another socket in its place.
        if std::fs::symlink_metadata(&self.path).is_ok_and(|m| m.ino() == self.inode) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.stop();
    }
}

fn accept_loop(socket: &UnixListener, stop: &EventFd, list: &Mutex<Vec<Connection>>, common: &Arc<Common>) {
    static SESSIONS: AtomicU64 = AtomicU64::new(1);
    loop {
        let mut fds =
            [PollFd::new(socket.as_fd(), PollFlags::POLLIN), PollFd::new(stop.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(e) => return tracing::error!(disk = common.disk.id, "cannot wait for front ends: {e}"),
        }
        if fds[1].any() == Some(true) {
            return;
        }
        if fds[0].any() != Some(true) {
            continue;
        }
        let stream = match socket.accept() {
            Ok((stream, _)) => stream,
            Err(e) => {
                tracing::warn!(disk = common.disk.id, "cannot accept a front end: {e}");
                std::thread::sleep(std::time::Duration::from_millis(100));
                continue;
            }
        };
        let mut list = list.lock().unwrap_or_else(PoisonError::into_inner);
        list.retain(|c| !c.thread.is_finished());
        if list.len() >= CONNECTIONS_MAX {
            tracing::warn!(
                disk = common.disk.id,
                "more than {CONNECTIONS_MAX} front ends: one is turned away"
            );
            continue;
        }
        let number = SESSIONS.fetch_add(1, Ordering::Relaxed);
        let common = common.clone();
        let serving = stream.try_clone().and_then(|ours| {
            let thread = std::thread::Builder::new()
                .name("vhost-session".into())
                .spawn(move || serve(stream, number, &common))?;
            Ok(Connection { stream: ours, thread })
        });
        match serving {
            Ok(connection) => list.push(connection),
            Err(e) => tracing::warn!("cannot serve a front end: {e}"),
        }
    }
}

fn serve(stream: UnixStream, number: u64, common: &Arc<Common>) {
    let disk = &common.disk.id;
    tracing::info!(disk, session = number, "a front end connected");
    let ours = stream.try_clone();
    if let Err(e) = &ours {
        tracing::warn!(disk, session = number, "the front end will not be told of changes: {e}");
    }
    let session = Session::new(number, common.clone());
    let mut handler = BackendReqHandler::from_stream(stream, session.clone());
    let why = loop {
        let channel = ours.as_ref().ok().and_then(channel::of_next_message);
        if let Err(e) = handler.handle_request() {
            break e;
        }
        if channel.is_some() {
            common.disk.channels.set(number, channel);
        }
    };
    common.disk.channels.set(number, None);
    match why {
        vhost::vhost_user::Error::Disconnected => {
            tracing::info!(disk, session = number, "the front end left")
        }
        e => tracing::warn!(disk, session = number, "the front end was disconnected: {e}"),
    }
    session.lock().unwrap_or_else(PoisonError::into_inner).end();
    // The list of connections holds the socket open still: without this a front end that was disconnected would wait
    // for an answer for ever instead of coming back.
    if let Ok(stream) = ours {
        let _ = stream.shutdown(std::net::Shutdown::Both);
    }
}
