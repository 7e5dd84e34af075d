//! How the two sides reach each other: Unix sockets as they are, TCP with TLS on both sides unless a flag says otherwise.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{setsockopt, sockopt};
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, ServerConfig, ServerConnection, StreamOwned};

use super::tls::{self, TlsFiles};

/// Longest wait of one read or write; what waits longer looks in between whether it was told to stop.
pub const TICK: Duration = Duration::from_millis(100);
/// Longest wait for a TCP connection, and for each half of the greeting on a new one.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Idle time after which TCP looks whether the peer's host is still there, in seconds.
const KEEPALIVE_IDLE_SECONDS: u32 = 5;
/// Time between two such looks, in seconds.
const KEEPALIVE_INTERVAL_SECONDS: u32 = 2;
/// Looks without an answer after which the connection ends.
const KEEPALIVE_PROBES: u32 = 3;
/// Longest time that sent bytes may stay without acknowledgement, in milliseconds.
const UNACKNOWLEDGED_MS: u32 = 10_000;
/// Bytes that a Unix socket holds, where the host lets us: a batch of pages.
const UNIX_BUFFER_BYTES: usize = 1 << 20;

/// Where a target listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// A Unix socket.
    Unix(PathBuf),
    /// A host's name or address, and a port.
    Tcp(String, u16),
}

impl FromStr for Address {
    type Err = anyhow::Error;

    /// `unix:PATH`, `/PATH`, `tcp:HOST:PORT` or `HOST:PORT`; an IPv6 address stands in brackets.
    fn from_str(text: &str) -> Result<Self> {
        if let Some(path) = text.strip_prefix("unix:").or_else(|| text.starts_with('/').then_some(text)) {
            ensure!(!path.is_empty(), "'{text}' names no socket: say unix:PATH");
            return Ok(Self::Unix(path.into()));
        }
        let rest = text.strip_prefix("tcp:").unwrap_or(text);
        let (host, port) = rest
            .rsplit_once(':')
            .with_context(|| format!("'{text}' is no address: say unix:PATH, tcp:HOST:PORT or HOST:PORT"))?;
        let port = port.parse().with_context(|| format!("'{port}' in '{text}' is no port (0 to 65535)"))?;
        let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        ensure!(
            !host.is_empty() && bare != Some("") && (bare.is_some() || !host.contains(':')),
            "'{host}' in '{text}' is no host: an IPv6 address stands in brackets, as in [::1]:4444"
        );
        Ok(Self::Tcp(bare.unwrap_or(host).to_owned(), port))
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(host, port) if host.contains(':') => write!(f, "tcp:[{host}]:{port}"),
            Self::Tcp(host, port) => write!(f, "tcp:{host}:{port}"),
        }
    }
}

/// How connections are kept from strangers.
#[derive(Debug, Clone, Default)]
pub struct Security {
    /// Certificates for TLS on TCP. Not used on Unix sockets.
    pub tls: Option<TlsFiles>,
    /// Name that the target's certificate has to have; the host of the address if not given.
    pub server_name: Option<String>,
    /// TCP without TLS: anybody on the way can read and change the guest's memory.
    pub insecure_plain_tcp: bool,
}

impl Security {
    fn tls_for_tcp(&self) -> Result<Option<&TlsFiles>> {
        match (&self.tls, self.insecure_plain_tcp) {
            (Some(_), true) => {
                bail!("TLS files and the flag for insecure plain TCP exclude each other: leave one out")
            }
            (Some(files), false) => Ok(Some(files)),
            (None, true) => Ok(None),
            (None, false) => bail!(
                "a guest's memory does not go over TCP in the clear: give TLS files (CA, certificate and key), use a Unix \
                 socket, or say that insecure plain TCP is wanted"
            ),
        }
    }
}

/// One connection in both directions. Reads and writes end with `WouldBlock` after [`TICK`] at the latest.
pub trait Stream: Read + Write + Send {
    /// What ends it from another thread.
    ///
    /// # Errors
    /// If the process has no descriptor left.
    fn closer(&self) -> io::Result<Closer>;

    /// What to wait on, together with other descriptors, after [`Stream::readable`] has said no.
    fn descriptor(&self) -> BorrowedFd<'_>;

    /// Whether something can be read at once, or within `wait`.
    ///
    /// # Errors
    /// If the system cannot say.
    fn readable(&self, wait: Duration) -> io::Result<bool>;
}

