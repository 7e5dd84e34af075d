//! A thread for each processor.
//!
//! The thread runs the guest until somebody asks it to stop. Asking is a flag and a signal; a signal that arrives right
//! before KVM_RUN is entered is lost, so it is sent again until the thread says that it stands still. Before it does, an
//! access that KVM has begun is completed (`immediate_exit`), as KVM's documentation demands before state is read.

use std::fmt;
use std::os::unix::thread::JoinHandleExt;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Once};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use kvm_ioctls::{VcpuExit, VcpuFd};

use super::ports::{After, Ports};
use crate::device::{Device, MMIO_BYTES, MMIO_START};

/// Longest that a processor may take to stop. Only a host that does not run us at all takes that long.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);
/// How often the signal is sent again.
const SIGNAL_EVERY: Duration = Duration::from_micros(200);
/// How long a processor that is slowed down runs between its rests.
const THROTTLE_SLICE: Duration = Duration::from_millis(10);

/// What a processor is told to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wanted {
    Stand,
    Run,
    End,
}

/// What it does.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Doing {
    Stands,
    Runs,
    Ended(Ending),
}

/// Why a processor does not run any more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ending {
    /// It was told to.
    Told,
    /// The guest shut down or asked for a reset.
    Shutdown,
    /// KVM can't run it: the sentence says why.
    Failed(String),
}

/// What the guest's accesses reach. The devices are in the order of their places.
pub struct Buses {
    /// Ports.
    pub ports: Ports,
    /// Devices with registers in memory.
    pub devices: Vec<Arc<dyn Device>>,
}

impl fmt::Debug for Buses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Buses").field("devices", &self.devices.len()).finish_non_exhaustive()
    }
}

impl Buses {
    fn device(&self, address: u64) -> Option<(&Arc<dyn Device>, u64)> {
        let offset = address.checked_sub(MMIO_START)?;
        Some((self.devices.get((offset / MMIO_BYTES) as usize)?, offset % MMIO_BYTES))
    }

    fn read(&self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((device, offset)) = self.device(address) {
            device.read(offset, data);
        }
    }

    fn write(&self, address: u64, data: &[u8]) {
        if let Some((device, offset)) = self.device(address) {
            device.write(offset, data);
        }
    }
}

#[derive(Debug)]
struct Shared {
    wanted: Mutex<(Wanted, Doing)>,
    changed: Condvar,
    throttle_percent: AtomicU8,
    exits: AtomicU64,
    fd: Mutex<VcpuFd>,
}

