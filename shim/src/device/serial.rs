//! The serial line: a 16550 at the ports of COM1. Not a [`super::Device`], as it has ports instead of addresses and no queue.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result, anyhow, ensure};
use serde::{Deserialize, Serialize};
use vm_superio::serial::NoEvents;
use vm_superio::{Serial, SerialState, Trigger};
use vmm_sys_util::eventfd::EventFd;

use super::DeviceState;
use crate::machine::DeviceDescription;

/// First port.
pub const PORT: u16 = 0x3f8;
/// Number of ports.
pub const PORTS: u16 = 8;
/// Interrupt line. Edges, not levels.
pub const IRQ: u32 = 4;
/// Kind of the device in descriptions and states.
pub const KIND: &str = "serial";
/// Its name there: there is one.
pub const ID: &str = "com1";
/// Version of the format of its state.
pub const STATE_VERSION: u32 = 1;
/// Most bytes of input that wait for the guest to read them, beside the 64 of the chip.
pub const INPUT_MAX: usize = 4096;

struct Interrupt(Arc<EventFd>);

impl Trigger for Interrupt {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        // A counter that is full has interrupted already.
        let _ = self.0.write(1);
        Ok(())
    }
}

/// Where output goes, whichever chip it comes from: a restored one takes the place of another.
#[derive(Clone)]
struct Sink(Arc<Mutex<Box<dyn Write + Send>>>);

impl Sink {
    fn lock(&self) -> MutexGuard<'_, Box<dyn Write + Send>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.lock().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.lock().flush()
    }
}

/// The state as it travels.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct State {
    baud_divisor_low: u8,
    baud_divisor_high: u8,
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    /// What the chip holds for the guest.
    received: Vec<u8>,
    /// What waits behind that.
    waiting: Vec<u8>,
}

struct Inner {
    chip: Serial<Interrupt, NoEvents, Sink>,
    waiting: VecDeque<u8>,
}

impl Inner {
    /// Gives the chip what it has room for.
    fn feed(&mut self) {
        let room = self.chip.fifo_capacity().min(self.waiting.len());
        if room == 0 {
            return;
        }
        let bytes: Vec<u8> = self.waiting.iter().take(room).copied().collect();
        // None are taken in loopback mode; they wait on.
        let taken = self.chip.enqueue_raw_bytes(&bytes).unwrap_or(0);
        self.waiting.drain(..taken);
    }
}

/// The serial line.
pub struct SerialPort {
    inner: Mutex<Inner>,
    sink: Sink,
    interrupt: Arc<EventFd>,
}

impl SerialPort {
    /// A line whose output goes to `sink`. A sink that blocks holds up the guest's processor.
    ///
    /// # Errors
    /// If there is no eventfd to be had.
    pub fn new(sink: Box<dyn Write + Send>) -> Result<Self> {
        let interrupt = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
            .context("make the eventfd of the serial line")?;
        let (interrupt, sink) = (Arc::new(interrupt), Sink(Arc::new(Mutex::new(sink))));
        let chip = Serial::new(Interrupt(interrupt.clone()), sink.clone());
        Ok(Self { inner: Mutex::new(Inner { chip, waiting: VecDeque::new() }), sink, interrupt })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What interrupts the guest, on line [`IRQ`], when it is signalled.
    ///
    /// # Errors
    /// If the process has no room for a descriptor.
    pub fn interrupt(&self) -> Result<EventFd> {
        self.interrupt.try_clone().context("a descriptor for the serial line's interrupt")
    }

    /// The guest reads the port `offset` from [`PORT`]; others read as 0xff.
    pub fn port_read(&self, offset: u16) -> u8 {
        let Some(offset) = u8::try_from(offset).ok().filter(|at| u16::from(*at) < PORTS) else { return 0xff };
        let mut inner = self.lock();
        let value = inner.chip.read(offset);
        inner.feed();
        value
    }

    /// The guest writes to the port `offset` from [`PORT`]; others are ignored, and so is output that its sink refuses.
    pub fn port_write(&self, offset: u16, value: u8) {
        let Some(offset) = u8::try_from(offset).ok().filter(|at| u16::from(*at) < PORTS) else { return };
        let mut inner = self.lock();
        if let Err(e) = inner.chip.write(offset, value) {
            tracing::debug!("a byte of the serial line is lost: {e}");
        }
        inner.feed();
    }

    /// Input for the guest. Returns how much of it was taken: what is beyond [`INPUT_MAX`] has to be offered again.
    pub fn input(&self, bytes: &[u8]) -> usize {
        let mut inner = self.lock();
        inner.feed();
        let room = INPUT_MAX.saturating_sub(inner.waiting.len()).min(bytes.len());
        inner.waiting.extend(&bytes[..room]);
        inner.feed();
        room
    }

    /// What it is, for the target of a migration.
    pub fn description(&self) -> DeviceDescription {
        DeviceDescription {
            kind: KIND.to_owned(),
            id: ID.to_owned(),
            version: STATE_VERSION,
            queues: 0,
            features: 0,
            size_bytes: None,
        }
    }

    /// Its state. The guest's processors stand still.
    ///
    /// # Errors
    /// None that is known: the state is numbers only.
    pub fn save(&self) -> Result<DeviceState> {
        let inner = self.lock();
        let chip = inner.chip.state();
        let state = State {
            baud_divisor_low: chip.baud_divisor_low,
            baud_divisor_high: chip.baud_divisor_high,
            interrupt_enable: chip.interrupt_enable,
            interrupt_identification: chip.interrupt_identification,
            line_control: chip.line_control,
            line_status: chip.line_status,
            modem_control: chip.modem_control,
            modem_status: chip.modem_status,
            scratch: chip.scratch,
            received: chip.in_buffer,
            waiting: inner.waiting.iter().copied().collect(),
        };
        let data = serde_json::to_value(state)?;
        Ok(DeviceState { kind: KIND.to_owned(), id: ID.to_owned(), version: STATE_VERSION, data })
    }

    /// Takes a state over. An interrupt that was pending is signalled.
    ///
    /// # Errors
    /// If the state is of another device or version, or holds more than the line does.
    pub fn restore(&self, state: &DeviceState) -> Result<()> {
        ensure!(
            state.kind == KIND && state.version == STATE_VERSION,
            "the serial line has version {STATE_VERSION} here and the state is of {} version {}; use the same program",
            state.kind,
            state.version
        );
        let state: State =
            serde_json::from_value(state.data.clone()).context("the state of the serial line")?;
        ensure!(
            state.waiting.len() <= INPUT_MAX,
            "the state of the serial line has {} bytes of input, more than {INPUT_MAX}",
            state.waiting.len()
        );
        let chip = SerialState {
            baud_divisor_low: state.baud_divisor_low,
            baud_divisor_high: state.baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.received,
        };
        let interrupt = Interrupt(self.interrupt.clone());
        let chip = Serial::from_state(&chip, interrupt, NoEvents, self.sink.clone())
            .map_err(|e| anyhow!("the state of the serial line is none: {e}"))?;
        *self.lock() = Inner { chip, waiting: state.waiting.into() };
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, Default)]
    struct Output(Arc<Mutex<Vec<u8>>>);

