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

/// The server process, which can be stopped, killed and started again at the same address.
pub struct Region {
    pub database: Database,
    process: Option<Child>,
    port: u16,
}

impl Region {
    pub async fn start(kind: Kind) -> Self {
        let mut region = Self { database: Database::create(kind).await, process: None, port: 0 };
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
        let mut process = Command::new(PathBuf::from(env!("CARGO_BIN_EXE_isobar")))
            .args(["serve", "--region", "tests", "--admin-listen", "127.0.0.1:0"])
            .args(["--listen", &format!("127.0.0.1:{}", self.port)])
            .args(["--database", &self.database.url()])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let stdout = process.stdout.take().expect("stdout is piped");
        self.process = Some(process);
        let (announce, announced) = mpsc::channel();
        // Reads to the end, so that the server never waits for a full pipe.
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                let _ = announce.send(line);
            }
        });
        self.port = await_port(&announced);
    }
}

fn await_port(announced: &mpsc::Receiver<String>) -> u16 {
    loop {
        let line = announced.recv_timeout(START_WITHIN).expect("isobar announces its address in time");
        if let Some(address) = line.strip_prefix("clients: ws://127.0.0.1:") {
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