/// Ends a connection, whoever is reading or writing on it.
#[derive(Debug)]
pub struct Closer(OwnedFd);

impl Closer {
    /// Ends it in both directions. What was not sent is lost.
    pub fn close(&self) {
        self.shutdown(nix::sys::socket::Shutdown::Both);
    }

    /// Ends it towards the peer, which still gets what was sent.
    pub fn close_sending(&self) {
        self.shutdown(nix::sys::socket::Shutdown::Write);
    }

    fn shutdown(&self, how: nix::sys::socket::Shutdown) {
        // A connection that has ended already is what was wanted.
        let _ = nix::sys::socket::shutdown(self.0.as_raw_fd(), how);
    }
}

/// A socket without TLS.
#[derive(Debug)]
enum Socket {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Socket {
    /// Sets time limits and options.
    fn prepare(self) -> Result<Self> {
        match &self {
            Self::Unix(stream) => {
                stream.set_read_timeout(Some(TICK))?;
                stream.set_write_timeout(Some(TICK))?;
                // More than the host's default needs a privilege; without it the socket works as well, only slower.
                if setsockopt(stream, sockopt::SndBufForce, &UNIX_BUFFER_BYTES).is_err() {
                    let _ = setsockopt(stream, sockopt::SndBuf, &UNIX_BUFFER_BYTES);
                }
            }
            Self::Tcp(stream) => {
                stream.set_read_timeout(Some(TICK))?;
                stream.set_write_timeout(Some(TICK))?;
                stream.set_nodelay(true)?;
                // The buffers are left to the kernel: a size of our own would end its tuning, which goes further than what
                // an unprivileged process may ask for.
                setsockopt(stream, sockopt::KeepAlive, &true)?;
                set_tcp_option(stream, libc::TCP_KEEPIDLE, KEEPALIVE_IDLE_SECONDS)?;
                set_tcp_option(stream, libc::TCP_KEEPINTVL, KEEPALIVE_INTERVAL_SECONDS)?;
                set_tcp_option(stream, libc::TCP_KEEPCNT, KEEPALIVE_PROBES)?;
                set_tcp_option(stream, libc::TCP_USER_TIMEOUT, UNACKNOWLEDGED_MS)?;
            }
        }
        Ok(self)
    }
}

fn set_tcp_option(stream: &TcpStream, option: libc::c_int, value: u32) -> io::Result<()> {
    let len = size_of::<u32>() as libc::socklen_t;
    // SAFETY: the descriptor is open for as long as `stream` is borrowed, and the kernel reads `len` bytes of `value`.
    let result = unsafe {
        libc::setsockopt(stream.as_raw_fd(), libc::IPPROTO_TCP, option, (&raw const value).cast(), len)
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(stream) => stream.as_fd(),
            Self::Tcp(stream) => stream.as_fd(),
        }
    }
}

impl Read for Socket {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.read(buf),
            Self::Tcp(stream) => stream.read(buf),
        }
    }
}

impl Write for Socket {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.write(buf),
            Self::Tcp(stream) => stream.write(buf),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Stream for Socket {
    fn closer(&self) -> io::Result<Closer> {
        self.as_fd().try_clone_to_owned().map(Closer)
    }

    fn descriptor(&self) -> BorrowedFd<'_> {
        self.as_fd()
    }

    fn readable(&self, wait: Duration) -> io::Result<bool> {
        let mut fds = [PollFd::new(self.as_fd(), PollFlags::POLLIN)];
        // Rounded up: a wait below a millisecond is not to become a busy loop.
        let millis = u16::try_from(wait.as_micros().div_ceil(1000)).unwrap_or(u16::MAX);
        match poll(&mut fds, PollTimeout::from(millis)) {
            Ok(ready) => Ok(ready > 0),
            Err(nix::Error::EINTR) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}

impl Stream for StreamOwned<ClientConnection, Socket> {
    fn closer(&self) -> io::Result<Closer> {
        self.sock.closer()
    }

    fn descriptor(&self) -> BorrowedFd<'_> {
        self.sock.as_fd()
    }

    fn readable(&self, wait: Duration) -> io::Result<bool> {
        // What was decrypted already waits within the session.
        if !self.conn.wants_read() { Ok(true) } else { self.sock.readable(wait) }
    }
}

impl Stream for StreamOwned<ServerConnection, Socket> {
    fn closer(&self) -> io::Result<Closer> {
        self.sock.closer()
    }

