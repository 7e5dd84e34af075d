//! What stands behind the guest's ports: the serial line, the keyboard controller's reset, and the test guest's report.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::device::serial::{PORT, PORTS, SerialPort};
use crate::guest::REPORT_PORT;

/// Command port of the keyboard controller.
const KEYBOARD_COMMAND: u16 = 0x64;
/// The command that resets the machine.
const KEYBOARD_RESET: u8 = 0xfe;

/// What the machine has to do after a guest's access.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum After {
    /// The guest goes on.
    Continue,
    /// The guest asked to be reset, which ends it.
    Reset,
}

/// The ports of one machine.
pub struct Ports {
    /// The serial line.
    pub serial: Arc<SerialPort>,
    /// How often the test guest asked to have its report looked at.
    reports: AtomicU64,
}

impl fmt::Debug for Ports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ports").field("reports", &self.reports).finish_non_exhaustive()
    }
}

impl Ports {
    /// Ports with this serial line.
    pub fn new(serial: Arc<SerialPort>) -> Self {
        Self { serial, reports: AtomicU64::new(0) }
    }

    /// How often the test guest asked to have its report looked at.
    pub fn reports(&self) -> u64 {
        self.reports.load(Ordering::Acquire)
    }

    /// The guest reads a port. Ports with nothing behind them read as ones, as on a bus without a card.
    pub fn read(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        match (port, data) {
            (PORT.., [byte]) if port < PORT + PORTS => {
                *byte = self.serial.port_read(port - PORT);
            }
            // Nothing to read, nothing that a write would have to wait for.
            (KEYBOARD_COMMAND, [byte]) => *byte = 0,
            _ => {}
        }
    }

    /// The guest writes a port.
    pub fn write(&self, port: u16, data: &[u8]) -> After {
        match (port, data) {
            (PORT.., [byte]) if port < PORT + PORTS => {
                self.serial.port_write(port - PORT, *byte);
            }
            (KEYBOARD_COMMAND, [KEYBOARD_RESET]) => return After::Reset,
            (REPORT_PORT, _) => {
                self.reports.fetch_add(1, Ordering::AcqRel);
            }
            _ => {}
        }
        After::Continue
    }
}
