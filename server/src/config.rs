//! What an operator sets, and from where: flags over `ISOBAR_*` environment over a TOML file over defaults.
//!
//! The defaults serve one region on loopback, on an embedded database, open to local use. Any other address is refused
//! until access is controlled or the operator says `--insecure`; other regions are spoken to with a cluster key only.
//! The key comes from a file of its own or from the environment, never from the configuration file.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::num::NonZeroU64;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Args;
use config::builder::{ConfigBuilder, DefaultState};
use isobar_protocol::config::{CHANGE_BYTES_CEILING, Limits};
use isobar_protocol::ids::RegionName;
use serde::{Deserialize, Deserializer};

pub use crate::config::cluster::{ClusterKey, Groups, PeerAddress};
use crate::config::cluster::{PEERS_MAX, check_client_url, check_name};
use crate::replication::{FrameLimits, Keep};
use crate::telemetry::LogFormat;

pub mod cluster;

/// Where other regions reach this one, unless it is said otherwise.
const PEER_LISTEN_DEFAULT: SocketAddr =
    SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 4401);

/// Smallest limit of what is sent to a peer, in bytes a second: a frame of entries then takes four seconds at most.
const PEER_RATE_LIMIT_MIN: u64 = 64 << 10;

/// Longest time between two checks in seconds, a year: beyond it clocks cannot count.
const SCRUB_SECONDS_MAX: u64 = 365 * 24 * 3600;

/// The variable that holds the regions' shared secret.
const CLUSTER_KEY_VARIABLE: &str = "ISOBAR_CLUSTER_KEY";

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

    /// Serve clients and operators on addresses other than loopback although anybody who reaches them may read and write.
    #[arg(long)]
    pub insecure: bool,

    /// Another region to exchange changes with; give it once for each: ws://HOST:PORT, or dns://NAME:PORT
    /// for every address of a DNS name; with TLS wss://HOST:PORT, or dns+wss://NAME:PORT. Needs a cluster key
    #[arg(long = "peer", value_name = "URL")]
    pub peers: Vec<String>,

    /// Address for other regions; opened if there are peers, or if it is given. Needs a cluster key
    /// [default: 127.0.0.1:4401]
    #[arg(long, value_name = "ADDRESS")]
    pub peer_listen: Option<SocketAddr>,

    /// Certificate of this node for other regions, PEM, with those of the authorities between: the peer listener speaks
    /// TLS then, and nothing else
    #[arg(long, value_name = "FILE")]
    pub peer_tls_cert: Option<PathBuf>,

    /// The private key of that certificate, PEM, without a password
    #[arg(long, value_name = "FILE")]
    pub peer_tls_key: Option<PathBuf>,

    /// Certificates of the authorities that peers' certificates have to come from, PEM; the peer listener demands one from
    /// everybody then [default: the system's authorities for peers that are dialled, and no demand]
    #[arg(long, value_name = "FILE")]
    pub peer_tls_ca: Option<PathBuf>,

    /// Bytes a second that are sent to one peer at most, as they leave, compressed; at least 65536 [default: no limit]
    #[arg(long, value_name = "BYTES_PER_SECOND")]
    pub peer_rate_limit: Option<u64>,

    /// Where clients reach this region, as clients of other regions are told: ws://HOST:PORT or wss://HOST
    #[arg(long, value_name = "URL")]
    pub advertise: Option<String>,

    /// Name of the cluster; regions of another cluster are refused, even with the same key [default: isobar]
    #[arg(long, value_name = "NAME")]
    pub cluster_id: Option<String>,

    /// File with the secret that all regions of the cluster share, at least 32 bytes, made for instance with
    /// "openssl rand -base64 48". The variable ISOBAR_CLUSTER_KEY may hold the secret itself instead
    #[arg(long, value_name = "FILE")]
    pub cluster_key_file: Option<PathBuf>,

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
    /// As it was given; [`Settings::peer_listener`] says what follows.
    pub peer_listen: Option<SocketAddr>,
    #[serde(deserialize_with = "peers_but_empty_ones")]
    pub peers: Vec<PeerAddress>,
    /// Where clients reach this region, as clients of other regions are told.
    pub advertise: Option<String>,
    /// Keeps one set of regions from talking to another, such as staging to production.
    pub cluster_id: String,
    /// Where the key was to be read from; it is in `cluster_key` then.
    pub cluster_key_file: Option<PathBuf>,
    #[serde(skip)]
    pub cluster_key: Option<ClusterKey>,
    /// The certificate for links, its key, and the authorities of peers; see `replication::PeerTls`.
    pub peer_tls_cert: Option<PathBuf>,
    pub peer_tls_key: Option<PathBuf>,
    pub peer_tls_ca: Option<PathBuf>,
    /// Bytes a second that are sent to one peer at most.
    pub peer_rate_limit: Option<NonZeroU64>,
    /// What fits through links: no setting, but tests make do with less.
    #[serde(skip)]
    pub frame_limits: FrameLimits,
    pub groups: Groups,
    /// How long log entries are kept after every region has acknowledged them.
    pub log_keep_hours: u64,
    /// How often log entries are given up.
    pub log_truncate_seconds: u64,
    /// How long a region that is not linked is waited for before log entries are given up.
    pub peer_silence_hours: u64,
    /// How often this region is compared with the others; 0: on demand only.
    pub scrub_minutes: u64,
    /// Stored bytes that are hashed again in a second; 0: none.
    pub verify_rate: u64,
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

