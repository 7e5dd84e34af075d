//! Certificates for TLS between the two sides, made for one run.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};

use super::traveller::Certificates;

/// Makes an authority and a certificate for 127.0.0.1 in `dir`.
///
/// # Errors
/// If they can't be made or written.
pub fn make(dir: &Path) -> Result<Certificates> {
    let authority_key = KeyPair::generate().context("make a key")?;
    let mut authority = CertificateParams::new(Vec::new())?;
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca = authority.self_signed(&authority_key).context("make an authority")?.pem();
    let issuer = Issuer::new(authority, authority_key);
    let key = KeyPair::generate().context("make a key")?;
    let params = CertificateParams::new(vec!["127.0.0.1".to_owned()])?;
    let cert = params.signed_by(&key, &issuer).context("make a certificate")?.pem();
    let write = |name: &str, text: &str| -> Result<PathBuf> {
        let path = dir.join(name);
        std::fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
        Ok(path)
    };
    Ok(Certificates {
        ca: write("ca.pem", &ca)?,
        cert: write("cert.pem", &cert)?,
        key: write("key.pem", &key.serialize_pem())?,
    })
}
