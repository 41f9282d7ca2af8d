//! `cargo xtask fuzz`.

use anyhow::Result;

/// Feed the decoders with untrusted bytes.
#[derive(clap::Args)]
pub struct Arguments {}

pub fn run(_arguments: &Arguments) -> Result<()> {
    Ok(())
}

pub fn briefly() -> Result<()> {
    Ok(())
}
