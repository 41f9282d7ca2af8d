//! What an operator sets, and what happens when it is wrong: the program itself, as a process.

use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::Instant;

use automerge::AutoCommit;
use isobar::config::{PeerAddress, ServeArgs, Settings};
use isobar::storage::Storage;
use isobar::storage::sqlite::SqliteStorage;
use tempfile::TempDir;

use crate::support::{Client, DEADLINE, document_id, get, put};

/// `isobar serve` in a directory of its own, with nothing set.
fn serve(directory: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_isobar"));
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("ISOBAR_")) {
        command.env_remove(name);
    }
    command.arg("serve").current_dir(directory).stdin(Stdio::null());
    command
}

/// The same on free ports.
fn serve_anywhere(directory: &Path) -> Command {
    let mut command = serve(directory);
    command.args(["--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0"]);
    command
}

/// A process that ends with the value.
struct Process {
    child: Child,
    clients: SocketAddr,
    admin: SocketAddr,
    errors: mpsc::Receiver<String>,
}

impl Process {
    fn start(mut command: Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let lines = lines_of(child.stdout.take().unwrap());
        let errors = lines_of(child.stderr.take().unwrap());
        let mut address = |prefix: &str| loop {
            match lines.recv_timeout(DEADLINE) {
                Ok(line) => match line.strip_prefix(prefix) {
                    Some(address) => return address.parse().unwrap(),
                    None => continue,
                },
                Err(error) => {
                    let _ = child.kill();
                    panic!("no address ({error}); it said {:?}", errors.iter().collect::<Vec<_>>());
                }
            }
        };
        let clients = address("clients: ws://");
        let admin = address("admin: http://");
        Self { child, clients, admin, errors }
    }

    /// Waits for the process to end by itself; returns whether that was a success, and what it said.
    fn ended(mut self) -> (bool, String) {
        // Its standard error ends with it.
        let mut said = String::new();
        let deadline = Instant::now() + DEADLINE;
        loop {
            match self.errors.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) => said += &(line + "\n"),
                Err(mpsc::RecvTimeoutError::Disconnected) => break,
                Err(mpsc::RecvTimeoutError::Timeout) => panic!("it has not ended; it said {said}"),
            }
        }
        (self.child.wait().unwrap().success(), said)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn lines_of(stream: impl Read + Send + 'static) -> mpsc::Receiver<String> {
    let (sender, lines) = mpsc::channel();
    std::thread::spawn(move || {
        for line in BufReader::new(stream).lines().map_while(Result::ok) {
            let _ = sender.send(line);
        }
    });
    lines
}

/// Runs a command that is expected to end by itself, with a failure; returns what it said.
fn refused(mut command: Command) -> String {
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let errors = lines_of(child.stderr.take().unwrap());
    let deadline = Instant::now() + DEADLINE;
    let mut said = String::new();
    while let Ok(line) = errors.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
        said += &(line + "\n");
    }
    let _ = child.kill();
    let status = child.wait().unwrap();
    assert_eq!(status.code(), Some(1), "it was not refused: {said}");
    assert!(!said.contains("panicked"), "{said}");
    said
}

/// The name of the region that a process serves: its database belongs to it.
async fn region_of(file: &Path) -> String {
    let storage = SqliteStorage::open(file).await.unwrap();
    let other = isobar_protocol::ids::RegionName::new("nobody-has-this-name").unwrap();
    let error = storage.region_identity(&other).await.unwrap_err().to_string();
    error.split_once("belongs to region ").unwrap().1.split_once(',').unwrap().0.to_owned()
}

#[tokio::test]
async fn flags_go_before_the_environment_before_the_file_before_defaults() {
    let expected = [
        ("default.db", "local"),
        ("file.db", "file"),
        ("environment.db", "environment"),
        ("flag.db", "flag"),
    ];
    for (level, (database, region)) in expected.into_iter().enumerate() {
        let directory = TempDir::new().unwrap();
        let mut command = serve_anywhere(directory.path());
        if level >= 1 {
            let file = directory.path().join("isobar.toml");
            std::fs::write(&file, "region = \"file\"\ndatabase = \"sqlite:file.db\"\nidle_seconds = 7\n")
                .unwrap();
            match level {
                // The file may be named either way.
                1 => command.arg("--config").arg(file),
                _ => command.env("ISOBAR_CONFIG", file),
            };
        }
        if level >= 2 {
            command.env("ISOBAR_REGION", "environment").env("ISOBAR_DATABASE", "sqlite:environment.db");
        }
        if level >= 3 {
            command.args(["--region", "flag", "--database", "sqlite:flag.db"]);
        }
        let process = Process::start(command);
        assert_eq!(get(process.admin, "/readyz").await, (200, "ready\n".to_owned()));
        drop(process);
        let database = if level == 0 { "isobar-data/isobar.db" } else { database };
        assert_eq!(region_of(&directory.path().join(database)).await, region);
    }
}