    fn descriptor(&self) -> BorrowedFd<'_> {
        self.sock.as_fd()
    }

    fn readable(&self, wait: Duration) -> io::Result<bool> {
        // What was decrypted already waits within the session.
        if !self.conn.wants_read() { Ok(true) } else { self.sock.readable(wait) }
    }
}

/// What makes connections to one target.
pub struct Connector {
    address: Address,
    tls: Option<(Arc<ClientConfig>, ServerName<'static>)>,
}

impl Connector {
    /// One for this address. Reads the certificates.
    ///
    /// # Errors
    /// If TCP is asked for without TLS and without the flag that allows it, or the certificates are of no use.
    pub fn new(address: Address, security: &Security) -> Result<Self> {
        let tls = match &address {
            Address::Unix(_) => None,
            Address::Tcp(host, _) => match security.tls_for_tcp()? {
                None => None,
                Some(files) => {
                    let name = security.server_name.as_deref().unwrap_or(host);
                    let name = ServerName::try_from(name.to_owned())
                        .with_context(|| format!("'{name}' can be no name in a certificate"))?;
                    Some((tls::client_config(files)?, name))
                }
            },
        };
        Ok(Self { address, tls })
    }

    /// Where it connects to.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// A new connection; TLS is established.
    ///
    /// # Errors
    /// If nobody listens there, or one of the two does not accept the other's certificate.
    pub fn connect(&self) -> Result<Box<dyn Stream>> {
        let socket = self.socket().with_context(|| format!("connect to {}", self.address))?.prepare()?;
        let Some((config, name)) = &self.tls else { return Ok(Box::new(socket)) };
        let session = ClientConnection::new(config.clone(), name.clone()).context("begin TLS")?;
        let mut stream = StreamOwned::new(session, socket);
        tls::handshake(&mut stream.conn, &mut stream.sock)
            .with_context(|| format!("TLS with {} does not come about", self.address))?;
        Ok(Box::new(stream))
    }

    fn socket(&self) -> Result<Socket> {
        match &self.address {
            Address::Unix(path) => Ok(Socket::Unix(UnixStream::connect(path)?)),
            Address::Tcp(host, port) => {
                let mut last = None;
                let addresses = (host.as_str(), *port).to_socket_addrs();
                for address in addresses.with_context(|| format!("find the address of {host}"))? {
                    match TcpStream::connect_timeout(&address, CONNECT_TIMEOUT) {
                        Ok(stream) => return Ok(Socket::Tcp(stream)),
                        Err(error) => last = Some(error),
                    }
                }
                Err(last.map_or_else(|| anyhow::anyhow!("{host} has no address"), Into::into))
            }
        }
    }
}

enum Door {
    /// With the path to remove at the end.
    Unix(UnixListener, PathBuf),
    Tcp(TcpListener),
}

/// Where a target waits for connections.
pub struct Listener {
    door: Door,
    tls: Option<Arc<ServerConfig>>,
}

impl Listener {
    /// Listens. A Unix socket that nobody listens on any more is replaced.
    ///
    /// # Errors
    /// As [`Connector::new`], and if the address is taken.
    pub fn bind(address: &Address, security: &Security) -> Result<Self> {
        let (door, tls) = match address {
            Address::Unix(path) => (bind_unix(path).with_context(|| format!("listen on {address}"))?, None),
            Address::Tcp(host, port) => {
                let tls = security.tls_for_tcp()?.map(tls::server_config).transpose()?;
                let listener = TcpListener::bind((host.as_str(), *port));
                (Door::Tcp(listener.with_context(|| format!("listen on {address}"))?), tls)
            }
        };
        match &door {
            Door::Unix(listener, _) => listener.set_nonblocking(true)?,
            Door::Tcp(listener) => listener.set_nonblocking(true)?,
        }
        Ok(Self { door, tls })
    }

    /// The address with the port that was given.
    ///
    /// # Errors
    /// If the system does not say.
    pub fn address(&self) -> Result<Address> {
        Ok(match &self.door {
            Door::Unix(_, path) => Address::Unix(path.clone()),
            Door::Tcp(listener) => {
                let address = listener.local_addr()?;
                Address::Tcp(address.ip().to_string(), address.port())
            }
        })
    }

