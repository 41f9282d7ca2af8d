//! The servers that are compared: how each is installed, started, addressed and measured.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;
use serde::Serialize;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::client::Address;
use crate::database::Postgres;
use crate::peers;
use crate::process::{self, ServerProcess};
use crate::session::Dialect;
use crate::workload::Document;

/// How long a server may take to listen.
const START_PATIENCE: Duration = Duration::from_secs(30);

/// A server under load.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, clap::ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Isobar on embedded SQLite.
    IsobarSqlite,
    /// Isobar on Postgres.
    IsobarPostgres,
    /// Isobar on SQLite, with clients that gather their answers, as Isobar's own do.
    IsobarGathered,
    /// The bare broadcast server, whose readers answer each frame as stock Automerge clients do.
    BareAnswered,
    /// The bare broadcast server, whose readers are silent.
    BareSilent,
    /// The published @automerge/automerge-repo-sync-server 0.2.8.
    SyncServer,
    /// The same server on @automerge/automerge-repo 2.5.6.
    AutomergeRepo,
    /// A sync server on samod 0.16.
    Samod,
    /// y-sweet 0.9.1, with Yjs clients.
    YSweet,
}

impl Kind {
    pub const ALL: [Self; 9] = [
        Self::IsobarSqlite,
        Self::IsobarPostgres,
        Self::IsobarGathered,
        Self::BareAnswered,
        Self::BareSilent,
        Self::SyncServer,
        Self::AutomergeRepo,
        Self::Samod,
        Self::YSweet,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::IsobarSqlite => "isobar (sqlite)",
            Self::IsobarPostgres => "isobar (postgres)",
            Self::IsobarGathered => "isobar (own clients)",
            Self::BareAnswered => "bare, answered",
            Self::BareSilent => "bare, silent",
            Self::SyncServer => "sync-server 0.2.8",
            Self::AutomergeRepo => "automerge-repo 2.5.6",
            Self::Samod => "samod 0.16",
            Self::YSweet => "y-sweet 0.9.1",
        }
    }

    pub fn dialect(self) -> Dialect {
        match self {
            Self::BareAnswered => Dialect::Bare { answers: true },
            Self::BareSilent => Dialect::Bare { answers: false },
            Self::IsobarGathered => Dialect::AutomergeGathered,
            Self::YSweet => Dialect::Yjs,
            _ => Dialect::Automerge,
        }
    }

    pub fn is_bare(self) -> bool {
        matches!(self, Self::BareAnswered | Self::BareSilent)
    }

    pub fn is_isobar(self) -> bool {
        matches!(self, Self::IsobarSqlite | Self::IsobarPostgres | Self::IsobarGathered)
    }
}

/// Where the programs are, and a scratch directory that goes away with this.
pub struct Environment {
    isobar: Option<PathBuf>,
    peers: PathBuf,
    postgres: Option<Postgres>,
    scratch: TempDir,
    /// Served by the bare server as `/file` and `/blob`.
    pub file: Option<PathBuf>,
}

/// Which servers are wanted and what may be done to get them.
pub struct Wanted {
    pub kinds: Vec<Kind>,
    /// A built isobar; otherwise it is built.
    pub isobar: Option<PathBuf>,
    pub may_install: bool,
}

impl Environment {
    /// Finds, builds or installs what is wanted. Returns what cannot be had, with the reason.
    pub async fn prepare(wanted: &Wanted) -> Result<(Self, BTreeMap<Kind, String>)> {
        let target = target_directory()?;
        let peers = target.join("bench-peers");
        let mut missing = BTreeMap::new();
        let mut isobar = None;
        if wanted.kinds.iter().any(|kind| kind.is_isobar()) {
            match wanted.isobar.clone().map_or_else(|| peers::build_isobar(&target), Ok) {
                Ok(path) => isobar = Some(path),
                Err(error) => {
                    for kind in wanted.kinds.iter().filter(|kind| kind.is_isobar()) {
                        missing.insert(*kind, format!("{error:#}"));
                    }
                }
            }
        }
        let mut postgres = None;
        if wanted.kinds.contains(&Kind::IsobarPostgres) {
            match Postgres::start().await {
                Ok(cluster) => postgres = Some(cluster),
                Err(error) => drop(missing.insert(Kind::IsobarPostgres, format!("{error:#}"))),
            }
        }
        for kind in &wanted.kinds {
            if let Err(error) = peers::ensure_installed(*kind, &peers, wanted.may_install) {
                missing.insert(*kind, format!("{error:#}"));
            }
        }
        let scratch = tempfile::Builder::new().prefix("isobar-bench-").tempdir()?;
        Ok((Self { isobar, peers, postgres, scratch, file: None }, missing))
    }

