//! What people type.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};

use super::parts::{ConsoleArgument, DiskArgument, TapArgument, TlsArgument};
use super::units;
use crate::guest::SelftestOptions;
use crate::vm::cpu::Baseline;

/// Runs virtual machines whose disks blockd serves, and moves them, running, to another process or host.
#[derive(Debug, Parser)]
#[command(name = "kvm-shim", version, about, after_help = EXAMPLES)]
pub struct Arguments {
    /// One JSON object on standard output (one a line where it streams), errors as JSON on standard error.
    #[arg(long, global = true)]
    pub json: bool,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

const EXAMPLES: &str = "\
Example, both sides on one host (see the README for two):
  blockd --api /run/b.sock --disk vda,image=/srv/vm.vhdx,socket=/run/vda.sock &
  kvm-shim run --memory 1G --guest selftest --disk socket=/run/vda.sock --api /run/a.sock &
  kvm-shim receive --listen unix:/run/m.sock --disk socket=/run/vda.sock --api /run/b-vm.sock &
  kvm-shim send --api /run/a.sock --to unix:/run/m.sock";

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Starts a machine and runs it until it ends or runs elsewhere.
    Run(Run),
    /// Waits for a machine, and runs it when it has come.
    Receive(Receive),
    /// Goes on with a machine that was saved to a file. The file is used up.
    Restore(Restore),
    /// Sends a running machine to where `receive` waits; shows the steps.
    Send(Send),
    /// Saves a machine to a file and ends it.
    Save(Save),
    /// Shows the machine of a process, and its migration.
    Status(Api),
    /// Stops the processors; they can go on.
    Pause(Api),
    /// Lets the processors go on.
    Resume(Api),
    /// Ends the machine and its process.
    Stop(Api),
    /// Ends a migration; the machine goes on here as if nothing had happened.
    Cancel(Api),
    /// Settles a migration whose target can't be reached any more, so that nobody knows where the machine is.
    Resolve(Resolve),
    /// Shows the built-in test guest's report, or tells the guest something.
    Guest(Guest),
}

/// The process with the machine.
#[derive(Debug, Args)]
pub struct Api {
    /// Socket of the process's control API.
    #[arg(long, env = "KVM_SHIM_API", value_name = "SOCKET")]
    pub api: PathBuf,
}

/// What processes with a machine have in common.
#[derive(Debug, Args)]
pub struct Process {
    /// Where to serve the control API.
    #[arg(long, env = "KVM_SHIM_API", value_name = "SOCKET")]
    pub api: PathBuf,
    /// Where the durable records of migrations are kept.
    #[arg(long, value_name = "DIR", default_value = "/var/lib/kvm-shim")]
    pub state_dir: PathBuf,
    /// A disk: socket=PATH[,serial=ID][,queues=N][,blockd=API-SOCKET,id=DISK]; repeatable.
    #[arg(long = "disk", value_name = "socket=PATH,..")]
    pub disks: Vec<DiskArgument>,
    /// A network card: NAME,mac=52:54:00:12:34:56; repeatable.
    #[arg(long = "tap", value_name = "NAME,mac=..")]
    pub taps: Vec<TapArgument>,
    /// The serial line: off, stdio or file=PATH.
    #[arg(long, default_value = "off")]
    pub console: ConsoleArgument,
}

/// `run`.
#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("what").required(true).args(["kernel", "guest"]))]
pub struct Run {
    /// What processes with a machine have in common.
    #[command(flatten)]
    pub process: Process,
    /// The machine's name.
    #[arg(long, default_value = "vm")]
    pub name: String,
    /// Memory: a multiple of 2M.
    #[arg(long, value_parser = units::size, default_value = "256M")]
    pub memory: u64,
    /// Take the memory from the host's pool of 2 MiB pages.
    #[arg(long)]
    pub huge_pages: bool,
    /// Number of processors.
    #[arg(long, default_value_t = 1)]
    pub cpus: u32,
    /// Baseline that the guest sees (x86-64-v2, x86-64-v3, x86-64-v4), so that it can go to any such host of this vendor; else
    /// all that this host has.
    #[arg(long, value_name = "BASELINE")]
    pub cpu: Option<Baseline>,
    /// Kernel to boot: bzImage, or ELF with a PVH entry.
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk.
    #[arg(long, value_name = "FILE", requires = "kernel")]
    pub initrd: Option<PathBuf>,
    /// The kernel's command line; the devices are added.
    #[arg(long, default_value = "console=ttyS0 reboot=k panic=-1", requires = "kernel")]
    pub cmdline: String,
    /// The built-in test guest instead: selftest[,working-set=128M][,rate=100M][,pattern=sequential|random|idle]
    /// [,fill=line|full][,depth=16][,disk-range=64M][,writes=70][,flush-every=64].
    #[arg(long, value_name = "selftest,..")]
    pub guest: Option<SelftestOptions>,
}

/// `receive`.
#[derive(Debug, Args)]
pub struct Receive {
    /// What processes with a machine have in common. The disks are told from each other by their serial numbers.
    #[command(flatten)]
    pub process: Process,
    /// Where to wait: unix:PATH or tcp:HOST:PORT.
    #[arg(long, value_name = "ADDRESS")]
    pub listen: String,
    /// Mutual TLS for tcp: ca=FILE,cert=FILE,key=FILE[,name=NAME].
    #[arg(long, value_name = "ca=..,cert=..,key=..")]
    pub tls: Option<TlsArgument>,
    /// Allow tcp without TLS: anybody on the way can read and change the machine's memory.
    #[arg(long, conflicts_with = "tls")]
    pub insecure_plain_tcp: bool,
}

