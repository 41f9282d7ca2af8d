//! What is done for one peer that asks: how much at the same time, how much waits, and how many bytes of answers.
//!
//! An honest peer asks for what its clients open, 1,024 searches at most, and waits. One that asks for more than has a place is
//! answered at once as if nothing were here: it asks again, or gets what it wants by the log. Whole documents are read one after
//! another, and the next only when what waits on the link leaves room for it.

use std::sync::Arc;

use isobar_protocol::link::LinkFrame;
use tokio::sync::Semaphore;

use crate::replication::outgoing::Outgoing;

/// Questions of one peer that are being answered or wait for it: as many as an honest peer has searches.
const PLACES: usize = 1_024;

/// Of them, those that are worked on. Each reads the database, whose connections local clients need as well.
const TURNS: usize = 16;

/// Whole documents that are read at the same time: as they wait in memory, one.
const DOCUMENT_TURNS: usize = 1;

/// See the module. One for each link.
#[derive(Clone)]
pub(super) struct Answers {
    outgoing: Arc<Outgoing>,
    places: Arc<Semaphore>,
    turns: Arc<Semaphore>,
    document_turns: Arc<Semaphore>,
}

impl Answers {
    pub(super) fn new(outgoing: Arc<Outgoing>) -> Self {
        let semaphore = |permits| Arc::new(Semaphore::new(permits));
        Self {
            outgoing,
            places: semaphore(PLACES),
            turns: semaphore(TURNS),
            document_turns: semaphore(DOCUMENT_TURNS),
        }
    }

    /// Does something small and sends what comes of it. Returns whether there was a place; if not, `refusal` is sent.
    pub(super) fn answer(
        &self,
        refusal: LinkFrame,
        work: impl Future<Output = LinkFrame> + Send + 'static,
    ) -> bool {
        let turns = self.turns.clone();
        self.begin(refusal, async move {
            let _turn = turns.acquire().await.ok()?;
            Some(work.await)
        })
    }

    /// The same for a whole document, which waits for room on the link.
    pub(super) fn answer_document(
        &self,
        refusal: LinkFrame,
        work: impl Future<Output = LinkFrame> + Send + 'static,
    ) -> bool {
        let (turns, outgoing) = (self.document_turns.clone(), self.outgoing.clone());
        self.begin(refusal, async move {
            // Held until the answer is queued, so that the next sees it there.
            let _turn = turns.acquire().await.ok()?;
            outgoing.until_room().await;
            outgoing.push(work.await);
            None
        })
    }

    fn begin(
        &self,
        refusal: LinkFrame,
        work: impl Future<Output = Option<LinkFrame>> + Send + 'static,
    ) -> bool {
        let Ok(place) = self.places.clone().try_acquire_owned() else {
            self.outgoing.push(refusal);
            return false;
        };
        let outgoing = self.outgoing.clone();
        tokio::spawn(async move {
            if let Some(frame) = work.await {
                outgoing.push(frame);
            }
            drop(place);
        });
        true
    }

    /// Questions that are being answered or wait for it.
    pub(super) fn under_way(&self) -> usize {
        PLACES - self.places.available_permits()
    }

