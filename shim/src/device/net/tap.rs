//! A tap device of the host: what is written to it the host receives, and what the host sends there is read.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;

use anyhow::{Context, Result, ensure};

/// Bytes of the header before each frame: that of virtio 1.2, 5.1.6.
pub const HEADER: usize = 12;
/// Most bytes of a frame with its header.
pub const FRAME_MAX: usize = HEADER + 65_535;

/// An open tap.
#[derive(Debug)]
pub struct Tap {
    file: File,
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn request(name: &str) -> libc::ifreq {
    // SAFETY: plain numbers and arrays of such, for which zeroes are valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request
}

impl Tap {
    /// Opens the tap of that name, which is made if there is none, and brings it up if that is allowed.
    ///
    /// # Errors
    /// If the name is none, or the host refuses: making a tap needs CAP_NET_ADMIN, and one that another process uses is busy.
    pub fn open(name: &str) -> Result<Self> {
        ensure!(
            !name.is_empty() && name.len() < libc::IFNAMSIZ && !name.contains(['/', '%', '\0', ' ']),
            "{name:?} is no name of a network interface; one has 1 to 15 characters"
        );
        let mut options = File::options();
        options.read(true).write(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC);
        let file = options
            .open("/dev/net/tun")
            .context("open /dev/net/tun, which needs the module tun and rights to it")?;
        let mut interface = request(name);
        interface.ifr_ifru.ifru_flags =
            (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
        // SAFETY: the request is valid for reading and writing while the call lasts.
        check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as _, &raw mut interface) })
            .with_context(|| {
                format!("open the tap {name}; is it used by another process, or may it not be made?")
            })?;
        let header = HEADER as libc::c_int;
        // SAFETY: as above.
        check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETVNETHDRSZ as _, &raw const header) })
            .with_context(|| format!("set the header of the tap {name}"))?;
        // Whole frames with their checksums: the guest is offered nothing else.
        // SAFETY: the argument is a number.
        check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETOFFLOAD as _, 0) })
            .with_context(|| format!("switch off the offloads of the tap {name}"))?;
        if let Err(e) = bring_up(name) {
            tracing::warn!("the tap {name} cannot be brought up ({e}): if it is down, do so");
        }
        Ok(Self { file })
    }

    /// Reads a frame with its header; `WouldBlock` when there is none.
    pub fn receive(&self, frame: &mut [u8]) -> io::Result<usize> {
        (&self.file).read(frame)
    }

    /// Hands the host a frame, header first.
    pub fn send(&self, frame: &[u8]) -> io::Result<()> {
        (&self.file).write(frame).map(|_| ())
    }

    /// For those who wait for frames.
    pub fn descriptor(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

fn bring_up(name: &str) -> io::Result<()> {
    // SAFETY: plain system call; the result is checked.
    let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    check(fd)?;
    // SAFETY: the descriptor was just made and belongs to nobody else.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let mut interface = request(name);
    // SAFETY: the request is valid for reading and writing while the call lasts.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFFLAGS as _, &raw mut interface) })?;
    // SAFETY: the call has set this member.
    let flags = unsafe { interface.ifr_ifru.ifru_flags };
    if i32::from(flags) & libc::IFF_UP != 0 {
        return Ok(());
    }
    interface.ifr_ifru.ifru_flags = flags | libc::IFF_UP as libc::c_short;
    // SAFETY: as above.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS as _, &raw const interface) })
}
