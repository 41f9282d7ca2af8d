//! Looking at everything that is stored: surveys for comparisons with other regions, and the walk that hashes stored bytes
//! again ([`verify`]).
//!
//! A [`Survey`] is what storage holds of every document, as fingerprints. It is taken in one pass, document after document, at most
//! half of the time, so that it is never more than one read among those for clients. Several who ask for one at once
//! share it.
//!
//! # Bounds
//!
//! A survey takes about 64 bytes a document, of which there are [`SURVEY_DOCUMENTS_MAX`]; the last is kept for
//! [`SURVEY_KEPT`], because the other side of a comparison asks for more than once.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use isobar_protocol::ids::{DocumentId, PlacementGroup};
use isobar_protocol::link::Fingerprints;
use isobar_protocol::scrub::{Fingerprint, answer};
use parking_lot::Mutex;

use crate::documents::Documents;
use crate::storage::{Storage, StorageError};

pub mod verify;

/// Documents listed at a time.
const PAGE_DOCUMENTS: u32 = 256;

/// Most documents in a survey: 64 MiB for them. In larger regions those with the lowest ids are compared.
const SURVEY_DOCUMENTS_MAX: usize = 1 << 20;

/// How long a survey is kept for further questions.
const SURVEY_KEPT: Duration = Duration::from_secs(120);

/// What storage holds of every document.
#[derive(Debug, Default)]
pub struct Survey {
    groups: Vec<PlacementGroup>,
    /// Each with the place of its group.
    documents: Vec<(DocumentId, u16, Fingerprint)>,
    /// Whether there are more documents.
    pub is_cut: bool,
}

impl Survey {
    /// The fingerprints below a prefix, of documents of these groups.
    pub fn answer(&self, prefix: &[u8], groups: &BTreeSet<PlacementGroup>) -> Option<Fingerprints> {
        let shared: Vec<bool> = self.groups.iter().map(|group| groups.contains(group)).collect();
        let documents = self.documents.iter().filter(|(_, group, _)| shared[usize::from(*group)]);
        answer(prefix, documents.map(|(document, _, print)| (document.clone(), *print)))
    }

    /// The place of a group; nothing if there are more groups than a region can be in.
    fn place(&mut self, group: PlacementGroup) -> Option<u16> {
        let place = self.groups.iter().position(|known| *known == group).unwrap_or_else(|| {
            self.groups.push(group);
            self.groups.len() - 1
        });
        u16::try_from(place).ok()
    }
}

/// Takes surveys, one at a time.
pub struct Surveyor {
    storage: Arc<dyn Storage>,
    documents: Arc<Documents>,
    latest: Mutex<Option<(Instant, Arc<Survey>)>>,
    /// How many have asked.
    asked: AtomicU64,
    /// How many had asked when the last survey began.
    served: tokio::sync::Mutex<u64>,
}

impl Surveyor {
    pub fn new(storage: Arc<dyn Storage>, documents: Arc<Documents>) -> Arc<Self> {
        Arc::new(Self {
            storage,
            documents,
            latest: Mutex::default(),
            asked: AtomicU64::new(0),
            served: tokio::sync::Mutex::new(0),
        })
    }

    /// A survey that began after this call. Whoever asks while one is being taken shares the next.
    pub async fn fresh(&self) -> Result<Arc<Survey>, StorageError> {
        let number = self.asked.fetch_add(1, Ordering::SeqCst) + 1;
        let mut served = self.served.lock().await;
        if *served >= number
            && let Some((_, survey)) = &*self.latest.lock()
        {
            return Ok(survey.clone());
        }
        let asked = self.asked.load(Ordering::SeqCst);
        let survey = Arc::new(self.take().await?);
        *self.latest.lock() = Some((Instant::now(), survey.clone()));
        *served = asked;
        Ok(survey)
    }

    /// The last survey, however old, or a fresh one: for who has looked at one a moment ago.
    pub async fn latest(&self) -> Result<Arc<Survey>, StorageError> {
        let latest = self.latest.lock().as_ref().map(|(_, survey)| survey.clone());
        match latest {
            Some(survey) => Ok(survey),
            None => self.fresh().await,
        }
    }

    /// Lets go of a survey that nobody has asked for in a while.
    pub fn tidy(&self) {
        let mut latest = self.latest.lock();
        if latest.as_ref().is_some_and(|(taken, _)| taken.elapsed() > SURVEY_KEPT) {
            *latest = None;
        }
    }

    async fn take(&self) -> Result<Survey, StorageError> {
        let mut survey = Survey::default();
        let mut after: Option<DocumentId> = None;
        loop {
            let began = Instant::now();
            let listed = self.storage.list_documents(after.as_ref(), PAGE_DOCUMENTS).await?;
            let is_last = listed.len() < PAGE_DOCUMENTS as usize;
            for document in listed {
                if survey.documents.len() >= SURVEY_DOCUMENTS_MAX {
                    survey.is_cut = true;
                    return Ok(survey);
                }
                let inspection = self.documents.inspect(&document.id, false).await?;
                if let Some(inspection) = inspection
                    && let Some(print) = inspection.fingerprint(&document.id)
                    && let Some(group) = survey.place(inspection.group)
                {
                    survey.documents.push((document.id.clone(), group, print));
                }
                after = Some(document.id);
            }
            if is_last {
                return Ok(survey);
            }
            tokio::time::sleep(began.elapsed()).await;
        }
    }

    /// The fingerprints of these documents as they are now, as far as they are of these groups, in the order of their ids.
    pub async fn look_at(
        &self,
        documents: &[DocumentId],
        groups: &BTreeSet<PlacementGroup>,
    ) -> Result<Vec<(DocumentId, Fingerprint)>, StorageError> {
        let asked: BTreeSet<&DocumentId> = documents.iter().collect();
        let mut found = Vec::new();
        for document in asked {
            let inspection = self.documents.inspect(document, false).await?;
            let shared = inspection.filter(|it| groups.contains(&it.group));
            found.extend(shared.and_then(|it| it.fingerprint(document)).map(|it| (document.clone(), it)));
        }
        Ok(found)
    }
}
