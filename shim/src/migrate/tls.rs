//! TLS with certificates on both sides, from PEM files.

use std::io::{self, Read, Write};
use std::ops::{Deref, DerefMut};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustls::client::WebPkiServerVerifier;
use rustls::crypto::ring::default_provider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, ConnectionCommon, RootCertStore, ServerConfig, SideData};

use super::transport::CONNECT_TIMEOUT;

/// PEM files for TLS. Both sides need all three.
#[derive(Debug, Clone)]
pub struct TlsFiles {
    /// Certificates of the authorities that the peer's certificate may come from.
    pub ca: PathBuf,
    /// Certificate of this side, with those between it and the authority.
    pub certificate: PathBuf,
    /// Key of this side's certificate.
    pub key: PathBuf,
}

/// For the side that connects.
pub(super) fn client_config(files: &TlsFiles) -> Result<Arc<ClientConfig>> {
    let provider = Arc::new(default_provider());
    let verifier = WebPkiServerVerifier::builder_with_provider(authorities(&files.ca)?, provider.clone())
        .build()
        .with_context(|| format!("use the authorities in {}", files.ca.display()))?;
    let (chain, key) = identity(files)?;
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .context("TLS 1.3")?
        .with_webpki_verifier(verifier)
        .with_client_auth_cert(chain, key)
        .with_context(|| use_of(files))?;
    // Each migration is one handful of connections: nothing is gained by keeping secrets for later ones.
    config.resumption = rustls::client::Resumption::disabled();
    Ok(Arc::new(config))
}

/// For the side that listens.
pub(super) fn server_config(files: &TlsFiles) -> Result<Arc<ServerConfig>> {
    let provider = Arc::new(default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(authorities(&files.ca)?, provider.clone())
        .build()
        .with_context(|| format!("use the authorities in {}", files.ca.display()))?;
    let (chain, key) = identity(files)?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .context("TLS 1.3")?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)
        .with_context(|| use_of(files))?;
    // A source that only sends would never read the tickets, and to close with unread bytes would reset the connection.
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}

fn use_of(files: &TlsFiles) -> String {
    format!("use the certificate {} with the key {}", files.certificate.display(), files.key.display())
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_file_iter(path)
        .with_context(|| format!("read the certificates in {}", path.display()))?
        .collect();
    let found = found.with_context(|| format!("read the certificates in {}", path.display()))?;
    if found.is_empty() {
        bail!("{} has no certificate in PEM", path.display());
    }
    Ok(found)
}

fn authorities(path: &Path) -> Result<Arc<RootCertStore>> {
    let mut store = RootCertStore::empty();
    for certificate in certificates(path)? {
        store.add(certificate).with_context(|| format!("take an authority from {}", path.display()))?;
    }
    Ok(Arc::new(store))
}

fn identity(files: &TlsFiles) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)> {
    let key = PrivateKeyDer::from_pem_file(&files.key)
        .with_context(|| format!("read the private key in {}", files.key.display()))?;
    Ok((certificates(&files.certificate)?, key))
}

/// Brings the handshake to its end, within [`CONNECT_TIMEOUT`].
pub(super) fn handshake<C, D: SideData>(session: &mut C, socket: &mut (impl Read + Write)) -> Result<()>
where
    C: Deref<Target = ConnectionCommon<D>> + DerefMut,
{
    handshake_within(session, socket, CONNECT_TIMEOUT)
}

fn handshake_within<C, D: SideData>(
    session: &mut C,
    socket: &mut (impl Read + Write),
    limit: Duration,
) -> Result<()>
where
    C: Deref<Target = ConnectionCommon<D>> + DerefMut,
{
    let until = Instant::now() + limit;
    while session.is_handshaking() || session.wants_write() {
        match step(session, socket) {
            Ok(0) => bail!("the peer hung up in the middle of it"),
            Ok(_) => {}
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(error) => {
                return Err(error).context("the peer was not accepted, or did not accept this side");
            }
        }
        if Instant::now() > until {
            bail!("the peer took longer than {} s for it", limit.as_secs_f32());
        }
    }
    Ok(())
}

/// One write or one read: rustls by itself goes on for as long as the peer sends anything, however little.
fn step<C, D: SideData>(session: &mut C, socket: &mut (impl Read + Write)) -> io::Result<usize>
where
    C: Deref<Target = ConnectionCommon<D>> + DerefMut,
{
    if session.wants_write() {
        return session.write_tls(socket);
    }
    let read = session.read_tls(socket)?;
    if let Err(error) = session.process_new_packets() {
        // The peer is told why, if it still listens.
        let _ = session.write_tls(socket);
        return Err(io::Error::new(io::ErrorKind::InvalidData, error));
    }
    Ok(read)
}

#[cfg(test)]
mod tests {
    use rustls::ClientConnection;
    use rustls::pki_types::ServerName;

    use super::*;

    /// A peer that sends a long record, one byte after the other.
    struct Dripping(u64);

    impl Read for Dripping {
        fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
            std::thread::sleep(Duration::from_millis(1));
            // A handshake record of 16000 bytes.
            buf[0] = *[22, 3, 3, 0x3e, 0x80].get(self.0 as usize).unwrap_or(&0);
            self.0 += 1;
            // In the end it hangs up, so that whoever waits for it without end is found out, too.
            if self.0 > 2000 { Ok(0) } else { Ok(1) }
        }
    }

    impl Write for Dripping {
        fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
            Ok(buf.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_peer_that_sends_byte_after_byte_does_not_keep_the_handshake_from_its_end() {
        let config = ClientConfig::builder_with_provider(Arc::new(default_provider()))
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_root_certificates(RootCertStore::empty())
            .with_no_client_auth();
        let name = ServerName::try_from("a.host").expect("name");
        let mut session = ClientConnection::new(Arc::new(config), name).expect("session");
        let limit = Duration::from_millis(100);
        let error = handshake_within(&mut session, &mut Dripping(0), limit).expect_err("too long");
        assert!(format!("{error:#}").contains("took longer than"), "{error:#}");
    }
}