    impl Write for Output {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn port() -> (SerialPort, Output) {
        let output = Output::default();
        (SerialPort::new(Box::new(output.clone())).unwrap(), output)
    }

    fn read_all(port: &SerialPort) -> Vec<u8> {
        let mut bytes = Vec::new();
        while port.port_read(5) & 1 != 0 {
            bytes.push(port.port_read(0));
        }
        bytes
    }

    #[test]
    fn what_the_guest_writes_comes_out() {
        let (port, output) = port();
        for byte in b"hello" {
            assert_ne!(port.port_read(5) & 0x20, 0, "there is room");
            port.port_write(0, *byte);
        }
        assert_eq!(*output.0.lock().unwrap(), b"hello");
    }

    #[test]
    fn long_input_reaches_the_guest_whole_and_interrupts_it() {
        let (port, _) = port();
        port.port_write(1, 1);
        let input: Vec<u8> = (0..1000).map(|i| i as u8).collect();
        assert_eq!(port.input(&input), 1000);
        assert!(port.interrupt().unwrap().read().is_ok());
        assert_eq!(read_all(&port), input);
    }

    #[test]
    fn input_beyond_what_is_kept_is_left_to_the_caller() {
        let (port, _) = port();
        let taken = port.input(&[7; 2 * INPUT_MAX]);
        assert_eq!(taken, INPUT_MAX);
        assert_eq!(port.input(&[7; 100]), 64, "the chip has taken as much");
        assert_eq!(port.input(&[7; 100]), 0);
        assert_eq!(read_all(&port).len(), INPUT_MAX + 64);
    }

    #[test]
    fn a_line_goes_on_elsewhere_with_its_input_and_its_interrupt() {
        let (source, _) = port();
        source.port_write(1, 1);
        source.port_write(7, 0x5a);
        source.input(&[3; 100]);
        let state = source.save().unwrap();
        let (target, output) = port();
        target.restore(&state).unwrap();
        assert_eq!(target.save().unwrap(), state);
        assert!(target.interrupt().unwrap().read().is_ok(), "the interrupt was pending");
        assert_eq!(target.port_read(7), 0x5a);
        assert_eq!(read_all(&target), [3; 100]);
        target.port_write(0, b'x');
        assert_eq!(*output.0.lock().unwrap(), b"x");
    }

    #[test]
    fn a_state_that_is_none_is_refused() {
        let (port, _) = port();
        let state = port.save().unwrap();
        let mut other = state.clone();
        other.version = 2;
        assert!(port.restore(&other).is_err());
        let mut long = state.clone();
        long.data["received"] = serde_json::json!(vec![0; 65]);
        assert!(port.restore(&long).is_err());
        let mut long = state;
        long.data["waiting"] = serde_json::json!(vec![0; INPUT_MAX + 1]);
        assert!(port.restore(&long).is_err());
    }

    #[test]
    fn ports_beyond_the_chip_are_nothing() {
        let (port, _) = port();
        port.port_write(8, 1);
        port.port_write(0x108, 1);
        assert_eq!((port.port_read(8), port.port_read(0x100)), (0xff, 0xff));
    }
}
