//! Stands between source and target, understands where messages begin, and cuts all connections at a chosen one.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

/// What happens to the message at which the connections are cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// It is lost.
    Before,
    /// Half of it arrives.
    Within,
    /// It arrives.
    After,
}

/// At which message it is cut, from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// Of all.
    Message(u64),
    /// Of those of a kind.
    Kind(u16, u64),
}

struct State {
    to: PathBuf,
    how: Cut,
    /// Messages until the cut.
    left: AtomicU64,
    /// Only messages of this kind are counted.
    only: Option<u16>,
    /// Nobody gets through after the cut.
    stay_down: AtomicBool,
    happened: AtomicBool,
    /// Kind of the message at which it was cut.
    kind: Mutex<Option<u16>>,
    open: Mutex<Vec<UnixStream>>,
}

/// Cuts once.
pub struct Proxy {
    pub path: PathBuf,
    state: Arc<State>,
}

impl Proxy {
    /// Cuts for good at the first message of a kind.
    pub fn start_at_kind(dir: &Path, to: &Path, how: Cut, kind: u16) -> Self {
        Self::start_with(dir, to, how, 0, true, Some(kind))
    }

    /// Cuts where it is said.
    pub fn start_at(dir: &Path, to: &Path, how: Cut, place: Place, stay_down: bool) -> Self {
        match place {
            Place::Message(at) => Self::start_with(dir, to, how, at, stay_down, None),
            Place::Kind(kind, nth) => Self::start_with(dir, to, how, nth, stay_down, Some(kind)),
        }
    }

    fn start_with(dir: &Path, to: &Path, how: Cut, at: u64, stay_down: bool, only: Option<u16>) -> Self {
        let path = dir.join("proxy.sock");
        let listener = UnixListener::bind(&path).expect("bind");
        let state = Arc::new(State {
            to: to.to_owned(),
            how,
            left: AtomicU64::new(at),
            only,
            stay_down: AtomicBool::new(stay_down),
            happened: AtomicBool::new(false),
            kind: Mutex::default(),
            open: Mutex::default(),
        });
        let for_thread = state.clone();
        std::thread::spawn(move || {
            for source in listener.incoming().flatten() {
                let state = for_thread.clone();
                if state.happened.load(SeqCst) && state.stay_down.load(SeqCst) {
                    continue;
                }
                let Ok(target) = UnixStream::connect(&state.to) else { continue };
                state.admit(source, target);
            }
        });
        Self { path, state }
    }

    pub fn happened(&self) -> bool {
        self.state.happened.load(SeqCst)
    }

    pub fn kind(&self) -> Option<u16> {
        *self.state.kind.lock().expect("nobody panics with it")
    }

    pub fn heal(&self) {
        self.state.stay_down.store(false, SeqCst);
    }
}

impl State {
    fn admit(self: &Arc<Self>, source: UnixStream, target: UnixStream) {
        {
            let mut open = self.open.lock().expect("nobody panics with it");
            open.push(source.try_clone().expect("clone"));
            open.push(target.try_clone().expect("clone"));
        }
        let (a, b) = (source.try_clone().expect("clone"), target.try_clone().expect("clone"));
        for (from, to) in [(source, target), (b, a)] {
            let state = self.clone();
            std::thread::spawn(move || {
                let _ = state.pump(&from, &to);
                let _ = from.shutdown(Shutdown::Both);
                let _ = to.shutdown(Shutdown::Both);
            });
        }
    }

    fn pump(&self, mut from: &UnixStream, mut to: &UnixStream) -> std::io::Result<()> {
        loop {
            let mut message = vec![0; 20];
            from.read_exact(&mut message)?;
            let kind = u16::from_le_bytes([message[6], message[7]]);
            let length = u32::from_le_bytes([message[12], message[13], message[14], message[15]]);
            message.resize(20 + length as usize, 0);
            from.read_exact(&mut message[20..])?;
            // Signs of life come when they come: they are not counted.
            let counts =
                kind != 20 && self.only.is_none_or(|only| only == kind) && !self.happened.load(SeqCst);
            let cut = counts
                && self.left.fetch_update(SeqCst, SeqCst, |left| left.checked_sub(1)).is_err()
                && !self.happened.swap(true, SeqCst);
            if !cut {
                to.write_all(&message)?;
                continue;
            }
            *self.kind.lock().expect("nobody panics with it") = Some(kind);
            match self.how {
                Cut::Before => {}
                Cut::Within => to.write_all(&message[..message.len() / 2])?,
                Cut::After => to.write_all(&message)?,
            }
            for stream in self.open.lock().expect("nobody panics with it").drain(..) {
                let _ = stream.shutdown(Shutdown::Both);
            }
        }
    }
}
