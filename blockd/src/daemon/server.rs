//! The life of the process: its socket, its signals, its end.

use std::io::{self, IsTerminal};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use blockd_api::Event;
use nix::sys::stat::{Mode, fchmod};
use tokio::net::{UnixListener, UnixSocket};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing_subscriber::EnvFilter;

use super::config::{Config, LogFormat};
use super::error::{DaemonError, Kind};
use super::events::Events;
use super::state::StateDir;
use super::{Daemon, api, system};

/// How long a clean end may take before the process ends anyway.
const END_GRACE: Duration = Duration::from_secs(30);
/// Connections that may wait while the disks come up.
const BACKLOG: u32 = 128;

/// Serves until SIGTERM or SIGINT, and ends cleanly then.
///
/// # Errors
/// A sentence that says why the daemon can't begin, or could not end cleanly.
pub fn run(config: Config) -> Result<(), DaemonError> {
    start_log(config.log_format);
    system::raise_open_files_limit();
    system::check_io_uring()?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("blockd-api")
        .enable_all()
        .build()
        .map_err(|e| DaemonError::io("the threads of the control API can't be started", &e))?;
    let ended = runtime.block_on(serve(config));
    // A request that hangs in a disk must not keep the process.
    runtime.shutdown_background();
    ended
}

async fn serve(config: Config) -> Result<(), DaemonError> {
    let mut signals = Signals::new().map_err(|e| DaemonError::io("signals can't be handled", &e))?;
    let Config { state_dir, api, disks, .. } = config;
    // Both tell of another daemon, before anything is touched. Who connects already is answered when the disks are up.
    let state = StateDir::open(&state_dir)?;
    let listener = listen(&api)?;
    let socket = api.clone();
    let starting = tokio::task::spawn_blocking(move || Daemon::start(state, &socket, disks));
    let daemon = tokio::select! {
        started = starting => started.map_err(|e| DaemonError::new(Kind::Internal, format!("starting failed: {e}")))?,
        name = signals.next() => Err(DaemonError::new(Kind::State, format!("{name} while the disks were coming up"))),
    };
    let daemon = daemon.inspect_err(|_| remove_socket(&api))?;
    let logging = tokio::spawn(log_events(daemon.events().clone()));
    tracing::info!(api = %api.display(), state = %state_dir.display(), version = env!("CARGO_PKG_VERSION"), "ready");
    system::tell_ready();
    let ended = until_told(daemon, listener, &mut signals).await;
    remove_socket(&api);
    let _ = logging.await;
    ended
}

/// Writes events to the log, away from the threads that push them.
async fn log_events(events: Arc<Events>) {
    let mut follower = events.follow();
    while let Some(batch) = follower.next(&events).await {
        for Event { kind, disk, job, message, .. } in batch {
            if kind == "disk-failed" {
                tracing::error!(disk, job, "{kind}: {message}");
            } else {
                tracing::info!(disk, job, "{kind}: {message}");
            }
        }
    }
}

/// Answers requests until a signal comes; then ends everything, in time.
async fn until_told(
    daemon: Arc<Daemon>,
    listener: UnixListener,
    signals: &mut Signals,
) -> Result<(), DaemonError> {
    let (tell, told) = tokio::sync::oneshot::channel::<()>();
    let serving = axum::serve(listener, api::router(daemon.clone())).with_graceful_shutdown(async {
        let _ = told.await;
    });
    let mut serving = tokio::spawn(serving.into_future());
    let name = tokio::select! {
        name = signals.next() => name,
        broken = &mut serving => {
            tracing::error!(?broken, "the control API has ended");
            "the end of the control API"
        }
    };
    tracing::info!("{name}: ending; a second signal ends at once");
    system::tell_stopping();
    let _ = tell.send(());
    daemon.events().close();
    let ending = async {
        if !serving.is_finished() {
            let _ = (&mut serving).await;
        }
        tokio::task::spawn_blocking(move || daemon.stop()).await
    };
    let late = |why: String| {
        let message = format!("{why}: ended with disks still open; they are mended at the next start");
        Err(DaemonError::new(Kind::State, message))
    };
    tokio::select! {
        ended = ending => match ended {
            Ok(()) => {
                tracing::info!("ended");
                Ok(())
            }
            Err(e) => Err(DaemonError::new(Kind::Internal, format!("ending failed: {e}"))),
        },
        name = signals.next() => late(format!("a second {name}")),
        () = tokio::time::sleep(END_GRACE) => late(format!("no clean end within {} s", END_GRACE.as_secs())),
    }
}

/// The signals that ask for the end.
struct Signals {
    term: Signal,
    int: Signal,
}

impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Self { term: signal(SignalKind::terminate())?, int: signal(SignalKind::interrupt())? })
    }

    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.term.recv() => "SIGTERM",
            _ = self.int.recv() => "SIGINT",
        }
    }
}

/// Listens on the API's socket, for the owner alone. What a dead daemon left there is replaced.
fn listen(path: &Path) -> Result<UnixListener, DaemonError> {
    let failed = |e: io::Error| DaemonError::io(format!("can't listen on {}", path.display()), &e);
    if let Some(folder) = path.parent() {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(failed)?;
    }
    clear_stale(path)?;
    let socket = UnixSocket::new_stream().map_err(failed)?;
    // Before binding: the file is never there with a wider mode, not even for a moment.
    fchmod(&socket, Mode::S_IRUSR | Mode::S_IWUSR).map_err(|e| failed(e.into()))?;
    socket.bind(path).map_err(failed)?;
    socket.listen(BACKLOG).map_err(failed)
}

fn clear_stale(path: &Path) -> Result<(), DaemonError> {
    let refuse = |kind, why: &str| {
        let message = format!("{} {why}; stop that one, or choose another socket with --api", path.display());
        Err(DaemonError::new(kind, message))
    };
    match path.symlink_metadata() {
        Err(_) => return Ok(()),
        Ok(there) if !there.file_type().is_socket() => {
            let message = format!(
                "{} is there and is no socket; remove it, or choose another one with --api",
                path.display()
            );
            return Err(DaemonError::new(Kind::Exists, message));
        }
        Ok(_) => {}
    }
    match UnixStream::connect(path) {
        Ok(_) => refuse(Kind::Locked, "is answered by another daemon"),
        Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => std::fs::remove_file(path).map_err(|e| {
            DaemonError::io(format!("{} of a dead daemon can't be removed", path.display()), &e)
        }),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        // It is in use by somebody who has no time just now, or is not ours to look at.
        Err(e) => refuse(Kind::Locked, &format!("may be in use by another daemon ({e})")),
    }
}

fn remove_socket(path: &Path) {
    if let Err(e) = std::fs::remove_file(path) {
        tracing::warn!(path = %path.display(), error = %e, "the socket can't be removed");
    }
}

fn start_log(format: LogFormat) {
    let filter = EnvFilter::builder()
        .with_default_directive(tracing_subscriber::filter::LevelFilter::INFO.into())
        .from_env_lossy();
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr);
    // A log that was started before, by a test in the same process, goes on.
    let _ = match format {
        LogFormat::Text => log.with_ansi(io::stderr().is_terminal()).try_init(),
        LogFormat::Json => log.json().flatten_event(true).try_init(),
    };
}