impl Default for Settings {
    /// What is in force when nothing is set; neither the environment nor a file is looked at.
    fn default() -> Self {
        let defaults = defaults().and_then(|builder| builder.build()).and_then(|it| it.try_deserialize());
        defaults.expect("the defaults are valid settings")
    }
}

impl Settings {
    /// Combines flags, environment, file and defaults, and refuses what is unsafe or contradictory.
    pub fn load(args: &ServeArgs) -> anyhow::Result<Self> {
        let mut builder = defaults()?;
        if let Some(path) = &args.config {
            builder = builder.add_source(config::File::from(path.as_path()).format(config::FileFormat::Toml));
        }
        let environment = config::Environment::with_prefix("ISOBAR")
            .try_parsing(true)
            .list_separator(",")
            .with_list_parse_key("peers")
            .source(Some(settings_in_environment()?));
        let combined = with_flags(builder.add_source(environment), args)?
            .build()
            .context("the configuration cannot be read")?;
        if combined.get::<config::Value>("cluster_key").is_ok() {
            bail!(
                "cluster_key does not belong into the configuration file: write the key into a file of its own and \
                 name it with cluster_key_file, or set {CLUSTER_KEY_VARIABLE}"
            );
        }
        let mut settings: Self = combined.try_deserialize().context("the configuration is not valid")?;
        settings.check()?;
        settings.cluster_key = settings.read_cluster_key(args)?;
        settings.check_cluster()?;
        Ok(settings)
    }

    fn check(&self) -> anyhow::Result<()> {
        check_name(&self.region).context("the region's name")?;
        for (name, address) in [("listen", self.listen), ("admin_listen", self.admin_listen)] {
            if !address.ip().is_loopback() && !self.insecure {
                bail!(
                    "{name} = {address} is reachable from other machines, and anybody who reaches it may read and \
                     write every document. Listen on 127.0.0.1, or say --insecure if something in front controls access."
                );
            }
        }
        if self.change_bytes_max > CHANGE_BYTES_CEILING {
            bail!(
                "change_bytes_max is larger than {CHANGE_BYTES_CEILING}: such a change could not be read back"
            );
        }
        if self.change_bytes_max > self.frame_bytes_max {
            bail!("change_bytes_max is larger than frame_bytes_max: such a change could never arrive");
        }
        if self.ping_seconds == 0 {
            bail!("ping_seconds is 0: every connection would be closed at once");
        }
        if self.log_truncate_seconds == 0 {
            bail!("log_truncate_seconds is 0: nothing else would be done");
        }
        if self.peer_silence_hours == 0 {
            bail!(
                "peer_silence_hours is 0: every interruption would make the other regions fetch whole documents"
            );
        }
        if self.frame_bytes_max < 64 << 10 {
            bail!("frame_bytes_max is below 65536: ordinary clients could not synchronise");
        }
        Ok(())
    }

