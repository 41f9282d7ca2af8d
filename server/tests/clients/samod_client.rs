//! Another implementation of the protocol as the client: samod, unmodified, alone and beside the JavaScript one.

use std::convert::Infallible;
use std::future::Future;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use crate::region::{Kind, Region};
use automerge::transaction::Transactable;
use automerge::{AutoSerde, Automerge, ObjType, ROOT, ReadDoc};
use futures_util::future::BoxFuture;
use futures_util::{FutureExt, SinkExt, StreamExt, future};
use samod::{BackoffConfig, DialError, Dialer, DialerHandle, DocHandle, Repo, Transport, Url};
use tokio_tungstenite::tungstenite::{self, Message};

/// Longer than any step takes on a busy machine.
const WITHIN: Duration = Duration::from_secs(30);

/// Where the JavaScript client's packages are, once they are installed.
const INTEROP: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/interop");

/// Connects with the WebSocket library that the server uses, too.
struct WebSocketDialer(Url);

impl Dialer for WebSocketDialer {
    type Error = Infallible;

    fn url(&self) -> Url {
        self.0.clone()
    }

    fn connect(&self) -> BoxFuture<'static, Result<Transport, DialError<Infallible>>> {
        let url = self.0.to_string();
        async move {
            let (socket, _) = tokio_tungstenite::connect_async(url).await.map_err(DialError::transient)?;
            let (sink, stream) = socket.split();
            let frames = stream.filter_map(|message| {
                future::ready(match message {
                    Ok(Message::Binary(frame)) => Some(Ok(frame.to_vec())),
                    Ok(_) => None,
                    Err(error) => Some(Err(error)),
                })
            });
            let sink =
                sink.with(|frame: Vec<u8>| future::ok::<_, tungstenite::Error>(Message::binary(frame)));
            Ok(Transport::new(frames, sink))
        }
        .boxed()
    }
}

/// A samod repository that is connected to a region.
struct Client {
    repo: Repo,
    dialer: DialerHandle,
}

impl Client {
    async fn connect(region: &Region) -> Self {
        let repo = Repo::build_tokio().load().await;
        let backoff = BackoffConfig { max_delay: Duration::from_millis(500), ..BackoffConfig::default() };
        let dialer = Arc::new(WebSocketDialer(Url::parse(&region.url()).unwrap()));
        let dialer = repo.dial(backoff, dialer).unwrap();
        in_time("the handshake", dialer.established()).await.unwrap();
        Self { repo, dialer }
    }

    /// Waits until the region has said that it holds everything that the handle does.
    async fn saved(&self, handle: &DocHandle) {
        let attempt = async {
            // A connection that is lost meanwhile is followed by another.
            while self.dialer.connection_id().is_none() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            let connection = self.dialer.connection_id().expect("it was there a moment ago");
            handle.they_have_our_changes(connection).await;
        };
        in_time("the acknowledgement", attempt).await;
    }

    async fn find(&self, handle: &DocHandle) -> DocHandle {
        let found = in_time("the document", self.repo.find(handle.document_id().clone())).await.unwrap();
        found.expect("the region has the document")
    }
}

async fn in_time<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(WITHIN, future).await.unwrap_or_else(|_| panic!("waited in vain for {what}"))
}

/// Adds an item to the list `items`, which the first edit makes.
fn add(handle: &DocHandle, item: &str) {
    handle.with_document(|document| {
        document
            .transact::<_, _, automerge::AutomergeError>(|transaction| {
                let items = match transaction.get(ROOT, "items")? {
                    Some((_, items)) => items,
                    None => transaction.put_object(ROOT, "items", ObjType::List)?,
                };
                transaction.insert(&items, transaction.length(&items), item)
            })
            .unwrap();
    });
}

/// The list `items`, sorted, since concurrent additions may stand in either order.
fn items(handle: &DocHandle) -> Vec<String> {
    let value = handle.with_document(|document| serde_json::to_value(AutoSerde::from(&*document)).unwrap());
    let list = value["items"].as_array().cloned().unwrap_or_default();
    let mut items: Vec<String> = list.iter().map(|item| item.as_str().unwrap().to_owned()).collect();
    items.sort();
    items
}

/// Waits until the handle's list has exactly these items.
async fn shows(handle: &DocHandle, expected: &[&str]) {
    let mut changes = Box::pin(handle.changes());
    let arrival = async {
        while items(handle) != expected {
            changes.next().await;
        }
    };
    let arrived = tokio::time::timeout(WITHIN, arrival).await;
    assert!(arrived.is_ok(), "expected {expected:?}, got {:?}", items(handle));
}

