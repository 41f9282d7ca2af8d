//! What an operator sets, and from where: flags over `ISOBAR_*` environment over a TOML file over defaults.
//!
//! The defaults serve one region on loopback, on an embedded database, open to local use. Any other address is refused
//! until access is controlled or the operator says `--insecure`.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Args;
use isobar_protocol::config::Limits;
use isobar_protocol::ids::RegionName;
use serde::Deserialize;

use crate::telemetry::LogFormat;

/// The flags of `isobar serve`. Every one may also be set as `ISOBAR_<NAME>` in the environment or as `<name>` in
/// the configuration file.
#[derive(Debug, Args, Default)]
pub struct ServeArgs {
    /// Read settings from this TOML file.
    #[arg(long, value_name = "FILE", env = "ISOBAR_CONFIG")]
    pub config: Option<PathBuf>,

    /// Name of this region, as other regions and operators know it [default: local]
    #[arg(long, value_name = "NAME")]
    pub region: Option<String>,

    /// Where documents are kept: sqlite:PATH or postgres://USER@HOST/NAME [default: sqlite:isobar-data/isobar.db]
    #[arg(long, value_name = "URL")]
    pub database: Option<String>,

    /// Address for clients: WebSocket on / and /sync, health checks [default: 127.0.0.1:4400]
    #[arg(long, value_name = "ADDRESS")]
    pub listen: Option<SocketAddr>,

    /// Address for operators: metrics and health checks [default: 127.0.0.1:4402]
    #[arg(long, value_name = "ADDRESS")]
    pub admin_listen: Option<SocketAddr>,

    /// Serve on addresses other than loopback although anybody who reaches them may read and write.
    #[arg(long)]
    pub insecure: bool,

    /// What to log to standard error, such as "info" or "warn,isobar=debug" [default: info]
    #[arg(long, value_name = "FILTER")]
    pub log: Option<String>,

    /// How log lines look: text or json [default: text]
    #[arg(long, value_name = "FORMAT")]
    pub log_format: Option<String>,
}

/// The settings in force.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    pub region: String,
    pub database: String,
    pub listen: SocketAddr,
    pub admin_listen: SocketAddr,
    pub insecure: bool,
    pub log: String,
    pub log_format: LogFormat,
    /// Open client connections at most. Each costs a file descriptor and about 20 KiB.
    pub connections_max: usize,
    /// Documents that one connection may have open.
    pub connection_documents_max: usize,
    /// Largest frame from a client, in bytes.
    pub frame_bytes_max: usize,
    /// Largest single change, in bytes.
    pub change_bytes_max: usize,
    /// Most operations in one change.
    pub change_ops_max: u64,
    /// Memory for documents that nobody has open at the moment, and for those that are: idle ones go when it is exceeded.
    pub resident_bytes_max: usize,
    /// How long a document stays in memory after its last subscriber has left.
    pub idle_seconds: u64,
    /// How long a connection may be silent before it is asked for a sign of life; after three times as long it is closed.
    pub ping_seconds: u64,
    /// How long a shutdown may take: clients are told to come back at moments spread over half of it.
    pub drain_seconds: u64,
}

impl Settings {
    /// Combines flags, environment, file and defaults, and refuses what is unsafe or contradictory.
    pub fn load(args: &ServeArgs) -> anyhow::Result<Self> {
        let limits = Limits::default();
        let mut builder = config::Config::builder()
            .set_default("region", "local")?
            .set_default("database", "sqlite:isobar-data/isobar.db")?
            .set_default("listen", "127.0.0.1:4400")?
            .set_default("admin_listen", "127.0.0.1:4402")?
            .set_default("insecure", false)?
            .set_default("log", "info")?
            .set_default("log_format", "text")?
            .set_default("connections_max", 50_000)?
            .set_default("connection_documents_max", 10_000)?
            .set_default("frame_bytes_max", limits.frame_bytes_max as u64)?
            .set_default("change_bytes_max", limits.change_bytes_max as u64)?
            .set_default("change_ops_max", limits.change_ops_max)?
            .set_default("resident_bytes_max", 512 << 20)?
            .set_default("idle_seconds", 30)?
            .set_default("ping_seconds", 20)?
            .set_default("drain_seconds", 10)?;
        if let Some(path) = &args.config {
            builder = builder.add_source(config::File::from(path.as_path()).format(config::FileFormat::Toml));
        }
        let environment: std::collections::HashMap<String, String> =
            std::env::vars().filter(|(name, _)| Self::is_setting(name)).collect();
        let settings: Self = builder
            .add_source(
                config::Environment::with_prefix("ISOBAR").try_parsing(true).source(Some(environment)),
            )
            .set_override_option("region", args.region.clone())?
            .set_override_option("database", args.database.clone())?
            .set_override_option("listen", args.listen.map(|it| it.to_string()))?
            .set_override_option("admin_listen", args.admin_listen.map(|it| it.to_string()))?
            .set_override_option("insecure", args.insecure.then_some(true))?
            .set_override_option("log", args.log.clone())?
            .set_override_option("log_format", args.log_format.clone())?
            .build()
            .context("the configuration cannot be read")?
            .try_deserialize()
            .context("the configuration is not valid")?;
        settings.check()?;
        Ok(settings)
    }

    /// Variables of this prefix that are settings; `ISOBAR_CONFIG` names the file, and tests have names of their own.
    fn is_setting(name: &str) -> bool {
        const NAMES: [&str; 16] = [
            "REGION",
            "DATABASE",
            "LISTEN",
            "ADMIN_LISTEN",
            "INSECURE",
            "LOG",
            "LOG_FORMAT",
            "CONNECTIONS_MAX",
            "CONNECTION_DOCUMENTS_MAX",
            "FRAME_BYTES_MAX",
            "CHANGE_BYTES_MAX",
            "CHANGE_OPS_MAX",
            "RESIDENT_BYTES_MAX",
            "IDLE_SECONDS",
            "PING_SECONDS",
            "DRAIN_SECONDS",
        ];
        name.strip_prefix("ISOBAR_").is_some_and(|rest| NAMES.contains(&rest))
    }

    fn check(&self) -> anyhow::Result<()> {
        RegionName::new(&self.region).context("the region's name")?;
        for (name, address) in [("listen", self.listen), ("admin_listen", self.admin_listen)] {
            if !address.ip().is_loopback() && !self.insecure {
                bail!(
                    "{name} = {address} is reachable from other machines, and anybody who reaches it may read and \
                     write every document. Listen on 127.0.0.1, or say --insecure if something in front controls access."
                );
            }
        }
        if self.change_bytes_max > self.frame_bytes_max {
            bail!("change_bytes_max is larger than frame_bytes_max: such a change could never arrive");
        }
        if self.ping_seconds == 0 {
            bail!("ping_seconds is 0: every connection would be closed at once");
        }
        if self.frame_bytes_max < 64 << 10 {
            bail!("frame_bytes_max is below 65536: ordinary clients could not synchronise");
        }
        Ok(())
    }

    pub fn limits(&self) -> Limits {
        Limits {
            frame_bytes_max: self.frame_bytes_max,
            change_bytes_max: self.change_bytes_max,
            change_ops_max: self.change_ops_max,
            ..Limits::default()
        }
    }

    pub fn idle(&self) -> Duration {
        Duration::from_secs(self.idle_seconds)
    }

    pub fn ping(&self) -> Duration {
        Duration::from_secs(self.ping_seconds)
    }

    pub fn drain(&self) -> Duration {
        Duration::from_secs(self.drain_seconds)
    }
}
