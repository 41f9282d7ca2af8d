//! What a node is told of the other regions: where they are, which hold what, and the secret that they share.
//!
//! These are the forms in which an operator writes them, checked. Nothing here is resolved, dialled or proven.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, bail};
use axum::http::Uri;
use isobar_protocol::ids::{PlacementGroup, RegionName};
use serde::Deserialize;
use tokio_rustls::rustls::pki_types::ServerName;

/// The placement group of all regions: of every document whose creator named no other.
pub const DEFAULT_GROUP: &str = "default";

/// Shortest cluster key in bytes: as many as the hash that proofs are made with.
pub const CLUSTER_KEY_BYTES_MIN: usize = 32;

/// Longest cluster key in bytes. More adds nothing, and a file that is larger is not a key.
pub const CLUSTER_KEY_BYTES_MAX: usize = 4096;

/// Longest name of a region, a group or a cluster, in bytes: it is part of metrics' labels and of URLs.
pub const NAME_BYTES_MAX: usize = 64;

/// Most peers that may be configured. Every one is a link; beyond some tens of regions links need another shape.
pub const PEERS_MAX: usize = 64;

/// Most placement groups beside "default": a node has an origin for each group that its region is in.
pub const GROUPS_MAX: usize = 64;

/// Refuses names that could not stand in a URL, a metric's label or a log line.
pub fn check_name(name: &str) -> anyhow::Result<()> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    if name.is_empty() || name.len() > NAME_BYTES_MAX {
        bail!("a name has 1 to {NAME_BYTES_MAX} characters, {name:?} has {}", name.len());
    }
    if !name.bytes().all(allowed) || !name.as_bytes()[0].is_ascii_alphanumeric() {
        bail!(
            "{name:?}: a name consists of letters, digits, '-', '_' and '.', and begins with a letter or digit"
        );
    }
    Ok(())
}

/// The secret that all regions of a cluster share. It is never shown: its `Debug` form hides it.
#[derive(Clone, PartialEq, Eq)]
pub struct ClusterKey(Arc<[u8]>);

impl ClusterKey {
    /// Takes the key as it was written, without the white space around it.
    pub fn new(written: &[u8]) -> anyhow::Result<Self> {
        let key = written.trim_ascii();
        if key.len() < CLUSTER_KEY_BYTES_MIN {
            bail!(
                "the cluster key has {} bytes, it needs at least {CLUSTER_KEY_BYTES_MIN}; \
                 `openssl rand -base64 48` makes one",
                key.len()
            );
        }
        if key.len() > CLUSTER_KEY_BYTES_MAX {
            bail!("the cluster key is longer than {CLUSTER_KEY_BYTES_MAX} bytes");
        }
        Ok(Self(Arc::from(key)))
    }

    pub fn from_file(path: &Path) -> anyhow::Result<Self> {
        let read = || -> std::io::Result<Vec<u8>> {
            let mut written = Vec::new();
            File::open(path)?.take(CLUSTER_KEY_BYTES_MAX as u64 + 1).read_to_end(&mut written)?;
            Ok(written)
        };
        let written =
            read().with_context(|| format!("the cluster key file {} cannot be read", path.display()))?;
        Self::new(&written).with_context(|| format!("the cluster key file {}", path.display()))
    }

    /// A new one that nobody else has, for regions that share a process.
    pub fn random() -> Self {
        let halves = [uuid::Uuid::new_v4().into_bytes(), uuid::Uuid::new_v4().into_bytes()];
        Self(Arc::from(halves.as_flattened()))
    }

    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for ClusterKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ClusterKey(hidden)")
    }
}

/// Where peers are.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum PeerAddress {
    /// One peer: `ws://host:port`, or `wss://host:port` with TLS, as written.
    WebSocket(String),
    /// The peers at all addresses that a name has: `dns://name:port`. They are spoken to as by `ws://`; or, as
    /// `dns+wss://name:port`, with TLS, and every one has a certificate with that name.
    Dns { name: String, port: u16, tls: bool },
}

