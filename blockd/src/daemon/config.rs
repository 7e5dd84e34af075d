//! What the daemon is told at its start: command line, configuration file, defaults.
//!
//! The file has the names of the command line:
//!
//! ```toml
//! state-dir = "/var/lib/blockd"
//! api = "/run/blockd/api.sock"
//! log-format = "json"
//!
//! [[disk]]
//! id = "web"
//! image = "/images/web.vhdx"
//! socket = "/run/blockd/web.sock"
//! queues = 4
//! ```
//!
//! What the command line says wins over the file, disk by disk.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::{Parser, ValueEnum};
use formats::Format;
use serde::Deserialize;

use super::error::DaemonError;
use super::names;
use crate::disk::DiskSpec;

/// Serves raw, VHD and VHDX images over vhost-user-blk and moves them while they are used.
#[derive(Debug, Parser)]
#[command(name = "blockd", version, after_help = EXAMPLE)]
pub struct Args {
    /// Folder that remembers the disks and their moves [default: /var/lib/blockd as root, else
    /// $XDG_STATE_HOME/blockd]
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
    /// Unix socket of the control API [default: /run/blockd/api.sock as root, else $XDG_RUNTIME_DIR/blockd/api.sock]
    #[arg(long, value_name = "SOCKET")]
    pub api: Option<PathBuf>,
    /// TOML file with the same names as these options, disks as [[disk]] tables
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// A disk to serve, repeatable: ID,image=PATH,socket=PATH[,queues=N][,format=raw|vhd|vhdx][,io-threads=N][,read-only]
    /// [,parents=PATH]...; parents is a file that may be the image's parent, or a folder in which it may be; a comma in a path
    /// is written twice
    #[arg(long, value_name = "DISK", value_parser = parse_disk)]
    pub disk: Vec<DiskSpec>,
    /// How to write the log to standard error; RUST_LOG says what is written (info unless set) [default: text]
    #[arg(long, value_name = "FORMAT")]
    pub log_format: Option<LogFormat>,
}

const EXAMPLE: &str = "\
Example:
  blockd --disk web,image=/images/web.vhdx,socket=/run/blockd/web.sock,queues=4

  Then give the socket to a VM, for instance
    cloud-hypervisor --disk vhost_user=true,socket=/run/blockd/web.sock,num_queues=4 --memory size=2G,shared=on ...
  and move the disk while the VM runs:
    blockctl move web --to /new-storage/

Exit status: 0 ended when told to, 1 failed, 2 wrong usage.";

/// What may follow the identifier in `--disk`.
const DISK_OPTIONS: [&str; 7] = ["image", "socket", "queues", "format", "io-threads", "read-only", "parents"];

/// How the log is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// Lines for people.
    Text,
    /// One JSON object a line.
    Json,
}

/// Everything that the daemon is told.
#[derive(Debug)]
pub struct Config {
    /// The state directory.
    pub state_dir: PathBuf,
    /// The control API's socket.
    pub api: PathBuf,
    /// How the log is written.
    pub log_format: LogFormat,
    /// The disks that were asked for.
    pub disks: Vec<Asked>,
}

