//! A region: a process of the built program, and a database that can be copied, put back and emptied while it is down.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use isobar_testkit::TestServer;
use sqlx::Connection;
use sqlx::postgres::PgConnection;

use crate::{DEADLINE, LOOK_EVERY};

/// The secret that the regions share.
const CLUSTER_KEY: &str = "a secret of the campaign's regions, of 32 bytes at least";

/// Where clients reach a region, and which life it is in.
#[derive(Clone)]
pub struct Door {
    pub region: usize,
    pub clients: SocketAddr,
    life: Arc<AtomicU64>,
}

impl Door {
    /// Counts the starts of the region.
    pub fn life(&self) -> u64 {
        self.life.load(Ordering::SeqCst)
    }
}

/// Where a region keeps its documents.
pub enum Database {
    Sqlite { directory: PathBuf },
    Postgres { server: Arc<TestServer>, name: String },
}

impl Database {
    fn url(&self) -> String {
        match self {
            Self::Sqlite { directory } => format!("sqlite:{}", directory.join("isobar.db").display()),
            Self::Postgres { server, name } => server.url(Some(name)),
        }
    }

    /// Makes an empty one, in the place of whatever is there.
    pub async fn empty(&self) {
        match self {
            Self::Sqlite { directory } => {
                if directory.exists() {
                    std::fs::remove_dir_all(directory).unwrap();
                }
                std::fs::create_dir(directory).unwrap();
            }
            Self::Postgres { server, name } => replace(server, name, "template0").await,
        }
    }

    /// Keeps a copy of what is there, in the place of the one before.
    pub async fn copy(&self) {
        match self {
            Self::Sqlite { directory } => copy_files(directory, &directory.with_extension("copy")),
            Self::Postgres { server, name } => replace(server, &format!("{name}_copy"), name).await,
        }
    }

    /// Puts the copy in the place of what is there.
    pub async fn restore(&self) {
        match self {
            Self::Sqlite { directory } => copy_files(&directory.with_extension("copy"), directory),
            Self::Postgres { server, name } => replace(server, name, &format!("{name}_copy")).await,
        }
    }

    pub async fn remove(&self) {
        if let Self::Postgres { server, name } = self {
            for name in [name.clone(), format!("{name}_copy")] {
                let drop = format!("DROP DATABASE IF EXISTS {name} WITH (FORCE)");
                maintain(server, drop).await.unwrap();
            }
        }
    }
}

