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

/// Most origins that a region keeps track of. A node start takes a new one: ten regions of four nodes that restart daily
/// make 15,000 a year.
pub const ORIGINS_MAX: usize = 65_536;

/// Bytes of entries sent to one peer and not acknowledged. At a round trip of 160 ms it lets 25 MB a second through.
pub const LINK_WINDOW_BYTES: usize = 4 << 20;

/// The part of it that streams may use which catch up, so that live edits of other origins do not wait behind a backlog.
pub const CATCH_UP_WINDOW_BYTES: usize = 2 << 20;

/// A stream that is so many entries behind is catching up.
pub const CATCH_UP_ENTRIES: u64 = 4_096;

/// Bytes of entries that are put into one frame. A single run that is larger is cut, a single change is not.
pub const ENTRIES_BYTES: usize = 256 << 10;

/// How long an acknowledgement waits for others to go with it.
pub const ACKNOWLEDGE_AFTER_MS: u64 = 20;

/// How often a peer hears what is durable here that it did not send itself.
pub const ANNOUNCE_EVERY_MS: u64 = 1_000;

/// How often a link is tried for a sign of life.
pub const PING_EVERY_MS: u64 = 5_000;

/// A link without a frame for so long is dead: three pings were lost.
pub const LINK_SILENCE_MS: u64 = 15_000;

/// How long another peer must be ahead before an origin is taken from it instead.
pub const ROUTE_PATIENCE_MS: u64 = 3_000;

/// How often routes are looked at when nothing has happened to them.
pub const ROUTES_EVERY_MS: u64 = 250;

/// How long after an origin was asked for again what comes too early is passed over: it was sent before.
pub const RENEW_PATIENCE_MS: u64 = 2_000;

/// How long a snapshot that was interrupted waits for somebody to go on with, before it is begun anew.
pub const FETCH_PATIENCE_MS: u64 = 10_000;

/// How long after a failed read of the log it is tried again.
pub const READ_RETRY_MS: u64 = 500;

/// Questions whether a region has a document, asked on one link and not answered. Each may have it load a document.
pub const RECEIPT_QUESTIONS_MAX: usize = 64;

/// Most heads that such a question names, and that a receipt does. Documents with more get none: they have as many authors
/// who have not seen each other.
pub const RECEIPT_HEADS_MAX: usize = 1_024;

/// Most regions that one receipt names.
pub const RECEIPT_REGIONS_MAX: usize = 256;

/// How long an answer is waited for.
pub const RECEIPT_ANSWER_PATIENCE_MS: u64 = 15_000;

/// How long after a denial, or without the logs getting there, a region is asked again.
pub const RECEIPT_ASK_AGAIN_MS: u64 = 5_000;

/// How often that is looked at.
pub const RECEIPT_LOOK_EVERY_MS: u64 = 250;

/// Longest frame between regions in bytes. Nearly all are below a quarter of a MiB; but to a peer that takes no parts a
/// document travels in one frame. As much as the largest client frame, which is how a large document is born.
pub const LINK_FRAME_BYTES_MAX: usize = 64 << 20;

/// Longer frames are sent in parts of so many bytes to peers that take them: what is sent meanwhile passes between two.
pub const LINK_PART_BYTES: usize = 256 << 10;

/// Longest frame in bytes that is put together of parts. A document and the room for its index fit twice at the default
/// limits; whoever puts it together holds that much for each link.
pub const LINK_PARTED_BYTES_MAX: usize = 512 << 20;

/// Frames that arrive in parts at the same time on one link: one that people wait for, and one behind it.
pub const LINK_PARTED_FRAMES_MAX: usize = 2;

/// Documents that may be missing of one snapshot. Each is asked for by its name afterwards; where more cannot be had the
/// peer is of no use.
pub const SNAPSHOT_MISSING_MAX: usize = 65_536;

/// Longest message of the handshake between regions in bytes. It is read from strangers; what the longest names and all
/// placement groups take fits twice.
pub const HANDSHAKE_BYTES_MAX: usize = 256 << 10;

