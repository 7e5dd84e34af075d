//! What stands behind the guest's ports: the serial line, the keyboard controller's reset, the register that switches the
//! machine off, and the test guest's report.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::device::serial::{PORT, PORTS, SerialPort};
use crate::guest::REPORT_PORT;

/// Command port of the keyboard controller.
pub(super) const KEYBOARD_COMMAND: u16 = 0x64;
/// The command that resets the machine.
pub(super) const KEYBOARD_RESET: u8 = 0xfe;
/// ACPI's sleep control register (ACPI specification 6.5, 4.8.3.7).
pub(super) const SLEEP_CONTROL: u16 = 0x600;
/// ACPI's sleep status register. Nobody wakes up here, so nothing is behind it.
pub(super) const SLEEP_STATUS: u16 = 0x601;
/// The type of sleep that is "off".
pub(super) const SLEEP_TYPE_OFF: u8 = 5;
/// What is written to be off: the type in bits 2 to 4, and the bit that enters it.
const SLEEP_OFF: u8 = SLEEP_TYPE_OFF << 2 | 1 << 5;

/// What the machine has to do after a guest's access.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum After {
    /// The guest goes on.
    Continue,
    /// The guest asked to be reset or switched off, which ends it.
    End,
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
            (KEYBOARD_COMMAND, [KEYBOARD_RESET]) | (SLEEP_CONTROL, [SLEEP_OFF]) => return After::End,
            (REPORT_PORT, _) => {
                self.reports.fetch_add(1, Ordering::AcqRel);
            }
            _ => {}
        }
        After::Continue
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_ends_by_a_reset_or_by_switching_off_and_by_nothing_else() {
        let ports = Ports::new(Arc::new(SerialPort::new(Box::new(std::io::sink())).expect("a line")));
        assert_eq!(ports.write(KEYBOARD_COMMAND, &[0xfe]), After::End);
        assert_eq!(ports.write(SLEEP_CONTROL, &[0x34]), After::End);
        for (port, value) in [(KEYBOARD_COMMAND, 0xff), (SLEEP_CONTROL, 0x14), (SLEEP_STATUS, 0x80)] {
            assert_eq!(ports.write(port, &[value]), After::Continue);
        }
    }
}
