//! Placement groups: what is of one reaches its regions and nobody else.

use std::collections::BTreeSet;

use automerge::AutoCommit;
use isobar::config::{ClusterKey, Groups, PeerAddress, Settings};
use isobar::documents::DeleteError;
use isobar::replication::Outcome;
use isobar::scrub::Surveyor;
use isobar::storage::Storage;
use isobar::storage::memory::MemoryStorage;
use isobar_protocol::ids::{DocumentId, PlacementGroup, Seq};
use isobar_protocol::link::Fingerprints;
use isobar_protocol::log::decode_run;
use isobar_protocol::wire::{EXTRA_ELSEWHERE, ElsewhereFrame};
use tokio_tungstenite::tungstenite;

use crate::support::{Client, Heard, Node, document_id, eventually, get, in_time, number, put, settings};

mod twice;

/// Two regions of the group "eu" and one outside, all linked.
struct Cluster {
    frankfurt: Node,
    paris: Node,
    tokyo: Node,
    /// Tokyo's.
    outside: MemoryStorage,
}

fn region(name: &str, key: &ClusterKey, peers: &[&Node]) -> Settings {
    let regions = vec!["frankfurt".to_owned(), "paris".to_owned()];
    let address = |node: &&Node| PeerAddress::WebSocket(format!("ws://{}", node.peers.unwrap()));
    Settings {
        region: name.to_owned(),
        groups: Groups::try_from(
            [("eu".to_owned(), regions)].into_iter().collect::<std::collections::BTreeMap<_, _>>(),
        )
        .unwrap(),
        cluster_key: Some(key.clone()),
        peer_listen: Some("127.0.0.1:0".parse().unwrap()),
        advertise: Some(format!("ws://{name}.example")),
        peers: peers.iter().map(address).collect(),
        ..settings()
    }
}

/// Waits until a region is linked to so many others.
async fn linked(node: &Node, count: usize) {
    let replication = node.parts.replication.as_ref().unwrap();
    eventually("the regions are linked", async || {
        replication.known().iter().filter(|it| it.up).count() == count
    })
    .await;
}

impl Cluster {
    async fn start() -> Self {
        let key = ClusterKey::random();
        let outside = MemoryStorage::new();
        let frankfurt = Node::start_with(region("frankfurt", &key, &[]), MemoryStorage::new()).await;
        let paris = Node::start_with(region("paris", &key, &[&frankfurt]), MemoryStorage::new()).await;
        let peers = [&frankfurt, &paris];
        let tokyo = Node::start_with(region("tokyo", &key, &peers), outside.reopen()).await;
        let cluster = Self { frankfurt, paris, tokyo, outside };
        for node in [&cluster.frankfurt, &cluster.paris, &cluster.tokyo] {
            linked(node, 2).await;
        }
        cluster
    }

    /// Everything that Tokyo has stored of a document, and every log that is not its own.
    async fn leaked(&self, document: &DocumentId) -> Vec<String> {
        let mut leaked = Vec::new();
        for listed in self.outside.list_documents(None, 1_000).await.unwrap() {
            leaked.extend((listed.id == *document).then(|| "a row".to_owned()));
        }
        for origin in self.outside.origins().await.unwrap() {
            leaked.extend((origin.group.as_str() == "eu").then(|| format!("origin {origin:?}")));
            for run in self.outside.read_log(origin.id, Seq(0), usize::MAX).await.unwrap() {
                let entries = decode_run(&run.body).unwrap();
                leaked
                    .extend(entries.iter().filter(|it| it.document == *document).map(|it| format!("{it:?}")));
            }
        }
        leaked
    }
}

async fn shared_doc(client: &mut Client, document: &DocumentId) {
    let mut doc = AutoCommit::new();
    put(&mut doc, "key", 1);
    client.share(document, doc).await;
    client.in_step(document).await;
}