    pub fn scratch(&self) -> &Path {
        self.scratch.path()
    }

    pub fn postgres(&self) -> Option<&Postgres> {
        self.postgres.as_ref()
    }
}

/// The build directory that this very program lies in.
pub fn target_directory() -> Result<PathBuf> {
    let program = std::env::current_exe()?;
    program.ancestors().nth(2).map(Path::to_owned).context("the program lies in target/<profile>/")
}

/// A running server with data of its own.
pub struct Server<'e> {
    environment: &'e Environment,
    kind: Kind,
    data: TempDir,
    database: Option<String>,
    process: ServerProcess,
    authority: String,
}

impl<'e> Server<'e> {
    /// Starts a server on empty storage.
    pub async fn start(environment: &'e Environment, kind: Kind) -> Result<Self> {
        let data = tempfile::Builder::new().prefix("server-").tempdir_in(environment.scratch())?;
        let database = match (kind, &environment.postgres) {
            (Kind::IsobarPostgres, Some(postgres)) => Some(postgres.create_database().await?),
            (Kind::IsobarPostgres, None) => bail!("Postgres is not running"),
            _ => None,
        };
        let launched = launch(environment, kind, data.path(), database.as_deref()).await?;
        let (process, authority) = launched;
        Ok(Self { environment, kind, data, database, process, authority })
    }

    /// Starts the server again, on the storage it had.
    pub async fn restart(&mut self) -> Result<()> {
        self.process.kill();
        let launched =
            launch(self.environment, self.kind, self.data.path(), self.database.as_deref()).await?;
        (self.process, self.authority) = launched;
        Ok(())
    }

    /// `kill -9`.
    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// Asks the server to end, as an operator would.
    pub async fn stop(&mut self) {
        // y-sweet saves when it is interrupted, and only then.
        let signal = if self.kind == Kind::YSweet { Signal::SIGINT } else { Signal::SIGTERM };
        self.process.stop(signal, Duration::from_secs(5)).await;
    }

    pub fn check_alive(&mut self) -> Result<()> {
        self.process.check_alive()
    }

    pub fn authority(&self) -> &str {
        &self.authority
    }

    /// Where a client of this document connects.
    pub fn address(&self, document: &Document) -> Address {
        let id = &document.id;
        let path = match self.kind {
            Kind::BareAnswered | Kind::BareSilent => format!("/room/{id}"),
            Kind::YSweet => format!("/d/{id}/ws/{id}"),
            _ => "/".to_owned(),
        };
        Address { authority: self.authority.clone(), path }
    }

    /// Creates a document where the server wants to be told; elsewhere the first upload creates it.
    pub async fn create(&self, document: &Document) -> Result<()> {
        if self.kind == Kind::YSweet {
            let body = format!("{{\"docId\":\"{}\"}}", document.id);
            let answer = http_post(&self.authority, "/doc/new", &body).await?;
            if !answer.starts_with("HTTP/1.1 200") {
                bail!("y-sweet refused to create a document: {answer}");
            }
        }
        Ok(())
    }

    pub fn cpu(&self) -> Duration {
        process::cpu_time(self.process.pid())
    }

    pub fn resident_bytes(&self) -> u64 {
        process::resident_bytes(self.process.pid())
    }

    /// CPU time of the database server, where that is another process.
    pub fn database_cpu(&self) -> Duration {
        match (&self.database, &self.environment.postgres) {
            (Some(_), Some(postgres)) => process::cpu_time(postgres.pid()),
            _ => Duration::ZERO,
        }
    }

    /// Waits until the server has used less than a twentieth of a core for `quiet`, at most for `patience`.
    pub async fn settle(&self, quiet: Duration, patience: Duration) {
        let slice = Duration::from_millis(100);
        let deadline = tokio::time::Instant::now() + patience;
        let mut quiet_for = Duration::ZERO;
        while quiet_for < quiet && tokio::time::Instant::now() < deadline {
            let before = self.cpu() + self.database_cpu();
            tokio::time::sleep(slice).await;
            let used = (self.cpu() + self.database_cpu()).saturating_sub(before);
            quiet_for = if used < slice / 20 { quiet_for + slice } else { Duration::ZERO };
        }
    }
}