/// A processor and its thread. Dropping it ends the thread.
#[derive(Debug)]
pub struct Vcpu {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Vcpu {
    /// Starts the thread of a processor, which stands still. `on_end` is called in that thread when the guest ends it.
    ///
    /// # Errors
    /// If no thread can be made.
    pub fn new(
        number: u32,
        fd: VcpuFd,
        buses: Arc<Buses>,
        on_end: impl Fn(&Ending) + Send + 'static,
    ) -> Result<Self> {
        install_signal_handler();
        let shared = Arc::new(Shared {
            wanted: Mutex::new((Wanted::Stand, Doing::Stands)),
            changed: Condvar::new(),
            throttle_percent: AtomicU8::new(0),
            exits: AtomicU64::new(0),
            fd: Mutex::new(fd),
        });
        let theirs = shared.clone();
        let thread = std::thread::Builder::new()
            .name(format!("vcpu{number}"))
            .spawn(move || {
                let ending = theirs.serve(&buses);
                theirs.lock().1 = Doing::Ended(ending.clone());
                theirs.changed.notify_all();
                if ending != Ending::Told {
                    on_end(&ending);
                }
            })
            .context("start a processor's thread")?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Lets it run.
    pub fn run(&self) {
        let mut state = self.shared.lock();
        if state.0 == Wanted::Stand {
            state.0 = Wanted::Run;
        }
        self.shared.changed.notify_all();
    }

    /// Asks it to stop, without waiting.
    pub fn ask_to_stand(&self) {
        let mut state = self.shared.lock();
        if state.0 == Wanted::Run {
            state.0 = Wanted::Stand;
        }
        self.shared.changed.notify_all();
        drop(state);
        self.signal();
    }

    /// Waits until it stands still after [`Vcpu::ask_to_stand`]. A processor that has ended stands still as well.
    ///
    /// # Errors
    /// If it does not stop within ten seconds.
    pub fn wait_until_it_stands(&self) -> Result<()> {
        let until = Instant::now() + STOP_TIMEOUT;
        let mut state = self.shared.lock();
        while state.1 == Doing::Runs {
            if Instant::now() > until {
                bail!("a processor did not stop within {STOP_TIMEOUT:?}");
            }
            self.signal();
            state = match self.shared.changed.wait_timeout(state, SIGNAL_EVERY) {
                Ok((state, _)) => state,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
        Ok(())
    }

    /// Why it does not run any more, if so.
    pub fn ending(&self) -> Option<Ending> {
        match &self.shared.lock().1 {
            Doing::Ended(ending) => Some(ending.clone()),
            _ => None,
        }
    }

    /// From here on it rests `percent` of the time, at most 99.
    pub fn throttle(&self, percent: u8) {
        self.shared.throttle_percent.store(percent.min(99), Ordering::Release);
        self.shared.changed.notify_all();
    }

    /// How long it runs and rests in turns at the present throttle; none if it is not slowed down.
    pub fn throttle_slices(&self) -> Option<(Duration, Duration)> {
        throttle_slices(self.shared.throttle_percent.load(Ordering::Acquire))
    }

    /// Makes it leave the guest for a moment, so that it sees that its time is over.
    pub fn signal(&self) {
        if let Some(thread) = &self.thread
            && !thread.is_finished()
        {
            // SAFETY: the thread has not been joined, so its handle is valid; the signal's handler does nothing.
            unsafe { libc::pthread_kill(thread.as_pthread_t() as libc::pthread_t, kick_signal()) };
        }
    }

    /// Exits to this process so far.
    pub fn exits(&self) -> u64 {
        self.shared.exits.load(Ordering::Relaxed)
    }

    /// Its descriptor, while it stands still. While it runs this waits.
    pub fn fd(&self) -> MutexGuard<'_, VcpuFd> {
        self.shared.fd.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        self.shared.lock().0 = Wanted::End;
        self.shared.changed.notify_all();
        let Some(thread) = self.thread.take() else { return };
        while !thread.is_finished() {
            // SAFETY: as in `signal`.
            unsafe { libc::pthread_kill(thread.as_pthread_t() as libc::pthread_t, kick_signal()) };
            std::thread::sleep(SIGNAL_EVERY);
        }
        let _ = thread.join();
    }
}

fn throttle_slices(percent: u8) -> Option<(Duration, Duration)> {
    (percent > 0).then(|| {
        let percent = u32::from(percent.min(99));
        (THROTTLE_SLICE, THROTTLE_SLICE * percent / (100 - percent))
    })
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, (Wanted, Doing)> {
        self.wanted.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Waits until it may run (true) or has to end (false).
    fn stand(&self) -> bool {
        let mut state = self.lock();
        loop {
            match state.0 {
                Wanted::End => return false,
                Wanted::Run => {
                    state.1 = Doing::Runs;
                    return true;
                }
                Wanted::Stand if state.1 != Doing::Stands => {
                    state.1 = Doing::Stands;
                    self.changed.notify_all();
                }
                Wanted::Stand => {}
            }
            state = self.changed.wait(state).unwrap_or_else(std::sync::PoisonError::into_inner);
        }
    }

    fn serve(&self, buses: &Buses) -> Ending {
        while self.stand() {
            let mut fd = self.fd.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            match self.run_until_told(&mut fd, buses) {
                Ok(()) => {}
                Err(ending) => return ending,
            }
            if let Err(ending) = complete_access(&mut fd, buses) {
                return ending;
            }
        }
        Ending::Told
    }

    fn run_until_told(&self, fd: &mut VcpuFd, buses: &Buses) -> Result<(), Ending> {
        let mut slice_began = Instant::now();
        loop {
            if self.lock().0 != Wanted::Run {
                return Ok(());
            }
            if let Some((run, rest)) = throttle_slices(self.throttle_percent.load(Ordering::Acquire))
                && slice_began.elapsed() >= run
            {
                self.rest(rest);
                slice_began = Instant::now();
                continue;
            }
            self.exits.fetch_add(1, Ordering::Relaxed);
            match fd.run() {
                Ok(exit) => handle(exit, buses)?,
                Err(e) if e.errno() == libc::EINTR => {}
                Err(e) if e.errno() == libc::EAGAIN => {}
                Err(e) => return Err(Ending::Failed(format!("KVM can't run the guest: {e}"))),
            }
        }
    }

    /// Sleeps, unless it has to stop or is not slowed down any more.
    fn rest(&self, time: Duration) {
        let until = Instant::now() + time;
        let mut state = self.lock();
        while state.0 == Wanted::Run && self.throttle_percent.load(Ordering::Acquire) > 0 {
            let Some(left) = until.checked_duration_since(Instant::now()) else { return };
            state = match self.changed.wait_timeout(state, left) {
                Ok((state, _)) => state,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
    }
}

/// What KVM has begun it completes on the way in, and leaves again at once. An access of several parts takes several turns.
fn complete_access(fd: &mut VcpuFd, buses: &Buses) -> Result<(), Ending> {
    fd.set_kvm_immediate_exit(1);
    let ended = loop {
        match fd.run() {
            Ok(exit) => {
                if let Err(ending) = handle(exit, buses) {
                    break Err(ending);
                }
            }
            // EINTR: nothing is left to complete. Any other error comes again, and is told, when it is to run.
            Err(_) => break Ok(()),
        }
    };
    fd.set_kvm_immediate_exit(0);
    ended
}

fn handle(exit: VcpuExit<'_>, buses: &Buses) -> Result<(), Ending> {
    match exit {
        VcpuExit::IoIn(port, data) => buses.ports.read(port, data),
        VcpuExit::IoOut(port, data) => {
            if buses.ports.write(port, data) == After::End {
                return Err(Ending::Shutdown);
            }
        }
        VcpuExit::MmioRead(address, data) => buses.read(address, data),
        VcpuExit::MmioWrite(address, data) => buses.write(address, data),
        VcpuExit::Intr | VcpuExit::IrqWindowOpen | VcpuExit::IoapicEoi(_) => {}
        VcpuExit::Hlt | VcpuExit::Shutdown | VcpuExit::SystemEvent(..) => return Err(Ending::Shutdown),
        exit => return Err(Ending::Failed(format!("KVM left the guest with {exit:?}"))),
    }
    Ok(())
}

/// The signal that makes KVM leave the guest.
fn kick_signal() -> i32 {
    libc::SIGRTMIN()
}

extern "C" fn do_nothing(_: i32) {}

fn install_signal_handler() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: a zeroed sigaction is valid; the handler does nothing, so it may run at any moment. SA_RESTART is not
        // set: KVM_RUN has to end with EINTR.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = do_nothing as *const () as usize;
            libc::sigemptyset(&mut action.sa_mask);
            libc::sigaction(kick_signal(), &action, std::ptr::null_mut());
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_throttled_processor_rests_its_share_of_the_time() {
        assert_eq!(throttle_slices(0), None);
        assert_eq!(throttle_slices(50), Some((THROTTLE_SLICE, THROTTLE_SLICE)));
        assert_eq!(throttle_slices(99), Some((THROTTLE_SLICE, THROTTLE_SLICE * 99)));
        assert_eq!(throttle_slices(255), throttle_slices(99));
    }
}
