//! What is typed at the standard input of a process whose machine comes at the second attempt. Alone in its process, whose
//! standard input it replaces.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::io::Write as _;
use std::os::fd::AsRawFd as _;
use std::time::{Duration, Instant};

use shim::cli::parts::ConsoleArgument;
use shim::device::serial::SerialPort;
use shim::setup::Devices;
use shim::vm::host::DeviceMaker as _;

/// What the guest has to read, once there are so many bytes.
fn read(line: &SerialPort, bytes: usize) -> Vec<u8> {
    let mut read = Vec::new();
    let until = Instant::now() + Duration::from_secs(60);
    while read.len() < bytes && Instant::now() < until {
        if line.port_read(5) & 1 != 0 {
            read.push(line.port_read(0));
        } else {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    read
}

#[test]
fn what_is_typed_reaches_the_machine_that_came_last_and_nothing_keeps_the_lines_of_failed_attempts() {
    let (input, mut keyboard) = std::io::pipe().unwrap();
    // SAFETY: plain system call on descriptors of ours; nobody has read standard input yet.
    assert!(unsafe { libc::dup2(input.as_raw_fd(), 0) } >= 0);
    let devices = Devices { disks: Vec::new(), taps: Vec::new(), console: ConsoleArgument::Stdio };
    let first = devices.serial().unwrap();
    keyboard.write_all(b"one").unwrap();
    assert_eq!(read(&first, 3), b"one");
    let attempt = std::sync::Arc::downgrade(&first);
    drop(first);
    assert_eq!(attempt.strong_count(), 0, "the line of a failed attempt ends with its machine");
    // Typed between two attempts, and so fast that a reader takes it in several pieces.
    let mut wanted = b"two".to_vec();
    keyboard.write_all(&wanted).unwrap();
    std::thread::sleep(Duration::from_millis(30));
    let second = devices.serial().unwrap();
    for piece in 0..50u8 {
        keyboard.write_all(&[piece]).unwrap();
        wanted.push(piece);
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(read(&second, wanted.len()), wanted);
}
