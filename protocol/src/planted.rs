//! Mistakes that the core can be told to make, so that tests can show that they would be noticed.
//!
//! A test runs code under [`with`]; each mistake is asked for in one line where it would be made. Without the feature `planted`, which
//! only the core's own tests switch on, the question is a constant `false`: nothing of this is in a server.

/// A mistake.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(
    not(feature = "planted"),
    allow(dead_code, reason = "some are only looked for where they are planted")
)]
#[repr(u32)]
pub enum Fault {
    /// A run is taken although entries before it are missing.
    TakeAfterGap,
    /// Chains count as equal, whatever they are.
    SkipChainCheck,
    /// What was handed over to be stored is announced.
    AnnounceUnstored,
    /// A run counts as durable when it is handed over.
    CountUnstored,
    /// Origins and pages of any group are sent to whoever asks.
    SendOutsideGroups,
    /// Origins of any group are taken from whoever has them.
    TakeOutsideGroups,
    /// A snapshot's vector is adopted with its first page.
    AdoptEarly,
    /// An interrupted snapshot goes on with any region, whatever that has.
    ResumeAnywhere,
    /// That entries are in nobody's log any more leads to nothing.
    IgnoreTruncated,
    /// What a peer announced on a former link counts for the next one.
    KeepAnnounced,
    /// A receipt is given for heads that the peer was only asked about.
    ReceiptUnasked,
    /// A closed link's interests stay.
    KeepInterests,
    /// A change is let in although dependencies are missing.
    LetInIncomplete,
    /// Heads are shown as soon as they are staged.
    ShowStaged,
    /// A change whose author's number is taken is let in.
    LetInReused,
    /// A base does not say that it has more than one head.
    ForgetBaseHeads,
    /// A base says nothing of where its authors stand.
    ForgetBaseAuthors,
}

#[cfg(feature = "planted")]
mod switched {
    use std::cell::{Cell, RefCell};
    use std::collections::BTreeMap;

    use super::Fault;
    use crate::ids::{OriginId, RegionName, Seq};

    thread_local! {
        static PLANTED: Cell<u32> = const { Cell::new(0) };
        static KEPT: RefCell<BTreeMap<(RegionName, RegionName), BTreeMap<OriginId, Seq>>> =
            const { RefCell::new(BTreeMap::new()) };
    }

    /// Puts everything back, also when the test panics.
    struct Restore(u32);

    impl Drop for Restore {
        fn drop(&mut self) {
            PLANTED.set(self.0);
            KEPT.with(|kept| kept.borrow_mut().clear());
        }
    }

    /// Runs something with these mistakes planted, on this thread.
    pub fn with<T>(faults: &[Fault], run: impl FnOnce() -> T) -> T {
        let bits = faults.iter().fold(0, |bits, fault| bits | 1 << *fault as u32);
        let _restore = Restore(PLANTED.replace(bits));
        run()
    }

    pub(crate) fn is(fault: Fault) -> bool {
        PLANTED.get() & 1 << fault as u32 != 0
    }

    /// What counts of a peer's announcements when its link opens.
    pub(crate) fn announced_before(ours: &RegionName, theirs: &RegionName) -> BTreeMap<OriginId, Seq> {
        let ends = (ours.clone(), theirs.clone());
        KEPT.with(|kept| kept.borrow_mut().remove(&ends).unwrap_or_default())
    }

    /// A link has closed, on which its peer had announced this.
    pub(crate) fn link_closed(ours: &RegionName, theirs: &RegionName, announced: BTreeMap<OriginId, Seq>) {
        if is(Fault::KeepAnnounced) {
            let ends = (ours.clone(), theirs.clone());
            KEPT.with(|kept| kept.borrow_mut().insert(ends, announced));
        }
    }
}

#[cfg(not(feature = "planted"))]
mod switched {
    use std::collections::BTreeMap;

    use super::Fault;
    use crate::ids::{OriginId, RegionName, Seq};

    /// Nothing is planted.
    pub(crate) const fn is(_: Fault) -> bool {
        false
    }

    /// Nothing: the peer may have lost what it had.
    pub(crate) const fn announced_before(_: &RegionName, _: &RegionName) -> BTreeMap<OriginId, Seq> {
        BTreeMap::new()
    }

    pub(crate) fn link_closed(_: &RegionName, _: &RegionName, _: BTreeMap<OriginId, Seq>) {}
}

#[cfg(feature = "planted")]
pub use switched::with;
pub(crate) use switched::{announced_before, is, link_closed};
