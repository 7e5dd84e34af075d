//! TCP, with and without TLS: who is let in and who is not.

mod migrate_fake;

use std::path::{Path, PathBuf};

use migrate_fake::*;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use shim::machine::SourceMachine;
use shim::migrate::{Address, Compression, Security, SendError, TlsFiles};

struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

fn authority(name: &str) -> Authority {
    let key = KeyPair::generate().expect("key");
    let mut params = CertificateParams::new(vec![]).expect("params");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.distinguished_name.push(DnType::CommonName, name);
    let pem = params.self_signed(&key).expect("signed").pem();
    Authority { issuer: Issuer::new(params, key), pem }
}

/// Writes files for a party whose certificate has these names, and who trusts `trusted`.
fn party(dir: &Path, label: &str, names: &[&str], by: &Authority, trusted: &Authority) -> TlsFiles {
    let key = KeyPair::generate().expect("key");
    let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    let certificate =
        CertificateParams::new(names).expect("params").signed_by(&key, &by.issuer).expect("signed");
    let write = |name: &str, content: &str| -> PathBuf {
        let path = dir.join(format!("{label}-{name}.pem"));
        std::fs::write(&path, content).expect("written");
        path
    };
    TlsFiles {
        ca: write("ca", &trusted.pem),
        certificate: write("certificate", &certificate.pem()),
        key: write("key", &key.serialize_pem()),
    }
}

fn with_tls(files: TlsFiles) -> Security {
    Security { tls: Some(files), ..Security::default() }
}

fn any_port() -> Address {
    "tcp:127.0.0.1:0".parse().expect("address")
}

#[test]
fn a_machine_moves_over_tls_and_over_plain_tcp_if_asked() {
    let dir = tempfile::tempdir().expect("dir");
    let ca = authority("one");
    let target_tls = with_tls(party(dir.path(), "target", &["127.0.0.1"], &ca, &ca));
    let source_tls = with_tls(party(dir.path(), "source", &["source"], &ca, &ca));
    let plain = Security { insecure_plain_tcp: true, ..Security::default() };
    for (i, (target_side, source_side)) in
        [(target_tls, source_tls), (plain.clone(), plain)].into_iter().enumerate()
    {
        let world = World::new();
        let here = dir.path().join(i.to_string());
        let source = FakeSource::new(&world, 16 << 20, Log::Manual, 1000);
        let target = Target::start(&world, &any_port(), &target_side, &here);
        let mut options = options(&target.address, &here);
        (options.security, options.connections, options.compression) = (source_side, 2, Compression::Lz4);
        send(&source, &options).expect("moved");
        assert_same(source.ram(), target.received().machine.ram());
        world.assert_rules_kept();
    }
}

#[test]
fn strangers_are_refused_by_either_side() {
    let dir = tempfile::tempdir().expect("dir");
    let (ca, other) = (authority("one"), authority("other"));
    let world = World::new();
    let source = FakeSource::new(&world, 4 << 20, Log::Manual, 500);
    let files = party(dir.path(), "target", &["127.0.0.1"], &ca, &ca);
    let target = Target::start(&world, &any_port(), &with_tls(files), dir.path());
    let good = party(dir.path(), "source", &["source"], &ca, &ca);
    let refused = |security: Security, why: &str| {
        let mut options = options(&target.address, dir.path());
        options.security = security;
        let error = send(&source, &options).expect_err(why);
        assert!(matches!(error, SendError::Failed(_)), "{why}: {error}");
        source.assert_untouched();
        error.to_string()
    };
    refused(with_tls(party(dir.path(), "a", &["source"], &other, &ca)), "a certificate of another authority");
    let error =
        refused(with_tls(party(dir.path(), "b", &["source"], &ca, &other)), "trust in another authority");
    assert!(error.contains("UnknownIssuer"), "{error}");
    let elsewhere = Security { server_name: Some("another.host".into()), ..with_tls(good.clone()) };
    let error = refused(elsewhere, "another name");
    assert!(error.contains("not valid for name"), "{error}");
    refused(Security { insecure_plain_tcp: true, ..Security::default() }, "no TLS");
    let error = refused(Security::default(), "neither");
    assert!(error.contains("insecure"), "{error}");
    // And the one who may.
    let mut options = options(&target.address, dir.path());
    options.security = with_tls(good);
    send(&source, &options).expect("moved");
    assert_same(source.ram(), target.received().machine.ram());
}

#[test]
fn a_client_without_a_certificate_gets_nowhere() {
    use rustls::pki_types::{CertificateDer, ServerName, pem::PemObject};
    use std::io::{Read, Write};
    let dir = tempfile::tempdir().expect("dir");
    let ca = authority("one");
    let world = World::new();
    let files = party(dir.path(), "target", &["127.0.0.1"], &ca, &ca);
    let target = Target::start(&world, &any_port(), &with_tls(files.clone()), dir.path());
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(&files.ca).expect("ca")).expect("added");
    let provider = std::sync::Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = ServerName::try_from("127.0.0.1").expect("name");
    let session = rustls::ClientConnection::new(std::sync::Arc::new(config), name).expect("session");
    let Address::Tcp(host, port) = &target.address else { unreachable!() };
    let socket = std::net::TcpStream::connect((host.as_str(), *port)).expect("connect");
    let mut stream = rustls::StreamOwned::new(session, socket);
    let outcome = stream.write_all(b"hello").and_then(|()| stream.read(&mut [0; 10]));
    let error = outcome.expect_err("refused").to_string();
    assert!(error.contains("CertificateRequired"), "{error}");
}