#[tokio::test]
async fn numbers_come_from_the_environment_too() {
    let directory = TempDir::new().unwrap();
    let mut command = serve_anywhere(directory.path());
    command.env("ISOBAR_CONNECTIONS_MAX", "1").env("ISOBAR_DRAIN_SECONDS", "1");
    // A variable of this prefix that is no setting is not ours to judge.
    command.env("ISOBAR_TEST_DATABASE_URL", "whatever");
    let process = Process::start(command);
    let _only = Client::join(process.clients, "only").await;
    assert!(Client::try_connect(process.clients).await.is_err());
    let directory = TempDir::new().unwrap();
    let mut command = serve_anywhere(directory.path());
    command.env("ISOBAR_CONNECTIONS_MAX", "many");
    let said = refused(command);
    assert!(said.contains("connections_max"), "{said}");
}

#[tokio::test]
async fn other_addresses_than_loopback_are_refused_unless_the_operator_insists() {
    for flag in ["--listen", "--admin-listen"] {
        let directory = TempDir::new().unwrap();
        let mut command = serve(directory.path());
        command.args([flag, "0.0.0.0:0"]);
        let said = refused(command);
        let name = flag.trim_start_matches('-').replace('-', "_");
        assert!(said.contains(&name) && said.contains("0.0.0.0:0") && said.contains("--insecure"), "{said}");
        assert!(!directory.path().join("isobar-data").exists(), "nothing was made before the refusal");
        // Where it comes from makes no difference.
        let mut command = serve(directory.path());
        command.env(format!("ISOBAR_{}", name.to_uppercase()), "0.0.0.0:0");
        assert!(refused(command).contains("--insecure"));
    }
    let directory = TempDir::new().unwrap();
    let mut command = serve(directory.path());
    command.args(["--listen", "0.0.0.0:0", "--admin-listen", "127.0.0.1:0", "--insecure"]);
    let process = Process::start(command);
    assert_eq!(process.clients.ip().to_string(), "0.0.0.0");
}

#[test]
fn a_file_that_is_wrong_is_refused_by_what_is_wrong() {
    for (content, says) in [
        ("regoin = \"eu\"\n", "regoin"),
        ("idle_seconds = \"soon\"\n", "idle_seconds"),
        ("listen = \"nowhere\"\n", "listen"),
        ("region = \"\"\n", "region"),
        ("ping_seconds = 0\n", "ping_seconds"),
        ("frame_bytes_max = 100\nchange_bytes_max = 100\n", "frame_bytes_max"),
        ("frame_bytes_max = 100000\n", "change_bytes_max"),
        ("log_format = \"xml\"\n", "log_format"),
        ("this is not TOML", "isobar.toml"),
    ] {
        let directory = TempDir::new().unwrap();
        let file = directory.path().join("isobar.toml");
        std::fs::write(&file, content).unwrap();
        let mut command = serve(directory.path());
        command.arg("--config").arg(&file);
        let said = refused(command);
        assert!(said.contains(says), "{content:?} was refused with {said}");
        assert!(!directory.path().join("isobar-data").exists());
    }
    let directory = TempDir::new().unwrap();
    let mut command = serve_anywhere(directory.path());
    command.args(["--config", "absent.toml"]);
    let said = refused(command);
    assert!(said.contains("absent.toml"), "{said}");
}

const KEY: &str = "the same secret in every region of the cluster";

/// What a start is refused with that has these settings beside others that would do.
fn refused_with(set: impl FnOnce(&mut Command, &Path)) -> String {
    let directory = TempDir::new().unwrap();
    let mut command = serve_anywhere(directory.path());
    set(&mut command, directory.path());
    let said = refused(command);
    assert!(!directory.path().join("isobar-data").exists(), "nothing was made before the refusal");
    assert!(!said.contains(KEY), "{said}");
    said
}

