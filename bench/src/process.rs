//! The servers' processes: started, measured from outside, and never left behind.
//!
//! CPU time comes from the kernel's per-process clock (nanoseconds, ended threads included), memory from `/proc`.
//! A server's child processes count as the server.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::time::ClockId;
use nix::unistd::Pid;

/// A child process that is killed when this is dropped, however the benchmark ends.
pub struct ServerProcess {
    child: Child,
    log: std::path::PathBuf,
}

impl ServerProcess {
    /// Starts `command` with both output streams going to the file `log`.
    pub fn start(command: Command, log: &Path) -> Result<Self> {
        let file = File::create(log).with_context(|| format!("creating {}", log.display()))?;
        let mut command = dying_with_parent(command);
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        let child = command.spawn().with_context(|| format!("starting {:?}", command.get_program()))?;
        Ok(Self { child, log: log.to_owned() })
    }

    /// Waits until a line of the log contains `prefix`, and returns what follows it on that line.
    pub async fn wait_for_line(&mut self, prefix: &str, patience: Duration) -> Result<String> {
        let deadline = Instant::now() + patience;
        loop {
            let log = fs::read(&self.log)?;
            let log = String::from_utf8_lossy(&log);
            let complete = log.rfind('\n').map_or("", |end| &log[..end]);
            if let Some(rest) = complete.lines().find_map(|line| line.split_once(prefix)) {
                return Ok(rest.1.split_whitespace().next().unwrap_or_default().to_owned());
            }
            self.check_alive()?;
            if Instant::now() > deadline {
                bail!("no line with {prefix:?} within {patience:?}; last output: {}", self.last_output());
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Waits until the process accepts connections on a loopback port.
    pub async fn wait_for_port(&mut self, port: u16, patience: Duration) -> Result<()> {
        let deadline = Instant::now() + patience;
        while tokio::net::TcpStream::connect(("127.0.0.1", port)).await.is_err() {
            self.check_alive()?;
            if Instant::now() > deadline {
                bail!("port {port} stayed closed for {patience:?}; last output: {}", self.last_output());
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok(())
    }

    /// Fails if the process has ended.
    pub fn check_alive(&mut self) -> Result<()> {
        match self.child.try_wait()? {
            Some(status) => bail!("the server ended with {status}; last output: {}", self.last_output()),
            None => Ok(()),
        }
    }

    fn last_output(&self) -> String {
        let log = fs::read(&self.log).unwrap_or_default();
        let tail = String::from_utf8_lossy(&log[log.len().saturating_sub(600)..]).into_owned();
        tail.trim().replace('\n', " | ")
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// `kill -9`, and waits for the end.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Asks the process to end; kills it if it has not after `patience`.
    pub async fn stop(&mut self, signal: Signal, patience: Duration) {
        let _ = kill(Pid::from_raw(self.pid() as i32), signal);
        let deadline = Instant::now() + patience;
        while Instant::now() < deadline {
            if matches!(self.child.try_wait(), Ok(Some(_))) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        self.kill();
    }
}

impl Drop for ServerProcess {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Wraps a command so that the kernel ends it with this process, where `setpriv` can ask for that: drop guards do
/// not run when the benchmark itself is killed.
fn dying_with_parent(command: Command) -> Command {
    let setpriv = Path::new("/usr/bin/setpriv");
    if !setpriv.exists() {
        return command;
    }
    let mut wrapped = Command::new(setpriv);
    wrapped.args(["--pdeathsig", "KILL", "--"]).arg(command.get_program()).args(command.get_args());
    for (key, value) in command.get_envs() {
        match value {
            Some(value) => wrapped.env(key, value),
            None => wrapped.env_remove(key),
        };
    }
    if let Some(directory) = command.get_current_dir() {
        wrapped.current_dir(directory);
    }
    wrapped
}

/// CPU time that a process and its living descendants have used.
pub fn cpu_time(pid: u32) -> Duration {
    family(pid).into_iter().map(own_cpu_time).sum()
}

/// CPU time that this process, the load generator, has used.
pub fn cpu_time_of_this() -> Duration {
    own_cpu_time(std::process::id())
}

fn own_cpu_time(pid: u32) -> Duration {
    ClockId::pid_cpu_clock_id(Pid::from_raw(pid as i32))
        .and_then(|clock| clock.now())
        .map(Duration::from)
        .unwrap_or_default()
}

/// Resident memory of a process and its living descendants, in bytes. Memory that they share counts once each.
pub fn resident_bytes(pid: u32) -> u64 {
    family(pid).into_iter().map(own_resident_bytes).sum()
}

fn own_resident_bytes(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kibibytes = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kibibytes.unwrap_or(0) * 1024
}

/// A process and its descendants, itself first.
fn family(pid: u32) -> Vec<u32> {
    let mut members = vec![pid];
    let mut next = 0;
    while next < members.len() {
        let tasks = fs::read_dir(format!("/proc/{}/task", members[next])).into_iter().flatten().flatten();
        for task in tasks {
            let children = fs::read_to_string(task.path().join("children")).unwrap_or_default();
            members.extend(children.split_whitespace().filter_map(|child| child.parse::<u32>().ok()));
        }
        next += 1;
    }
    members
}

/// A port that was free a moment ago, for servers that cannot choose one themselves.
pub fn free_port() -> Result<u16> {
    Ok(std::net::TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port())
}
