//! Makes a machine's devices from what the command line names.

use std::fs::OpenOptions;
use std::io::Write;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::cli::parts::{ConsoleArgument, DiskArgument, TapArgument};
use crate::device::Device;
use crate::device::blk::{BlkDevice, BlkOptions};
use crate::device::net::{NetDevice, NetOptions};
use crate::device::serial::SerialPort;
use crate::machine::{DeviceDescription, Finding};
use crate::memory::GuestRam;
use crate::vm::host::DeviceMaker;

/// The devices of this process's machine.
#[derive(Debug, Clone)]
pub struct Devices {
    /// Disks, in the order of their places.
    pub disks: Vec<DiskArgument>,
    /// Network cards; their places are behind the disks'.
    pub taps: Vec<TapArgument>,
    /// Where the serial line leads.
    pub console: ConsoleArgument,
}

impl Devices {
    /// Makes them for a new machine.
    ///
    /// # Errors
    /// If a disk's daemon is not there, or a tap can't be opened.
    pub fn make_all(&self, ram: &Arc<GuestRam>) -> Result<Vec<Arc<dyn Device>>> {
        let mut devices: Vec<Arc<dyn Device>> = Vec::new();
        for disk in &self.disks {
            devices.push(make_disk(disk, disk.queues, ram, false)?);
        }
        for tap in &self.taps {
            devices.push(make_tap(tap, ram)?);
        }
        Ok(devices)
    }

    fn disk(&self, wanted: &DeviceDescription) -> Option<&DiskArgument> {
        self.disks.iter().find(|disk| disk.serial == wanted.id)
    }

    fn tap(&self, wanted: &DeviceDescription) -> Option<&TapArgument> {
        self.taps.iter().find(|tap| tap.mac.to_string() == wanted.id)
    }
}

fn make_disk(
    disk: &DiskArgument,
    queues: u16,
    ram: &Arc<GuestRam>,
    deferred: bool,
) -> Result<Arc<dyn Device>> {
    let options = BlkOptions { queues, deferred, ..BlkOptions::new(&disk.socket, &disk.serial) };
    let device = BlkDevice::new(options, ram.clone())
        .with_context(|| format!("connect the disk {} at {}", disk.serial, disk.socket.display()))?;
    Ok(device)
}

fn make_tap(tap: &TapArgument, ram: &Arc<GuestRam>) -> Result<Arc<dyn Device>> {
    let options = NetOptions { tap: tap.name.clone(), mac: tap.mac };
    let device =
        NetDevice::new(options, ram.clone()).with_context(|| format!("open the tap {}", tap.name))?;
    Ok(device)
}

impl DeviceMaker for Devices {
    fn check(&self, index: usize, wanted: &DeviceDescription) -> Vec<Finding> {
        let found = match wanted.kind.as_str() {
            "blk" => self.disk(wanted).is_some(),
            "net" => self.tap(wanted).is_some(),
            _ => false,
        };
        if found {
            return Vec::new();
        }
        let (kind, id) = (&wanted.kind, &wanted.id);
        let way = match kind.as_str() {
            "blk" => format!("give --disk socket=PATH,serial={id}"),
            "net" => format!("give --tap NAME,mac={id}"),
            _ => "take a newer kvm-shim here".to_owned(),
        };
        let has: Vec<_> = self.disks.iter().map(|disk| disk.serial.as_str()).collect();
        vec![Finding {
            kind: "device".into(),
            fatal: true,
            needed: format!("{kind} {id} (place {index})"),
            found: if has.is_empty() { "no disks".into() } else { format!("disks {}", has.join(", ")) },
            message: format!("the machine has the {kind} {id}, which this side has nothing for: {way}"),
        }]
    }

    fn make(
        &self,
        _index: usize,
        wanted: &DeviceDescription,
        ram: &Arc<GuestRam>,
    ) -> Result<Arc<dyn Device>> {
        if let Some(disk) = self.disk(wanted).filter(|_| wanted.kind == "blk") {
            return make_disk(disk, wanted.queues, ram, true);
        }
        let tap = self.tap(wanted).filter(|_| wanted.kind == "net");
        make_tap(
            tap.with_context(|| format!("there is nothing here for the {} {}", wanted.kind, wanted.id))?,
            ram,
        )
    }

    fn serial(&self) -> Result<Arc<SerialPort>> {
        let sink: Box<dyn Write + Send> = match &self.console {
            ConsoleArgument::Off => Box::new(std::io::sink()),
            ConsoleArgument::Stdio => Box::new(std::io::stdout()),
            ConsoleArgument::File(path) => {
                let file = OpenOptions::new().append(true).create(true).open(path);
                Box::new(file.with_context(|| format!("open the console's file {}", path.display()))?)
            }
        };
        let line = Arc::new(SerialPort::new(sink)?);
        if self.console == ConsoleArgument::Stdio {
            read_standard_input(line.clone());
        }
        Ok(line)
    }
}

/// What is typed goes to the guest, for as long as there is something to read.
fn read_standard_input(line: Arc<SerialPort>) {
    std::thread::spawn(move || {
        let mut buffer = [0; 64];
        while let Ok(count) = std::io::Read::read(&mut std::io::stdin(), &mut buffer) {
            if count == 0 {
                return;
            }
            let mut rest = &buffer[..count];
            while !rest.is_empty() {
                let taken = line.input(rest);
                if taken == 0 {
                    // The guest has not taken what came before.
                    std::thread::sleep(Duration::from_millis(5));
                }
                rest = &rest[taken..];
            }
        }
    });
}