async fn launch(
    environment: &Environment,
    kind: Kind,
    data: &Path,
    database: Option<&str>,
) -> Result<(ServerProcess, String)> {
    let port = process::free_port()?;
    let command = command(environment, kind, data, database, port)?;
    let log = data.join(format!("server-{port}.log"));
    let mut process = ServerProcess::start(command, &log)?;
    let authority = if kind.is_bare() || kind.is_isobar() {
        process.wait_for_line("clients: ws://", START_PATIENCE).await?.trim_end_matches('/').to_owned()
    } else {
        process.wait_for_port(port, START_PATIENCE).await?;
        format!("127.0.0.1:{port}")
    };
    Ok((process, authority))
}

fn command(
    environment: &Environment,
    kind: Kind,
    data: &Path,
    database: Option<&str>,
    port: u16,
) -> Result<Command> {
    let peers = &environment.peers;
    let command = match kind {
        Kind::IsobarSqlite | Kind::IsobarPostgres | Kind::IsobarGathered => {
            let sqlite = format!("sqlite:{}", data.join("isobar.db").display());
            let mut command = Command::new(environment.isobar.as_ref().context("isobar was not built")?);
            command.args(["serve", "--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0"]);
            command.args(["--region", "bench", "--database", database.unwrap_or(&sqlite)]);
            command
        }
        Kind::BareAnswered | Kind::BareSilent => {
            let mut command = Command::new(std::env::current_exe()?);
            command
                .arg("bare")
                .args(environment.file.iter().flat_map(|file| ["--file".as_ref(), file.as_os_str()]));
            command
        }
        Kind::SyncServer => {
            let package = peers.join("sync-server/node_modules/@automerge/automerge-repo-sync-server");
            let mut command = Command::new("node");
            command
                .arg("--require")
                .arg(peers::source().join("loopback.cjs"))
                .arg(package.join("src/index.js"));
            command.env("PORT", port.to_string()).env("DATA_DIR", data.join("documents"));
            command.env("NODE_ENV", "production");
            command
        }
        Kind::AutomergeRepo => {
            fs::create_dir_all(data.join("documents"))?;
            let mut command = Command::new("node");
            command.arg(peers.join("automerge-repo/server.mjs"));
            command.env("PORT", port.to_string()).env("DATA_DIR", data.join("documents"));
            command.env("NODE_ENV", "production");
            command
        }
        Kind::Samod => {
            let mut command = Command::new(peers.join("samod-build/release/samod-server"));
            command.arg(port.to_string()).arg(data.join("documents"));
            command
        }
        Kind::YSweet => {
            let mut command = Command::new(peers.join("y-sweet/bin/y-sweet"));
            command.arg("serve").arg(data.join("documents")).arg("--port").arg(port.to_string());
            command.env("RUST_LOG", "warn");
            command
        }
    };
    Ok(command)
}

/// One HTTP/1.1 POST on a connection of its own; returns the head and body of the answer.
async fn http_post(authority: &str, path: &str, json: &str) -> Result<String> {
    let request = format!(
        "POST {path} HTTP/1.1\r\nHost: {authority}\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\nConnection: close\r\n\r\n{json}",
        json.len()
    );
    Ok(String::from_utf8_lossy(&http(authority, &request).await?).into_owned())
}

/// One HTTP/1.1 GET; returns how many bytes came, head included.
pub async fn http_get_bytes(authority: &str, path: &str) -> Result<usize> {
    let request = format!("GET {path} HTTP/1.1\r\nHost: {authority}\r\nConnection: close\r\n\r\n");
    let answer = http(authority, &request).await?;
    if !answer.starts_with(b"HTTP/1.1 200") {
        bail!("the bare server did not serve {path}");
    }
    Ok(answer.len())
}

/// One HTTP/1.1 GET; returns the body of the answer.
pub async fn http_get(authority: &str, path: &str) -> Result<String> {
    let request = format!("GET {path} HTTP/1.1\r\nHost: {authority}\r\nConnection: close\r\n\r\n");
    let answer = String::from_utf8_lossy(&http(authority, &request).await?).into_owned();
    let (head, body) = answer.split_once("\r\n\r\n").context("not an HTTP answer")?;
    if !head.starts_with("HTTP/1.1 200") {
        bail!("{path} was refused: {head}");
    }
    Ok(body.to_owned())
}

async fn http(authority: &str, request: &str) -> Result<Vec<u8>> {
    let exchange = async {
        let mut stream = tokio::net::TcpStream::connect(authority).await?;
        stream.write_all(request.as_bytes()).await?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await?;
        Ok(answer)
    };
    tokio::time::timeout(Duration::from_secs(10), exchange).await.context("no HTTP answer within 10 s")?
}