impl PeerAddress {
    pub fn parse(text: &str) -> anyhow::Result<Self> {
        // A URL may hold a password by mistake: what is refused is not repeated.
        const FORMS: &str =
            "a peer is ws://HOST:PORT, wss://HOST:PORT, dns://NAME:PORT or dns+wss://NAME:PORT";
        let uri: Uri = text.trim().parse().ok().context(FORMS)?;
        let (Some(scheme), Some(authority)) = (uri.scheme_str(), uri.authority()) else { bail!(FORMS) };
        let (host, port) = (authority.host(), authority.port_u16());
        let nothing_more = matches!(uri.path(), "" | "/") && uri.query().is_none();
        let Some(port) = port.filter(|&port| port != 0) else { bail!("{FORMS}: the port is missing") };
        if host.is_empty() || authority.as_str().contains('@') || !nothing_more {
            bail!("{FORMS}, and nothing more");
        }
        match scheme {
            "ws" => Ok(Self::WebSocket(format!("{scheme}://{host}:{port}"))),
            "wss" if tls_name(host).is_some() => Ok(Self::WebSocket(format!("{scheme}://{host}:{port}"))),
            "dns" | "dns+wss"
                if host.bytes().all(|it| it.is_ascii_alphanumeric() || b"-_.".contains(&it))
                    && tls_name(host).is_some() =>
            {
                Ok(Self::Dns { name: host.to_owned(), port, tls: scheme == "dns+wss" })
            }
            _ => bail!(FORMS),
        }
    }

    /// Whether the peer is spoken to with TLS.
    pub fn is_tls(&self) -> bool {
        match self {
            Self::WebSocket(url) => url.starts_with("wss://"),
            Self::Dns { tls, .. } => *tls,
        }
    }
}

impl fmt::Display for PeerAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::WebSocket(url) => f.write_str(url),
            Self::Dns { name, port, tls: false } => write!(f, "dns://{name}:{port}"),
            Self::Dns { name, port, tls: true } => write!(f, "dns+wss://{name}:{port}"),
        }
    }
}

/// The host of a URL as what a certificate may name: a DNS name or an address.
pub fn tls_name(host: &str) -> Option<ServerName<'static>> {
    ServerName::try_from(host.trim_start_matches('[').trim_end_matches(']').to_owned()).ok()
}

/// Refuses what clients could not be sent to.
pub fn check_client_url(text: &str) -> anyhow::Result<()> {
    let uri: Uri = text.parse().ok().context("it is not a URL")?;
    let has_host = uri.authority().is_some_and(|it| !it.host().is_empty() && !it.as_str().contains('@'));
    if !matches!(uri.scheme_str(), Some("ws" | "wss")) || !has_host || uri.query().is_some() {
        bail!("clients are sent to ws://HOST[:PORT][/PATH] or wss://HOST[:PORT][/PATH]");
    }
    Ok(())
}

/// The placement groups that were configured, and the regions of each. The group "default" is all regions and not
/// listed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(try_from = "BTreeMap<String, Vec<String>>")]
pub struct Groups(BTreeMap<PlacementGroup, BTreeSet<RegionName>>);

impl Groups {
    /// Whether documents of this group belong into the region. An unknown group belongs nowhere.
    pub fn holds(&self, group: &PlacementGroup, region: &RegionName) -> bool {
        group.as_str() == DEFAULT_GROUP || self.0.get(group).is_some_and(|regions| regions.contains(region))
    }

    /// The groups whose documents a region holds: "default", and every other that it is in.
    pub fn of(&self, region: &RegionName) -> BTreeSet<PlacementGroup> {
        let default = PlacementGroup::new(DEFAULT_GROUP).expect("the name is neither empty nor long");
        let named = self.0.iter().filter(|(_, regions)| regions.contains(region));
        named.map(|(group, _)| group.clone()).chain([default]).collect()
    }

    /// The regions of a group that was configured.
    pub fn regions(&self, group: &PlacementGroup) -> Option<&BTreeSet<RegionName>> {
        self.0.get(group)
    }
}

impl TryFrom<BTreeMap<String, Vec<String>>> for Groups {
    type Error = String;

    fn try_from(written: BTreeMap<String, Vec<String>>) -> Result<Self, String> {
        // Deserializers show an error without its causes.
        Self::checked(written).map_err(|error| format!("{error:#}"))
    }
}

impl Groups {
    fn checked(written: BTreeMap<String, Vec<String>>) -> anyhow::Result<Self> {
        if written.len() > GROUPS_MAX {
            bail!("groups: there are {}, allowed are {GROUPS_MAX}", written.len());
        }
        let mut groups = BTreeMap::new();
        for (group, regions) in written {
            check_name(&group).context("groups")?;
            if group == DEFAULT_GROUP {
                bail!("groups: \"{DEFAULT_GROUP}\" is all regions and cannot be defined otherwise");
            }
            groups.insert(PlacementGroup::new(&group)?, Self::members(&group, &regions)?);
        }
        Ok(Self(groups))
    }

