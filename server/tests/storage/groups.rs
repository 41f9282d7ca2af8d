//! Clause 18: a document is of one placement group.

use isobar::storage::{Batch, DocumentState, ListedDocument, Storage, two_groups};
use isobar_protocol::ids::{OriginId, PlacementGroup, Seq};

use crate::fixture::*;

fn eu() -> PlacementGroup {
    PlacementGroup::new("eu").unwrap()
}

/// The batch, of the group "eu" instead of the usual one.
fn in_eu(mut batch: Batch) -> Batch {
    batch.runs.iter_mut().for_each(|run| run.group = eu());
    batch.changes.iter_mut().for_each(|append| append.group = eu());
    batch.deletions.iter_mut().for_each(|deletion| deletion.group = eu());
    batch
}

fn quarantined(own: &PlacementGroup, other: &PlacementGroup) -> DocumentState {
    DocumentState::Quarantined { reason: two_groups(own, other) }
}

async fn logged(storage: &dyn Storage, origin: OriginId) -> usize {
    whole_log_of(storage, origin).await.len()
}

pub async fn clause_19_what_comes_under_another_group_is_logged_and_not_merged(database: Database) {
    let storage = database.open().await;
    let (mine, other) = (claim(&*storage, 0).await, new_origin());
    append_own(&*storage, &mine, Seq(1), &[append(1, 0..2)]).await.unwrap();
    storage.append(&in_eu(other_batch(other, 1, &[append(1, 2..4), append(2, 4..5)]))).await.unwrap();

    let one = load(&*storage, 1).await;
    assert_eq!((one.group, one.state), (group(), quarantined(&group(), &eu())));
    assert_eq!(sorted(one.tail), changes(0..2));
    let two = load(&*storage, 2).await;
    assert_eq!((two.group, two.state, two.tail), (eu(), DocumentState::Live, changes(4..5)));
    assert_eq!(logged(&*storage, other).await, 3);
    // What is of its group still comes in, with a run and without one.
    append_own(&*storage, &mine, Seq(3), &[append(1, 5..6)]).await.unwrap();
    let unlogged = |batch: Batch| Batch { runs: Vec::new(), ..batch };
    storage.append(&unlogged(other_batch(new_origin(), 1, &[append(1, 6..7)]))).await.unwrap();
    let foreign = unlogged(other_batch(new_origin(), 1, &[append(2, 7..8)]));
    storage.append(&foreign).await.unwrap();
    storage.append(&foreign).await.unwrap();

    let database = database.crashed();
    let storage = database.open().await;
    assert_eq!(tail(&*storage, 1).await, sorted(changes([0, 1, 5, 6])));
    assert_eq!(tail(&*storage, 2).await, changes(4..5));
    let listed = |number, group: PlacementGroup, state| ListedDocument { id: document(number), group, state };
    let expected =
        [listed(1, group(), quarantined(&group(), &eu())), listed(2, eu(), quarantined(&eu(), &group()))];
    assert_eq!(storage.list_quarantined(None, 10).await.unwrap(), expected);
    let found = storage.find_document(&document(2)).await.unwrap();
    assert_eq!(found.as_ref(), Some(&expected[1]));
    assert_eq!(storage.find_document(&document(3)).await.unwrap(), None);
}

pub async fn clause_19_of_two_groups_in_one_batch_the_first_has_the_document(database: Database) {
    let storage = database.open().await;
    let (here, there) = (new_origin(), new_origin());
    let batches =
        [other_batch(here, 1, &[append(1, 0..2)]), in_eu(other_batch(there, 1, &[append(1, 2..4)]))];
    storage.append(&joined(batches)).await.unwrap();
    let loaded = load(&*storage, 1).await;
    assert_eq!((loaded.group, loaded.state), (group(), quarantined(&group(), &eu())));
    assert_eq!(sorted(loaded.tail), changes(0..2));
    assert_eq!((logged(&*storage, here).await, logged(&*storage, there).await), (2, 2));
}

pub async fn clause_19_writers_that_create_documents_in_two_groups_at_once_mix_nothing(database: Database) {
    const DOCUMENTS: u8 = 40;
    let storage = database.open().await;
    let (here, there) = (new_origin(), new_origin());
    for number in 0..DOCUMENTS {
        let seq = u64::from(number) * 2 + 1;
        let ours = other_batch(here, seq, &[append(number, 0..2)]);
        let theirs = in_eu(other_batch(there, seq, &[append(number, 2..4)]));
        let (one, other) = tokio::join!(storage.append(&ours), storage.append(&theirs));
        one.unwrap();
        other.unwrap();
    }
    for number in 0..DOCUMENTS {
        let loaded = load(&*storage, number).await;
        let (other, held) = if loaded.group == eu() { (group(), 2..4) } else { (eu(), 0..2) };
        assert_eq!(loaded.state, quarantined(&loaded.group, &other));
        assert_eq!(sorted(loaded.tail), sorted(changes(held)));
    }
    assert_eq!(logged(&*storage, here).await, usize::from(DOCUMENTS) * 2);
    assert_eq!(logged(&*storage, there).await, usize::from(DOCUMENTS) * 2);
}

pub async fn clause_19_a_tombstone_is_of_the_group_of_its_document(database: Database) {
    let storage = database.open().await;
    let mine = claim(&*storage, 0).await;
    append_own(&*storage, &mine, Seq(1), &[append(1, 0..2)]).await.unwrap();
    storage.append(&in_eu(deletion(&mine, 3, 1, 500))).await.unwrap();
    storage.append(&in_eu(deletion(&mine, 4, 2, 600))).await.unwrap();
    let deleted = |number, group, deleted_at_ms| ListedDocument {
        id: document(number),
        group,
        state: DocumentState::Deleted { deleted_at_ms },
    };
    let expected = [deleted(1, group(), 500), deleted(2, eu(), 600)];
    assert_eq!(storage.list_documents(None, 10).await.unwrap(), expected);
    assert_eq!(storage.find_document(&document(1)).await.unwrap().as_ref(), Some(&expected[0]));
}
