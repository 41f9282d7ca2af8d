//! What passes between the nodes of one region beside the log.

use std::time::Duration;

use automerge::AutoCommit;
use bytes::Bytes;
use isobar_protocol::ids::DocumentId;

use super::Shared;
use crate::support::{Client, document_id, eventually, get, in_time, put};

/// How long presence is waited for before it is sent again: nobody says when an interest has got around.
const AGAIN: Duration = Duration::from_millis(200);

/// Sends presence until the other one hears some: from then on it gets all.
pub async fn meet(from: &mut Client, to: &mut Client, document: &DocumentId, count: &mut u64) {
    let sender = from.peer.to_string();
    in_time("presence gets through", async {
        loop {
            *count += 1;
            from.ephemeral(document, *count, b"are you there?").await;
            let heard = to.until("presence", |it| it.presence.iter().any(|(by, _)| *by == sender));
            if tokio::time::timeout(AGAIN, heard).await.is_ok() {
                return;
            }
        }
    })
    .await;
}

/// Sends some messages and checks that each of the others hears each once, in order.
pub async fn all_hear(from: &mut Client, others: &mut [&mut Client], document: &DocumentId, count: &mut u64) {
    let sender = from.peer.to_string();
    let first = *count + 1;
    for _ in 0..30 {
        *count += 1;
        from.ephemeral(document, *count, b"a cursor").await;
    }
    let expected: Vec<u64> = (first..=*count).collect();
    for other in others {
        let of = |it: &Client| -> Vec<u64> {
            let all = it.presence.iter().filter(|(by, number)| *by == sender && *number >= first);
            all.map(|(_, number)| *number).collect()
        };
        let name = other.peer.to_string();
        other.until(&format!("{name} hears {sender}"), |it| of(it).last() == expected.last()).await;
        assert_eq!(of(other), expected, "{name} hears {sender}");
    }
}

async fn presence_reaches_the_clients_of_both(database: Shared) {
    let (left, right) = database.pair().await;
    let document = document_id("document");
    let mut one = Client::join(left.clients, "one").await;
    let mut doc = AutoCommit::new();
    put(&mut doc, "key", 1);
    one.share(&document, doc).await;
    one.in_step(&document).await;
    let mut beside = Client::join(left.clients, "beside").await;
    beside.fetch(&document).await;
    let mut two = Client::join(right.clients, "two").await;
    two.fetch(&document).await;
    let (mut of_one, mut of_two) = (0, 0);
    meet(&mut one, &mut two, &document, &mut of_one).await;
    meet(&mut two, &mut one, &document, &mut of_two).await;
    all_hear(&mut one, &mut [&mut two, &mut beside], &document, &mut of_one).await;
    all_hear(&mut two, &mut [&mut one, &mut beside], &document, &mut of_two).await;
    assert!(one.presence.iter().all(|(by, _)| by != "one"), "nobody hears himself");

    // What a message may not be larger than between regions it may not be between nodes.
    two.presence.clear();
    one.ephemeral(&document, of_one + 1, &vec![0; 100_000]).await;
    one.ephemeral(&document, of_one + 2, b"small").await;
    two.until("the small one", |it| it.presence == [("one".to_owned(), of_one + 2)]).await;
    beside.until("the small one", |it| it.presence.contains(&("one".to_owned(), of_one + 2))).await;
    assert!(beside.presence.contains(&("one".to_owned(), of_one + 1)), "it is for its own node to bear");

    // A region that is down to one node tells nobody.
    right.kill().await;
    eventually("it is alone", async || left.metric("isobar_siblings").await == 0.0).await;
    let told = left.metric("isobar_sibling_notices_told_total").await;
    all_hear(&mut one, &mut [&mut beside], &document, &mut (of_one + 2)).await;
    assert_eq!(left.metric("isobar_sibling_notices_told_total").await, told);
}

#[tokio::test]
async fn presence_reaches_the_clients_of_both_nodes_once() {
    presence_reaches_the_clients_of_both(Shared::memory()).await;
}

#[tokio::test]
async fn presence_reaches_the_clients_of_both_nodes_once_on_postgres() {
    presence_reaches_the_clients_of_both(Shared::postgres().await).await;
}

#[tokio::test]
async fn notices_that_cannot_be_read_harm_nobody() {
    let database = Shared::memory();
    let node = database.node().await;
    let stranger = database.open().await.take_seat().await.unwrap();
    eventually("it has a sibling", async || node.metric("isobar_siblings").await == 1.0).await;
    // Of a later version, cut off, empty.
    for notice in [&[250, 1, 2][..], &[2, 1], &[]] {
        assert!(stranger.notices.tell(Bytes::copy_from_slice(notice)));
    }
    eventually("they are heard", async || node.metric("isobar_sibling_notices_heard_total").await == 3.0)
        .await;
    assert_eq!(node.metric("isobar_sibling_notices_malformed_total").await, 2.0);
    assert_eq!(get(node.clients, "/readyz").await.0, 200);
}
