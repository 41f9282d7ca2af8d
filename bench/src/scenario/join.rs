//! A client that knows nothing fetches the 260,000-edit document.

use anyhow::Result;

use crate::results::Sample;
use crate::servers::{Environment, Kind};

pub async fn run(_environment: &Environment, _kind: Kind) -> Result<Sample> {
    anyhow::bail!("not written yet")
}
