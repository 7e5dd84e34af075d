//! QEMU's process, its serial console and its monitor.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::{Host, Setup};

/// How to run a guest.
#[derive(Debug, Clone)]
pub struct GuestOptions {
    /// A name for its files.
    pub name: String,
    /// What it does: `files` or `blocks`.
    pub job: &'static str,
    /// Rounds of the job, at most.
    pub rounds: u32,
    /// Size of what a round writes.
    pub mib: u32,
    /// Virtual processors.
    pub cpus: u32,
    /// Queues of the disk.
    pub queues: u32,
    /// Wait for another QEMU to send its state.
    pub incoming: bool,
}

impl GuestOptions {
    /// A guest with one processor and one queue.
    pub fn new(name: &str, job: &'static str) -> Self {
        Self { name: name.into(), job, rounds: 4, mib: 4, cpus: 1, queues: 1, incoming: false }
    }
}

/// A running guest. It is killed when this is dropped; when a test has failed, what it said is printed.
#[derive(Debug)]
pub struct Guest {
    name: String,
    child: Child,
    serial: PathBuf,
    log: PathBuf,
    console: PathBuf,
    monitor: PathBuf,
}

impl Guest {
    /// Starts a guest whose disk is served on `disk`. Its files are in `dir`.
    pub fn start(setup: &Setup, dir: &Path, disk: &Path, options: &GuestOptions) -> Result<Self> {
        let initramfs = dir.join("initramfs.cpio");
        if !initramfs.exists() {
            setup.pack_initramfs(&initramfs)?;
        }
        let mut command = emulator(setup, "10");
        command.args(machine_arguments(options, setup, &initramfs));
        command.arg("-chardev").arg(format!("socket,id=disk,path={}{}", disk.display(), reconnect(setup)?));
        command.arg("-device").arg(format!("vhost-user-blk-pci,chardev=disk,num-queues={}", options.queues));
        if options.incoming {
            command.args(["-incoming", "defer"]);
        }
        Self::spawn(command, dir, &options.name)
    }

    /// Starts a guest that runs machines of its own. Its files are in `dir`.
    pub fn start_host(setup: &Setup, dir: &Path, host: &Host) -> Result<Self> {
        let initramfs = dir.join("host.cpio");
        host.pack(setup, &initramfs)?;
        // Two layers of guests have clocks that run while they wait: this one does not stand back for others.
        let mut command = emulator(setup, "0");
        // An emulated processor's counter is as steady as that of the machine below; only measuring it is not.
        let kernel = format!("{KERNEL} tsc=reliable {}", host.words());
        command.args(["-cpu", "max", "-smp", "2", "-m", "2G", "-append", &kernel]);
        command.arg("-kernel").arg(&setup.kernel).arg("-initrd").arg(&initramfs);
        Self::spawn(command, dir, "host")
    }

    fn spawn(mut command: Command, dir: &Path, name: &str) -> Result<Self> {
        let file = |ending: &str| dir.join(format!("{name}.{ending}"));
        let (serial, log, console, monitor) = (file("serial"), file("log"), file("console"), file("qmp"));
        command.arg("-chardev").arg(format!(
            "socket,id=console,path={},server=on,wait=off,logfile={}",
            console.display(),
            serial.display()
        ));
        command.args(["-serial", "chardev:console"]);
        command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", monitor.display()));
        let output = File::create(&log)?;
        command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        let child = command.spawn().context("start QEMU")?;
        Ok(Self { name: name.to_owned(), child, serial, log, console, monitor })
    }

