//! The processes with a machine: one that starts it, one that waits for it, one that wakes it from a file.

use std::io::IsTerminal as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use tracing_subscriber::EnvFilter;

use super::Exit;
use super::args::{Process, Receive, Restore, Run};
use super::ask::tls_files;
use crate::api::server;
use crate::control::{Control, Receiving};
use crate::device::{MMIO_BYTES, MMIO_START};
use crate::guest;
use crate::machine::SourceMachine;
use crate::memory::{GuestRam, Memory};
use crate::migrate::{Place, last_attempt};
use crate::setup::Devices;
use crate::vm::boot::{self, Kernel};
use crate::vm::host::{self, DeviceMaker as _};
use crate::vm::machine::{Life, Machine, Parts};
use crate::vm::{cpu, kvm};

/// How long a process whose machine is gone still answers those who watched it go.
const FAREWELL: Duration = Duration::from_millis(1500);

fn start_log() {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .try_init();
}

fn devices(process: &Process) -> Devices {
    Devices { disks: process.disks.clone(), taps: process.taps.clone(), console: process.console.clone() }
}

fn prepare(process: &Process) -> Result<()> {
    start_log();
    std::fs::create_dir_all(&process.state_dir)
        .with_context(|| format!("make the state directory {}", process.state_dir.display()))
}

/// `run`.
///
/// # Errors
/// If the machine can't be made; later failures end it.
pub fn run(run: &Run) -> Result<Exit> {
    prepare(&run.process)?;
    refuse_if_elsewhere(run)?;
    let kvm = kvm::open()?;
    let leaves = cpu::host_leaves(&kvm, run.cpu)?;
    let tsc_khz = host::tsc_khz(&kvm)?;
    let devices = devices(&run.process);
    let ram = GuestRam::new(run.memory, run.huge_pages)?;
    let parts = Parts {
        name: run.name.clone(),
        ram: ram.clone(),
        vcpus: run.cpus,
        cpu: cpu::describe(leaves, run.cpu, cpu::msrs(&kvm)?, tsc_khz),
        serial: devices.serial()?,
        devices: devices.make_all(&ram)?,
    };
    let machine = Machine::new(&kvm, parts)?;
    match (&run.kernel, &run.guest) {
        (Some(kernel), _) => boot_kernel(&machine, run, kernel)?,
        (None, Some(options)) => boot_selftest(&machine, options, tsc_khz)?,
        (None, None) => anyhow::bail!("there is nothing to run: give --kernel or --guest selftest"),
    }
    machine.start(true)?;
    serve(&run.process, Control::with_machine(machine, &run.process)?)
}

/// A machine that a target was told to run, and of which nobody knows whether it does, must not be started a second time.
fn refuse_if_elsewhere(run: &Run) -> Result<()> {
    let Some(last) = last_attempt(&run.process.state_dir, &run.name)? else { return Ok(()) };
    anyhow::ensure!(
        last.place != Place::HandedOver,
        "the machine {name} was handed over to {}, and it is not known whether it runs there; ask with `kvm-shim resolve --retry \
         --state-dir {} --name {name}` (see `kvm-shim resolve --help`), or start this one under another --name",
        last.to,
        run.process.state_dir.display(),
        name = run.name,
    );
    Ok(())
}

fn boot_kernel(machine: &Machine, run: &Run, kernel: &Path) -> Result<()> {
    let ram = SourceMachine::ram(machine);
    let kernel =
        Kernel { kernel: kernel.to_owned(), initrd: run.initrd.clone(), cmdline: run.cmdline.clone() };
    let entry = boot::load(ram, &kernel, run.cpus, machine.devices().len())?;
    machine.begin(0, &entry.regs(), |sregs, memory: &Memory| entry.apply(sregs, memory))
}

fn boot_selftest(machine: &Machine, options: &guest::SelftestOptions, tsc_khz: u32) -> Result<()> {
    let disks: Vec<u64> = machine
        .devices()
        .iter()
        .enumerate()
        .filter(|(_, device)| device.description().kind == "blk")
        .map(|(place, _)| MMIO_START + place as u64 * MMIO_BYTES)
        .take(guest::DISKS_MAX)
        .collect();
    let count = machine.vcpus().len() as u32;
    let starts = guest::load(SourceMachine::ram(machine), options, count, &disks, tsc_khz)?;
    for (number, start) in starts.iter().enumerate() {
        machine.begin(number, &start.regs, |sregs, _| {
            start.apply(sregs);
            Ok(())
        })?;
    }
    Ok(())
}

/// `receive`.
///
/// # Errors
/// If it can't wait, or what came can't be run.
pub fn receive(receive: &Receive, json: bool) -> Result<Exit> {
    prepare(&receive.process)?;
    let receiving = Receiving {
        listen: receive.listen.clone(),
        tls: receive.tls.as_ref().map(tls_files),
        insecure_plain_tcp: receive.insecure_plain_tcp,
        json,
    };
    let control = Control::waiting(&receive.process, devices(&receive.process))?;
    control.begin_to_receive(receiving)?;
    serve(&receive.process, control)
}

/// `restore`.
///
/// # Errors
/// If the file is damaged or was used up, or this host can't run what is in it.
pub fn restore(restore: &Restore) -> Result<Exit> {
    prepare(&restore.process)?;
    let control = Control::waiting(&restore.process, devices(&restore.process))?;
    control.restore(&restore.file)?;
    serve(&restore.process, control)
}

/// Answers until the machine is over or a signal comes.
fn serve(process: &Process, control: Arc<Control>) -> Result<Exit> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .thread_name("api")
        .enable_all()
        .build()
        .context("start the threads of the control API")?;
    let ended = runtime.block_on(until_over(process, control));
    runtime.shutdown_background();
    ended
}

async fn until_over(process: &Process, control: Arc<Control>) -> Result<Exit> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate()).context("handle SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("handle SIGINT")?;
    let watched = control.clone();
    let over = tokio::task::spawn_blocking(move || watched.wait_until_over());
    let (api, answering) = (process.api.clone(), control.clone());
    let mut serving = tokio::spawn(async move { server::serve(&api, answering).await });
    let result = tokio::select! {
        served = &mut serving => served.context("serve the control API")?.map(|()| Exit::Done),
        life = over => {
            let exit = life.context("wait for the machine")?.and_then(|life| ended(&life));
            // Whoever sent the machine away still asks how it went.
            control.wait_until_told(FAREWELL).await;
            exit
        }
        _ = terminate.recv() => Ok(Exit::Done),
        _ = interrupt.recv() => Ok(Exit::Done),
    };
    let _ = std::fs::remove_file(&process.api);
    result
}

fn ended(life: &Life) -> Result<Exit> {
    match life {
        Life::Failed(why) => anyhow::bail!("the machine has failed: {why}"),
        life => {
            tracing::info!("the machine is {}", life.name());
            Ok(Exit::Done)
        }
    }
}
