//! TLS on links: the certificate that this node shows, and the authorities that its peers' certificates are measured by.
//!
//! Two questions are kept apart. Whether a peer may link is decided by the signed handshake on top, with or without TLS.
//! TLS keeps what is said from others on the way, has the dialler know that it reached the host it meant and, where an
//! authority is configured, keeps strangers without a certificate from saying anything at all.
//!
//! - With a certificate the listener speaks TLS and nothing else, and the dialler shows it when it is asked for one.
//! - With an authority, peers are measured by it alone, and the listener demands a certificate of it: mutual TLS.
//!   Without one, the roots of the operating system decide about those that are dialled, and nobody is asked for a
//!   certificate.
//!
//! Only TLS 1.3 is spoken, as both ends are this program or a proxy that somebody runs today. Sessions are not resumed:
//! links live long, and every new one is verified anew.
//!
//! The files are looked at again when a link is made, and now and then in between. What was read last and is good stays in
//! use: a renewal that is half written, or does not fit together, is reported and changes nothing. Links that are up are not
//! touched.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use parking_lot::Mutex;
use tokio_rustls::rustls::client::{
    Resumption, verify_server_cert_signed_by_trust_anchor, verify_server_name,
};
use tokio_rustls::rustls::crypto::{CryptoProvider, ring};
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use tokio_rustls::rustls::server::danger::ClientCertVerifier;
use tokio_rustls::rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use tokio_rustls::rustls::{self, CertificateError, ClientConfig, RootCertStore, ServerConfig, version};

use crate::config::{PeerAddress, Settings};

/// Largest file that is read: a bundle of all public authorities has a quarter of it.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// The files are read at most so often, however many links are tried.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// How often the files are read when no link is made, so that a bad renewal is reported before a link needs it.
const WATCH_INTERVAL: Duration = Duration::from_secs(60);

/// How often it is looked whether the certificate expires.
const EXPIRY_INTERVAL: Duration = Duration::from_secs(24 * 3600);

/// How long in advance it is reported that a certificate will not be accepted any more.
const EXPIRY_NOTICE: Duration = Duration::from_secs(7 * 24 * 3600);

/// See the module.
pub struct PeerTls {
    paths: Paths,
    /// What decides about peers if no authority is configured.
    system_roots: Arc<RootCertStore>,
    state: Mutex<State>,
}

#[derive(Clone, Default)]
struct Paths {
    cert: Option<PathBuf>,
    key: Option<PathBuf>,
    ca: Option<PathBuf>,
}

/// What stood in the files.
#[derive(Clone, Default, PartialEq, Eq)]
struct Contents {
    cert: Option<Vec<u8>>,
    key: Option<Vec<u8>>,
    ca: Option<Vec<u8>>,
}

struct State {
    current: Configs,
    /// What was read last, good or bad.
    seen: Contents,
    looked: Instant,
    unreadable: bool,
    /// When it was looked last whether the certificate expires.
    foreseen: Instant,
}

/// How to speak TLS at this moment.
#[derive(Clone)]
pub(super) struct Configs {
    /// Nothing if the listener does not speak TLS.
    pub(super) server: Option<Arc<ServerConfig>>,
    pub(super) client: Arc<ClientConfig>,
}

impl PeerTls {
    /// Reads and checks what the settings name. Errors say which setting is wrong and what to do.
    pub fn load(settings: &Settings) -> anyhow::Result<Self> {
        let paths = Paths {
            cert: settings.peer_tls_cert.clone(),
            key: settings.peer_tls_key.clone(),
            ca: settings.peer_tls_ca.clone(),
        };
        let dials_tls = settings.peers.iter().any(PeerAddress::is_tls);
        let system_roots = match dials_tls && paths.ca.is_none() {
            true => system_roots()?,
            false => RootCertStore::empty(),
        };
        let system_roots = Arc::new(system_roots);
        let seen = paths.read()?;
        let current = paths.build(&seen, &system_roots)?;
        let now = Instant::now();
        let state = State { current, seen, looked: now, unreadable: false, foreseen: now };
        Ok(Self { paths, system_roots, state: Mutex::new(state) })
    }

    /// Reads the files now and then; to be run as a task.
    pub async fn watch(self: Arc<Self>) {
        let mut ticks = tokio::time::interval(WATCH_INTERVAL);
        loop {
            ticks.tick().await;
            self.configs().await;
        }
    }