    /// The link is gone: what waits is given up.
    pub(super) fn close(&self) {
        self.turns.close();
        self.document_turns.close();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use isobar_protocol::ids::{DocumentId, PlacementGroup};
    use isobar_protocol::link::{DocumentContents, Standing};
    use tokio::sync::watch;

    use super::*;
    use crate::replication::outgoing::BULK_BYTES_MAX;

    const DEADLINE: Duration = Duration::from_secs(20);

    fn found(request: u64, standing: Standing) -> LinkFrame {
        LinkFrame::Found { request, standing }
    }

    /// Takes what waits until so many frames have come.
    async fn take(outgoing: &Outgoing, count: usize) -> Vec<LinkFrame> {
        let mut frames = Vec::new();
        let all = async {
            while frames.len() < count {
                outgoing
                    .take(None, |frame| {
                        frames.push(frame);
                        frames.len() < count
                    })
                    .await;
            }
        };
        tokio::time::timeout(DEADLINE, all).await.expect("answers come");
        frames
    }

    #[tokio::test]
    async fn beyond_its_places_a_peer_is_refused_and_few_questions_are_worked_on_at_a_time() {
        let outgoing = Arc::new(Outgoing::default());
        let answers = Answers::new(outgoing.clone());
        let (open, opened) = watch::channel(false);
        let (working, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let ask = |request: u64| {
            let (mut opened, working, most) = (opened.clone(), working.clone(), most.clone());
            answers.answer(found(request, Standing::Absent), async move {
                most.fetch_max(working.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                let _ = opened.wait_for(|open| *open).await;
                working.fetch_sub(1, Ordering::SeqCst);
                found(request, Standing::Here)
            })
        };
        assert!((0..PLACES as u64).all(ask));
        assert_eq!(answers.under_way(), PLACES);
        assert!(!ask(9_999), "there is no place left");
        assert_eq!(take(&outgoing, 1).await, [found(9_999, Standing::Absent)]);
        let all_turns = async {
            while working.load(Ordering::SeqCst) < TURNS {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(DEADLINE, all_turns).await.expect("every turn is taken");
        open.send_replace(true);
        let mut answered = take(&outgoing, PLACES).await;
        answered.sort_by_key(|frame| match frame {
            LinkFrame::Found { request, .. } => *request,
            other => panic!("{other:?}"),
        });
        let expected: Vec<_> = (0..PLACES as u64).map(|request| found(request, Standing::Here)).collect();
        assert_eq!(answered, expected);
        assert_eq!(most.load(Ordering::SeqCst), TURNS);
    }

    fn document(bytes: usize) -> LinkFrame {
        let contents = DocumentContents {
            document: DocumentId::from_slice(&[7; 16]).unwrap(),
            group: PlacementGroup::new("default").unwrap(),
            deleted_at_ms: None,
            base: None,
            changes: vec![vec![0; bytes].into()],
        };
        LinkFrame::DocumentAnswer { request: 1, contents: Some(contents) }
    }

    #[tokio::test]
    async fn documents_are_read_only_while_there_is_room_for_them() {
        const DOCUMENTS: usize = 12;
        let outgoing = Arc::new(Outgoing::default());
        let answers = Answers::new(outgoing.clone());
        let (read, mut reads) = watch::channel(0);
        let refusal = LinkFrame::DocumentAnswer { request: 1, contents: None };
        for _ in 0..DOCUMENTS {
            let read = read.clone();
            answers.answer_document(refusal.clone(), async move {
                read.send_modify(|read| *read += 1);
                document(BULK_BYTES_MAX / 3)
            });
        }
        // Three leave hardly any room; the fourth still goes in, as what is left is not known to be too little.
        let begun = tokio::time::timeout(DEADLINE, reads.wait_for(|read| *read >= 3));
        begun.await.expect("what has room is read").unwrap();
        for _ in 0..1_000 {
            tokio::task::yield_now().await;
        }
        assert!(*reads.borrow() <= 4, "{} documents wait", *reads.borrow());
        for taken in 1..=DOCUMENTS {
            take(&outgoing, 1).await;
            let ahead = *reads.borrow() - taken.min(*reads.borrow());
            assert!(ahead <= 4, "{ahead} documents wait");
        }
        assert_eq!(*reads.borrow(), DOCUMENTS);
    }

    #[tokio::test]
    async fn nothing_is_begun_for_a_link_that_is_gone() {
        let outgoing = Arc::new(Outgoing::default());
        let answers = Answers::new(outgoing.clone());
        answers.close();
        outgoing.close();
        assert!(answers.answer_document(document(1), async { panic!("it was begun") }));
        let ended = async {
            while answers.under_way() > 0 {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(DEADLINE, ended).await.expect("it ends");
    }
}
