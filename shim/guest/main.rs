//! The test guest: shows that memory, registers and disks are carried over exactly when a machine moves.
//!
//! It runs in 64-bit user mode (CPL 3, with port access by IOPL 3), interrupts off, without an operating system, and looks at
//! everything by polling: such code runs at full speed on every kind of KVM. All that it knows is in guest memory and in
//! registers, so it moves with the machine. A fault ends the machine, as there is nobody to handle it.
//!
//! Each processor runs [`run`] with its own stack, its own part of the working set and its own record in the report; the first
//! one drives the disks too.
#![no_std]
#![no_main]
#![warn(clippy::undocumented_unsafe_blocks)]

mod disk;
#[allow(dead_code)] // the host's side uses the rest
mod layout;
mod machine;
mod memory;
mod pace;
#[allow(dead_code)]
mod pattern;
mod queue;
mod registers;
mod report;

use core::mem::offset_of;

use disk::{Disk, Mode};
use layout::{
    COMMAND_RUN, COMMAND_STOP, CONTROL_ADDRESS, Control, DISKS_MAX, PARAMETERS_ADDRESS, PATTERN_IDLE,
    Parameters, RING_ANSWERED, RING_PERIODIC, RING_STARTED, STATE_RUNNING, STATE_STOPPED, STATE_VERIFIED,
    STATE_VERIFYING,
};
use machine::{load, tsc};
use memory::Worker;
use pace::Pace;
use registers::Registers;
use report::VcpuReport;

/// Pages visited or verified before the next look at the command, the clock and the disks.
const PAGES_A_ROUND: u32 = 8;
/// Pauses in a row while there is nothing to do.
const REST_PAUSES: u32 = 32;

/// What a processor begins with; never returns, as there is nothing to return to.
extern "C" fn run(vcpu: u32) -> ! {
    // SAFETY: the host wrote the parameters there before it started the processors.
    let parameters = &unsafe { load::<Parameters>(PARAMETERS_ADDRESS) };
    Processor::new(parameters, vcpu).run()
}

/// What the host wants now. Each word is read, as it is written, whole.
fn control() -> Control {
    let word = |offset: usize| {
        // SAFETY: the host made this page.
        unsafe { load::<u64>(CONTROL_ADDRESS + offset as u64) }
    };
    Control { command: word(offset_of!(Control, command)), rate: word(offset_of!(Control, rate)) }
}

struct Processor<'a> {
    parameters: &'a Parameters,
    vcpu: u32,
    report: VcpuReport,
    worker: Worker<'a>,
    disks: [Option<Disk<'a>>; DISKS_MAX],
    registers: Registers,
    pace: Pace,
    last_ring: u64,
}

impl<'a> Processor<'a> {
    fn new(parameters: &'a Parameters, vcpu: u32) -> Self {
        let drives = |disk: u32| vcpu == 0 && disk < parameters.disks;
        Self {
            parameters,
            vcpu,
            report: VcpuReport::new(vcpu),
            worker: Worker::new(parameters, vcpu),
            disks: core::array::from_fn(|disk| {
                drives(disk as u32).then(|| Disk::new(parameters, disk as u32))
            }),
            registers: Registers::new(parameters.seed, vcpu),
            pace: Pace::new(parameters),
            last_ring: tsc(),
        }
    }

    fn run(&mut self) -> ! {
        self.report.set_state(STATE_RUNNING);
        self.report.ring(RING_STARTED);
        for disk in self.disks.iter_mut().flatten() {
            disk.set_up(&mut self.report);
        }
        let mut current = 0;
        let mut answered = false;
        loop {
            let control = control();
            if control.command != current {
                current = control.command;
                answered = false;
                self.begin(current as u32);
            }
            let now = self.clock();
            let (worked, done) = match current as u32 {
                COMMAND_RUN => (self.work(now, control.rate), true),
                COMMAND_STOP => (false, self.disks(now, Mode::Drain)),
                _ => self.verify(now),
            };
            if done && !answered {
                answered = true;
                self.answer(current);
            }
            if !worked {
                self.registers.rest(REST_PAUSES, &mut self.report);
            }
        }
    }

    /// Looks at the clock, and at what is to be done from time to time.
    fn clock(&mut self) -> u64 {
        let now = tsc();
        self.report.saw_time(now);
        self.registers.check(&mut self.report);
        let interval = u64::from(self.parameters.report_ms) * u64::from(self.parameters.tsc_khz);
        // A clock that went back makes the difference huge: then it is time as well.
        if self.vcpu == 0 && interval != 0 && now.wrapping_sub(self.last_ring) >= interval {
            self.last_ring = now;
            for disk in self.disks.iter_mut().flatten() {
                disk.check_device(&mut self.report);
            }
            self.report.ring(RING_PERIODIC);
        }
        now
    }

    /// A new command.
    fn begin(&mut self, command: u32) {
        if command != COMMAND_RUN && command != COMMAND_STOP {
            self.report.set_state(STATE_VERIFYING);
            self.worker.begin_verifying(&mut self.report);
            for disk in self.disks.iter_mut().flatten() {
                disk.begin_verifying();
            }
        }
    }

    /// A command was carried out.
    fn answer(&mut self, command: u64) {
        self.report.set_state(match command as u32 {
            COMMAND_RUN => STATE_RUNNING,
            COMMAND_STOP => STATE_STOPPED,
            _ => STATE_VERIFIED,
        });
        self.report.answer(command);
        // The first command is the one that the guest starts with.
        if command >> 32 != 0 {
            self.report.ring(RING_ANSWERED);
        }
    }

    /// Visits pages as far as the rate allows, and uses the disks. Whether there was memory to work on.
    fn work(&mut self, now: u64, rate: u64) -> bool {
        self.disks(now, Mode::Run);
        if self.parameters.pattern == PATTERN_IDLE {
            return false;
        }
        for visited in 0..PAGES_A_ROUND {
            if !self.pace.due(now, rate) {
                return visited > 0;
            }
            self.worker.visit(&mut self.report);
        }
        true
    }

    /// Verifies some more. Whether there was memory left to verify, and whether all is done.
    fn verify(&mut self, now: u64) -> (bool, bool) {
        let disks_done = self.disks(now, Mode::Verify);
        let mut left = true;
        for _ in 0..PAGES_A_ROUND {
            left = left && self.worker.verify_next(&mut self.report);
        }
        (left, disks_done && !left)
    }

    /// Lets the disks get on. Whether they all have nothing left to do in this mode.
    fn disks(&mut self, now: u64, mode: Mode) -> bool {
        let mut done = true;
        for disk in self.disks.iter_mut().flatten() {
            done &= disk.step(now, mode, &mut self.report);
        }
        done
    }
}
