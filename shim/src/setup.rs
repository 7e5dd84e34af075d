//! Makes a machine's devices from what the command line names.

use std::fs::OpenOptions;
use std::io::{ErrorKind, Read, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use anyhow::{Context, Result, bail};

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
    /// If two have one name, a disk's daemon is not there, or a tap can't be opened.
    pub fn make_all(&self, ram: &Arc<GuestRam>) -> Result<Vec<Arc<dyn Device>>> {
        self.check_names()?;
        let mut devices: Vec<Arc<dyn Device>> = Vec::new();
        for disk in &self.disks {
            devices.push(make_disk(disk, disk.queues, ram, false)?);
        }
        for tap in &self.taps {
            devices.push(make_tap(tap, ram)?);
        }
        Ok(devices)
    }

    /// Whether the devices can be told apart when the machine moves, which is by their serial numbers and addresses.
    ///
    /// # Errors
    /// If two have the same.
    pub fn check_names(&self) -> Result<()> {
        for (i, disk) in self.disks.iter().enumerate() {
            if let Some(twin) = self.disks[..i].iter().find(|other| other.serial == disk.serial) {
                bail!(
                    "the disks {} and {} both have the serial number {}, by which a machine that moves tells its disks apart; give \
                     them serial=.. with different ones",
                    twin.socket.display(),
                    disk.socket.display(),
                    disk.serial
                );
            }
        }
        for (i, tap) in self.taps.iter().enumerate() {
            if let Some(twin) = self.taps[..i].iter().find(|other| other.mac == tap.mac) {
                bail!(
                    "the network cards on {} and {} both have the address {}; give them mac=.. with different ones",
                    twin.name,
                    tap.name,
                    tap.mac
                );
            }
        }
        Ok(())
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
        let (kind, id) = (&wanted.kind, &wanted.id);
        let needed = format!("{kind} {id} (place {index})");
        let fits = match kind.as_str() {
            "blk" => self.disks.iter().filter(|disk| disk.serial == *id).count(),
            "net" => self.taps.iter().filter(|tap| tap.mac.to_string() == *id).count(),
            _ => 0,
        };
        if fits > 1 {
            let why = self.check_names().err().map_or_else(String::new, |why| format!("{why:#}"));
            let found = format!("{fits} of that name");
            return vec![Finding { kind: "device".into(), fatal: true, needed, found, message: why }];
        }
        if fits == 1 {
            return Vec::new();
        }
        let way = match kind.as_str() {
            "blk" => format!("give --disk socket=PATH,serial={id}"),
            "net" => format!("give --tap NAME,mac={id}"),
            _ => "take a newer kvm-shim here".to_owned(),
        };
        let has: Vec<_> = self.disks.iter().map(|disk| disk.serial.as_str()).collect();
        vec![Finding {
            kind: "device".into(),
            fatal: true,
            needed,
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
            TYPED.lead_to(&line, std::io::stdin)?;
        }
        Ok(line)
    }
}

/// Rest of the reader before it offers again what no line has taken.
const OFFER_AGAIN: Duration = Duration::from_millis(5);

/// What is typed at this process's standard input.
static TYPED: Typed = Typed { to: Mutex::new(To { line: Weak::new(), is_read: false }) };

/// What is typed, which goes to the line that was made last: a target makes one for each attempt to send it a machine. One
/// thread reads for all of them, as what a reader has taken is gone for every other, and it keeps no line alive.
struct Typed {
    to: Mutex<To>,
}

struct To {
    line: Weak<SerialPort>,
    /// The thread was started.
    is_read: bool,
}

impl Typed {
    fn lock(&self) -> MutexGuard<'_, To> {
        self.to.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From here on what is typed goes to `line`, if it is still there. `source` is opened by the first call.
    fn lead_to<R: Read>(
        &'static self,
        line: &Arc<SerialPort>,
        source: impl FnOnce() -> R + Send + 'static,
    ) -> Result<()> {
        let mut to = self.lock();
        to.line = Arc::downgrade(line);
        if !to.is_read {
            let thread = std::thread::Builder::new().name("typed".into());
            thread.spawn(move || self.read(source())).context("start the thread that reads what is typed")?;
            to.is_read = true;
        }
        Ok(())
    }

    /// Hands on what is typed, for as long as there is something to read. What no line has room for waits.
    fn read(&self, mut source: impl Read) {
        let mut buffer = [0; 64];
        loop {
            let mut rest = match source.read(&mut buffer) {
                Ok(0) => return,
                Ok(count) => &buffer[..count],
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => {
                    tracing::warn!("what is typed can't be read any more: {error}");
                    return;
                }
            };
            while !rest.is_empty() {
                let line = self.lock().line.upgrade();
                let taken = line.map_or(0, |line| line.input(rest));
                if taken == 0 {
                    std::thread::sleep(OFFER_AGAIN);
                }
                rest = &rest[taken..];
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn devices(disks: &[&str], taps: &[&str]) -> Devices {
        let disks = disks.iter().map(|disk| disk.parse().expect("a disk")).collect();
        let taps = taps.iter().map(|tap| tap.parse().expect("a tap")).collect();
        Devices { disks, taps, console: ConsoleArgument::Off }
    }

    fn wanted(kind: &str, id: &str) -> DeviceDescription {
        DeviceDescription {
            kind: kind.into(),
            id: id.into(),
            version: 1,
            queues: 1,
            features: 0,
            size_bytes: None,
        }
    }

    #[test]
    fn disks_that_cannot_be_told_apart_are_refused_on_either_side() {
        let twins = devices(&["socket=/run/a/vda.sock", "socket=/x", "socket=/run/b/vda.sock"], &[]);
        let ram = GuestRam::new(2 << 20, false).expect("memory");
        let error = twins.make_all(&ram).err().expect("twins").to_string();
        for part in ["/run/a/vda.sock", "/run/b/vda.sock", "serial number vda", "give them serial=.."] {
            assert!(error.contains(part), "{error}");
        }
        let findings = twins.check(0, &wanted("blk", "vda"));
        assert!(findings[0].fatal && findings[0].message.contains("give them serial=.."), "{findings:?}");
        assert!(twins.check(1, &wanted("blk", "x")).is_empty());
        let told = devices(&["socket=/run/a/vda.sock", "socket=/run/b/vda.sock,serial=vdb"], &[]);
        told.check_names().expect("two names");
        assert!(told.check(0, &wanted("blk", "vda")).is_empty());
        assert!(told.check(0, &wanted("blk", "vdc"))[0].message.contains("serial=vdc"));
    }

    #[test]
    fn network_cards_with_one_address_are_refused_on_either_side() {
        let twins = devices(&[], &["tap0,mac=52:54:00:00:00:0a", "tap1,mac=52:54:00:00:00:0A"]);
        let error = twins.check_names().expect_err("twins").to_string();
        assert!(error.contains("tap0 and tap1") && error.contains("52:54:00:00:00:0a"), "{error}");
        let findings = twins.check(0, &wanted("net", "52:54:00:00:00:0a"));
        assert!(findings[0].fatal && findings[0].message.contains("give them mac=.."), "{findings:?}");
    }
}
