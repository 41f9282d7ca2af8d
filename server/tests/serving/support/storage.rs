//! A storage in memory that a test can hold, fail and kill.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use isobar::storage::memory::MemoryStorage;
use isobar::storage::{
    Acknowledgement, Batch, ClaimedOrigin, DocumentAppend, DocumentState, ErasureStep, ListedDocument,
    Member, NewBase, RunAppend, Storage, StorageError, StorageStatistics, StoredChange, StoredDocument,
    StoredOrigin, StoredRun, Writer,
};
use isobar_protocol::ids::{ChangeHash, DocumentId, OriginId, PlacementGroup, RegionName, Seq, StorageId};
use isobar_protocol::link::MissingDocument;
use isobar_protocol::link::handshake::NodeId;
use isobar_protocol::log::{Content, Entry, encode_run};
use parking_lot::Mutex;
use tokio::sync::watch;

/// What shall go wrong. Shared between a test and the storage.
pub struct Faults {
    held: watch::Sender<bool>,
    loads_held: watch::Sender<bool>,
    failures: Mutex<VecDeque<StorageError>>,
    /// Loads that have read what is stored, whether or not they are held.
    pub loads: AtomicUsize,
    /// Appends that have begun, whether or not they are held.
    pub appends: AtomicUsize,
    /// Calls that change what is stored, appends excepted, since [`Faults::kill_at`].
    pub upkeep_calls: AtomicUsize,
    kill_at: AtomicUsize,
    killed_after_effect: Mutex<bool>,
    dead: watch::Sender<bool>,
}

pub struct FaultyStorage {
    inner: MemoryStorage,
    faults: Arc<Faults>,
}

impl FaultyStorage {
    /// Another handle to this store, with faults of its own.
    pub fn new(store: &MemoryStorage) -> (Self, Arc<Faults>) {
        let faults = Arc::new(Faults {
            held: watch::Sender::new(false),
            loads_held: watch::Sender::new(false),
            failures: Mutex::default(),
            loads: AtomicUsize::new(0),
            appends: AtomicUsize::new(0),
            upkeep_calls: AtomicUsize::new(0),
            kill_at: AtomicUsize::new(usize::MAX),
            killed_after_effect: Mutex::new(false),
            dead: watch::Sender::new(false),
        });
        (Self { inner: store.reopen(), faults: faults.clone() }, faults)
    }

    fn alive(&self) -> Result<(), StorageError> {
        match *self.faults.dead.borrow() {
            true => Err(StorageError::Fatal("the process is dead".into())),
            false => Ok(()),
        }
    }

    /// A call that makes or prunes a base: here the process may die, before the effect or after it.
    async fn upkeep<T>(
        &self,
        call: impl Future<Output = Result<T, StorageError>>,
    ) -> Result<T, StorageError> {
        self.alive()?;
        let number = self.faults.upkeep_calls.fetch_add(1, Ordering::SeqCst);
        let dies_here = number == self.faults.kill_at.load(Ordering::SeqCst);
        if dies_here && !*self.faults.killed_after_effect.lock() {
            self.faults.kill();
        }
        self.alive()?;
        let result = call.await;
        if dies_here {
            self.faults.kill();
        }
        self.alive()?;
        result
    }
}

impl Faults {
    /// From now on appends wait, before anything is stored.
    pub fn hold_appends(&self) {
        self.held.send_replace(true);
    }

    pub fn release_appends(&self) {
        self.held.send_replace(false);
    }

    /// From now on loads wait, after they have read what is stored.
    pub fn hold_loads(&self) {
        self.loads_held.send_replace(true);
    }

    pub fn release_loads(&self) {
        self.loads_held.send_replace(false);
    }

    /// The next append that begins fails like this, with nothing stored.
    pub fn fail_next_append(&self, error: StorageError) {
        self.failures.lock().push_back(error);
    }