#[tokio::test]
async fn a_group_is_stored_by_its_regions_and_nothing_of_it_outside() {
    let cluster = Cluster::start().await;
    let (secret, common) = (document_id("secret"), document_id("common"));
    let mut author = Client::join_as(cluster.frankfurt.clients, "?group=eu", "author", &[]).await.unwrap();
    // Somebody else waited for it before, and did not choose the group of what others create.
    let mut early = Client::join(cluster.frankfurt.clients, "early").await;
    early.share(&secret, AutoCommit::new()).await;
    early.until("it is not there yet", |it| it.open(&secret).unavailable > 0).await;
    shared_doc(&mut author, &secret).await;
    let group = cluster.frankfurt.parts.storage.load_document(&secret).await.unwrap().unwrap().group;
    assert_eq!(group.as_str(), "eu");
    // A document keeps its group, whoever writes on.
    early.until("the document comes", |it| number(&it.open(&secret).doc, "key") == Some(1)).await;
    early.write(&secret, |doc| put(doc, "key", 2)).await;
    let mut reader = Client::join(cluster.paris.clients, "reader").await;
    reader.fetch(&secret).await;
    reader.until("the change comes", |it| number(&it.open(&secret).doc, "key") == Some(2)).await;

    // What is written afterwards and belongs to all has arrived: whatever was to leak has had its time.
    let mut other = Client::join(cluster.frankfurt.clients, "other").await;
    shared_doc(&mut other, &common).await;
    let mut far = Client::join(cluster.tokyo.clients, "far").await;
    far.fetch(&common).await;
    far.share(&secret, AutoCommit::new()).await;
    far.until("it is not to be had", |it| it.open(&secret).unavailable > 0).await;
    eventually("the common one is stored", async || {
        cluster.outside.load_document(&common).await.unwrap().is_some()
    })
    .await;
    assert_eq!(cluster.leaked(&secret).await, Vec::<String>::new());
    assert_eq!(far.open(&secret).received.iter().map(|it| it.0 + it.1).sum::<usize>(), 0);

    // Nobody's presence in it is seen outside, nor the outsider's inside; in the group it is.
    author.ephemeral(&secret, 1, b"inside").await;
    far.ephemeral(&secret, 1, b"outside").await;
    let mut count = 1;
    in_time("presence crosses the group", async {
        loop {
            count += 1;
            author.ephemeral(&secret, count, b"inside").await;
            other.ephemeral(&common, count, b"common").await;
            let heard = tokio::time::timeout(std::time::Duration::from_millis(200), reader.hear()).await;
            if let Ok(Heard::Ephemeral { data, .. }) = heard {
                assert_eq!(data, b"inside");
                break;
            }
        }
    })
    .await;
    in_time("presence of the common document comes outside", async {
        loop {
            count += 1;
            other.ephemeral(&common, count, b"common").await;
            let heard = tokio::time::timeout(std::time::Duration::from_millis(200), far.hear()).await;
            if let Ok(Heard::Ephemeral { data, .. }) = heard {
                assert_eq!(data, b"common");
                break;
            }
        }
    })
    .await;
}

#[tokio::test]
async fn a_client_outside_is_told_where_to_go_if_it_wants_to_hear() {
    let cluster = Cluster::start().await;
    let secret = document_id("secret");
    let mut author = Client::join_as(cluster.paris.clients, "?group=eu", "author", &[]).await.unwrap();
    shared_doc(&mut author, &secret).await;

    let extras = [EXTRA_ELSEWHERE];
    let mut told = Client::join_as(cluster.tokyo.clients, "", "told", &extras).await.unwrap();
    told.share(&secret, AutoCommit::new()).await;
    let mut frames = Vec::new();
    while !matches!(frames.last(), Some(Heard::Unavailable(_))) {
        frames.push(told.hear().await);
    }
    let urls = vec!["ws://frankfurt.example".to_owned(), "ws://paris.example".to_owned()];
    let elsewhere = Heard::Elsewhere(ElsewhereFrame { document: secret.clone(), urls });
    assert_eq!(frames, [elsewhere, Heard::Unavailable(secret.clone())]);

    let mut stock = Client::join(cluster.tokyo.clients, "stock").await;
    stock.share(&secret, AutoCommit::new()).await;
    assert_eq!(stock.hear().await, Heard::Unavailable(secret.clone()));
    assert_eq!(cluster.leaked(&secret).await, Vec::<String>::new());
}

#[tokio::test]
async fn a_region_that_says_of_itself_that_it_is_in_a_group_is_not_believed() {
    let key = ClusterKey::random();
    let outside = MemoryStorage::new();
    let frankfurt = Node::start_with(region("frankfurt", &key, &[]), MemoryStorage::new()).await;
    let mut settings = region("tokyo", &key, &[&frankfurt]);
    let claimed = vec!["frankfurt".to_owned(), "tokyo".to_owned()];
    settings.groups =
        Groups::try_from(std::collections::BTreeMap::from([("eu".to_owned(), claimed)])).unwrap();
    let tokyo = Node::start_with(settings, outside.reopen()).await;
    linked(&tokyo, 1).await;
    let (secret, common) = (document_id("secret"), document_id("common"));
    let mut author = Client::join_as(frankfurt.clients, "?group=eu", "author", &[]).await.unwrap();
    shared_doc(&mut author, &secret).await;
    let mut other = Client::join(frankfurt.clients, "other").await;
    shared_doc(&mut other, &common).await;
    let mut far = Client::join_as(tokyo.clients, "?group=eu", "far", &[]).await.unwrap();
    far.fetch(&common).await;
    far.share(&secret, AutoCommit::new()).await;
    far.until("it is not to be had", |it| it.open(&secret).unavailable > 0).await;
    let cluster_view = outside.load_document(&secret).await.unwrap();
    assert!(cluster_view.is_none(), "{cluster_view:?}");
    assert!(
        outside
            .origins()
            .await
            .unwrap()
            .iter()
            .all(|it| it.group.as_str() != "eu" || it.region.as_str() == "tokyo")
    );
}