#[test]
fn peers_come_from_flags_before_the_environment_before_the_file() {
    let file = "peers = [\"ws://file:1\", \"ws://file:2\"]\n";
    let named = |set: fn(&mut Command)| {
        refused_with(|command, directory| {
            std::fs::write(directory.join("isobar.toml"), file).unwrap();
            command.args(["--config", "isobar.toml"]);
            set(command);
        })
    };
    // Without a key the first of them is complained about.
    assert!(named(|_| ()).contains("peer ws://file:1 is configured, but no cluster key"));
    const SEVERAL: &str = "dns://environment:1, ws://environment:2,";
    let said = named(|it| {
        it.env("ISOBAR_PEERS", SEVERAL);
    });
    assert!(said.contains("peer dns://environment:1 is"), "{said}");
    let said = named(|it| {
        it.env("ISOBAR_PEERS", SEVERAL).args(["--peer", "ws://a:1", "--peer", "ws://b:1"]);
    });
    assert!(said.contains("peer ws://a:1 is"), "{said}");
}

#[tokio::test]
async fn peers_are_spoken_to_with_a_cluster_key_only() {
    let peer = ["--peer", "ws://127.0.0.1:9", "--peer-listen", "127.0.0.1:0"];
    let said = refused_with(|it, _| {
        it.args(peer);
    });
    assert!(said.contains("--cluster-key-file") && said.contains("ISOBAR_CLUSTER_KEY"), "{said}");
    // --insecure is about clients and operators.
    let said = refused_with(|it, _| {
        it.args(["--peer-listen", "0.0.0.0:0", "--insecure"]);
    });
    assert!(said.contains("peer_listen = 0.0.0.0:0") && said.contains("no cluster key"), "{said}");

    let ready = async |set: &dyn Fn(&mut Command, &Path)| {
        let directory = TempDir::new().unwrap();
        let mut command = serve_anywhere(directory.path());
        set(&mut command, directory.path());
        assert_eq!(get(Process::start(command).admin, "/readyz").await.0, 200);
    };
    ready(&|it, _| {
        it.args(peer).env("ISOBAR_CLUSTER_KEY", KEY);
    })
    .await;
    ready(&|it, directory| {
        std::fs::write(directory.join("key"), format!("{KEY}\n")).unwrap();
        // The flag goes before the environment.
        it.args(peer).args(["--cluster-key-file", "key"]).env("ISOBAR_CLUSTER_KEY", "short");
    })
    .await;
    ready(&|it, directory| {
        std::fs::write(directory.join("key"), KEY).unwrap();
        std::fs::write(directory.join("isobar.toml"), "cluster_key_file = \"key\"\n").unwrap();
        it.args(peer).args(["--config", "isobar.toml"]);
    })
    .await;
    let said = refused_with(|it, _| {
        it.args(["--peer-listen", "127.0.0.1:0"]);
    });
    assert!(said.contains("peer_listen = 127.0.0.1:0") && said.contains("no cluster key"), "{said}");
}

#[test]
fn certificates_are_named_by_flags_before_the_environment_before_the_file() {
    let named = |set: fn(&mut Command)| {
        refused_with(|command, directory| {
            std::fs::write(directory.join("isobar.toml"), "peer_tls_ca = \"file.pem\"\n").unwrap();
            command.args(["--config", "isobar.toml", "--peer-listen", "127.0.0.1:0"]);
            set(command.env("ISOBAR_CLUSTER_KEY", KEY));
        })
    };
    assert!(named(|_| ()).contains("peer_tls_ca: file.pem"));
    let said = named(|it| {
        it.env("ISOBAR_PEER_TLS_CA", "environment.pem");
    });
    assert!(said.contains("peer_tls_ca: environment.pem"), "{said}");
    let said = named(|it| {
        it.env("ISOBAR_PEER_TLS_CA", "environment.pem").args(["--peer-tls-ca", "flag.pem"]);
    });
    assert!(said.contains("peer_tls_ca: flag.pem"), "{said}");
    let said = named(|it| {
        it.env("ISOBAR_PEER_TLS_CERT", "cert.pem").args(["--peer-tls-key", "key.pem"]);
    });
    assert!(said.contains("peer_tls_cert: cert.pem"), "{said}");
}

