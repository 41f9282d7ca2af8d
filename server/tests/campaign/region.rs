//! A region: processes of the built program that share a database, which can be copied, put back and emptied while they
//! are down.

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

/// Where clients reach a node of a region, and which life the region is in.
#[derive(Clone)]
pub struct Door {
    pub region: usize,
    pub clients: SocketAddr,
    life: Arc<AtomicU64>,
}

impl Door {
    /// Counts the starts of the whole region.
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
    /// Those that share the database: one on SQLite.
    pub nodes: Vec<Node>,
    pub database: Database,
    /// Where its nodes reach the other regions.
    pub peers: Vec<String>,
    life: Arc<AtomicU64>,
}

/// A process of a region, and its addresses, which stay the same.
pub struct Node {
    pub name: String,
    pub door: Door,
    pub admin: SocketAddr,
    pub peer: SocketAddr,
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
    pub fn new(name: &'static str, database: Database) -> Self {
        Self { name, nodes: Vec::new(), database, peers: Vec::new(), life: Arc::default() }
    }

    /// Adds a node, which listens on a loopback address of its own.
    pub fn add_node(&mut self, region: usize, host: Ipv4Addr, directory: &Path) {
        let name = format!("{}-{}", self.name, self.nodes.len());
        // No outgoing connection is given a port of this host, so these stay free while the node is down.
        let at = |port: u16| SocketAddr::from((host, port));
        self.nodes.push(Node {
            door: Door { region, clients: at(4400), life: self.life.clone() },
            peer: at(4401),
            admin: at(4402),
            log: directory.join(format!("{name}.log")),
            name,
            process: None,
        });
    }

    pub fn life(&self) -> u64 {
        self.life.load(Ordering::SeqCst)
    }

    /// Starts all nodes at the same time; when this returns, they accept.
    pub async fn start(&mut self) {
        self.life.fetch_add(1, Ordering::SeqCst);
        let commands: Vec<Command> = self.nodes.iter().map(|node| self.command(node)).collect();
        let starting = self.nodes.iter_mut().zip(commands).map(|(node, command)| node.start(command));
        futures_util::future::join_all(starting).await;
    }

    /// Starts one node again. The region's life goes on: its disk does.
    pub async fn start_node(&mut self, number: usize) {
        let command = self.command(&self.nodes[number]);
        self.nodes[number].start(command).await;
    }

    /// Kills all nodes in mid-stride. They must have been alive.
    pub fn kill(&mut self) {
        self.nodes.iter_mut().for_each(Node::kill);
    }

    /// Serves the database of a region that is down to nobody but who knows the address.
    pub async fn inspect(&self) -> Inspection {
        let anywhere = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let (process, clients) = spawn(self.serve(&self.nodes[0].log, anywhere, anywhere)).await;
        Inspection { process, clients }
    }

    /// The number of the node that keeps the links. There is one, or will be soon.
    pub async fn keeper(&self) -> usize {
        let keeper = tokio::time::timeout(DEADLINE, async {
            loop {
                for (number, node) in self.nodes.iter().enumerate().filter(|(_, node)| node.process.is_some())
                {
                    if node.keeps_links().await {
                        return number;
                    }
                }
                tokio::time::sleep(LOOK_EVERY).await;
            }
        });
        keeper.await.unwrap_or_else(|_| panic!("no node of {} keeps its links", self.name))
    }

    fn command(&self, node: &Node) -> Command {
        let mut command = self.serve(&node.log, node.door.clients, node.admin);
        command.args(["--peer-listen", &node.peer.to_string()]);
        for peer in &self.peers {
            command.args(["--peer", peer]);
        }
        command
    }

    fn serve(&self, log: &Path, clients: SocketAddr, admin: SocketAddr) -> Command {
        let log = OpenOptions::new().create(true).append(true).open(log).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_isobar"));
        command.args(["serve", "--region", self.name, "--database", &self.database.url()]);
        command.args(["--listen", &clients.to_string(), "--admin-listen", &admin.to_string()]);
        command.args(["--log", "info"]).env("ISOBAR_CLUSTER_KEY", CLUSTER_KEY);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log);
        command
    }

    /// Separates what the processes have logged.
    pub fn note(&self, what: &str) {
        self.nodes.iter().for_each(|node| node.note(what));
    }
}

impl Node {
    async fn start(&mut self, command: Command) {
        assert!(self.process.is_none(), "the node is down");
        self.process = Some(spawn(command).await.0);
    }

    /// Kills the node in mid-stride. It must have been alive.
    pub fn kill(&mut self) {
        let mut process = self.process.take().expect("the node runs");
        if let Some(status) = process.try_wait().unwrap() {
            panic!("node {} has ended by itself: {status}", self.name);
        }
        kill(process);
    }

    async fn keeps_links(&self) -> bool {
        let answer = ask(self.admin, "GET", "/admin/v1/convergence").await;
        answer.is_ok_and(|(_, body)| {
            let body: serde_json::Value = serde_json::from_str(&body).unwrap();
            body["keeps_links"] == true
        })
    }

    pub fn logged(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    fn note(&self, what: &str) {
        use std::io::Write;
        let file: std::io::Result<File> = OpenOptions::new().create(true).append(true).open(&self.log);
        writeln!(file.unwrap(), "---- {what}").unwrap();
    }
}

impl Drop for Node {
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