fn copy_files(from: &Path, to: &Path) {
    if to.exists() {
        std::fs::remove_dir_all(to).unwrap();
    }
    std::fs::create_dir(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

/// Makes the database `name` from the template. What a killed process has left open is closed, which takes the server
/// a moment.
async fn replace(server: &TestServer, name: &str, template: &str) {
    let end = format!(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{template}' AND pid <> pg_backend_pid()"
    );
    let make = async || {
        maintain(server, format!("DROP DATABASE IF EXISTS {name} WITH (FORCE)")).await?;
        maintain(server, end.clone()).await?;
        maintain(server, format!("CREATE DATABASE {name} TEMPLATE {template}")).await
    };
    let made = tokio::time::timeout(DEADLINE, async {
        while let Err(error) = make().await {
            eprintln!("database {name} not made yet: {error}");
            tokio::time::sleep(LOOK_EVERY).await;
        }
    });
    made.await.expect("the database is made in time");
}

async fn maintain(server: &TestServer, statement: String) -> sqlx::Result<()> {
    let mut connection = PgConnection::connect(&server.url(None)).await?;
    sqlx::raw_sql(sqlx::AssertSqlSafe(statement)).execute(&mut connection).await?;
    connection.close().await
}

pub struct Region {
    pub name: &'static str,
    pub door: Door,
    pub admin: SocketAddr,
    pub peer: SocketAddr,
    pub database: Database,
    /// Where it reaches the others.
    pub peers: Vec<String>,
    /// What its processes have logged, one after the other.
    log: PathBuf,
    process: Option<Child>,
}

/// A process without peers and at another address, to look at what is on a region's disk.
pub struct Inspection {
    process: Child,
    pub clients: SocketAddr,
}

impl Region {
    pub fn new(
        number: usize,
        name: &'static str,
        host: Ipv4Addr,
        directory: &Path,
        database: Database,
    ) -> Self {
        // No outgoing connection is given a port of this host, so these stay free while the region is down.
        let at = |port: u16| SocketAddr::from((host, port));
        let life = Arc::new(AtomicU64::new(0));
        Self {
            name,
            door: Door { region: number, clients: at(4400), life },
            peer: at(4401),
            admin: at(4402),
            database,
            peers: Vec::new(),
            log: directory.join(format!("{name}.log")),
            process: None,
        }
    }

    /// Starts the region; when this returns, it accepts.
    pub async fn start(&mut self) {
        assert!(self.process.is_none(), "the region is down");
        let mut command = self.command(self.door.clients, self.admin);
        command.args(["--peer-listen", &self.peer.to_string()]);
        for peer in &self.peers {
            command.args(["--peer", peer]);
        }
        self.door.life.fetch_add(1, Ordering::SeqCst);
        let (process, _) = spawn(command).await;
        self.process = Some(process);
    }

    /// Kills the region in mid-stride. It must have been alive.
    pub fn kill(&mut self) {
        let mut process = self.process.take().expect("the region runs");
        if let Some(status) = process.try_wait().unwrap() {
            panic!("region {} has ended by itself: {status}", self.name);
        }
        kill(process);
    }

    /// Serves the database of a region that is down to nobody but who knows the address.
    pub async fn inspect(&self) -> Inspection {
        let anywhere = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let (process, clients) = spawn(self.command(anywhere, anywhere)).await;
        Inspection { process, clients }
    }

    fn command(&self, clients: SocketAddr, admin: SocketAddr) -> Command {
        let log = OpenOptions::new().create(true).append(true).open(&self.log).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_isobar"));
        command.args(["serve", "--region", self.name, "--database", &self.database.url()]);
        command.args(["--listen", &clients.to_string(), "--admin-listen", &admin.to_string()]);
        command.args(["--log", "info"]).env("ISOBAR_CLUSTER_KEY", CLUSTER_KEY);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log);
        command
    }

    pub fn logged(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Separates what the processes have logged.
    pub fn note(&self, what: &str) {
        use std::io::Write;
        let file: std::io::Result<File> = OpenOptions::new().create(true).append(true).open(&self.log);
        writeln!(file.unwrap(), "---- {what}").unwrap();
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        self.process.take().into_iter().for_each(kill);
    }
}

impl Inspection {
    pub fn end(self) {
        kill(self.process);
    }
}

fn kill(mut process: Child) {
    // It may have ended by itself.
    let _ = process.kill();
    process.wait().unwrap();
}

/// Starts a process and waits until it accepts. Returns its address for clients.
async fn spawn(mut command: Command) -> (Child, SocketAddr) {
    let mut process = command.spawn().unwrap();
    let stdout = BufReader::new(process.stdout.take().expect("stdout is piped"));
    let (sender, lines) = mpsc::channel();
    // Reads to the end, so that the process never waits for a full pipe.
    std::thread::spawn(move || {
        stdout.lines().map_while(Result::ok).for_each(|line| drop(sender.send(line)));
    });
    let announced = tokio::task::spawn_blocking(move || {
        let mut clients = None;
        loop {
            let line = lines.recv_timeout(DEADLINE).ok()?;
            if let Some(address) = line.strip_prefix("clients: ws://") {
                clients = address.parse().ok();
            }
            if line.starts_with("admin: ") {
                return clients;
            }
        }
    });
    match announced.await.unwrap() {
        Some(clients) => (process, clients),
        None => {
            kill(process);
            panic!("a region does not start");
        }
    }
}

/// Asks an admin listener; the status and the body.
pub async fn ask(address: SocketAddr, method: &str, path: &str) -> anyhow::Result<(u16, String)> {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let exchange = async {
        let mut stream = tokio::net::TcpStream::connect(address).await?;
        let head = format!("{method} {path} HTTP/1.1\r\nHost: region\r\nConnection: close\r\n\r\n");
        stream.write_all(head.as_bytes()).await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        anyhow::Ok(answer)
    };
    let answer = tokio::time::timeout(Duration::from_secs(20), exchange).await??;
    let status = answer.split(' ').nth(1).and_then(|it| it.parse().ok());
    let body = answer.split_once("\r\n\r\n").map(|(_, body)| body.to_owned());
    status.zip(body).ok_or_else(|| anyhow::anyhow!("not an HTTP answer: {answer}"))
}