/// A disk that was asked for.
#[derive(Debug, Clone)]
pub struct Asked {
    /// What to serve.
    pub spec: DiskSpec,
    /// Whether somebody has just typed it (and sees our answer), rather than the configuration file.
    pub typed: bool,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct ConfigFile {
    state_dir: Option<PathBuf>,
    api: Option<PathBuf>,
    log_format: Option<LogFormat>,
    #[serde(default)]
    disk: Vec<DiskTable>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct DiskTable {
    id: String,
    image: PathBuf,
    socket: PathBuf,
    format: Option<Format>,
    #[serde(default = "one")]
    queues: u16,
    #[serde(default = "one")]
    io_threads: u16,
    #[serde(default)]
    read_only: bool,
    #[serde(default)]
    parents: Vec<PathBuf>,
}

const fn one() -> u16 {
    1
}

/// What the defaults depend on.
#[derive(Debug)]
pub struct Surroundings {
    /// Whether the effective user is root.
    pub root: bool,
    /// Reads an environment variable.
    pub env: fn(&str) -> Option<OsString>,
}

impl Default for Surroundings {
    fn default() -> Self {
        Self { root: nix::unistd::geteuid().is_root(), env: |name| std::env::var_os(name) }
    }
}

impl Config {
    /// Reads the configuration file, if one is named, and puts everything together.
    ///
    /// # Errors
    /// A sentence for whoever started the daemon; all of them are wrong usage.
    pub fn resolve(args: Args, around: &Surroundings) -> Result<Self, DaemonError> {
        let file = args.config.as_deref().map(ConfigFile::read).transpose()?.unwrap_or_default();
        let state_dir = match args.state_dir.or(file.state_dir) {
            Some(dir) => absolute(&dir)?,
            None => around.default_state_dir()?,
        };
        let api = match args.api.or(file.api) {
            Some(path) => absolute(&path)?,
            None => around.default_api()?,
        };
        names::check_socket("the API socket", &api)?;
        let log_format = args.log_format.or(file.log_format).unwrap_or(LogFormat::Text);
        let typed = args.disk.into_iter().map(|spec| Asked { spec, typed: true });
        let filed = file.disk.into_iter().map(|t| Asked { spec: t.into_spec(), typed: false });
        let mut disks = unique(filed)?;
        disks.extend(unique(typed)?);
        let disks: Vec<_> = disks.into_values().collect();
        check_disks(&disks, &api)?;
        Ok(Self { state_dir, api, log_format, disks })
    }
}

impl ConfigFile {
    fn read(path: &Path) -> Result<Self, DaemonError> {
        let text = std::fs::read_to_string(path).map_err(|e| {
            DaemonError::invalid(format!("the configuration file {} can't be read: {e}", path.display()))
        })?;
        let file: Self = toml::from_str(&text).map_err(|e| {
            DaemonError::invalid(format!("the configuration file {} is not right:\n{e}", path.display()))
        })?;
        // A path in a file that is relative to wherever the daemon happens to be started is an accident in waiting.
        for path in [&file.state_dir, &file.api].into_iter().flatten() {
            names::check_absolute("in the configuration file", path)?;
        }
        Ok(file)
    }
}

impl DiskTable {
    fn into_spec(self) -> DiskSpec {
        let Self { id, image, socket, format, queues, io_threads, read_only, parents } = self;
        DiskSpec { id, image, socket, format, queues, io_threads, read_only, parents }
    }
}

impl Surroundings {
    fn default_state_dir(&self) -> Result<PathBuf, DaemonError> {
        if self.root {
            return Ok("/var/lib/blockd".into());
        }
        let base = self.dir("XDG_STATE_HOME").or_else(|| Some(self.dir("HOME")?.join(".local/state")));
        let asks = "neither XDG_STATE_HOME nor HOME says where the state directory should be; name it with --state-dir";
        Ok(base.ok_or_else(|| DaemonError::invalid(asks))?.join("blockd"))
    }

    fn default_api(&self) -> Result<PathBuf, DaemonError> {
        if self.root {
            return Ok("/run/blockd/api.sock".into());
        }
        let asks = "XDG_RUNTIME_DIR is not set, so there is no place for the API socket; name it with --api";
        let base = self.dir("XDG_RUNTIME_DIR").ok_or_else(|| DaemonError::invalid(asks))?;
        Ok(base.join("blockd/api.sock"))
    }

    /// A folder that a variable names; the XDG specification has relative ones ignored.
    fn dir(&self, variable: &str) -> Option<PathBuf> {
        (self.env)(variable).map(PathBuf::from).filter(|p| p.is_absolute())
    }
}

fn unique(disks: impl Iterator<Item = Asked>) -> Result<BTreeMap<String, Asked>, DaemonError> {
    let mut by_id = BTreeMap::new();
    for asked in disks {
        let id = asked.spec.id.clone();
        if by_id.insert(id.clone(), asked).is_some() {
            return Err(DaemonError::invalid(format!(
                "disk {id} is asked for twice; give each disk its own name"
            )));
        }
    }
    Ok(by_id)
}

fn check_disks(disks: &[Asked], api: &Path) -> Result<(), DaemonError> {
    let mut sockets = BTreeSet::from([api]);
    let mut images = BTreeSet::new();
    for Asked { spec, .. } in disks {
        names::check_spec(spec)?;
        if !sockets.insert(&spec.socket) {
            let path = spec.socket.display();
            return Err(DaemonError::invalid(format!(
                "disk {}: the socket {path} is asked for twice",
                spec.id
            )));
        }
        if !images.insert(&spec.image) {
            let path = spec.image.display();
            return Err(DaemonError::invalid(format!(
                "disk {}: the image {path} is asked for twice",
                spec.id
            )));
        }
    }
    Ok(())
}

fn absolute(path: &Path) -> Result<PathBuf, DaemonError> {
    std::path::absolute(path).map_err(|e| DaemonError::invalid(format!("{}: {e}", path.display())))
}

/// Reads the value of `--disk`. Its paths may be relative to the current folder.
fn parse_disk(text: &str) -> Result<DiskSpec, DaemonError> {
    let mut parts = split_at_commas(text).into_iter();
    let id = parts.next().unwrap_or_default();
    names::check_disk_id(&id)?;
    let (mut options, mut parents) = (BTreeMap::new(), Vec::new());
    for part in parts {
        let (name, value) = match part.split_once('=') {
            Some((name, value)) => (name.to_owned(), Some(value.to_owned())),
            None => (part, None),
        };
        if name == "parents" {
            let folder = value.ok_or_else(|| {
                DaemonError::invalid(format!(
                    "disk {id}: parents takes a folder or a file, as in parents=..."
                ))
            })?;
            parents.push(absolute(Path::new(&folder))?);
        } else if options.insert(name.clone(), value).is_some() {
            return Err(DaemonError::invalid(format!("disk {id}: {name} is given twice")));
        }
    }
    if let Some(name) = options.keys().find(|name| !DISK_OPTIONS.contains(&name.as_str())) {
        let known = DISK_OPTIONS.join(", ");
        return Err(DaemonError::invalid(format!("disk {id}: there is no {name:?}; there are {known}")));
    }
    let mut take = |name: &str| match options.remove(name) {
        Some(None) => Err(DaemonError::invalid(format!("disk {id}: {name} takes a value, as in {name}=..."))),
        Some(value) => Ok(value),
        None => Ok(None),
    };
    let missing = |name: &str| DaemonError::invalid(format!("disk {id}: {name}=PATH is missing"));
    let image = absolute(Path::new(&take("image")?.ok_or_else(|| missing("image"))?))?;
    let socket = absolute(Path::new(&take("socket")?.ok_or_else(|| missing("socket"))?))?;
    let format = take("format")?.map(|f| names::parse_format(&f)).transpose()?;
    let queues = take("queues")?.map_or(Ok(1), |n| parse_count(&id, "queues", &n))?;
    let io_threads = take("io-threads")?.map_or(Ok(1), |n| parse_count(&id, "io-threads", &n))?;
    let read_only = match options.remove("read-only") {
        None => false,
        Some(None) => true,
        Some(Some(value)) => {
            let message = format!("disk {id}: read-only takes no value, and {value:?} is given");
            return Err(DaemonError::invalid(message));
        }
    };
    let spec = DiskSpec { id, image, socket, format, queues, io_threads, read_only, parents };
    names::check_spec(&spec)?;
    Ok(spec)
}

fn parse_count(id: &str, name: &str, text: &str) -> Result<u16, DaemonError> {
    text.parse().map_err(|_| DaemonError::invalid(format!("disk {id}: {name}={text} is not a number")))
}

/// Splits at single commas; two together stand for one in a value.
fn split_at_commas(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        let literal = c != ',' || chars.next_if_eq(&',').is_some();
        match parts.last_mut() {
            Some(last) if literal => last.push(c),
            _ => parts.push(String::new()),
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOT: Surroundings = Surroundings { root: true, env: |_| None };

    fn args(line: &[&str]) -> Args {
        Args::try_parse_from(std::iter::once("blockd").chain(line.iter().copied())).expect("it parses")
    }

    fn refusal(line: &[&str]) -> String {
        let args = Args::try_parse_from(std::iter::once("blockd").chain(line.iter().copied()));
        match args {
            Err(e) => {
                assert_eq!(e.exit_code(), 2);
                e.to_string()
            }
            Ok(args) => Config::resolve(args, &ROOT).expect_err("refused").message,
        }
    }

    fn file(text: &str) -> (tempfile::TempDir, String) {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("blockd.toml");
        std::fs::write(&path, text).expect("written");
        let path = path.to_str().expect("UTF-8").to_owned();
        (dir, path)
    }

    #[test]
    fn the_command_line_is_well_formed() {
        use clap::CommandFactory;
        Args::command().debug_assert();
        assert!(Args::command().render_long_help().to_string().contains("Example:"));
    }

    #[test]
    fn a_disk_has_all_the_options_of_the_manual() {
        let args = args(&[
            "--disk",
            "web,image=/i/a,,b.img,socket=/s,queues=4,format=vhdx,io-threads=2,read-only",
            "--disk",
            "db,socket=/t,image=db.vhd",
        ]);
        let web = &args.disk[0];
        assert_eq!(
            (web.id.as_str(), web.image.as_path(), web.socket.as_path()),
            ("web", Path::new("/i/a,b.img"), Path::new("/s"))
        );
        assert_eq!((web.queues, web.io_threads, web.format, web.read_only), (4, 2, Some(Format::Vhdx), true));
        let db = &args.disk[1];
        assert_eq!((db.queues, db.io_threads, db.format, db.read_only), (1, 1, None, false));
        assert!(db.image.is_absolute() && db.image.ends_with("db.vhd"));
    }

    #[test]
    fn wrong_usage_is_refused_with_what_is_wrong() {
        for (disk, says) in [
            ("", "1 to 64"),
            ("a", "image=PATH is missing"),
            ("a,image=/i", "socket=PATH is missing"),
            ("a,image,socket=/s", "image takes a value"),
            ("a,image=/i,socket=/s,queue=2", "\"queue\""),
            ("a,image=/i,sock=/s", "\"sock\""),
            ("a,image=/i,socket=/s,queues=no", "queues=no"),
            ("a,image=/i,socket=/s,queues=99", "1 to 64"),
            ("a,image=/i,socket=/s,io-threads=2", "1 to 1"),
            ("a,image=/i,socket=/s,format=qcow2", "raw, vhd and vhdx"),
            ("a,image=/i,socket=/s,read-only=yes", "takes no value"),
            ("a,image=/i,image=/j,socket=/s", "twice"),
            ("a/b,image=/i,socket=/s", "letters"),
        ] {
            let message = refusal(&["--disk", disk]);
            assert!(message.contains(says), "{disk}: {message}");
        }
        assert!(
            refusal(&["--disk", "a,image=/i,socket=/s", "--disk", "a,image=/j,socket=/t"]).contains("twice")
        );
        assert!(
            refusal(&["--disk", "a,image=/i,socket=/s", "--disk", "b,image=/j,socket=/s"]).contains("/s")
        );
        assert!(
            refusal(&["--disk", "a,image=/i,socket=/s", "--disk", "b,image=/i,socket=/t"]).contains("/i")
        );
        assert!(refusal(&["--api", "/s", "--disk", "a,image=/i,socket=/s"]).contains("/s"));
        assert!(refusal(&["--api", &format!("/{}", "x".repeat(200))]).contains("107"));
    }

    #[test]
    fn the_file_has_the_names_of_the_command_line_which_wins() {
        let (_dir, path) = file(
            "state-dir = '/state'\napi = '/file.sock'\nlog-format = 'json'\n\
             [[disk]]\nid = 'a'\nimage = '/a.img'\nsocket = '/a.sock'\nqueues = 2\nio-threads = 2\nread-only = true\nformat = 'raw'\n\
             [[disk]]\nid = 'b'\nimage = '/b.img'\nsocket = '/b.sock'\n",
        );
        let args =
            args(&["--config", &path, "--api", "/typed.sock", "--disk", "b,image=/c.img,socket=/b.sock"]);
        let config = Config::resolve(args, &ROOT).expect("sound");
        assert_eq!((config.state_dir, config.api), ("/state".into(), "/typed.sock".into()));
        assert_eq!(config.log_format, LogFormat::Json);
        let [a, b] = &config.disks[..] else { panic!("two disks") };
        assert_eq!((a.spec.queues, a.spec.io_threads, a.spec.read_only, a.typed), (2, 2, true, false));
        assert_eq!((b.spec.image.as_path(), b.typed), (Path::new("/c.img"), true));
    }

    #[test]
    fn a_wrong_file_is_refused() {
        for (text, says) in [
            ("disks = 3", "disks"),
            ("state_dir = '/x'", "state_dir"),
            ("state-dir = 'x'", "absolute"),
            ("[[disk]]\nid = 'a'", "image"),
            ("[[disk]]\nid = 'a'\nimage = 'a'\nsocket = '/s'", "absolute"),
            ("[[disk]]\nid = 'a'\nimage = '/a'\nsocket = '/s'\nparent = '/b'", "parent"),
            ("[[disk]]\nid = 'a'\nimage = '/a'\nsocket = '/s'\nformat = 'qcow2'", "qcow2"),
            ("log-format = 'xml'", "xml"),
        ] {
            let (_dir, path) = file(text);
            let message = refusal(&["--config", &path]);
            assert!(message.contains(says), "{text}: {message}");
        }
        assert!(refusal(&["--config", "/nonexistent/blockd.toml"]).contains("/nonexistent/blockd.toml"));
    }

    #[test]
    fn defaults_follow_the_user() {
        let config = Config::resolve(args(&[]), &ROOT).expect("sound");
        assert_eq!((config.state_dir, config.api), ("/var/lib/blockd".into(), "/run/blockd/api.sock".into()));
        let user = Surroundings {
            root: false,
            env: |name| match name {
                "HOME" => Some("/home/u".into()),
                "XDG_RUNTIME_DIR" => Some("/run/user/7".into()),
                "XDG_STATE_HOME" => Some("relative".into()),
                _ => None,
            },
        };
        let config = Config::resolve(args(&[]), &user).expect("sound");
        assert_eq!(
            (config.state_dir, config.api),
            ("/home/u/.local/state/blockd".into(), "/run/user/7/blockd/api.sock".into())
        );
        let nobody = Surroundings { root: false, env: |_| None };
        assert!(Config::resolve(args(&[]), &nobody).expect_err("refused").message.contains("--state-dir"));
        let e = Config::resolve(args(&["--state-dir", "/s"]), &nobody).expect_err("refused");
        assert!(e.message.contains("--api"));
    }
}