/// Shortest cluster key in bytes: what it takes that nobody guesses it, if it is random. Whoever reaches a region's port for
/// links gets a proof to try guesses on.
pub const CLUSTER_KEY_BYTES_MIN: usize = 32;

/// Most placement groups that one region holds.
pub const REGION_GROUPS_MAX: usize = 256;

/// Most nodes that a hello names as having been started on the region's database, the newest ones. A link to an older one
/// has long timed out: as many starts take longer than that.
pub const LINK_LINEAGE_MAX: usize = 64;

/// Most features that a node may announce to another region. Today there is one.
pub const LINK_FEATURES_MAX: usize = 64;

/// Longest name of a feature in bytes.
pub const LINK_FEATURE_BYTES_MAX: usize = 64;

/// Longest address in bytes at which a region serves clients. Browsers take no longer ones.
pub const CLIENT_URL_BYTES_MAX: usize = 2_048;

/// Most addresses that are named for a document that is elsewhere: one for each region, of which there are tens.
pub const ELSEWHERE_URLS_MAX: usize = 64;

/// Most origins in one frame between regions. An origin is made by each start of a node in each placement group, and
/// forgotten when its log is gone: a hundred nodes that restart daily leave fewer in a year.
pub const LINK_ORIGINS_MAX: usize = 65_536;

/// Most documents in one page of a snapshot. Pages are cut by bytes; this is for pages of tiny documents.
pub const SNAPSHOT_PAGE_DOCUMENTS_MAX: usize = 4_096;

/// Most documents that one frame adds to, or takes from, a region's interest in presence. That many are open at once on a
/// busy node; more go in several frames.
pub const INTEREST_DOCUMENTS_MAX: usize = 10_000;

/// How long presence of a document is still wanted after its last session has left, in milliseconds.
pub const INTEREST_LINGER_MS: u64 = 30_000;

/// Most bytes of one ephemeral message between regions. Cursors and selections take hundreds; it is sent again to
/// every session that looks at the document, and it is not what a document's data is for.
pub const PRESENCE_DATA_BYTES_MAX: usize = 64 << 10;

/// Most nodes of a region that a notice to its siblings names. A database has seats for as many.
pub const NOTICE_NODES_MAX: usize = 64;

/// Most regions that a notice to siblings names: the addresses of tens fit into one.
pub const NOTICE_REGIONS_MAX: usize = 256;

/// Longest reason in bytes that a region gives for ending a link. It is for a line of a log.
pub const LINK_REASON_BYTES_MAX: usize = 1_024;

/// Longest prefix of a hashed document id that a scrub asks for, in bytes: 65,536 buckets, so a region of ten million
/// documents has 150 in each.
pub const SCRUB_PREFIX_BYTES_MAX: usize = 2;

/// How many buckets there are below a prefix: one for each next byte.
pub const SCRUB_BUCKETS: usize = 256;

/// A scrub's answer lists single documents if there are at most this many: about 200 KiB, which costs less than asking
/// another time.
pub const SCRUB_SMALL_BUCKET_DOCUMENTS: usize = 4_096;

/// Most documents that a scrub's answer lists, however many there are below the longest prefix. Only ids that were
/// sought for their hashes crowd like that; with the longest ids it is a frame of 5 MiB.
pub const SCRUB_DOCUMENTS_MAX: usize = 65_536;

/// Most documents whose fingerprints one frame asks for by their ids. Each is read for it.
pub const SCRUB_DOCUMENTS_ASKED_MAX: usize = 1_024;

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

/// Most bytes that a change may have, as sent and as inflated, whatever an operator sets: a few kilobytes of another region's
/// must not become a whole memory.
pub const CHANGE_BYTES_CEILING: usize = 1 << 30;

impl Limits {
    /// For what was accepted once: it is read back whatever the limits are today.
    pub fn stored() -> Self {
        Self {
            change_bytes_max: CHANGE_BYTES_CEILING,
            change_ops_max: u64::MAX,
            document_bytes_max: usize::MAX,
            document_ops_max: u64::MAX,
            pending_changes_max: usize::MAX,
            pending_bytes_max: usize::MAX,
            ancestry_steps_max: u64::MAX,
            ..Self::default()
        }
    }
}