#[test]
fn a_cluster_key_is_refused_without_being_repeated() {
    let short = "a secret that is too short";
    let said = refused_with(|it, _| {
        it.env("ISOBAR_CLUSTER_KEY", short);
    });
    assert!(said.contains("26 bytes") && said.contains("at least 32") && !said.contains(short), "{said}");
    let said = refused_with(|it, directory| {
        std::fs::write(directory.join("key"), short).unwrap();
        it.env("ISOBAR_CLUSTER_KEY_FILE", "key");
    });
    assert!(said.contains("file key") && said.contains("26 bytes") && !said.contains(short), "{said}");
    let said = refused_with(|it, _| {
        it.args(["--cluster-key-file", "absent"]);
    });
    assert!(said.contains("absent cannot be read"), "{said}");
    let said = refused_with(|it, _| {
        it.env("ISOBAR_CLUSTER_KEY", KEY).env("ISOBAR_CLUSTER_KEY_FILE", "key");
    });
    assert!(said.contains("which one is meant"), "{said}");
    let said = refused_with(|it, directory| {
        std::fs::write(directory.join("isobar.toml"), format!("cluster_key = \"{KEY}\"\n")).unwrap();
        it.args(["--config", "isobar.toml"]);
    });
    assert!(said.contains("cluster_key_file") && said.contains("file of its own"), "{said}");
}

#[test]
fn what_is_said_of_the_cluster_is_checked() {
    for (content, says) in [
        ("region = \"eu west\"\n", "eu west"),
        ("cluster_id = \"\"\n", "cluster_id"),
        ("advertise = \"https://eu.example\"\n", "advertise"),
        ("peers = [\"http://us.example:4401\"]\n", "dns://NAME:PORT"),
        ("peers = [\"ws://us.example\"]\n", "port"),
        ("log_keep_hours = -1\n", "log_keep_hours"),
        ("log_truncate_seconds = 0\n", "log_truncate_seconds"),
        ("peer_silence_hours = 0\n", "peer_silence_hours"),
        ("peer_rate_limit = 65535\n", "peer_rate_limit is below 65536"),
        ("peer_rate_limit = 0\n", "peer_rate_limit"),
        ("peer_tls_cert = \"cert.pem\"\n", "but not peer_tls_key"),
        ("peer_tls_key = \"key.pem\"\n", "but not peer_tls_cert"),
        ("[groups]\ndefault = [\"frankfurt\"]\n", "all regions"),
        ("[groups]\neu-only = []\n", "\"eu-only\" has no regions"),
        ("[groups]\neu-only = [\"paris\", \"paris\"]\n", "twice"),
        ("[groups]\neu-only = [\"par is\"]\n", "par is"),
        ("[groups]\n\"eu only\" = [\"paris\"]\n", "eu only"),
    ] {
        let said = refused_with(|it, directory| {
            std::fs::write(directory.join("isobar.toml"), content).unwrap();
            it.args(["--config", "isobar.toml"]);
        });
        assert!(said.contains(says), "{content:?} was refused with {said}");
    }
}

#[test]
fn a_file_says_which_regions_hold_what() {
    let directory = TempDir::new().unwrap();
    let file = directory.path().join("isobar.toml");
    let content = "region = \"paris\"\nadvertise = \"wss://paris.example/sync\"\npeers = []\n\
                   log_keep_hours = 48\n\
                   [groups]\nEU-only = [\"frankfurt\", \"paris\"]\nus = [\"virginia\"]\n";
    std::fs::write(&file, content).unwrap();
    let settings = Settings::load(&ServeArgs { config: Some(file), ..Default::default() }).unwrap();
    let groups = settings.groups.of(&settings.region_name().unwrap());
    assert_eq!(groups.iter().map(|group| group.as_str()).collect::<Vec<_>>(), ["EU-only", "default"]);
    assert_eq!(settings.keep().entries.as_secs(), 48 * 3600);
    assert_eq!(settings.advertise.as_deref(), Some("wss://paris.example/sync"));
    assert_eq!(settings.peer_listener(), None);
    // What is not set is as it is without a file.
    let defaults = Settings::default();
    assert_eq!((settings.cluster_id, settings.idle_seconds), (defaults.cluster_id, defaults.idle_seconds));
}

#[test]
fn the_peer_listener_is_opened_for_peers_or_when_it_is_asked_for() {
    let peer = PeerAddress::parse("ws://virginia:4401").unwrap();
    let asked: SocketAddr = "127.0.0.1:7".parse().unwrap();
    assert_eq!(Settings::default().peer_listener(), None);
    let settings = Settings { peers: vec![peer], ..Settings::default() };
    assert_eq!(settings.peer_listener(), Some("127.0.0.1:4401".parse().unwrap()));
    assert_eq!(Settings { peer_listen: Some(asked), ..settings }.peer_listener(), Some(asked));
    let settings = Settings { peer_listen: Some(asked), ..Settings::default() };
    assert_eq!(settings.peer_listener(), Some(asked));
}

