//! What a seed has in store: how many regions and clients, which faults and how often, and how fast everything is.

use crate::rng::Rng;

/// What may go wrong, by itself or by an operator's hand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// A connection is reset; what was on its way is lost.
    Reset,
    /// A pair of regions loses sight of each other, for a while, in one direction or both.
    Cut,
    /// A region stands still for a while, as a paused machine does.
    Pause,
    Crash,
    /// A crash between two effects.
    CrashInside,
    /// A copy of the disk is put aside.
    Copy,
    /// The disk is replaced by a copy that was put aside.
    Rollback,
    /// Entries that everybody has leave the log.
    Truncate,
    /// Entries leave the log whoever has them.
    TruncateByForce,
    /// A frame that was received before is received again, of those kinds that say something that stays true.
    Replay,
    /// Graphs that nobody uses leave the memory.
    Evict,
    Delete,
    /// A client's copy begins to write under the same actor.
    Clone,
    /// A node's clock goes forward at once, and the time of day in either direction.
    ClockJump,
    /// A base is made. It is no fault, and what may go wrong with it is.
    /// It also is made after commits, more often in some schedules.
    Compact,
}

pub const FAULTS: [Fault; 15] = [
    Fault::Reset,
    Fault::Cut,
    Fault::Pause,
    Fault::Crash,
    Fault::CrashInside,
    Fault::Copy,
    Fault::Rollback,
    Fault::Truncate,
    Fault::TruncateByForce,
    Fault::Replay,
    Fault::Evict,
    Fault::Delete,
    Fault::Clone,
    Fault::ClockJump,
    Fault::Compact,
];

/// A mistake that the shell around the core is told to make, to see that it is noticed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Planted {
    /// Clients are told that a change is kept when it has only been submitted.
    AcknowledgeBeforeCommit,
    /// The replica is told of own entries when they have only been submitted.
    AnnounceBeforeCommit,
    /// The replica is told that a received run is durable when it has only been submitted.
    ReportStoredBeforeCommit,
    /// A log read leaves an entry out.
    SkipEntry,
    /// A node goes on under the origin that it finds on its disk.
    KeepOrigin,
    /// A commit under an origin that was replaced is done.
    SkipFence,
    /// More is removed than a base covers.
    PruneTooMuch,
    /// A node goes on under the origin that it finds on its disk if nothing is written under it there.
    KeepUnwrittenOrigin,
    /// Not a mistake of this kind: nodes go on under the origins that they find, so that two logs come to be under one name. No
    /// region may mix them.
    ForkOrigins,
    /// Not a mistake either: nobody looks at what regions send beyond their groups. No region may take it.
    TrustSenders,
    /// Changes of a deleted document are stored.
    Resurrect,
    /// Pages leave deletions out.
    ForgetTombstonesInPages,
    /// The log is truncated although one member has not acknowledged.
    TruncateEarly,
    /// A commit leaves a change out and reports success.
    DropWrite,
    /// A received run is logged and its changes are not stored.
    LogWithoutChanges,
    /// A run is not there any more after a restart.
    LoseRun,
    /// Counters of a snapshot are raised, and the log is said to begin where it began.
    AdoptOverLog,
    /// Counters of a snapshot are raised, its pages are dropped.
    AdoptWithoutPages,
    /// Own entries are logged under whatever group's origin comes first.
    WrongGroup,
    /// Of two changes with one number the first is kept and nobody is told.
    IgnoreClones,
    /// The bytes of deleted documents stay in the log.
    KeepDeletedBytes,
    /// Nothing is reported about runs that were stored.
    ForgetToReport,
    /// Presence goes over every link.
    PresenceToAll,
    /// Presence that came from another region is passed on.
    PassPresenceOn,
    /// New links are not told of what was wanted before.
    ForgetInterests,
    /// Regions look at each other twice without waiting for what is on its way.
    LookWithoutWaiting,
    /// Regions note their positions before they look at what they hold.
    PlaceBeforeLooking,
}

/// See the module.
#[derive(Debug, Clone)]
pub struct Plan {
    pub regions: usize,
    /// Whether some documents belong to the first two regions alone.
    pub two_groups: bool,
    /// When the last region joins, if not at the beginning.
    pub joins_at_ms: Option<u64>,
    /// When some region leaves for good, if one does.
    pub leaves_at_ms: Option<u64>,
    /// Whether it begins with a copy of the first region's disk.
    pub joins_with_copy: bool,
    pub clients: usize,
    pub documents: usize,
    pub writes: usize,
    pub faults_until_ms: u64,
    pub faults: Vec<Fault>,
    pub fault_every_ms: u64,
    pub turn_every_ms: u64,
    pub tick_every_ms: u64,
    pub latency_ms: u64,
    pub commit_ms: u64,
    pub page_documents: usize,
    /// After how many commits of a hundred a base is made.
    pub compact_percent: u32,
    /// How many frames of a hundred, of whatever kind, arrive twice.
    pub twice_percent: u32,
}

impl Plan {
    pub fn new(rng: &mut Rng) -> Self {
        let regions = *rng.pick(&[2, 2, 3, 3, 4]).expect("not empty");
        let joins = regions > 2 && rng.chance(35);
        // Each fault is there or not, so that every combination comes up; some more often within a seed.
        let mut faults: Vec<Fault> = Vec::new();
        for fault in FAULTS {
            if rng.chance(55) {
                (0..rng.range(1, 3)).for_each(|_| faults.push(fault));
            }
        }
        let faults_until_ms = *rng.pick(&[500, 1_000, 2_000, 5_000, 10_000, 20_000]).expect("not empty");
        let [writes_max, turns_max] = [0; 2].map(|_| *rng.pick(&[10, 20, 60]).expect("not empty"));
        Self {
            regions,
            two_groups: regions > 2 && rng.chance(35),
            joins_at_ms: joins.then(|| rng.range(100, faults_until_ms)),
            leaves_at_ms: (regions > 2 && rng.chance(20)).then(|| rng.range(100, faults_until_ms)),
            joins_with_copy: rng.chance(30),
            clients: rng.range(1, 4) as usize,
            documents: rng.range(1, 6) as usize,
            writes: rng.range(3, writes_max) as usize,
            faults_until_ms,
            faults,
            fault_every_ms: faults_until_ms / *rng.pick(&[6, 20, 50, 100]).expect("not empty"),
            turn_every_ms: faults_until_ms / rng.range(10, turns_max),
            tick_every_ms: *rng.pick(&[25, 50, 100, 200]).expect("not empty"),
            latency_ms: *rng.pick(&[1, 10, 50, 200]).expect("not empty"),
            commit_ms: *rng.pick(&[1, 5, 20, 100]).expect("not empty"),
            page_documents: *rng.pick(&[1, 1, 3]).expect("not empty"),
            compact_percent: *rng.pick(&[0, 5, 30]).expect("not empty"),
            twice_percent: *rng.pick(&[0, 0, 5]).expect("not empty"),
        }
    }
}