#[tokio::test]
async fn a_document_is_deleted_in_the_group_that_it_is_of() {
    let store = MemoryStorage::new();
    let key = ClusterKey::random();
    let node = Node::start_with(region("frankfurt", &key, &[]), store.reopen()).await;
    let (secret, unknown) = (document_id("secret"), document_id("unknown"));
    let mut author = Client::join_as(node.clients, "?group=eu", "author", &[]).await.unwrap();
    shared_doc(&mut author, &secret).await;
    // That somebody of a group waits for a document does not make it one of that group.
    author.share(&unknown, AutoCommit::new()).await;
    author.until("it is not there", |it| it.open(&unknown).unavailable > 0).await;
    let delete =
        async |node: &Node, id: &DocumentId| node.parts.documents.delete(id, &node.parts.committer).await;
    delete(&node, &unknown).await.unwrap();
    let group = store.load_document(&unknown).await.unwrap().unwrap().group;
    assert_eq!(group.as_str(), "default");
    node.stop().await.unwrap();

    // A region that has left the group could tell nobody.
    let alone = Settings { groups: Groups::default(), ..region("frankfurt", &key, &[]) };
    let node = Node::start_with(alone, store.reopen()).await;
    let refused = delete(&node, &secret).await;
    assert!(matches!(refused, Err(DeleteError::OutsideGroup(group)) if group.as_str() == "eu"));
    assert!(!store.load_document(&secret).await.unwrap().unwrap().tail.is_empty());
}

#[tokio::test]
async fn a_group_that_is_not_here_is_refused_with_the_reason() {
    let cluster = Cluster::start().await;
    for (query, reason) in [("?group=eu", "frankfurt, paris"), ("?group=mars", "no placement group")] {
        let refused = Client::join_as(cluster.tokyo.clients, query, "client", &[]).await;
        let Err(tungstenite::Error::Http(answer)) = refused.map(|_| ()) else { panic!("{query} is let in") };
        assert_eq!(answer.status(), 400);
        let body = String::from_utf8(answer.into_body().unwrap()).unwrap();
        assert!(body.contains(reason), "{body}");
    }
}

#[tokio::test]
async fn regions_are_listed_to_clients_also_when_they_are_down() {
    let Cluster { frankfurt, paris, tokyo, .. } = Cluster::start().await;
    let listed = async || -> serde_json::Value {
        let (status, body) = get(tokyo.clients, "/regions").await;
        assert_eq!(status, 200);
        serde_json::from_str(&body).unwrap()
    };
    let view = |name: &str, here, up| serde_json::json!({"name": name, "url": format!("ws://{name}.example"), "here": here, "up": up});
    let all = serde_json::json!([
        view("tokyo", true, true),
        view("frankfurt", false, true),
        view("paris", false, true)
    ]);
    assert_eq!(listed().await, all);
    paris.stop().await.unwrap();
    let one_down = serde_json::json!([
        view("tokyo", true, true),
        view("frankfurt", false, true),
        view("paris", false, false)
    ]);
    eventually("paris is down", async || listed().await == one_down).await;
    drop(frankfurt);
}

#[tokio::test]
async fn nothing_of_a_group_is_in_what_regions_compare_with_one_outside() {
    let cluster = Cluster::start().await;
    let (secret, common) = (document_id("secret"), document_id("common"));
    let mut author = Client::join_as(cluster.frankfurt.clients, "?group=eu", "author", &[]).await.unwrap();
    shared_doc(&mut author, &secret).await;
    let mut other = Client::join(cluster.frankfurt.clients, "other").await;
    shared_doc(&mut other, &common).await;
    let parts = &cluster.frankfurt.parts;
    let surveyor = Surveyor::new(parts.storage.clone(), parts.documents.clone());
    let survey = surveyor.fresh().await.unwrap();
    let group = |name: &str| PlacementGroup::new(name).unwrap();
    let (outside, inside) =
        (BTreeSet::from([group("default")]), BTreeSet::from([group("default"), group("eu")]));
    let listed = |groups: &BTreeSet<PlacementGroup>| match survey.answer(&[], groups).unwrap() {
        Fingerprints::Documents(documents) => documents.into_iter().map(|(id, _)| id).collect::<Vec<_>>(),
        Fingerprints::Buckets(_) => panic!("two documents are listed"),
    };
    assert_eq!(listed(&outside), std::slice::from_ref(&common));
    assert_eq!(listed(&inside), [common.clone(), secret.clone()]);
    // Not even who knows the id learns that it is there.
    let asked = [secret.clone(), common.clone()];
    assert_eq!(surveyor.look_at(&asked, &outside).await.unwrap().len(), 1);
    assert_eq!(surveyor.look_at(&asked, &inside).await.unwrap().len(), 2);

    for node in [&cluster.tokyo, &cluster.frankfurt] {
        let replication = node.parts.replication.as_ref().unwrap();
        assert!(replication.check_now());
        eventually("the check ends", async || !replication.is_checking()).await;
        let checked = replication.checked();
        assert_eq!(checked.len(), 2);
        let found: Vec<_> = checked.values().map(|it| (it.outcome, it.divergences.len())).collect();
        assert_eq!(found, [(Outcome::Equal, 0); 2]);
    }
    assert_eq!(cluster.leaked(&secret).await, Vec::<String>::new());
}
