//! Starting what a node has to do with other regions.

use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::Context;
use isobar_protocol::ids::StorageId;
use isobar_protocol::link::FEATURE_PARTS;
use isobar_protocol::link::handshake::{ClusterId, ClusterKey, Hello, Identity, NodeId, VERSIONS};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::{cancellable, listen};
use crate::config::Settings;
use crate::replication::{Identities, Parts, PeerTls, Replication, accept_links, keep_links};

/// What runs, and where; nothing if the node is to serve alone.
#[derive(Default)]
pub(super) struct Regions {
    pub(super) replication: Option<Replication>,
    pub(super) address: Option<SocketAddr>,
    pub(super) tasks: Vec<JoinHandle<()>>,
}

impl Regions {
    pub(super) async fn start(
        settings: &Settings,
        storage_id: &StorageId,
        parts: Parts,
        stop: &CancellationToken,
    ) -> anyhow::Result<Self> {
        let Some(address) = settings.peer_listener() else { return Ok(Self::default()) };
        let identity = Arc::new(identity(settings, storage_id)?);
        // Before anybody is linked: whoever takes over from this node knows it then.
        parts.storage.register_node(identity.hello.node).await?;
        let tls = Arc::new(PeerTls::load(settings)?);
        let listener = listen(address).await?;
        let address = listener.local_addr()?;
        let (storage, metrics) = (parts.storage.clone(), parts.metrics.clone());
        let own = parts.committer.progress().borrow().iter().map(|log| log.origin).collect();
        let hello = &identity.hello;
        let (replication, work) =
            Replication::new(hello.region.clone(), hello.groups.clone(), own, parts.clone()).await?;
        let spawn = |work| tokio::spawn(cancellable(stop.clone(), work));
        let identities = Identities { node: identity, tls: tls.clone() };
        let accept = accept_links(replication.clone(), identities.clone(), metrics.clone(), listener);
        let keep = keep_links(replication.clone(), identities, metrics.clone(), settings.peers.clone());
        let checks = replication.clone().run_checks(parts, settings.scrub_interval());
        let truncate = replication.clone().truncate_logs(storage, metrics, settings.keep());
        let tasks = vec![
            spawn(boxed(work)),
            spawn(boxed(accept)),
            spawn(boxed(keep)),
            spawn(boxed(truncate)),
            spawn(boxed(checks)),
            spawn(boxed(tls.watch())),
        ];
        Ok(Self { replication: Some(replication), address: Some(address), tasks })
    }
}

fn boxed(
    work: impl Future<Output = ()> + Send + 'static,
) -> std::pin::Pin<Box<dyn Future<Output = ()> + Send>> {
    Box::pin(work)
}

/// What this node says of itself to other regions.
fn identity(settings: &Settings, storage_id: &StorageId) -> anyhow::Result<Identity> {
    let key = settings.cluster_key.as_ref().context(
        "listening for other regions takes the secret that they share: --cluster-key-file or ISOBAR_CLUSTER_KEY",
    )?;
    let region = settings.region_name()?;
    let takes_parts = settings.frame_limits.takes_parts;
    Ok(Identity {
        key: ClusterKey::new(key.as_bytes())?,
        cluster: ClusterId::new(&settings.cluster_id)?,
        versions: VERSIONS,
        hello: Hello {
            groups: settings.groups.of(&region),
            region,
            node: NodeId(uuid::Uuid::new_v4().into_bytes()),
            storage_id: storage_id.clone(),
            features: takes_parts.then(|| FEATURE_PARTS.to_owned()).into_iter().collect(),
            client_url: settings.advertise.clone(),
            // Read anew whenever this node begins to keep the links.
            lineage: None,
        },
    })
}
