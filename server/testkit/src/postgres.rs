//! Starting, stopping and removing a Postgres cluster.
//!
//! A shell does the work (`cluster.sh`), reading commands from a pipe. When this process ends, however it ends, the
//! pipe closes, and the shell stops the server and removes its directory. So nothing is left behind by a test
//! that panics or is killed.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

const SCRIPT: &str = include_str!("cluster.sh");

/// The superuser of the cluster. Connections from this machine need no password.
const USER: &str = "isobar";

/// Users to run the server as when this process is root, as which it refuses to run.
const UNPRIVILEGED_USERS: [&str; 2] = ["postgres", "nobody"];

/// How often another port is tried when somebody took the one that was free a moment ago.
const PORT_ATTEMPTS_MAX: u32 = 5;

/// Whether commits wait for the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// As in production; for benchmarks.
    Disk,
    /// Faster; survives a crash of the server, not one of the machine. For tests.
    None,
}

/// A Postgres cluster on a free port of the loopback address. It ends with the value or the process.
#[derive(Debug)]
pub struct PostgresCluster {
    shell: Child,
    /// `None` while the value is dropped.
    commands: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
    port: u16,
}

impl PostgresCluster {
    /// Creates and starts a cluster; takes one to three seconds.
    pub fn start(durability: Durability) -> io::Result<Self> {
        let programs = find_programs()?;
        let mut attempt = 1;
        loop {
            match Self::try_start(&programs, durability) {
                Err(error) if error.kind() == io::ErrorKind::AddrInUse && attempt < PORT_ATTEMPTS_MAX => {
                    attempt += 1;
                }
                outcome => return outcome,
            }
        }
    }

    fn try_start(programs: &Path, durability: Durability) -> io::Result<Self> {
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port();
        let mut command = unprivileged_shell()?;
        command.args(["-c", SCRIPT, "cluster"]).arg(programs).arg(port.to_string()).arg(USER);
        command.arg(match durability {
            Durability::Disk => "on",
            Durability::None => "off",
        });
        // A group of its own: an interrupt from the terminal is for the tests, and reaches the cluster by the pipe.
        command.process_group(0).current_dir("/");
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut shell = command.spawn()?;
        let commands = shell.stdin.take();
        let answers = BufReader::new(shell.stdout.take().expect("stdout is piped"));
        let mut cluster = Self { shell, commands, answers, port };
        cluster.await_answer()?;
        Ok(cluster)
    }

    /// The URL of the database `name`; `postgres` always exists.
    pub fn url(&self, name: &str) -> String {
        format!("postgres://{USER}@{}:{}/{name}", Ipv4Addr::LOCALHOST, self.port)
    }

    /// Stops the server as a crash would: at once, connections broken, recovery at the next start.
    pub fn crash(&mut self) -> io::Result<()> {
        self.command("crash")
    }

    /// Starts the server again after [`PostgresCluster::crash`], at the same address.
    pub fn restart(&mut self) -> io::Result<()> {
        self.command("start")
    }

    fn command(&mut self, command: &str) -> io::Result<()> {
        let commands = self.commands.as_mut().expect("the pipe is open until the value is dropped");
        writeln!(commands, "{command}")?;
        self.await_answer()
    }

    fn await_answer(&mut self) -> io::Result<()> {
        let mut answer = String::new();
        self.answers.read_line(&mut answer)?;
        if answer.trim_end() == "done" {
            return Ok(());
        }
        drop(self.commands.take());
        let mut explanation = String::new();
        if let Some(mut stderr) = self.shell.stderr.take() {
            stderr.read_to_string(&mut explanation)?;
        }
        let kind = if explanation.contains("Address already in use") {
            io::ErrorKind::AddrInUse
        } else {
            io::ErrorKind::Other
        };
        Err(io::Error::new(kind, format!("Postgres did not start: {explanation}")))
    }
}

impl Drop for PostgresCluster {
    fn drop(&mut self) {
        drop(self.commands.take());
        // Nobody can act on a failure here, and the directory is a temporary one.
        let _ = self.shell.wait();
    }
}

/// A shell as a user that Postgres agrees to run as.
fn unprivileged_shell() -> io::Result<Command> {
    // Where there is no /proc, whoever is root finds Postgres saying so.
    if !std::fs::metadata("/proc/self").is_ok_and(|process| process.uid() == 0) {
        return Ok(Command::new("sh"));
    }
    let users = std::fs::read_to_string("/etc/passwd")?;
    let exists = |user: &&str| users.lines().any(|line| line.split(':').next() == Some(user));
    let user = UNPRIVILEGED_USERS.into_iter().find(exists).ok_or_else(|| {
        io::Error::new(io::ErrorKind::NotFound, "Postgres does not run as root, and there is no other user")
    })?;
    let mut command = Command::new("runuser");
    command.args(["-u", user, "--", "sh"]);
    // The superuser's directory for temporary files is not necessarily open to others.
    command.env("TMPDIR", "/tmp");
    Ok(command)
}

/// The directory of Postgres's programs: the newest version where Debian puts them, else one on the `PATH`.
fn find_programs() -> io::Result<PathBuf> {
    let version =
        |directory: &PathBuf| -> Option<u32> { directory.parent()?.file_name()?.to_str()?.parse().ok() };
    let installed = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let newest = installed.map(|entry| entry.path().join("bin")).max_by_key(version);
    let on_path = std::env::var_os("PATH").unwrap_or_default();
    newest
        .into_iter()
        .chain(std::env::split_paths(&on_path))
        .find(|bin| bin.join("initdb").is_file())
        .ok_or_else(|| {
            io::Error::new(io::ErrorKind::NotFound, "no initdb: install the Postgres server (postgresql)")
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listens(port: u16) -> bool {
        std::net::TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_ok()
    }

    #[test]
    fn a_cluster_listens_until_it_is_dropped_and_can_crash_in_between() {
        let mut cluster = PostgresCluster::start(Durability::None).unwrap();
        let port = cluster.port;
        assert!(listens(port));
        cluster.crash().unwrap();
        assert!(!listens(port));
        cluster.restart().unwrap();
        assert!(listens(port));
        drop(cluster);
        assert!(!listens(port));
    }
}