    /// The key from where the strongest setting says it is: the flag, the environment, the file.
    fn read_cluster_key(&self, args: &ServeArgs) -> anyhow::Result<Option<ClusterKey>> {
        if args.cluster_key_file.is_none()
            && let Some(key) = std::env::var_os(CLUSTER_KEY_VARIABLE)
        {
            if std::env::var_os("ISOBAR_CLUSTER_KEY_FILE").is_some() {
                bail!("{CLUSTER_KEY_VARIABLE} and ISOBAR_CLUSTER_KEY_FILE are both set: which one is meant?");
            }
            return ClusterKey::new(key.as_encoded_bytes()).context(CLUSTER_KEY_VARIABLE).map(Some);
        }
        let path = args.cluster_key_file.as_deref().or(self.cluster_key_file.as_deref());
        path.map(ClusterKey::from_file).transpose()
    }

    fn check_cluster(&self) -> anyhow::Result<()> {
        check_name(&self.cluster_id).context("cluster_id")?;
        if let Some(url) = &self.advertise {
            check_client_url(url).context("advertise")?;
        }
        if self.peers.len() > PEERS_MAX {
            bail!("there are {} peers, allowed are {PEERS_MAX}", self.peers.len());
        }
        if self.peer_rate_limit.is_some_and(|limit| limit.get() < PEER_RATE_LIMIT_MIN) {
            bail!(
                "peer_rate_limit is below {PEER_RATE_LIMIT_MIN} bytes a second: an edit would wait for seconds behind \
                 a single frame"
            );
        }
        match (&self.peer_tls_cert, &self.peer_tls_key) {
            (Some(_), None) => {
                bail!("peer_tls_cert is set, but not peer_tls_key: a certificate is of no use without")
            }
            (None, Some(_)) => bail!("peer_tls_key is set, but not peer_tls_cert, which it belongs to"),
            _ => {}
        }
        if self.cluster_key.is_some() {
            return Ok(());
        }
        const SET_IT: &str = "Name a file that holds it with --cluster-key-file, or set ISOBAR_CLUSTER_KEY: the same \
                              secret of at least 32 bytes in every region.";
        if let Some(peer) = self.peers.first() {
            bail!(
                "peer {peer} is configured, but no cluster key, which regions prove themselves with. {SET_IT}"
            );
        }
        if let Some(address) = self.peer_listen {
            bail!("peer_listen = {address} is for other regions, but there is no cluster key. {SET_IT}");
        }
        Ok(())
    }

    /// Where to listen for other regions: nowhere, if there are none and nobody asked for it.
    pub fn peer_listener(&self) -> Option<SocketAddr> {
        self.peer_listen.or((!self.peers.is_empty()).then_some(PEER_LISTEN_DEFAULT))
    }