    /// Waits for somebody to connect, for [`TICK`] at most. TLS is not established yet.
    ///
    /// # Errors
    /// If the system cannot accept connections.
    pub fn accept(&self) -> Result<Option<Arrival>> {
        let fd = match &self.door {
            Door::Unix(listener, _) => listener.as_fd(),
            Door::Tcp(listener) => listener.as_fd(),
        };
        let mut fds = [PollFd::new(fd, PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::try_from(TICK).unwrap_or(PollTimeout::ZERO)) {
            Ok(0) | Err(nix::Error::EINTR) => return Ok(None),
            Ok(_) => {}
            Err(error) => return Err(error).context("wait for a connection"),
        }
        let socket = match &self.door {
            Door::Unix(listener, _) => listener.accept().map(|(stream, _)| Socket::Unix(stream)),
            Door::Tcp(listener) => listener.accept().map(|(stream, _)| Socket::Tcp(stream)),
        };
        match socket {
            Ok(socket) => Ok(Some(Arrival { socket, tls: self.tls.clone() })),
            // Whoever connected has gone again.
            Err(error)
                if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::ConnectionAborted) =>
            {
                Ok(None)
            }
            Err(error) => Err(error).context("accept a connection"),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Door::Unix(_, path) = &self.door {
            // Nobody can connect any more; that the name stays behind would do no harm.
            let _ = std::fs::remove_file(path);
        }
    }
}

fn bind_unix(path: &Path) -> Result<Door> {
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket());
    if is_socket {
        let refused =
            UnixStream::connect(path).is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused);
        ensure!(refused, "somebody listens there already");
        std::fs::remove_file(path).context("remove the socket that was left behind")?;
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).context("keep others away")?;
    Ok(Door::Unix(listener, path.to_owned()))
}

/// Somebody who has just connected.
pub struct Arrival {
    socket: Socket,
    tls: Option<Arc<ServerConfig>>,
}

impl Arrival {
    /// Establishes TLS where it is asked for.
    ///
    /// # Errors
    /// If the peer has no certificate of the right authority, or does not speak TLS.
    pub fn establish(self) -> Result<Box<dyn Stream>> {
        // An accepted socket inherits that its listener does not block.
        match &self.socket {
            Socket::Unix(stream) => stream.set_nonblocking(false)?,
            Socket::Tcp(stream) => stream.set_nonblocking(false)?,
        }
        let socket = self.socket.prepare()?;
        let Some(config) = self.tls else { return Ok(Box::new(socket)) };
        let session = ServerConnection::new(config).context("begin TLS")?;
        let mut stream = StreamOwned::new(session, socket);
        tls::handshake(&mut stream.conn, &mut stream.sock)
            .context("TLS with the source does not come about")?;
        Ok(Box::new(stream))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_and_written() {
        let same = |text: &str, shown: &str| {
            let address: Address = text.parse().expect(text);
            assert_eq!(address.to_string(), shown);
            assert_eq!(shown.parse::<Address>().expect(shown), address);
        };
        same("unix:a/b", "unix:a/b");
        same("/run/x", "unix:/run/x");
        same("tcp:host:1", "tcp:host:1");
        same("10.0.0.1:4444", "tcp:10.0.0.1:4444");
        same("[::1]:5", "tcp:[::1]:5");
        for bad in ["", "unix:", "host", "host:", "host:70000", ":5", "::1:5", "[]:5"] {
            assert!(bad.parse::<Address>().is_err(), "{bad}");
        }
    }

    #[test]
    fn plain_tcp_is_refused_unless_asked_for() {
        let address: Address = "127.0.0.1:0".parse().expect("address");
        let error = Listener::bind(&address, &Security::default()).err().expect("refused").to_string();
        assert!(error.contains("insecure"), "{error}");
        assert!(Connector::new(address.clone(), &Security::default()).is_err());
        let plain = Security { insecure_plain_tcp: true, ..Security::default() };
        assert!(Listener::bind(&address, &plain).is_ok());
    }

    #[test]
    fn a_socket_left_behind_is_replaced_but_not_one_in_use() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("s");
        drop(UnixListener::bind(&path).expect("bind"));
        let address = Address::Unix(path);
        let first = Listener::bind(&address, &Security::default()).expect("replaced");
        assert!(Listener::bind(&address, &Security::default()).is_err());
        drop(first);
        Listener::bind(&address, &Security::default()).expect("free again");
    }
}