/// `restore`.
#[derive(Debug, Args)]
pub struct Restore {
    /// What processes with a machine have in common.
    #[command(flatten)]
    pub process: Process,
    /// The file that `save` has written.
    pub file: PathBuf,
}

/// What becomes of the disks when the machine moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum StorageArgument {
    /// The daemon that serves them goes on to do so.
    Keep,
    /// Their daemon lets the images go, and the target's daemon opens them.
    Release,
    /// They are being moved and are synced: the move is committed while the machine stands still, then as `release`.
    Commit,
}

impl StorageArgument {
    /// As the API has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Keep => "keep",
            Self::Release => "release",
            Self::Commit => "commit",
        }
    }
}

/// Compression of memory on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum CompressArgument {
    /// None.
    None,
    /// Fast.
    Lz4,
    /// Smaller.
    Zstd,
}

/// What to do when the time is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum OnTimeoutArgument {
    /// The machine stays here.
    Cancel,
    /// It stands still for as long as it takes.
    Force,
}

/// `send`.
#[derive(Debug, Args)]
pub struct Send {
    /// The process with the machine.
    #[command(flatten)]
    pub api: Api,
    /// Where `receive` waits: unix:PATH or tcp:HOST:PORT.
    #[arg(long, value_name = "ADDRESS")]
    pub to: String,
    /// Only report whether the machine could run there.
    #[arg(long)]
    pub check: bool,
    /// Longest time for which the machine may stand still.
    #[arg(long, value_parser = units::time, default_value = "300ms")]
    pub downtime: Duration,
    /// Give up after so long.
    #[arg(long, value_parser = units::time)]
    pub timeout: Option<Duration>,
    /// What then.
    #[arg(long, value_enum, default_value = "cancel", requires = "timeout")]
    pub on_timeout: OnTimeoutArgument,
    /// Connections that carry memory, 1 to 16.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=16))]
    pub connections: u32,
    /// At most so many bytes a second.
    #[arg(long, value_parser = units::size, value_name = "RATE")]
    pub bandwidth: Option<u64>,
    /// Compress memory.
    #[arg(long, value_enum, default_value = "none")]
    pub compress: CompressArgument,
    /// If the guest writes faster than it is copied: run it on the target and fetch what is missing.
    #[arg(long, conflicts_with = "auto_converge")]
    pub postcopy: bool,
    /// If the guest writes faster than it is copied: slow it down.
    #[arg(long)]
    pub auto_converge: bool,
    /// Mutual TLS for tcp: ca=FILE,cert=FILE,key=FILE[,name=NAME].
    #[arg(long, value_name = "ca=..,cert=..,key=..")]
    pub tls: Option<TlsArgument>,
    /// Allow tcp without TLS: anybody on the way can read and change the machine's memory.
    #[arg(long, conflicts_with = "tls")]
    pub insecure_plain_tcp: bool,
    /// What becomes of the disks.
    #[arg(long, value_enum, default_value = "keep")]
    pub storage: StorageArgument,
    /// Return at once; `status` shows how it goes on.
    #[arg(long)]
    pub detach: bool,
}

/// `save`.
#[derive(Debug, Args)]
pub struct Save {
    /// The process with the machine.
    #[command(flatten)]
    pub api: Api,
    /// The file, which must not exist.
    pub file: PathBuf,
    /// What becomes of the disks.
    #[arg(long, value_enum, default_value = "keep")]
    pub storage: StorageArgument,
}

/// `resolve`.
///
/// The target was told to run the machine, or was about to be, and one of both sides was lost: so it is not known where
/// the machine is. Ask the process that sent it by `--api`; if that is dead, give its `--state-dir` and `--name` instead.
#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("how").required(true).args(["retry", "resume_here", "discard"]))]
#[command(verbatim_doc_comment)]
pub struct Resolve {
    /// Socket of the control API: of the process that sent the machine; with --discard of the one that received it.
    #[arg(long, env = "KVM_SHIM_API", value_name = "SOCKET")]
    pub api: Option<PathBuf>,
    /// Instead of --api, if the process that sent the machine is dead: where it kept its records.
    #[arg(long, value_name = "DIR", conflicts_with = "discard")]
    pub state_dir: Option<PathBuf>,
    /// The machine's name in those records.
    #[arg(long, default_value = "vm", requires = "state_dir")]
    pub name: String,
    /// For the records of a machine that was sent over tcp: ca=FILE,cert=FILE,key=FILE[,name=NAME].
    #[arg(long, value_name = "ca=..,cert=..,key=..", requires = "state_dir")]
    pub tls: Option<TlsArgument>,
    /// The same without TLS.
    #[arg(long, conflicts_with = "tls", requires = "state_dir")]
    pub insecure_plain_tcp: bool,
    /// Ask the target once more. It runs the machine if it has all of it.
    #[arg(long)]
    pub retry: bool,
    /// Run it here, or let it be started here. Only if the target certainly does not run it: its host is off, or its process
    /// has ended.
    #[arg(long)]
    pub resume_here: bool,
    /// On the target: give up the machine that is prepared there. It is lost if its source is dead.
    #[arg(long)]
    pub discard: bool,
}

/// `guest`.
#[derive(Debug, Args)]
pub struct Guest {
    /// The process with the machine.
    #[command(flatten)]
    pub api: Api,
    /// Verify all memory and disks now; exit 4 if anything is wrong.
    #[arg(long)]
    pub verify: bool,
    /// Write memory at this rate from now on; 0: as fast as it can.
    #[arg(long, value_parser = units::size)]
    pub rate: Option<u64>,
    /// Stop working.
    #[arg(long, conflicts_with = "go_on")]
    pub stop: bool,
    /// Go on working.
    #[arg(long)]
    pub go_on: bool,
}