/// Two repositories, each at one end of so many regions.
async fn two_repositories_converge_through_regions_and_across_their_restarts(kind: Kind, count: usize) {
    let mut regions = Region::start_linked(kind, count).await;
    let (left, right) = (Client::connect(&regions[0]).await, Client::connect(&regions[count - 1]).await);
    let near = left.repo.create(Automerge::new()).await.unwrap();
    add(&near, "first");
    left.saved(&near).await;

    let far = right.find(&near).await;
    shows(&far, &["first"]).await;
    add(&far, "second");
    shows(&near, &["first", "second"]).await;

    regions.iter_mut().for_each(Region::restart);
    add(&near, "third");
    add(&far, "fourth");
    let expected = ["first", "fourth", "second", "third"];
    shows(&near, &expected).await;
    shows(&far, &expected).await;
    left.saved(&near).await;
    right.saved(&far).await;

    // Whoever comes after a crash gets it all from the last region, since the others are gone.
    in_time("the first repository to stop", left.repo.stop()).await;
    in_time("the second repository to stop", right.repo.stop()).await;
    regions.iter_mut().for_each(Region::crash);
    let late = Client::connect(&regions[count - 1]).await;
    let found = late.find(&near).await;
    shows(&found, &expected).await;
    let heads = |handle: &DocHandle| handle.with_document(|document| document.get_heads());
    assert_eq!(heads(&found), heads(&near));
}

#[tokio::test(flavor = "multi_thread")]
async fn two_repositories_converge_through_a_region_on_sqlite() {
    two_repositories_converge_through_regions_and_across_their_restarts(Kind::Sqlite, 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_repositories_converge_through_a_region_on_postgres() {
    two_repositories_converge_through_regions_and_across_their_restarts(Kind::Postgres, 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_repositories_converge_across_two_regions_on_sqlite() {
    two_repositories_converge_through_regions_and_across_their_restarts(Kind::Sqlite, 2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_repositories_converge_across_two_regions_on_postgres() {
    two_repositories_converge_through_regions_and_across_their_restarts(Kind::Postgres, 2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_document_is_unavailable_until_somebody_makes_it() {
    unavailable_until_somebody_makes_it(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_document_is_unavailable_until_somebody_makes_it_in_another_region() {
    unavailable_until_somebody_makes_it(2).await;
}

async fn unavailable_until_somebody_makes_it(count: usize) {
    let regions = Region::start_linked(Kind::Sqlite, count).await;
    let offline = Repo::build_tokio().load().await;
    let made = offline.create(Automerge::new()).await.unwrap();
    add(&made, "made offline");

    let reader = Client::connect(&regions[0]).await;
    let missing = in_time("the answer", reader.repo.find(made.document_id().clone())).await.unwrap();
    assert!(missing.is_none());

    let (_, mut states) = reader.repo.search(made.document_id().clone()).unwrap();
    let url = Url::parse(&regions[count - 1].url()).unwrap();
    offline.dial(BackoffConfig::default(), Arc::new(WebSocketDialer(url))).unwrap();
    let arrival = async {
        loop {
            if let samod::SearchState::Found(handle) = states.next().await.unwrap() {
                break handle;
            }
        }
    };
    shows(&in_time("the document", arrival).await, &["made offline"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn samod_and_the_javascript_client_edit_one_document() {
    edited_by_samod_and_javascript(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn samod_and_the_javascript_client_edit_one_document_from_two_regions() {
    edited_by_samod_and_javascript(2).await;
}

async fn edited_by_samod_and_javascript(count: usize) {
    if !Path::new(INTEROP).join("node_modules").exists() {
        println!("SKIPPED: the JavaScript client is not installed (npm ci in server/tests/interop)");
        return;
    }
    let regions = Region::start_linked(Kind::Sqlite, count).await;
    let client = Client::connect(&regions[0]).await;
    let handle = client.repo.create(Automerge::new()).await.unwrap();
    add(&handle, "samod");
    client.saved(&handle).await;

    let node = Command::new("node")
        .args(["partner.mjs", &regions[count - 1].url(), &handle.url().to_string()])
        .current_dir(INTEROP)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    shows(&handle, &["javascript", "samod"]).await;
    add(&handle, "samod again");
    let ended = tokio::task::spawn_blocking(|| node.wait_with_output());
    let output = in_time("the JavaScript client", ended).await.unwrap().unwrap();
    assert!(output.status.success());
    let theirs: Vec<String> = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(theirs, ["samod", "javascript", "samod again"]);
    shows(&handle, &["javascript", "samod", "samod again"]).await;
}
