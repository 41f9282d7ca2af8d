#![no_main]
//! What another region says of a base: its summary and its index. The first two bytes are the summary's length.
//!
//! Each survives being encoded again, and parts that agree, as the server checks it, make a graph that finds what they name.

use std::sync::Arc;

use isobar_protocol::base::{BaseIndex, BaseSummary};
use isobar_protocol::graph::Graph;
use libfuzzer_sys::fuzz_target;

fn agree(summary: &BaseSummary, index: &BaseIndex) -> bool {
    let heads = summary.heads.iter().map(|head| (&head.hash, head.position));
    let last = summary.actors.iter().map(|actor| (&actor.last_hash, actor.last_position));
    summary.change_count == index.len() as u64
        && !summary.heads.is_empty()
        && summary.heads.is_sorted_by_key(|head| head.position)
        && heads.chain(last).all(|(hash, position)| index.position_of(hash) == Some(position))
}

fuzz_target!(|data: &[u8]| {
    let Some((length, data)) = data.split_first_chunk::<2>() else { return };
    let (summary, index) = data.split_at(data.len().min(usize::from(u16::from_le_bytes(*length))));
    let summary = BaseSummary::decode(summary).ok();
    let index = BaseIndex::decode(index).ok();
    if let Some(summary) = &summary {
        assert_eq!(BaseSummary::decode(&summary.encode()).as_ref(), Ok(summary));
    }
    if let Some(index) = &index {
        let again = BaseIndex::decode(&index.encode()).expect("it was encoded here");
        assert_eq!((again.len(), again.hashes()), (index.len(), index.hashes()));
        assert_eq!(index.clone().prefix(index.len() / 2).len(), index.len() / 2);
    }
    let (Some(summary), Some(index)) = (summary, index) else { return };
    if agree(&summary, &index) {
        let mut graph = Graph::from_base(summary.clone());
        graph.attach_index(Arc::new(index.clone()));
        assert_eq!(graph.tail_start(), index.len() as u64);
        for head in &summary.heads {
            assert_eq!(graph.position(&head.hash), Some(head.position));
        }
        for hash in index.hashes() {
            assert!(graph.position(hash).is_some_and(|position| position < graph.tail_start()));
        }
    }
});