    /// What the guest said so far.
    pub fn said(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.serial).unwrap_or_default()).replace('\r', "")
    }

    /// Waits for a whole line that begins with `GUEST: ` and then `what`; returns the rest of the line. Fails when the
    /// guest ends before, says that it failed, or after `timeout`.
    pub fn wait_for(&mut self, what: &str, timeout: Duration) -> Result<String> {
        let until = Instant::now() + timeout;
        let wanted = format!("GUEST: {what}");
        loop {
            let ended = self.child.try_wait()?;
            let said = self.said();
            let mut whole_lines = said.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n'));
            if let Some(rest) = whole_lines.find_map(|line| line.strip_prefix(&wanted)) {
                return Ok(rest.trim().to_owned());
            }
            if said.contains("GUEST: FAIL") {
                bail!("{} failed while waiting for {what:?}:\n{}", self.name, self.tail());
            }
            if let Some(status) = ended {
                bail!("{} ended with {status} before it said {what:?}:\n{}", self.name, self.tail());
            }
            if Instant::now() > until {
                bail!("{} did not say {what:?} within {timeout:?}:\n{}", self.name, self.tail());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Types a line: the job ends with the round that it is in.
    pub fn tell_to_stop(&self) -> Result<()> {
        let mut console = UnixStream::connect(&self.console).context("connect to the guest's console")?;
        console.write_all(b"stop\n").context("type into the guest's console")?;
        // QEMU reads at its own pace: let go only when it had the time.
        std::thread::sleep(Duration::from_millis(200));
        Ok(())
    }

    /// Waits until the guest has switched itself off.
    pub fn wait_end(&mut self, timeout: Duration) -> Result<()> {
        let until = Instant::now() + timeout;
        while self.child.try_wait()?.is_none() {
            if Instant::now() > until {
                bail!("{} did not end within {timeout:?}:\n{}", self.name, self.tail());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Sends commands to the monitor, one after the other, on a connection of their own; returns the last answer.
    pub fn monitor(&self, commands: &[(&str, Value)]) -> Result<Value> {
        let stream = connect_patiently(&self.monitor)?;
        stream.set_read_timeout(Some(Duration::from_secs(30)))?;
        let mut lines = BufReader::new(stream.try_clone()?).lines();
        let mut answer = Value::Null;
        let first = [("qmp_capabilities", json!({}))];
        for (command, arguments) in first.iter().chain(commands) {
            let line = json!({"execute": command, "arguments": arguments}).to_string() + "\n";
            (&stream).write_all(line.as_bytes())?;
            answer = loop {
                let line = lines.next().context("QEMU closed its monitor")??;
                let mut message: Value = serde_json::from_str(&line)?;
                if let Some(error) = message.get("error") {
                    bail!("{command}: {error}");
                }
                if let Some(result) = message.get_mut("return") {
                    break result.take();
                }
            };
        }
        Ok(answer)
    }

    fn tail(&self) -> String {
        let said = self.said();
        let from = said.len().saturating_sub(3000);
        let from = (from..said.len()).find(|i| said.is_char_boundary(*i)).unwrap_or(0);
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        format!("--- {} said\n{}\n--- QEMU said\n{log}\n---", self.name, &said[from..])
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("{}", self.tail());
        }
    }
}

/// What every guest's kernel is told. A busy machine may let the guest wait so long for its first timer interrupts that
/// Linux would give up.
const KERNEL: &str = "console=ttyS0 quiet panic=-1 no_timer_check";

/// QEMU with what every guest has.
fn emulator(setup: &Setup, niceness: &str) -> Command {
    let mut command = Command::new("nice");
    command.args(["-n", niceness]).arg(&setup.qemu);
    if !setup.qemu_lib.is_empty() {
        command.env("LD_LIBRARY_PATH", &setup.qemu_lib);
    }
    for dir in &setup.qemu_share {
        command.args(["-L", dir]);
    }
    command.args("-accel tcg,thread=multi -M pc -nodefaults -no-reboot -display none".split(' '));
    command
}

fn machine_arguments(options: &GuestOptions, setup: &Setup, initramfs: &Path) -> Vec<String> {
    let kernel = format!("{KERNEL} job={} rounds={} mib={}", options.job, options.rounds, options.mib);
    let memory =
        "-m 256M -object memory-backend-memfd,id=memory,size=256M,share=on -machine memory-backend=memory";
    let mut arguments: Vec<String> = memory.split(' ').map(str::to_owned).collect();
    arguments.extend(["-smp".into(), options.cpus.to_string(), "-append".into(), kernel]);
    arguments.extend(["-kernel".into(), setup.kernel.display().to_string()]);
    arguments.extend(["-initrd".into(), initramfs.display().to_string()]);
    arguments
}

/// What makes QEMU come back to a daemon that died; since 9.2 it takes milliseconds.
fn reconnect(setup: &Setup) -> Result<&'static str> {
    let mut command = Command::new(&setup.qemu);
    if !setup.qemu_lib.is_empty() {
        command.env("LD_LIBRARY_PATH", &setup.qemu_lib);
    }
    let output = command.arg("--version").output().context("qemu-system-x86_64 --version")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let version = text.split_whitespace().find_map(|word| {
        let mut parts = word.split('.').map(|part| part.parse::<u32>().ok());
        Some((parts.next()??, parts.next()??))
    });
    Ok(if version.context("QEMU does not tell its version")? >= (9, 2) {
        ",reconnect-ms=100"
    } else {
        ",reconnect=1"
    })
}

fn connect_patiently(path: &Path) -> Result<UnixStream> {
    for _ in 0..100 {
        if let Ok(stream) = UnixStream::connect(path) {
            return Ok(stream);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    UnixStream::connect(path).with_context(|| format!("connect to {}", path.display()))
}