    fn members(group: &str, written: &[String]) -> anyhow::Result<BTreeSet<RegionName>> {
        if written.is_empty() {
            bail!("groups: {group:?} has no regions");
        }
        let mut members = BTreeSet::new();
        for region in written {
            check_name(region).with_context(|| format!("groups: a region of {group:?}"))?;
            if !members.insert(RegionName::new(region)?) {
                bail!("groups: {group:?} names {region:?} twice");
            }
        }
        Ok(members)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_never_shown() {
        let key = ClusterKey::new(b"  a secret of at least 32 bytes, with white space around\n").unwrap();
        assert_eq!(key.as_bytes(), b"a secret of at least 32 bytes, with white space around");
        assert_eq!(format!("{key:?}"), "ClusterKey(hidden)");
        // Nor in what holds it.
        let settings = crate::config::Settings { cluster_key: Some(key), ..Default::default() };
        assert!(!format!("{settings:?}").contains("secret"));
    }

    #[test]
    fn a_key_that_is_short_is_refused_and_not_repeated() {
        let error = ClusterKey::new(b"   thirty-one-bytes-are-not-enough   ").unwrap_err().to_string();
        assert!(error.contains("31 bytes") && !error.contains("thirty"), "{error}");
        assert!(ClusterKey::new(&[b'x'; 32]).is_ok());
        assert!(ClusterKey::new(&[b'x'; CLUSTER_KEY_BYTES_MAX + 1]).is_err());
        assert_ne!(ClusterKey::random(), ClusterKey::random());
        assert_eq!(ClusterKey::random().as_bytes().len(), CLUSTER_KEY_BYTES_MIN);
    }

    #[test]
    fn peers_are_urls_with_a_port_and_nothing_more() {
        for good in [
            "ws://frankfurt:4401",
            "ws://[2001:db8::1]:443",
            "dns://isobar.internal:4401",
            "wss://frankfurt.example:443",
            "wss://[2001:db8::1]:443",
            "dns+wss://isobar.internal:4401",
        ] {
            assert_eq!(PeerAddress::parse(good).unwrap().is_tls(), good.contains("wss"));
            assert_eq!(PeerAddress::parse(good).unwrap().to_string(), good);
        }
        assert_eq!(PeerAddress::parse(" ws://a:1/ ").unwrap().to_string(), "ws://a:1");
        assert_eq!(
            PeerAddress::parse("dns://name:7").unwrap(),
            PeerAddress::Dns { name: "name".to_owned(), port: 7, tls: false }
        );
        for bad in [
            "",
            "frankfurt",
            "frankfurt:4401",
            "ws://frankfurt",
            "ws://:4401",
            "http://frankfurt:4401",
            "https://frankfurt:4401",
            "wss://frankfurt",
            "wss://a..b:4401",
            "dns+ws://frankfurt:4401",
            "ws://a:0",
            "ws://a:99999",
            "ws://user:password@a:1",
            "ws://a:1/sync",
            "ws://a:1/?x",
            "dns://a,b:1",
        ] {
            let error = PeerAddress::parse(bad).expect_err(bad).to_string();
            assert!(error.contains("dns://NAME:PORT") && !error.contains("password"), "{bad}: {error}");
        }
    }

    #[test]
    fn a_region_holds_the_default_group_and_those_that_name_it() {
        let written = [("eu-only", vec!["frankfurt", "paris"]), ("us", vec!["virginia"])];
        let written = written.map(|(group, regions)| {
            (group.to_owned(), regions.into_iter().map(str::to_owned).collect::<Vec<_>>())
        });
        let groups = Groups::try_from(BTreeMap::from(written)).unwrap();
        let region = |name| RegionName::new(name).unwrap();
        let group = |name| PlacementGroup::new(name).unwrap();
        assert_eq!(groups.of(&region("paris")), BTreeSet::from([group("default"), group("eu-only")]));
        assert_eq!(groups.of(&region("tokyo")), BTreeSet::from([group("default")]));
        assert!(groups.holds(&group("us"), &region("virginia")));
        assert!(!groups.holds(&group("us"), &region("paris")));
        assert!(groups.holds(&group("default"), &region("anywhere")));
        assert!(!groups.holds(&group("nobody-said"), &region("paris")));
        assert_eq!(groups.regions(&group("us")), Some(&BTreeSet::from([region("virginia")])));
    }

    #[test]
    fn names_can_stand_in_urls_and_labels() {
        for good in ["a", "eu-central-1", "FRA_2", "1.b"] {
            check_name(good).unwrap();
        }
        let long = "x".repeat(NAME_BYTES_MAX + 1);
        for bad in ["", "-a", ".", "a b", "a/b", "münchen", "a\n", long.as_str()] {
            check_name(bad).expect_err(bad);
        }
    }
}
