//! Running other programs, with errors that say which one failed.

use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, bail};

/// Runs a command to its end.
pub trait Run {
    /// Shows the command, runs it with its output on this terminal, and fails unless it succeeds.
    fn run(&mut self) -> Result<()>;
    /// Runs the command silently and returns what it printed; fails unless it succeeds.
    fn read(&mut self) -> Result<String>;
    /// Whether the program is there and succeeds.
    fn succeeds(&mut self) -> bool;
}

impl Run for Command {
    fn run(&mut self) -> Result<()> {
        let line = line(self);
        println!("$ {line}");
        let status = self.status().with_context(|| format!("cannot run `{line}`"))?;
        if !status.success() {
            bail!("`{line}` failed ({status})");
        }
        Ok(())
    }

    fn read(&mut self) -> Result<String> {
        let line = line(self);
        let Output { status, stdout, stderr } =
            self.stdin(Stdio::null()).output().with_context(|| format!("cannot run `{line}`"))?;
        if !status.success() {
            bail!("`{line}` failed ({status}): {}", String::from_utf8_lossy(&stderr).trim());
        }
        String::from_utf8(stdout).with_context(|| format!("`{line}` printed something else than text"))
    }

    fn succeeds(&mut self) -> bool {
        self.stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .is_ok_and(|status| status.success())
    }
}

/// The command as one would type it.
fn line(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
}
