//! Who links to whom when regions dial each other.

use std::time::Duration;

use isobar::config::ClusterKey;
use isobar::demo::links::{Distance, Proxy};
use isobar::storage::memory::MemoryStorage;
use isobar_protocol::replica::LinkId;
use tokio::net::TcpListener;

use crate::siblings::region_at;
use crate::support::{Node, eventually};

fn link(node: &Node) -> Option<LinkId> {
    node.parts.replication.as_ref().unwrap().regions().iter().find_map(|region| region.link)
}

#[tokio::test]
async fn who_dials_without_knowing_that_it_is_linked_leaves_the_link_that_is_up() {
    let key = ClusterKey::random();
    // A port that is free for the node that is started last.
    let near_peers = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let way = Proxy::start(near_peers, Distance::of(Duration::ZERO)).await.unwrap();
    way.refuse();
    // Of two links that are opened at once the one that "far" dialled would stay.
    let far = Node::start_with(region_at("far", &key, &[way.address()]), MemoryStorage::new()).await;
    let mut settings = region_at("near", &key, &[far.peers.unwrap()]);
    settings.peer_listen = Some(near_peers);
    let near = Node::start_with(settings, MemoryStorage::new()).await;
    eventually("both are linked", async || link(&far).is_some() && link(&near).is_some()).await;
    let before = (link(&far), link(&near));

    way.heal();
    eventually("far has dialled", async || far.metric("isobar_links_superfluous_total").await >= 1.0).await;
    assert_eq!((link(&far), link(&near)), before);
    eventually("it is closed", async || way.delivered().connections == 0).await;
    assert_eq!((link(&far), link(&near)), before);
    assert_eq!(near.metric("isobar_links_refused_total").await, 0.0, "it is no stranger");
}
