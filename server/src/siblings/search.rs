//! Searches that the keeper of the links makes for this node.
//!
//! Whoever waits gives up when neither the outcome nor a word that the keeper is at it has come for [`PATIENCE`]. The keeper has
//! its own deadlines, so a search ends.

use std::collections::HashMap;
use std::time::Duration;

use isobar_protocol::ids::{DocumentId, PlacementGroup};
use tokio::sync::watch;
use tokio::time::timeout;

use crate::replication::SearchOutcome;

/// How long the keeper may be silent: longer than it takes to hear that nobody has the document.
const PATIENCE: Duration = Duration::from_secs(2);

/// How often the keeper says that it is at it.
pub const SAID_EVERY: Duration = Duration::from_millis(500);

/// How often at most that counts: a document may take as long to fetch as the keeper allows, and a little more.
const SAID_MAX: u32 = 40;

/// Searches at the same time. More are answered with "not found".
const SEARCHES_MAX: usize = 1_024;

/// How far a search is.
#[derive(Debug, Clone)]
pub enum State {
    /// The keeper has said so often that it is at it.
    Running(u32),
    Over(SearchOutcome),
}

#[derive(Debug)]
struct Search {
    document: DocumentId,
    group: PlacementGroup,
    state: watch::Sender<State>,
}

/// Searches that are under way. See the module.
#[derive(Debug, Default)]
pub struct Searches {
    last: u64,
    running: HashMap<u64, Search>,
}

impl Searches {
    /// Takes part in the search for a document. Returns its number, whether it is a new one, and where to hear of it; nothing if
    /// there are too many.
    pub fn join(
        &mut self,
        document: &DocumentId,
        group: &PlacementGroup,
    ) -> Option<(u64, bool, watch::Receiver<State>)> {
        let same = self.running.iter().find(|(_, it)| it.document == *document && it.group == *group);
        if let Some((request, search)) = same {
            return Some((*request, false, search.state.subscribe()));
        }
        if self.running.len() >= SEARCHES_MAX {
            return None;
        }
        self.last += 1;
        let (state, heard) = watch::channel(State::Running(0));
        let search = Search { document: document.clone(), group: group.clone(), state };
        self.running.insert(self.last, search);
        Some((self.last, true, heard))
    }

    /// The keeper is at it.
    pub fn goes_on(&mut self, request: u64) {
        if let Some(search) = self.running.get(&request) {
            search.state.send_modify(|state| {
                if let State::Running(said) = state {
                    *said += 1;
                }
            });
        }
    }

    /// The document that is looked for.
    pub fn document(&self, request: u64) -> Option<&DocumentId> {
        self.running.get(&request).map(|search| &search.document)
    }

    /// Ends a search.
    pub fn settle(&mut self, request: u64, outcome: SearchOutcome) {
        if let Some(search) = self.running.remove(&request) {
            search.state.send_replace(State::Over(outcome));
        }
    }
}

/// Waits for the outcome; nothing if the keeper is silent for too long.
pub async fn outcome(mut heard: watch::Receiver<State>) -> Option<SearchOutcome> {
    loop {
        match &*heard.borrow_and_update() {
            State::Over(outcome) => return Some(outcome.clone()),
            State::Running(said) if *said > SAID_MAX => return None,
            State::Running(_) => {}
        }
        timeout(PATIENCE, heard.changed()).await.ok()?.ok()?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn searched(searches: &mut Searches, name: u8) -> (u64, bool, watch::Receiver<State>) {
        let document = DocumentId::from_slice(&[name]).expect("one byte");
        searches.join(&document, &PlacementGroup::new("all").expect("a short name")).expect("there is room")
    }

    #[tokio::test]
    async fn who_looks_for_the_same_waits_together_until_it_is_over() {
        let mut searches = Searches::default();
        let (request, is_new, first) = searched(&mut searches, 1);
        let (same, again, second) = searched(&mut searches, 1);
        assert_eq!((request == same, is_new, again), (true, true, false));
        assert_ne!(searched(&mut searches, 2).0, request);
        searches.goes_on(request);
        searches.settle(request, SearchOutcome::Found);
        assert_eq!(outcome(first).await, Some(SearchOutcome::Found));
        assert_eq!(outcome(second).await, Some(SearchOutcome::Found));
        assert!(searched(&mut searches, 1).1, "it is over");
    }

    #[tokio::test]
    async fn a_search_that_never_comes_to_an_end_is_given_up() {
        let mut searches = Searches::default();
        let (request, _, heard) = searched(&mut searches, 2);
        (0..=SAID_MAX).for_each(|_| searches.goes_on(request));
        assert_eq!(outcome(heard).await, None);
    }
}