    /// The name of this region.
    pub fn region_name(&self) -> anyhow::Result<RegionName> {
        RegionName::new(&self.region).context("the region's name")
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

    /// What of the logs is kept for how long.
    pub fn keep(&self) -> Keep {
        let hours = |hours: u64| Duration::from_secs(hours.saturating_mul(3600));
        Keep {
            every: Duration::from_secs(self.log_truncate_seconds),
            entries: hours(self.log_keep_hours),
            silence: hours(self.peer_silence_hours),
        }
    }

    /// How often regions are compared; nothing: only when somebody asks.
    pub fn scrub_interval(&self) -> Option<Duration> {
        let minutes = NonZeroU64::new(self.scrub_minutes)?;
        Some(Duration::from_secs(minutes.get().saturating_mul(60).min(SCRUB_SECONDS_MAX)))
    }
}

type Builder = ConfigBuilder<DefaultState>;

/// Every setting that has a default.
fn defaults() -> Result<Builder, config::ConfigError> {
    let limits = Limits::default();
    config::Config::builder()
        .set_default("region", "local")?
        .set_default("database", "sqlite:isobar-data/isobar.db")?
        .set_default("listen", "127.0.0.1:4400")?
        .set_default("admin_listen", "127.0.0.1:4402")?
        .set_default("insecure", false)?
        .set_default("log", "info")?
        .set_default("log_format", "text")?
        .set_default("peers", Vec::<String>::new())?
        .set_default("cluster_id", "isobar")?
        .set_default("groups", config::Map::<String, config::Value>::new())?
        .set_default("log_keep_hours", 24)?
        .set_default("log_truncate_seconds", 60)?
        .set_default("peer_silence_hours", 7 * 24)?
        .set_default("scrub_minutes", 60)?
        .set_default("verify_rate", 1 << 20)?
        .set_default("connections_max", 50_000)?
        .set_default("connection_documents_max", 10_000)?
        .set_default("frame_bytes_max", limits.frame_bytes_max as u64)?
        .set_default("change_bytes_max", limits.change_bytes_max as u64)?
        .set_default("change_ops_max", limits.change_ops_max)?
        .set_default("resident_bytes_max", 512 << 20)?
        .set_default("idle_seconds", 30)?
        .set_default("ping_seconds", 20)?
        .set_default("drain_seconds", 10)
}

fn with_flags(builder: Builder, args: &ServeArgs) -> Result<Builder, config::ConfigError> {
    let path = |path: &Option<PathBuf>| path.as_ref().map(|path| path.to_string_lossy().into_owned());
    builder
        .set_override_option("region", args.region.clone())?
        .set_override_option("database", args.database.clone())?
        .set_override_option("listen", args.listen.map(|it| it.to_string()))?
        .set_override_option("admin_listen", args.admin_listen.map(|it| it.to_string()))?
        .set_override_option("insecure", args.insecure.then_some(true))?
        .set_override_option("peers", (!args.peers.is_empty()).then(|| args.peers.clone()))?
        .set_override_option("peer_listen", args.peer_listen.map(|it| it.to_string()))?
        .set_override_option("advertise", args.advertise.clone())?
        .set_override_option("cluster_id", args.cluster_id.clone())?
        .set_override_option("cluster_key_file", path(&args.cluster_key_file))?
        .set_override_option("peer_rate_limit", args.peer_rate_limit)?
        .set_override_option("peer_tls_cert", path(&args.peer_tls_cert))?
        .set_override_option("peer_tls_key", path(&args.peer_tls_key))?
        .set_override_option("peer_tls_ca", path(&args.peer_tls_ca))?
        .set_override_option("log", args.log.clone())?
        .set_override_option("log_format", args.log_format.clone())
}

/// The variables of our prefix that are settings. `ISOBAR_CONFIG` names the file, `ISOBAR_CLUSTER_KEY` is a secret that
/// must not appear in messages about settings, and tests have names of their own.
fn settings_in_environment() -> anyhow::Result<HashMap<String, String>> {
    const NAMES: [&str; 28] = [
        "REGION",
        "DATABASE",
        "LISTEN",
        "ADMIN_LISTEN",
        "INSECURE",
        "LOG",
        "LOG_FORMAT",
        "PEERS",
        "PEER_LISTEN",
        "ADVERTISE",
        "CLUSTER_ID",
        "CLUSTER_KEY_FILE",
        "PEER_RATE_LIMIT",
        "PEER_TLS_CERT",
        "PEER_TLS_KEY",
        "PEER_TLS_CA",
        "LOG_KEEP_HOURS",
        "SCRUB_MINUTES",
        "VERIFY_RATE",
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
    let mut set = HashMap::new();
    for name in NAMES.map(|name| format!("ISOBAR_{name}")) {
        match std::env::var(&name) {
            Ok(value) => drop(set.insert(name, value)),
            Err(std::env::VarError::NotPresent) => {}
            Err(std::env::VarError::NotUnicode(_)) => bail!("{name} is not text"),
        }
    }
    Ok(set)
}

/// A list that was written with commas may have nothing between them.
fn peers_but_empty_ones<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<PeerAddress>, D::Error> {
    let written = Vec::<String>::deserialize(deserializer)?;
    let peers = written.iter().filter(|it| !it.trim().is_empty()).map(|it| PeerAddress::parse(it));
    peers.collect::<anyhow::Result<_>>().map_err(serde::de::Error::custom)
}