#[tokio::test]
async fn a_database_of_a_newer_program_or_another_region_is_refused() {
    let directory = TempDir::new().unwrap();
    let file = directory.path().join("isobar.db");
    SqliteStorage::open(&file).await.unwrap().close().await;
    use sqlx::{Connection, SqliteConnection};
    let mut connection = SqliteConnection::connect(&format!("sqlite:{}", file.display())).await.unwrap();
    sqlx::query("INSERT INTO _sqlx_migrations VALUES (9999, 'from the future', datetime(), true, x'00', 0)")
        .execute(&mut connection)
        .await
        .unwrap();
    connection.close().await.unwrap();
    let mut command = serve_anywhere(directory.path());
    command.args(["--database", &format!("sqlite:{}", file.display())]);
    let said = refused(command);
    assert!(said.contains("schema 9999") && said.contains("use a newer isobar"), "{said}");

    let directory = TempDir::new().unwrap();
    let mut command = serve_anywhere(directory.path());
    drop(Process::start({
        let mut first = serve_anywhere(directory.path());
        first.args(["--region", "eu"]);
        first
    }));
    command.args(["--region", "us"]);
    let said = refused(command);
    assert!(said.contains("belongs to region eu, not us"), "{said}");
    // What is meant as a URL may hold a password.
    let mut command = serve_anywhere(directory.path());
    command.args(["--database", "mysql://user:secret@host/name"]);
    let said = refused(command);
    assert!(said.contains("sqlite:PATH or postgres://") && !said.contains("secret"), "{said}");
}

#[test]
fn help_names_every_flag_and_its_default() {
    let help = |arguments: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_isobar")).args(arguments).output().unwrap();
        assert!(output.status.success());
        String::from_utf8(output.stdout).unwrap()
    };
    assert!(help(&["--help"]).contains("serve"));
    assert!(help(&["--version"]).starts_with("isobar "));
    let serve = help(&["serve", "--help"]);
    for says in [
        "--config <FILE>",
        "ISOBAR_CONFIG",
        "--region <NAME>",
        "[default: local]",
        "--database <URL>",
        "sqlite:isobar-data/isobar.db",
        "--listen <ADDRESS>",
        "127.0.0.1:4400",
        "--admin-listen <ADDRESS>",
        "127.0.0.1:4402",
        "--insecure",
        "--log <FILTER>",
        "--log-format <FORMAT>",
        "--peer <URL>",
        "dns://NAME:PORT",
        "--peer-listen <ADDRESS>",
        "127.0.0.1:4401",
        "--advertise <URL>",
        "--cluster-id <NAME>",
        "[default: isobar]",
        "--cluster-key-file <FILE>",
        "ISOBAR_CLUSTER_KEY",
        "dns+wss://NAME:PORT",
        "--peer-rate-limit <BYTES_PER_SECOND>",
        "--peer-tls-cert <FILE>",
        "--peer-tls-key <FILE>",
        "--peer-tls-ca <FILE>",
    ] {
        assert!(serve.contains(says), "{says} is missing from {serve}");
    }
}

#[tokio::test]
async fn a_second_process_on_a_database_takes_over_and_the_first_ends_without_acknowledging_more() {
    let directory = TempDir::new().unwrap();
    let document = document_id("document");
    let first = Process::start(serve_anywhere(directory.path()));
    let mut before = Client::join(first.clients, "before").await;
    before.share(&document, AutoCommit::new()).await;
    before.write(&document, |doc| put(doc, "edits", 1)).await;
    let acknowledged = before.open(&document).heads();

    let second = Process::start(serve_anywhere(directory.path()));
    let mut after = Client::join(second.clients, "after").await;
    after.fetch(&document).await;
    assert_eq!(after.open(&document).heads(), acknowledged);

    // The first still listens, and finds out when it is asked to store something.
    before.edit(&document, |doc| put(doc, "edits", 2)).await;
    before.ended().await;
    assert_eq!(before.open(&document).server_heads, acknowledged);
    let (success, said) = first.ended();
    assert!(!success);
    assert!(said.contains("claimed by another node"), "{said}");

    // The second has what was acknowledged, nothing else, and takes what the client still holds.
    let mut doc = before.open(&document).doc.clone();
    let mut moved = Client::join(second.clients, "before").await;
    moved.share(&document, std::mem::take(&mut doc)).await;
    moved.in_step(&document).await;
    after.until("the edit", |it| crate::support::number(&it.open(&document).doc, "edits") == Some(2)).await;
    assert_eq!(after.open(&document).heads(), moved.open(&document).heads());
}
