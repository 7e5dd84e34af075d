//! Stands between source and target, understands where messages begin, and cuts all connections at a chosen one.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
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
    plan: Mutex<Plan>,
    /// Nobody gets through after a cut.
    stay_down: AtomicBool,
    open: Mutex<Vec<UnixStream>>,
}

/// The cuts that are still to come.
struct Plan {
    places: VecDeque<(Cut, Place)>,
    /// Messages that counted since the last cut.
    seen: u64,
    /// Cuts so far.
    cuts: usize,
}

impl Plan {
    /// Whether to cut at a message of this kind, and how.
    fn cut_at(&mut self, kind: u16) -> Option<Cut> {
        let (how, place) = *self.places.front()?;
        let (counts, nth) = match place {
            // Signs of life come when they come: they are not counted.
            Place::Message(nth) => (kind != 20, nth),
            Place::Kind(only, nth) => (kind == only, nth),
        };
        if !counts {
            return None;
        }
        self.seen += 1;
        if self.seen <= nth {
            return None;
        }
        self.places.pop_front();
        self.seen = 0;
        self.cuts += 1;
        Some(how)
    }
}

/// Cuts where it is told to.
pub struct Proxy {
    pub path: PathBuf,
    state: Arc<State>,
}

impl Proxy {
    /// Cuts for good at the first message of a kind.
    pub fn start_at_kind(dir: &Path, to: &Path, how: Cut, kind: u16) -> Self {
        Self::start(dir, to, vec![(how, Place::Kind(kind, 0))], true)
    }

    /// Cuts at each of these places, one after the other. `stay_down`: lets nobody through after the first.
    pub fn start(dir: &Path, to: &Path, places: Vec<(Cut, Place)>, stay_down: bool) -> Self {
        let path = dir.join("proxy.sock");
        let listener = UnixListener::bind(&path).expect("bind");
        let state = Arc::new(State {
            to: to.to_owned(),
            plan: Mutex::new(Plan { places: places.into(), seen: 0, cuts: 0 }),
            stay_down: AtomicBool::new(stay_down),
            open: Mutex::default(),
        });
        let for_thread = state.clone();
        std::thread::spawn(move || {
            for source in listener.incoming().flatten() {
                let state = for_thread.clone();
                if state.cuts() > 0 && state.stay_down.load(SeqCst) {
                    continue;
                }
                let Ok(target) = UnixStream::connect(&state.to) else { continue };
                state.admit(source, target);
            }
        });
        Self { path, state }
    }

    pub fn cuts(&self) -> usize {
        self.state.cuts()
    }

    pub fn heal(&self) {
        self.state.stay_down.store(false, SeqCst);
    }
}

impl State {
    fn cuts(&self) -> usize {
        self.plan.lock().expect("nobody panics with it").cuts
    }

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
            let cut = self.plan.lock().expect("nobody panics with it").cut_at(kind);
            let Some(how) = cut else {
                to.write_all(&message)?;
                continue;
            };
            match how {
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