    /// How to speak TLS from now on, by what stands in the files.
    pub(super) async fn configs(&self) -> Configs {
        let nothing_to_read = self.paths.cert.is_none() && self.paths.ca.is_none();
        if nothing_to_read || self.state.lock().looked.elapsed() < LOOK_INTERVAL {
            return self.state.lock().current.clone();
        }
        let paths = self.paths.clone();
        match tokio::task::spawn_blocking(move || paths.read()).await {
            Ok(read) => self.take(read),
            Err(_) => self.state.lock().current.clone(),
        }
    }

    /// Takes what the files say if it is new and good.
    fn take(&self, read: anyhow::Result<Contents>) -> Configs {
        let mut state = self.state.lock();
        state.looked = Instant::now();
        let unreadable = read.is_err();
        let was_unreadable = std::mem::replace(&mut state.unreadable, unreadable);
        match read {
            Err(error) if !was_unreadable => {
                tracing::error!(error = format!("{error:#}"), "TLS files not read, the old ones stay in use");
            }
            Ok(seen) if seen != state.seen => {
                match self.paths.build(&seen, &self.system_roots) {
                    Ok(renewed) => {
                        state.current = renewed;
                        tracing::info!("TLS files renewed");
                    }
                    Err(error) => {
                        tracing::error!(
                            error = format!("{error:#}"),
                            "TLS files not usable, the old ones stay in use"
                        );
                    }
                }
                state.seen = seen;
                state.foreseen = Instant::now();
            }
            Ok(seen) if state.foreseen.elapsed() >= EXPIRY_INTERVAL => {
                // What it says about the certificate's time is all that is new.
                let _ = self.paths.build(&seen, &self.system_roots);
                state.foreseen = Instant::now();
            }
            _ => {}
        }
        state.current.clone()
    }
}

impl Paths {
    fn read(&self) -> anyhow::Result<Contents> {
        let read = |name: &str, path: &Option<PathBuf>| {
            let path = path.as_deref();
            path.map(|path| read(path).with_context(|| format!("{name}: {}", path.display()))).transpose()
        };
        Ok(Contents {
            cert: read("peer_tls_cert", &self.cert)?,
            key: read("peer_tls_key", &self.key)?,
            ca: read("peer_tls_ca", &self.ca)?,
        })
    }

    fn build(&self, contents: &Contents, system_roots: &Arc<RootCertStore>) -> anyhow::Result<Configs> {
        let provider = Arc::new(ring::default_provider());
        let ca = contents.ca.as_deref();
        let ca = ca.map(authorities).transpose().with_context(|| naming("peer_tls_ca", &self.ca))?;
        let own = match (&contents.cert, &contents.key) {
            (Some(cert), Some(key)) => Some((
                chain(cert).with_context(|| naming("peer_tls_cert", &self.cert))?,
                private_key(key).with_context(|| naming("peer_tls_key", &self.key))?,
            )),
            _ => None,
        };
        if let (Some((chain, _)), Some(ca)) = (&own, &ca) {
            foresee(chain, ca, &provider);
        }
        let roots = ca.clone().unwrap_or_else(|| system_roots.clone());
        let versions = &[&version::TLS13];
        let client = ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(versions)?
            .with_root_certificates(roots);
        let mut client = match &own {
            Some((chain, key)) => client
                .with_client_auth_cert(chain.clone(), key.clone_key())
                .map_err(|error| self.mismatch(error))?,
            None => client.with_no_client_auth(),
        };
        client.resumption = Resumption::disabled();
        let Some((chain, key)) = own else {
            return Ok(Configs { server: None, client: Arc::new(client) });
        };
        let server =
            ServerConfig::builder_with_provider(provider.clone()).with_protocol_versions(versions)?;
        let server = match ca {
            Some(ca) => server.with_client_cert_verifier(demanding(ca, &provider)?),
            None => server.with_no_client_auth(),
        };
        let mut server = server.with_single_cert(chain, key).map_err(|error| self.mismatch(error))?;
        server.send_tls13_tickets = 0;
        Ok(Configs { server: Some(Arc::new(server)), client: Arc::new(client) })
    }

    /// Why a certificate and a key are no pair.
    fn mismatch(&self, error: rustls::Error) -> anyhow::Error {
        let (cert, key) = (naming("peer_tls_cert", &self.cert), naming("peer_tls_key", &self.key));
        match error {
            rustls::Error::InconsistentKeys(_) => {
                anyhow::anyhow!("{key} is not the key of the certificate in {cert}")
            }
            other => anyhow::anyhow!("{cert} and {key} cannot be used: {other}"),
        }
    }
}

fn naming(setting: &str, path: &Option<PathBuf>) -> String {
    format!("{setting} = {}", path.as_deref().unwrap_or(Path::new("")).display())
}

fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    let mut read = Vec::new();
    let file = File::open(path).context("the file cannot be opened")?;
    file.take(FILE_BYTES_MAX + 1).read_to_end(&mut read).context("the file cannot be read")?;
    ensure!(read.len() as u64 <= FILE_BYTES_MAX, "the file is larger than {FILE_BYTES_MAX} bytes");
    Ok(read)
}

/// The certificates of a PEM file, the node's own first.
fn chain(pem: &[u8]) -> anyhow::Result<Vec<CertificateDer<'static>>> {
    let chain = certificates(pem)?;
    // Names that stand in the subject only count for nothing since long, and whoever makes one like that finds out late.
    let parsed = ParsedCertificate::try_from(&chain[0]).context("the certificate cannot be read")?;
    let nobody = ServerName::try_from("name.invalid").expect("it is a DNS name");
    match verify_server_name(&parsed, &nobody) {
        Err(rustls::Error::InvalidCertificate(CertificateError::NotValidForNameContext {
            presented,
            ..
        })) if presented.is_empty() => {
            bail!(
                "the certificate names no host: it needs a subject alternative name (subjectAltName) with the name or \
                 address that peers dial"
            )
        }
        Ok(()) | Err(rustls::Error::InvalidCertificate(CertificateError::NotValidForNameContext { .. })) => {
            Ok(chain)
        }
        Err(error) => Err(error).context("the certificate cannot be used"),
    }
}

fn certificates(pem: &[u8]) -> anyhow::Result<Vec<CertificateDer<'static>>> {
    let certificates = CertificateDer::pem_slice_iter(pem).collect::<Result<Vec<_>, _>>();
    let certificates = certificates.ok().context("the file is not PEM")?;
    ensure!(!certificates.is_empty(), "there is no certificate in the file (BEGIN CERTIFICATE)");
    Ok(certificates)
}

fn private_key(pem: &[u8]) -> anyhow::Result<PrivateKeyDer<'static>> {
    // What is wrong with a key is not repeated.
    PrivateKeyDer::from_pem_slice(pem)
        .ok()
        .context("there is no private key without a password in the file (BEGIN PRIVATE KEY)")
}

fn authorities(pem: &[u8]) -> anyhow::Result<Arc<RootCertStore>> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(pem)? {
        roots.add(certificate).context("a certificate in the file is none of an authority")?;
    }
    Ok(Arc::new(roots))
}

fn system_roots() -> anyhow::Result<RootCertStore> {
    let mut roots = RootCertStore::empty();
    // Some system has always a certificate that nobody can read.
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    ensure!(
        !roots.is_empty(),
        "a peer is to be spoken to with TLS, and this system has no list of certificate authorities: install one \
         (ca-certificates), or name a file with --peer-tls-ca"
    );
    Ok(roots)
}

fn demanding(
    ca: Arc<RootCertStore>,
    provider: &Arc<CryptoProvider>,
) -> anyhow::Result<Arc<dyn ClientCertVerifier>> {
    let verifier = WebPkiClientVerifier::builder_with_provider(ca, provider.clone()).build();
    verifier.context("peer_tls_ca cannot be used")
}

/// Reports if this node's certificate is not, or soon will not be, what peers with the same authority accept. It is
/// theirs to decide: they may know another.
fn foresee(chain: &[CertificateDer<'static>], ca: &Arc<RootCertStore>, provider: &Arc<CryptoProvider>) {
    let refusal = |at: UnixTime| -> Option<rustls::Error> {
        let as_client = demanding(ca.clone(), provider).ok()?;
        let (own, rest) = chain.split_first()?;
        let parsed = ParsedCertificate::try_from(own).ok()?;
        let as_server = verify_server_cert_signed_by_trust_anchor(
            &parsed,
            ca,
            rest,
            at,
            provider.signature_verification_algorithms.all,
        );
        as_server.err().or_else(|| as_client.verify_client_cert(own, rest, at).err())
    };
    let now = UnixTime::now();
    if let Some(error) = refusal(now) {
        tracing::warn!(%error, "own TLS certificate is nothing that peers with the same authority accept");
    } else if refusal(UnixTime::since_unix_epoch(Duration::from_secs(now.as_secs()) + EXPIRY_NOTICE))
        .is_some()
    {
        tracing::warn!("own TLS certificate expires within a week");
    }
}

/// What lies under an I/O error of a TLS stream.
pub(super) fn cause(error: &io::Error) -> Option<&rustls::Error> {
    error.get_ref()?.downcast_ref()
}