    /// The process dies at this call of those that make or prune a base, counted from 0 and from now.
    pub fn kill_at(&self, call: usize, after_effect: bool) {
        *self.killed_after_effect.lock() = after_effect;
        self.upkeep_calls.store(0, Ordering::SeqCst);
        self.kill_at.store(call, Ordering::SeqCst);
    }

    /// From now on nothing is stored any more.
    pub fn kill(&self) {
        self.dead.send_replace(true);
    }

    pub fn is_dead(&self) -> bool {
        *self.dead.borrow()
    }
}

#[async_trait]
impl Storage for FaultyStorage {
    async fn region_identity(&self, region: &RegionName) -> Result<StorageId, StorageError> {
        self.inner.region_identity(region).await
    }

    async fn claim_origin(
        &self,
        region: &RegionName,
        group: &PlacementGroup,
        slot: u32,
        anew: bool,
    ) -> Result<ClaimedOrigin, StorageError> {
        self.inner.claim_origin(region, group, slot, anew).await
    }

    async fn register_node(&self, node: NodeId) -> Result<(), StorageError> {
        self.inner.register_node(node).await
    }

    async fn registered_nodes(&self) -> Result<Vec<NodeId>, StorageError> {
        self.inner.registered_nodes().await
    }

    async fn origins(&self) -> Result<Vec<StoredOrigin>, StorageError> {
        self.alive()?;
        self.inner.origins().await
    }

    async fn append(&self, batch: &Batch) -> Result<(), StorageError> {
        self.alive()?;
        self.faults.appends.fetch_add(1, Ordering::SeqCst);
        let _ = self.faults.held.subscribe().wait_for(|held| !held).await;
        if let Some(error) = self.faults.failures.lock().pop_front() {
            return Err(error);
        }
        self.alive()?;
        self.inner.append(batch).await
    }

    async fn load_document(&self, document: &DocumentId) -> Result<Option<StoredDocument>, StorageError> {
        self.alive()?;
        let loaded = self.inner.load_document(document).await;
        self.faults.loads.fetch_add(1, Ordering::SeqCst);
        let _ = self.faults.loads_held.subscribe().wait_for(|held| !held).await;
        loaded
    }

    async fn read_base_chunk(&self, document: &DocumentId) -> Result<Option<(u64, Bytes)>, StorageError> {
        self.alive()?;
        self.inner.read_base_chunk(document).await
    }

    async fn read_base_index(&self, document: &DocumentId) -> Result<Option<(u64, Bytes)>, StorageError> {
        self.alive()?;
        self.inner.read_base_index(document).await
    }

    async fn install_base(
        &self,
        document: &DocumentId,
        replaces: u64,
        base: NewBase,
    ) -> Result<u64, StorageError> {
        self.upkeep(self.inner.install_base(document, replaces, base)).await
    }

    async fn prune_changes(&self, document: &DocumentId, covered: &[ChangeHash]) -> Result<(), StorageError> {
        self.upkeep(self.inner.prune_changes(document, covered)).await
    }

    async fn mend_changes(&self, document: &DocumentId, good: &[StoredChange]) -> Result<(), StorageError> {
        self.inner.mend_changes(document, good).await
    }

    async fn finish_prune(&self, document: &DocumentId, generation: u64) -> Result<(), StorageError> {
        self.upkeep(self.inner.finish_prune(document, generation)).await
    }

    async fn set_state(&self, document: &DocumentId, state: &DocumentState) -> Result<(), StorageError> {
        self.upkeep(self.inner.set_state(document, state)).await
    }

    async fn read_log(
        &self,
        origin: OriginId,
        after: Seq,
        bytes_max: usize,
    ) -> Result<Vec<StoredRun>, StorageError> {
        self.inner.read_log(origin, after, bytes_max).await
    }

    async fn truncate_log(
        &self,
        origin: OriginId,
        up_to: Seq,
        older_than: Duration,
    ) -> Result<(), StorageError> {
        self.alive()?;
        self.inner.truncate_log(origin, up_to, older_than).await
    }

