//! TLS with certificates on both sides, from PEM files.

use std::io::{self, Read, Write};
use std::ops::{Deref, DerefMut};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

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
    let until = Instant::now() + CONNECT_TIMEOUT;
    while session.is_handshaking() || session.wants_write() {
        match session.complete_io(socket) {
            Ok((0, 0)) => bail!("the peer hung up in the middle of it"),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => {
                return Err(error).context("the peer was not accepted, or did not accept this side");
            }
        }
        if Instant::now() > until {
            bail!("the peer took longer than {} s for it", CONNECT_TIMEOUT.as_secs());
        }
    }
    Ok(())
}
