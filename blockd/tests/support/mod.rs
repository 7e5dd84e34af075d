//! A daemon in its own process and folder, and the few lines of HTTP that it takes to talk to it.

#![allow(dead_code, reason = "each test file uses its own part")]

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// Nothing here takes longer, not even on a loaded machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// A folder with images, sockets and state, for one test.
pub(crate) struct Bench {
    dir: tempfile::TempDir,
}

impl Bench {
    pub(crate) fn new() -> Self {
        Self { dir: tempfile::Builder::new().prefix("bd").tempdir().expect("a temporary directory") }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn text(&self, name: &str) -> String {
        self.path(name).to_str().expect("UTF-8").to_owned()
    }

    /// A sparse raw image.
    pub(crate) fn image(&self, name: &str, bytes: u64) -> String {
        let file = std::fs::File::create(self.path(name)).expect("created");
        file.set_len(bytes).expect("sized");
        self.text(name)
    }

    /// The body of an attach request; the socket is named after the disk.
    pub(crate) fn attach(&self, id: &str, image: &str) -> Value {
        json!({ "id": id, "image": image, "socket": self.text(&format!("{id}.sock")) })
    }

    /// The value of `--disk`.
    pub(crate) fn disk(&self, id: &str, image: &str) -> String {
        format!("{id},image={image},socket={}", self.text(&format!("{id}.sock")))
    }

    /// The daemon's command line with this folder's state and API socket.
    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_blockd"));
        command
            .arg("--state-dir")
            .arg(self.path("state"))
            .arg("--api")
            .arg(self.path("api.sock"))
            .args(args)
            .env_remove("RUST_LOG")
            .env_remove("NOTIFY_SOCKET")
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        command
    }

    /// Starts the daemon and waits until it answers.
    pub(crate) fn start(&self, args: &[&str]) -> Daemon {
        Daemon::start(self, self.command(args))
    }

    /// Runs the daemon where it is expected to end by itself; its status and what it wrote to standard error.
    pub(crate) fn run(&self, args: &[&str]) -> (Option<i32>, String) {
        self.run_command(self.command(args))
    }

    pub(crate) fn run_command(&self, mut command: Command) -> (Option<i32>, String) {
        let mut child = command.stderr(Stdio::piped()).spawn().expect("spawned");
        let status = wait(&mut child);
        let mut log = String::new();
        child.stderr.take().expect("piped").read_to_string(&mut log).expect("read");
        (status.code(), log)
    }
}

/// A running daemon; killed when dropped.
pub(crate) struct Daemon {
    child: Child,
    api: PathBuf,
    log: PathBuf,
}

impl Daemon {
    pub(crate) fn start(bench: &Bench, mut command: Command) -> Self {
        let log = bench.path("log");
        let stderr = std::fs::OpenOptions::new().create(true).append(true).open(&log).expect("a log");
        let child = command.stderr(stderr).spawn().expect("spawned");
        let mut daemon = Self { child, api: bench.path("api.sock"), log };
        let give_up = Instant::now() + PATIENCE;
        loop {
            if let Ok(stream) = UnixStream::connect(&daemon.api)
                && exchange(stream, "GET", "/v1/disks", "").is_some_and(|(status, _)| status == 200)
            {
                return daemon;
            }
            let ended = daemon.child.try_wait().expect("asked");
            assert!(ended.is_none() && Instant::now() < give_up, "not up ({ended:?}):\n{}", daemon.log());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends a request with any body; status and body of the answer.
    pub(crate) fn send(&self, method: &str, path: &str, body: &str) -> (u16, String) {
        let stream = UnixStream::connect(&self.api).expect("the API's socket answers");
        match exchange(stream, method, path, body) {
            Some(answer) => answer,
            None => panic!("{method} {path}: no answer:\n{}", self.log()),
        }
    }

    /// Sends JSON and gets JSON.
    pub(crate) fn ask(&self, method: &str, path: &str, body: &Value) -> (u16, Value) {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let (status, answer) = self.send(method, path, &body);
        let parsed = serde_json::from_str(&answer);
        (status, parsed.unwrap_or_else(|e| panic!("{method} {path}: {e}: {answer:?}")))
    }

    /// What must work.
    #[track_caller]
    pub(crate) fn ok(&self, method: &str, path: &str, body: &Value) -> Value {
        let (status, answer) = self.ask(method, path, body);
        assert_eq!(status, 200, "{method} {path}: {answer}\n{}", self.log());
        answer
    }

    pub(crate) fn get(&self, path: &str) -> Value {
        self.ok("GET", path, &Value::Null)
    }

    /// What must fail with this status and kind; answers the message.
    #[track_caller]
    pub(crate) fn refused(&self, method: &str, path: &str, body: &Value, status: u16, kind: &str) -> String {
        let (got, answer) = self.ask(method, path, body);
        let error = &answer["error"];
        let is = (got, error["kind"].as_str().unwrap_or_default());
        assert_eq!(is, (status, kind), "{method} {path} {body}: {answer}");
        error["message"].as_str().expect("a message").to_owned()
    }

    /// Opens a stream of lines.
    pub(crate) fn follow(&self, path: &str) -> Lines {
        let mut stream = UnixStream::connect(&self.api).expect("the API's socket answers");
        stream.set_read_timeout(Some(PATIENCE)).expect("set");
        write!(stream, "GET {path} HTTP/1.1\r\nHost: blockd\r\n\r\n").expect("sent");
        let mut reader = BufReader::new(stream);
        let mut line = String::new();
        while line != "\r\n" {
            line.clear();
            assert!(reader.read_line(&mut line).expect("a head") > 0, "the stream ended in its head");
        }
        Lines { reader, rest: String::new() }
    }

    pub(crate) fn signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args(["-s", name, &pid]).status().expect("kill runs").success());
    }