    async fn erase_step(&self, runs_max: usize) -> Result<ErasureStep, StorageError> {
        self.alive()?;
        self.inner.erase_step(runs_max).await
    }

    async fn adopt_origins(
        &self,
        origins: &[StoredOrigin],
        missing: &[MissingDocument],
    ) -> Result<(), StorageError> {
        self.alive()?;
        self.inner.adopt_origins(origins, missing).await
    }

    async fn missing_documents(&self) -> Result<Vec<MissingDocument>, StorageError> {
        self.alive()?;
        self.inner.missing_documents().await
    }

    async fn document_found(&self, document: &DocumentId) -> Result<(), StorageError> {
        self.alive()?;
        self.inner.document_found(document).await
    }

    async fn note_member(&self, member: &Member) -> Result<(), StorageError> {
        self.alive()?;
        self.inner.note_member(member).await
    }

    async fn members(&self) -> Result<Vec<Member>, StorageError> {
        self.alive()?;
        self.inner.members().await
    }

    async fn forget_member(&self, region: &RegionName) -> Result<bool, StorageError> {
        self.alive()?;
        self.inner.forget_member(region).await
    }

    async fn note_acknowledgements(&self, news: &[Acknowledgement]) -> Result<(), StorageError> {
        self.alive()?;
        self.inner.note_acknowledgements(news).await
    }

    async fn acknowledgements(&self) -> Result<Vec<Acknowledgement>, StorageError> {
        self.inner.acknowledgements().await
    }

    async fn find_document(&self, document: &DocumentId) -> Result<Option<ListedDocument>, StorageError> {
        self.inner.find_document(document).await
    }

    async fn list_documents(
        &self,
        after: Option<&DocumentId>,
        limit: u32,
    ) -> Result<Vec<ListedDocument>, StorageError> {
        self.inner.list_documents(after, limit).await
    }

    async fn list_quarantined(
        &self,
        after: Option<&DocumentId>,
        limit: u32,
    ) -> Result<Vec<ListedDocument>, StorageError> {
        self.inner.list_quarantined(after, limit).await
    }

    async fn count_quarantined(&self) -> Result<u64, StorageError> {
        self.inner.count_quarantined().await
    }

    async fn create_document(
        &self,
        document: &DocumentId,
        group: &PlacementGroup,
    ) -> Result<(), StorageError> {
        self.alive()?;
        self.inner.create_document(document, group).await
    }

    async fn statistics(&self) -> Result<StorageStatistics, StorageError> {
        self.inner.statistics().await
    }

    async fn check(&self) -> Result<(), StorageError> {
        self.alive()?;
        self.inner.check().await
    }

    async fn close(&self) {
        self.inner.close().await;
    }
}

/// Puts changes into a store beside any node, as one that ran before would have.
pub async fn append(storage: &impl Storage, document: &DocumentId, changes: Vec<StoredChange>) {
    let (region, group) = (RegionName::new("local").unwrap(), PlacementGroup::new("default").unwrap());
    let origin = storage.claim_origin(&region, &group, 0, false).await.unwrap();
    let entry = |change: &StoredChange| Entry {
        document: document.clone(),
        content: Content::Change { hash: change.hash, bytes: change.bytes.clone() },
    };
    let entries: Vec<Entry> = changes.iter().map(entry).collect();
    let run = RunAppend {
        origin: origin.id,
        writer: Writer::Own { incarnation: origin.incarnation },
        group: group.clone(),
        first: Seq(origin.last_seq.0 + 1),
        last: Seq(origin.last_seq.0 + entries.len() as u64),
        chain_before: origin.chain,
        chain: origin.chain.after_all(&entries),
        body: encode_run(&entries).into(),
    };
    let changes = (run.first.0..).map(Seq).zip(changes).collect();
    let appended = DocumentAppend { document: document.clone(), group, origin: origin.id, changes };
    let batch = Batch { runs: vec![run], changes: vec![appended], deletions: Vec::new() };
    storage.append(&batch).await.unwrap();
}
