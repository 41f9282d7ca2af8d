//! TLS on links: who is linked, who is refused, and what is said about it.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use automerge::AutoCommit;
use isobar::config::{ClusterKey, PeerAddress, Settings};
use isobar::storage::memory::MemoryStorage;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use tempfile::TempDir;
use tracing::subscriber::DefaultGuard;

use crate::support::{Client, Node, document_id, eventually, number, put, settings};

/// Where every node of these tests is reached.
const HERE: &str = "127.0.0.1";

/// Somebody who signs certificates.
struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    fn new(name: &str) -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    /// A certificate with these names, and its key.
    fn issue(&self, names: &[&str]) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let certificate = CertificateParams::new(names).unwrap().signed_by(&key, &self.0).unwrap();
        (certificate.pem(), key.serialize_pem())
    }
}

/// The files of one node.
struct Files(TempDir);

impl Files {
    fn new() -> Self {
        Self(TempDir::new().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Writes a certificate of this authority, and its key.
    fn certify(&self, authority: &Authority, names: &[&str]) -> &Self {
        let (certificate, key) = authority.issue(names);
        std::fs::write(self.path("cert.pem"), certificate).unwrap();
        std::fs::write(self.path("key.pem"), key).unwrap();
        self
    }

    fn trust(&self, authority: &Authority) -> &Self {
        std::fs::write(self.path("ca.pem"), authority.0.pem()).unwrap();
        self
    }

    /// The settings of a region that uses what was written.
    fn region(&self, name: &str, key: &ClusterKey, peer: Option<&str>) -> Settings {
        let written = |name| Some(self.path(name)).filter(|path| path.exists());
        Settings {
            region: name.to_owned(),
            cluster_key: Some(key.clone()),
            peer_listen: Some(format!("{HERE}:0").parse().unwrap()),
            peers: peer.map(|peer| PeerAddress::parse(peer).unwrap()).into_iter().collect(),
            peer_tls_cert: written("cert.pem"),
            peer_tls_key: written("key.pem"),
            peer_tls_ca: written("ca.pem"),
            ..settings()
        }
    }
}

/// What all nodes of a test say, which run in its thread.
struct Said {
    text: Arc<Mutex<Vec<u8>>>,
    _guard: DefaultGuard,
}

struct Writer(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Writer {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Said {
    fn listen() -> Self {
        let text = Arc::new(Mutex::new(Vec::new()));
        let written = text.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_ansi(false)
            .with_max_level(tracing::Level::INFO)
            .with_writer(move || Writer(written.clone()))
            .finish();
        Self { text, _guard: tracing::subscriber::set_default(subscriber) }
    }

    fn text(&self) -> String {
        String::from_utf8(self.text.lock().unwrap().clone()).unwrap()
    }

    /// Waits for a line that has all of these in it.
    async fn line(&self, parts: &[&str]) {
        let found = async || self.text().lines().any(|line| parts.iter().all(|part| line.contains(part)));
        let mut looked = 0;
        eventually(&format!("a line says {parts:?}"), async || {
            looked += 1;
            if looked % 500 == 0 {
                eprintln!("so far it said {}", self.text());
            }
            found().await
        })
        .await;
    }
}

const DIALLER: &str = "peer not linked";
const LISTENER: &str = "link refused";

async fn start(settings: Settings) -> Node {
    Node::start_with(settings, MemoryStorage::new()).await
}

fn address(scheme: &str, host: &str, node: &Node) -> String {
    format!("{scheme}://{host}:{}", node.peers.unwrap().port())
}

fn is_linked(node: &Node) -> bool {
    node.parts.replication.as_ref().unwrap().is_linked()
}

/// Waits until both say why there is no link, and asserts that there is none.
async fn refused(said: &Said, nodes: [&Node; 2], dialler: &str, listener: &str) {
    said.line(&[DIALLER, dialler]).await;
    said.line(&[LISTENER, listener]).await;
    assert!(!nodes.into_iter().any(is_linked), "{}", said.text());
    assert!(!said.text().contains("region linked"), "{}", said.text());
}

/// Has an edit made in each of two regions arrive in the other.
async fn converge(a: &Node, b: &Node) {
    let document = document_id("document");
    let mut here = Client::join(a.clients, "here").await;
    here.share(&document, AutoCommit::new()).await;
    here.write(&document, |doc| put(doc, "here", 1)).await;
    let mut there = Client::join(b.clients, "there").await;
    there.fetch(&document).await;
    there.until("the edit comes", |it| number(&it.open(&document).doc, "here") == Some(1)).await;
    there.write(&document, |doc| put(doc, "there", 2)).await;
    here.until("the answer comes", |it| number(&it.open(&document).doc, "there") == Some(2)).await;
}

#[tokio::test]
async fn regions_with_certificates_of_one_authority_link_whoever_dials() {
    let (said, key, authority) = (Said::listen(), ClusterKey::random(), Authority::new("one"));
    let (files, other) = (Files::new(), Files::new());
    files.certify(&authority, &[HERE, "localhost"]).trust(&authority);
    other.certify(&authority, &[HERE]).trust(&authority);
    let frankfurt = start(files.region("frankfurt", &key, None)).await;
    // By address, and by a name that every one of its addresses has a certificate for.
    let peer = address("wss", HERE, &frankfurt);
    let virginia = start(other.region("virginia", &key, Some(&peer))).await;
    converge(&frankfurt, &virginia).await;
    let peer = address("dns+wss", "localhost", &frankfurt);
    let tokyo = start(other.region("tokyo", &key, Some(&peer))).await;
    converge(&frankfurt, &tokyo).await;
    let peer = address("wss", HERE, &virginia);
    let paris = start(files.region("paris", &key, Some(&peer))).await;
    converge(&paris, &virginia).await;
    assert!(!said.text().contains(LISTENER), "{}", said.text());
}

#[tokio::test]
async fn the_signed_handshake_decides_with_tls_too() {
    let (said, authority, files) = (Said::listen(), Authority::new("one"), Files::new());
    files.certify(&authority, &[HERE]).trust(&authority);
    let frankfurt = start(files.region("frankfurt", &ClusterKey::random(), None)).await;
    let peer = address("wss", HERE, &frankfurt);
    let virginia = start(files.region("virginia", &ClusterKey::random(), Some(&peer))).await;
    refused(&said, [&frankfurt, &virginia], "the peer was refused", "the peer was refused").await;
}

#[tokio::test]
async fn a_listener_with_a_certificate_of_another_authority_is_not_spoken_to() {
    let (said, key) = (Said::listen(), ClusterKey::random());
    let (authority, other) = (Authority::new("one"), Authority::new("another"));
    let (files, others) = (Files::new(), Files::new());
    others.certify(&other, &[HERE]);
    let frankfurt = start(others.region("frankfurt", &key, None)).await;
    let peer = address("wss", HERE, &frankfurt);
    files.trust(&authority);
    let virginia = start(files.region("virginia", &key, Some(&peer))).await;
    refused(&said, [&frankfurt, &virginia], "UnknownIssuer", "alert: UnknownCA").await;
}

#[tokio::test]
async fn a_listener_with_a_certificate_of_another_name_is_not_spoken_to() {
    let (said, key, authority) = (Said::listen(), ClusterKey::random(), Authority::new("one"));
    let (files, other) = (Files::new(), Files::new());
    files.certify(&authority, &["frankfurt.example"]);
    let frankfurt = start(files.region("frankfurt", &key, None)).await;
    let peer = address("wss", HERE, &frankfurt);
    let virginia = start(other.trust(&authority).region("virginia", &key, Some(&peer))).await;
    refused(&said, [&frankfurt, &virginia], "frankfurt.example", "alert: BadCertificate").await;
}

#[tokio::test]
async fn a_dialler_without_a_certificate_is_refused_where_one_is_demanded() {
    let (said, key, authority) = (Said::listen(), ClusterKey::random(), Authority::new("one"));
    let (files, other) = (Files::new(), Files::new());
    files.certify(&authority, &[HERE]).trust(&authority);
    let frankfurt = start(files.region("frankfurt", &key, None)).await;
    let peer = address("wss", HERE, &frankfurt);
    let virginia = start(other.trust(&authority).region("virginia", &key, Some(&peer))).await;
    refused(&said, [&frankfurt, &virginia], "CertificateRequired", "no certificates").await;
    eventually("it is counted", async || frankfurt.metric("isobar_links_refused_total").await >= 1.0).await;
}

#[tokio::test]
async fn a_dialler_with_a_certificate_of_another_authority_is_refused() {
    let (said, key) = (Said::listen(), ClusterKey::random());
    let (authority, other) = (Authority::new("one"), Authority::new("another"));
    let (files, others) = (Files::new(), Files::new());
    files.certify(&authority, &[HERE]).trust(&authority);
    let frankfurt = start(files.region("frankfurt", &key, None)).await;
    let peer = address("wss", HERE, &frankfurt);
    others.certify(&other, &[HERE]).trust(&authority);
    let virginia = start(others.region("virginia", &key, Some(&peer))).await;
    // Its operator could have known from the start.
    said.line(&["own TLS certificate is nothing that peers", "UnknownIssuer"]).await;
    refused(&said, [&frankfurt, &virginia], "alert: UnknownCA", "UnknownIssuer").await;
}

#[tokio::test]
async fn without_an_authority_nobody_is_asked_for_a_certificate() {
    let (key, authority) = (ClusterKey::random(), Authority::new("one"));
    let (files, other) = (Files::new(), Files::new());
    files.certify(&authority, &[HERE]);
    let frankfurt = start(files.region("frankfurt", &key, None)).await;
    let peer = address("wss", HERE, &frankfurt);
    let virginia = start(other.trust(&authority).region("virginia", &key, Some(&peer))).await;
    converge(&frankfurt, &virginia).await;
}

#[tokio::test]
async fn a_dialler_without_tls_is_told_that_the_listener_speaks_it() {
    let (said, key, authority) = (Said::listen(), ClusterKey::random(), Authority::new("one"));
    let files = Files::new();
    files.certify(&authority, &[HERE]);
    let frankfurt = start(files.region("frankfurt", &key, None)).await;
    let peer = address("ws", HERE, &frankfurt);
    let virginia = start(Files::new().region("virginia", &key, Some(&peer))).await;
    let says = "the listener speaks TLS: it is dialled as wss://";
    refused(&said, [&frankfurt, &virginia], says, says).await;
}

#[tokio::test]
async fn a_dialler_with_tls_is_told_that_the_listener_does_not_speak_it() {
    let (said, key, authority) = (Said::listen(), ClusterKey::random(), Authority::new("one"));
    let files = Files::new();
    files.trust(&authority);
    let frankfurt = start(Files::new().region("frankfurt", &key, None)).await;
    let peer = address("wss", HERE, &frankfurt);
    let virginia = start(files.region("virginia", &key, Some(&peer))).await;
    let says = "the listener does not speak TLS: it needs peer_tls_cert";
    refused(&said, [&frankfurt, &virginia], says, says).await;
}

#[tokio::test]
async fn renewed_files_are_used_from_the_next_link_on_and_broken_ones_change_nothing() {
    let (said, key) = (Said::listen(), ClusterKey::random());
    let (old, new) = (Authority::new("old"), Authority::new("new"));
    let files = Files::new();
    files.certify(&old, &[HERE]).trust(&old);
    let frankfurt = start(files.region("frankfurt", &key, None)).await;
    let peer = address("wss", HERE, &frankfurt);

    // The key of another certificate: a renewal that is half written.
    let (_, other_key) = old.issue(&[HERE]);
    std::fs::write(files.path("key.pem"), other_key).unwrap();
    let of_old = Files::new();
    of_old.certify(&old, &[HERE]).trust(&old);
    // Whoever comes has it read, once a second at most.
    eventually("it is reported", async || {
        let _ = tokio::net::TcpStream::connect(frankfurt.peers.unwrap()).await.unwrap().try_write(&[22]);
        said.text().contains("TLS files not usable")
    })
    .await;
    said.line(&["TLS files not usable", "is not the key of the certificate in peer_tls_cert"]).await;
    let virginia = start(of_old.region("virginia", &key, Some(&peer))).await;
    converge(&frankfurt, &virginia).await;
    virginia.stop().await.unwrap();

    let of_new = Files::new();
    of_new.certify(&new, &[HERE]).trust(&new);
    let tokyo = start(of_new.region("tokyo", &key, Some(&peer))).await;
    said.line(&[DIALLER, "UnknownIssuer"]).await;
    assert!(!is_linked(&tokyo));
    files.certify(&new, &[HERE]).trust(&new);
    converge(&frankfurt, &tokyo).await;
    assert!(said.text().contains("TLS files renewed"));
}

#[tokio::test]
async fn strangers_that_say_nothing_take_no_room_from_a_linked_region() {
    let (said, key, authority) = (Said::listen(), ClusterKey::random(), Authority::new("one"));
    let files = Files::new();
    files.certify(&authority, &[HERE]).trust(&authority);
    let frankfurt = start(files.region("frankfurt", &key, None)).await;
    let peer = address("wss", HERE, &frankfurt);
    let virginia = start(files.region("virginia", &key, Some(&peer))).await;
    eventually("they are linked", async || is_linked(&frankfurt) && is_linked(&virginia)).await;
    let mut strangers = Vec::new();
    for _ in 0..160 {
        let stranger = tokio::net::TcpStream::connect(frankfurt.peers.unwrap()).await.unwrap();
        // The beginning of a handshake that never goes on.
        stranger.try_write(&[22, 3, 1]).unwrap();
        strangers.push(stranger);
    }
    // Beyond the bound they are not kept waiting.
    let mut last = strangers.pop().unwrap();
    let mut buffer = [0; 1];
    let ended = tokio::io::AsyncReadExt::read(&mut last, &mut buffer);
    let ended = crate::support::in_time("the last is closed", ended).await;
    assert!(matches!(ended, Ok(0) | Err(_)), "{ended:?}");
    assert!(!said.text().contains("no answer in time"), "it was closed at once");
    converge(&frankfurt, &virginia).await;
}

/// What a start is refused with.
async fn not_started(files: &Files, change: impl FnOnce(&mut Settings)) -> String {
    let mut settings = files.region("frankfurt", &ClusterKey::random(), None);
    settings.database = format!("sqlite:{}", files.path("isobar.db").display());
    change(&mut settings);
    let error = match isobar::app::App::start(settings).await {
        Ok(_) => panic!("it started"),
        Err(error) => format!("{error:#}"),
    };
    assert!(!Path::exists(&files.path("isobar.db")), "nothing was made before the refusal");
    error
}

#[tokio::test]
async fn files_that_cannot_be_used_are_refused_at_the_start_by_name() {
    let authority = Authority::new("one");
    let files = Files::new();
    files.certify(&authority, &[HERE]).trust(&authority);
    let (certificate, _) = authority.issue(&[HERE]);
    let (nameless, nameless_key) = authority.issue(&[]);
    let write = |name: &str, text: &str| std::fs::write(files.path(name), text).unwrap();

    let said = not_started(&files, |it| it.peer_tls_ca = Some(files.path("absent.pem"))).await;
    assert!(
        said.contains("peer_tls_ca: ") && said.contains("absent.pem: the file cannot be opened"),
        "{said}"
    );
    write("ca.pem", "no PEM at all");
    let said = not_started(&files, |_| ()).await;
    assert!(said.contains("peer_tls_ca = ") && said.contains("there is no certificate"), "{said}");
    files.trust(&authority);
    write("cert.pem", &certificate);
    let said = not_started(&files, |_| ()).await;
    assert!(said.contains("key.pem is not the key of the certificate in peer_tls_cert = "), "{said}");
    write("key.pem", &certificate);
    let said = not_started(&files, |_| ()).await;
    assert!(said.contains("peer_tls_key = ") && said.contains("no private key"), "{said}");
    write("cert.pem", &nameless);
    write("key.pem", &nameless_key);
    let said = not_started(&files, |_| ()).await;
    assert!(said.contains("peer_tls_cert = ") && said.contains("subjectAltName"), "{said}");
    write("cert.pem", &"x".repeat((1 << 20) + 1));
    let said = not_started(&files, |_| ()).await;
    assert!(said.contains("larger than 1048576 bytes"), "{said}");
}
