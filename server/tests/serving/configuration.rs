//! What an operator sets, and what happens when it is wrong: the program itself, as a process.

use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::Instant;

use automerge::AutoCommit;
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
