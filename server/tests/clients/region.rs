//! A running `isobar serve` of this build, on a new database of its own.
//!
//! The process ends with the value, so nothing is left behind by a test that fails.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use isobar_testkit::TestServer;
use sqlx::{Connection, PgConnection, Row};
use tempfile::TempDir;

const START_WITHIN: Duration = Duration::from_secs(20);

/// Which database a region stands on.
#[derive(Debug, Clone, Copy)]
pub enum Kind {
    Sqlite,
    Postgres,
}

/// A new, empty database that ends with the value.
pub enum Database {
    Sqlite(TempDir),
    Postgres { server: TestServer, name: String },
}

impl Database {
    pub async fn create(kind: Kind) -> Self {
        match kind {
            Kind::Sqlite => Self::Sqlite(tempfile::tempdir().unwrap()),
            Kind::Postgres => {
                let server = isobar_testkit::shared().unwrap();
                let name = format!("region_{}", uuid::Uuid::new_v4().simple());
                let mut connection = PgConnection::connect(&server.url(None)).await.unwrap();
                // The name is made here, of hexadecimal digits.
                let statement = sqlx::AssertSqlSafe(format!("create database {name}"));
                sqlx::query(statement).execute(&mut connection).await.unwrap();
                Self::Postgres { server, name }
            }
        }
    }

    fn url(&self) -> String {
        match self {
            Self::Sqlite(folder) => format!("sqlite:{}", folder.path().join("region.db").display()),
            Self::Postgres { server, name } => server.url(Some(name)),
        }
    }

    /// What the database occupies, with its indexes and its write-ahead log where it has one of its own.
    pub async fn stored_bytes(&self) -> u64 {
        match self {
            Self::Sqlite(folder) => {
                let files = std::fs::read_dir(folder.path()).unwrap();
                files.map(|file| file.unwrap().metadata().unwrap().len()).sum()
            }
            Self::Postgres { server, name } => {
                let mut connection = PgConnection::connect(&server.url(Some(name))).await.unwrap();
                let query = "select pg_database_size(current_database())";
                let bytes: i64 = sqlx::query(query).fetch_one(&mut connection).await.unwrap().get(0);
                bytes.unsigned_abs()
            }
        }
    }
}

/// The secret of the regions that a test links.
const CLUSTER_KEY: &str = "a secret that only the regions of one test share";

/// The server process, which can be stopped, killed and started again at the same address.
pub struct Region {
    pub database: Database,
    name: String,
    process: Option<Child>,
    port: u16,
    links: Option<Links>,
}

/// How a region is linked to others.
struct Links {
    port: u16,
    /// The regions that it dials.
    peers: Vec<String>,
}

impl Region {
    pub async fn start(kind: Kind) -> Self {
        Self::start_as("tests", kind, None).await
    }

    /// So many regions, each on a database of its own, linked to each other if there are several.
    pub async fn start_linked(kind: Kind, count: usize) -> Vec<Self> {
        let mut regions: Vec<Self> = Vec::new();
        for number in 0..count {
            let peers = regions.iter().filter_map(|it| it.links.as_ref());
            let peers = peers.map(|it| format!("ws://127.0.0.1:{}", it.port)).collect();
            let links = (count > 1).then_some(Links { port: 0, peers });
            regions.push(Self::start_as(&format!("tests-{number}"), kind, links).await);
        }
        regions
    }

    async fn start_as(name: &str, kind: Kind, links: Option<Links>) -> Self {
        let database = Database::create(kind).await;
        let mut region = Self { database, name: name.to_owned(), process: None, port: 0, links };
        region.start_process();
        region
    }

    /// The address for clients; the same after every restart.
    pub fn url(&self) -> String {
        format!("ws://127.0.0.1:{}", self.port)
    }

    /// Asks the server to finish, and asserts that it does so cleanly; then starts it again.
    pub fn restart(&mut self) {
        let mut process = self.process.take().expect("the region runs");
        let asked = Command::new("kill").arg("-TERM").arg(process.id().to_string()).status().unwrap();
        assert!(asked.success());
        let status = process.wait().unwrap();
        assert!(status.success(), "isobar ended with {status} when asked to stop");
        self.start_process();
    }

    /// Ends the server without warning and starts it again.
    pub fn crash(&mut self) {
        let mut process = self.process.take().expect("the region runs");
        process.kill().unwrap();
        process.wait().unwrap();
        self.start_process();
    }

    /// The process's memory in bytes: now, and at its peak. `None` where there is no /proc.
    pub fn resident_bytes(&self) -> Option<(u64, u64)> {
        let process = self.process.as_ref().expect("the region runs");
        let status = std::fs::read_to_string(format!("/proc/{}/status", process.id())).ok()?;
        let kib = |key: &str| -> Option<u64> {
            let line = status.lines().find(|line| line.starts_with(key))?;
            line.split_whitespace().nth(1)?.parse().ok()
        };
        Some((kib("VmRSS:")? * 1024, kib("VmHWM:")? * 1024))
    }

    fn start_process(&mut self) {
        let mut command = Command::new(PathBuf::from(env!("CARGO_BIN_EXE_isobar")));
        command
            .args(["serve", "--region", &self.name, "--admin-listen", "127.0.0.1:0"])
            .args(["--listen", &format!("127.0.0.1:{}", self.port)])
            .args(["--database", &self.database.url()]);
        if let Some(links) = &self.links {
            command
                .env("ISOBAR_CLUSTER_KEY", CLUSTER_KEY)
                .args(["--peer-listen", &format!("127.0.0.1:{}", links.port)])
                .args(links.peers.iter().flat_map(|peer| ["--peer", peer]));
        }
        let mut process = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
        let stdout = process.stdout.take().expect("stdout is piped");
        self.process = Some(process);
        let (announce, announced) = mpsc::channel();
        // Reads to the end, so that the server never waits for a full pipe.
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                let _ = announce.send(line);
            }
        });
        self.port = await_port(&announced, "clients");
        if let Some(links) = &mut self.links {
            links.port = await_port(&announced, "peers");
        }
    }
}

/// The port of a listener, when the process says that it is open.
fn await_port(announced: &mpsc::Receiver<String>, listener: &str) -> u16 {
    let opening = format!("{listener}: ws://127.0.0.1:");
    loop {
        let line = announced.recv_timeout(START_WITHIN).expect("isobar announces its address in time");
        if let Some(address) = line.strip_prefix(&opening) {
            return address.trim_end_matches('/').parse().expect("the address ends with a port");
        }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        if let Some(process) = &mut self.process {
            // It may have ended by itself, which the test has noticed.
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}
