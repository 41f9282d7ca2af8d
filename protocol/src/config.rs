//! Every limit of the core, with its unit and its reason.
//!
//! Constants bound what no deployment has cause to change. [`Limits`] holds what an operator may set; its
//! defaults are the documented ones.

/// Longest document id in bytes. The usual id is a UUID of 16; applications that make their own ids from keys
/// use 32; twice that leaves room without letting ids become a payload.
pub const DOCUMENT_ID_BYTES_MAX: usize = 64;

/// Longest actor id in bytes. Automerge makes 16 and accepts any length; some applications use a public key.
pub const ACTOR_ID_BYTES_MAX: usize = 128;

/// Longest peer, storage, region or group name in bytes.
pub const PEER_ID_BYTES_MAX: usize = 256;

/// Most bits per entry that a Bloom filter may declare. Automerge uses 10; zero makes stock Automerge divide
/// by zero, so the least is 1.
pub const BLOOM_BITS_PER_ENTRY_MAX: u32 = 64;

/// Most probes per entry that a Bloom filter may declare. Automerge uses 7; each costs a lookup per change.
pub const BLOOM_PROBES_MAX: u32 = 16;

/// Most filters (`have` entries) in one sync message. Automerge sends one.
pub const SYNC_HAVE_MAX: usize = 8;

/// Most hashes in one list of a sync message: heads, needs, or the last synchronised heads.
pub const SYNC_HASHES_MAX: usize = 65_536;

/// Most dependencies of one change. A change depends on the heads its author saw: one per concurrent author.
pub const CHANGE_DEPENDENCIES_MAX: usize = 65_536;

/// Most other actors that one change may name.
pub const CHANGE_OTHER_ACTORS_MAX: usize = 65_536;

/// Most columns in one change. The format defines fewer than twenty; unknown ones are kept for the future.
pub const CHANGE_COLUMNS_MAX: usize = 64;

/// Deepest nesting of CBOR values that is skipped over when a frame has unknown keys.
pub const CBOR_DEPTH_MAX: usize = 32;

/// Most keys in one client frame's map. The protocol's largest message has seven.
pub const FRAME_KEYS_MAX: usize = 64;

/// Most storage ids that one client may watch, and most entries in one remote-heads message.
pub const REMOTE_HEADS_STORAGES_MAX: usize = 256;

/// How far a change's first operation may stand above what its dependencies have reached. Honest authors continue
/// at the maximum they know; that is more only if they edit the document as it was once, beside newer changes.
/// Counters are 32 bits wide, so an unbounded jump would use the document up for everybody.
pub const START_OP_JUMP_MAX: u64 = 1_000_000;

/// The highest operation counter a document may reach: half of what the 32-bit counter holds.
pub const MAX_OP_MAX: u64 = 1 << 31;

/// Steps of looking through a document's history that each of its changes adds to what may be spent on it. Stock
/// authors name their own last change and need none; others need as many as there are changes beside theirs. It
/// keeps the work that a history costs in proportion to its length, however it is contrived.
pub const ANCESTRY_STEPS_PER_CHANGE: u64 = 64;

/// Most replies in a row to one client about one document that neither carry nor follow anything new. A standard
/// exchange needs one; a peer with another idea of the protocol would answer each for ever.
pub const FRUITLESS_REPLIES_MAX: u8 = 4;

/// After so many messages about one document without an answer, more changes are gathered before the next.
/// A round trip of 200 ms at 20 edits a second has four under way.
pub const UNANSWERED_MESSAGES_MAX: u8 = 4;

/// What an operator may set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Largest client frame in bytes. The stock server accepts 100 MiB; a document of that size does not load
    /// in a browser.
    pub frame_bytes_max: usize,
    /// Largest single change in bytes, as sent and as inflated.
    pub change_bytes_max: usize,
    /// Most operations in one change. A run-length encoded change of 69 bytes can claim 20 million.
    pub change_ops_max: u64,
    /// Most bytes a whole document chunk may inflate to.
    pub document_bytes_max: usize,
    /// Most operations in a whole document chunk that is split, and in a base that is made. Automerge takes 250 to 500
    /// bytes of memory for each.
    pub document_ops_max: u64,
    /// Most changes of one document that wait for a dependency.
    pub pending_changes_max: usize,
    /// Most bytes of one document's changes that wait for a dependency.
    pub pending_bytes_max: usize,
    /// Steps of looking through a document's history, to check what its changes descend from, beyond
    /// [`ANCESTRY_STEPS_PER_CHANGE`]. Changes that were accepted once must be read back without this limit.
    pub ancestry_steps_max: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            frame_bytes_max: 64 << 20,
            change_bytes_max: 16 << 20,
            change_ops_max: 4_000_000,
            document_bytes_max: 256 << 20,
            document_ops_max: 5_000_000,
            pending_changes_max: 100_000,
            pending_bytes_max: 16 << 20,
            ancestry_steps_max: 4_000_000,
        }
    }
}
