//! A limit of what one peer is sent: what goes first under it, and that everything goes.

use std::collections::BTreeMap;
use std::num::NonZeroU64;

use automerge::transaction::Transactable;
use automerge::{AutoCommit, ROOT};
use isobar::config::{ClusterKey, Groups, PeerAddress, Settings};
use isobar::storage::memory::MemoryStorage;
use isobar_protocol::ids::Seq;

use crate::support::{Client, Node, document_id, eventually, number, put, settings};

/// Changes of the backlog: most of them are sent as catching up, and all of those fit the window for it.
const BACKLOG: u64 = 12_000;

/// A limit under which the backlog takes some seconds.
const BYTES_PER_SECOND: u64 = 512 << 10;

fn region(name: &str, key: &ClusterKey, peer: Option<&Node>) -> Settings {
    let regions = ["frankfurt", "virginia"].map(str::to_owned).to_vec();
    let groups = BTreeMap::from([("other".to_owned(), regions)]);
    let address = |node: &Node| PeerAddress::WebSocket(format!("ws://{}", node.peers.unwrap()));
    Settings {
        region: name.to_owned(),
        // A log of its own, so that its entries may pass those of the backlog.
        groups: Groups::try_from(groups).unwrap(),
        cluster_key: Some(key.clone()),
        peer_listen: Some("127.0.0.1:0".parse().unwrap()),
        peers: peer.map(address).into_iter().collect(),
        ..settings()
    }
}

/// A document of so many changes that hardly can be compressed.
fn backlog() -> AutoCommit {
    let mut doc = AutoCommit::new();
    for _ in 0..BACKLOG {
        let text: String = (0..6).map(|_| uuid::Uuid::new_v4().simple().to_string()).collect();
        doc.put(ROOT, "text", text).unwrap();
        doc.commit();
    }
    doc
}

/// How far a node has the log that another writes for the group of all.
async fn stored(node: &Node, writer: &Node) -> Seq {
    let origin = writer.parts.committer.progress().borrow().iter().max_by_key(|log| log.seq).unwrap().origin;
    let origins = node.parts.storage.origins().await.unwrap();
    origins.iter().find(|it| it.id == origin).map_or(Seq(0), |it| it.seq)
}

#[tokio::test]
async fn under_a_limit_a_live_edit_passes_a_backlog_and_everything_arrives() {
    let key = ClusterKey::random();
    let limited =
        Settings { peer_rate_limit: NonZeroU64::new(BYTES_PER_SECOND), ..region("frankfurt", &key, None) };
    let frankfurt = Node::start_with(limited, MemoryStorage::new()).await;
    let (long, live) = (document_id("long"), document_id("live"));
    let mut author = Client::join(frankfurt.clients, "author").await;
    author.share(&long, backlog()).await;
    author.in_step(&long).await;
    let mut writer = Client::join_as(frankfurt.clients, "?group=other", "writer", &[]).await.unwrap();
    writer.share(&live, AutoCommit::new()).await;
    writer.write(&live, |doc| put(doc, "edits", 1)).await;

    let virginia = Node::start_with(region("virginia", &key, Some(&frankfurt)), MemoryStorage::new()).await;
    let mut reader = Client::join(virginia.clients, "reader").await;
    eventually("the backlog begins to arrive", async || stored(&virginia, &frankfurt).await > Seq(0)).await;
    writer.write(&live, |doc| put(doc, "edits", 2)).await;
    reader.fetch(&live).await;
    reader.until("the edit comes", |it| number(&it.open(&live).doc, "edits") == Some(2)).await;
    let lag_bytes = "isobar_link_lag_bytes{region=\"virginia\"}";
    eventually("it is seen how many bytes the other region lacks", async || {
        frankfurt.metric(lag_bytes).await > 100_000.0
    })
    .await;
    let so_far = stored(&virginia, &frankfurt).await;
    assert!(so_far < Seq(BACKLOG), "the edit came behind the whole backlog");

    eventually("the backlog arrives", async || stored(&virginia, &frankfurt).await == Seq(BACKLOG)).await;
    eventually("the other region lacks nothing", async || frankfurt.metric(lag_bytes).await == 0.0).await;
    reader.fetch(&long).await;
    let heads = author.open(&long).heads();
    reader.until("the long document is the same", |it| it.open(&long).heads() == heads).await;
    let sent = frankfurt.metric("isobar_link_region_bytes_sent_total{region=\"virginia\"}").await;
    assert!(sent > BACKLOG as f64 * 100.0, "{sent} bytes");
    let held = "isobar_link_throttled_microseconds_total{region=\"virginia\"}";
    assert!(frankfurt.metric(held).await > 0.0);
    assert_eq!(virginia.metric("isobar_link_throttled_microseconds_total{region=\"frankfurt\"}").await, 0.0);
}
