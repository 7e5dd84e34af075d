//! Runs the built program, and plays a daemon for it.
#![allow(dead_code, reason = "each test program uses another part of it")]

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};

use serde_json::Value;
use tempfile::TempDir;

/// The program, with nothing of the surroundings that could change what it does.
pub fn command() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_blockctl"));
    command
        .env_remove("BLOCKD_API")
        .env_remove("BLOCKD_BIN")
        .env_remove("BLOCKD_STATE_DIR")
        .env_remove("XDG_RUNTIME_DIR")
        .stdin(Stdio::null());
    command
}

/// How a run of the program ended.
#[derive(Debug)]
pub struct Ended {
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl Ended {
    /// What `--json` has printed: one object and nothing else.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }

    /// It must have ended with this code.
    #[track_caller]
    pub fn expect(self, code: i32) -> Self {
        assert_eq!(self.code, code, "{self:?}");
        self
    }
}

/// Runs a command until it ends.
pub fn run(command: &mut Command) -> Ended {
    let output = command.output().expect("the program starts");
    Ended {
        code: output.status.code().expect("an exit code"),
        out: String::from_utf8(output.stdout).expect("UTF-8"),
        err: String::from_utf8(output.stderr).expect("UTF-8"),
    }
}

/// Runs `blockctl` with these arguments, in this folder.
pub fn blockctl(folder: &Path, args: &[&str]) -> Ended {
    run(command().current_dir(folder).args(args))
}

/// Names in a folder, sorted.
pub fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(folder)
        .expect("a folder")
        .map(|entry| entry.expect("an entry").file_name().into_string().expect("UTF-8"))
        .collect();
    names.sort();
    names
}

/// A sparse raw image with data at its beginning, in its middle and at its end.
pub fn write_raw(path: &Path, size: u64) {
    use std::os::unix::fs::FileExt as _;
    let file = std::fs::File::create_new(path).expect("a new file");
    file.set_len(size).expect("a size");
    let mut word = 0x1234_5678_9abc_def1u64;
    for at in [0, size / 2, size - 65536] {
        let data: Vec<u8> = (0..8192)
            .flat_map(|_| {
                word ^= word << 13;
                word ^= word >> 7;
                word ^= word << 17;
                word.to_le_bytes()
            })
            .collect();
        file.write_all_at(&data, at / 4096 * 4096).expect("written");
    }
}

/// A request that the daemon got.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Asked {
    pub method: String,
    pub path: String,
    pub body: Value,
}

/// An answer: a status and a body.
pub type Answer = (u16, String);

/// Answers requests as a test says, over HTTP/1.1 on a Unix socket.
#[derive(Debug)]
pub struct Daemon {
    _folder: TempDir,
    pub socket: PathBuf,
    asked: Arc<Mutex<Vec<Asked>>>,
}

impl Daemon {
    /// `answer` gets each request, and how many came before it.
    pub fn start(answer: impl Fn(&Asked, usize) -> Answer + Send + 'static) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let socket = folder.path().join("api.sock");
        let listener = UnixListener::bind(&socket).expect("a socket");
        let asked = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&asked);
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let Some(request) = read_request(&stream) else { continue };
                let before = log.lock().expect("a lock").len();
                let (status, body) = answer(&request, before);
                log.lock().expect("a lock").push(request);
                let head = format!(
                    "HTTP/1.1 {status} x\r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
                    body.len()
                );
                // A client that has gone away is the test's business.
                let _ =
                    (&stream).write_all(head.as_bytes()).and_then(|()| (&stream).write_all(body.as_bytes()));
            }
        });
        Self { _folder: folder, socket, asked }
    }

    /// A daemon that answers every request alike.
    pub fn always(status: u16, body: &Value) -> Self {
        let body = body.to_string();
        Self::start(move |_, _| (status, body.clone()))
    }

    /// Runs `blockctl` against it.
    pub fn blockctl(&self, args: &[&str]) -> Ended {
        run(command().arg("--api").arg(&self.socket).args(args))
    }

    /// What it was asked so far.
    pub fn asked(&self) -> Vec<Asked> {
        self.asked.lock().expect("a lock").clone()
    }
}

fn read_request(stream: &UnixStream) -> Option<Asked> {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line).ok()?;
    let mut words = line.split_whitespace();
    let (method, path) = (words.next()?.to_owned(), words.next()?.to_owned());
    let mut length = 0;
    loop {
        let mut header = String::new();
        reader.read_line(&mut header).ok()?;
        if header.trim().is_empty() {
            break;
        }
        if let Some(value) = header.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().ok()?;
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    Some(Asked { method, path, body: serde_json::from_slice(&body).unwrap_or(Value::Null) })
}