    pub(crate) fn wait(&mut self) -> ExitStatus {
        wait(&mut self.child)
    }

    /// SIGTERM, and a clean end.
    pub(crate) fn end(mut self) {
        self.signal("TERM");
        let status = self.wait();
        assert_eq!(status.code(), Some(0), "{}", self.log());
    }

    /// SIGKILL.
    pub(crate) fn kill(mut self) {
        self.child.kill().expect("killed");
        self.child.wait().expect("waited for");
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn wait(child: &mut Child) -> ExitStatus {
    let give_up = Instant::now() + PATIENCE;
    loop {
        if let Some(status) = child.try_wait().expect("asked") {
            return status;
        }
        if Instant::now() > give_up {
            let _ = child.kill();
            panic!("the daemon does not end");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Lines of a chunked answer, as they come.
pub(crate) struct Lines {
    reader: BufReader<UnixStream>,
    rest: String,
}

impl Lines {
    /// The next line as JSON; `None` at the end of the stream.
    pub(crate) fn next(&mut self) -> Option<Value> {
        loop {
            if let Some((line, rest)) = self.rest.split_once('\n') {
                let line = serde_json::from_str(line).expect("a line of JSON");
                self.rest = rest.to_owned();
                return Some(line);
            }
            let mut size = String::new();
            if self.reader.read_line(&mut size).expect("a chunk's size") == 0 {
                return None;
            }
            let size = usize::from_str_radix(size.trim(), 16).expect("a chunk's size");
            let mut chunk = vec![0; size + 2];
            self.reader.read_exact(&mut chunk).expect("a chunk");
            if size == 0 {
                return None;
            }
            self.rest.push_str(std::str::from_utf8(&chunk[..size]).expect("UTF-8"));
        }
    }
}

/// One request and its answer; `None` when the connection breaks off.
fn exchange(mut stream: UnixStream, method: &str, path: &str, body: &str) -> Option<(u16, String)> {
    stream.set_read_timeout(Some(PATIENCE)).ok()?;
    // As curl has it with -d: a content type that is not JSON.
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: blockd\r\nConnection: close\r\nContent-Length: {}\r\n\
         Content-Type: application/x-www-form-urlencoded\r\n\r\n",
        body.len()
    );
    // A server that refuses a large body need not read it.
    let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body.as_bytes()));
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    let (head, body) = answer.split_once("\r\n\r\n")?;
    let status = head.split(' ').nth(1)?.parse().ok()?;
    assert!(!head.to_ascii_lowercase().contains("transfer-encoding"), "an answer in chunks: {head}");
    Some((status, body.to_owned()))
}

/// Waits for something that comes by itself.
#[track_caller]
pub(crate) fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let give_up = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < give_up, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The names of the files in a folder.
pub(crate) fn names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).expect("a folder");
    let mut names: Vec<_> =
        entries.map(|e| e.expect("an entry").file_name().into_string().expect("UTF-8")).collect();
    names.sort();
    names
}
