//! The keeper of the region's links, as the other nodes see it: which regions it knows, and how far it is with what this
//! node observes for receipts.
//!
//! The keeper says about once a second what regions it knows, by which link each is up, and for each observing node which of
//! its observations it has taken last and how many notices of reached documents it has told it. Notices come in the order in
//! which they were told, so whoever counts knows what was lost; then, and whenever the keeper is another one or may be, the
//! node begins a new *epoch*: what it knows of other regions is forgotten, and everything is observed anew.
//!
//! # Invariant
//!
//! What is known of a region comes from the keeper's present link to it: with another link, or none, it is forgotten first. If
//! the notice that a link has ended is lost, the next statement says it, and a keeper that is silent for [`SILENCE_MS`] is taken
//! to have no links.

use std::collections::BTreeMap;

use isobar_protocol::config::NOTICE_REGIONS_MAX;
use isobar_protocol::ids::RegionName;
use isobar_protocol::notice::{KnownRegion, ObserverStanding};
use isobar_protocol::replica::{LinkId, Moment};
use uuid::Uuid;

/// How long a keeper that says nothing is believed to have its links: a few statements.
const SILENCE_MS: u64 = 4_000;

/// What is to be done, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// What a region holds is not known any more.
    Forget(RegionName),
    /// Everything that is followed is to be observed again.
    ObserveAnew,
}

/// See the module.
#[derive(Debug)]
pub struct Keeper {
    /// This node.
    node: Uuid,
    /// The keeper, and when it was heard last.
    keeper: Option<(Uuid, Moment)>,
    /// The regions that any keeper has named since the node started.
    regions: BTreeMap<RegionName, KnownRegion>,
    epoch: u64,
    /// Observations told in this epoch.
    sent: u64,
    /// The same at the last two statements: what was told before them has had the time to be taken.
    sent_before: [u64; 2],
    /// Notices of reached documents heard in this epoch.
    heard: u64,
}

impl Keeper {
    pub fn new(node: Uuid) -> Self {
        let regions = BTreeMap::new();
        Self { node, keeper: None, regions, epoch: 0, sent: 0, sent_before: [0; 2], heard: 0 }
    }

    /// This node.
    pub fn node(&self) -> Uuid {
        self.node
    }

    /// The regions that are known, and how they are linked to the keeper.
    pub fn regions(&self) -> impl Iterator<Item = &KnownRegion> {
        self.regions.values()
    }

    /// Whether the keeper has a link to any region.
    pub fn is_linked(&self) -> bool {
        self.regions.values().any(|region| region.link.is_some())
    }

    /// A sibling states that it keeps the links.
    pub fn stated(
        &mut self,
        now: Moment,
        by: Uuid,
        regions: Vec<KnownRegion>,
        observers: &[ObserverStanding],
    ) -> Vec<Step> {
        let mut steps = Vec::new();
        let is_another = self.keeper.is_none_or(|(keeper, _)| keeper != by);
        self.keeper = Some((by, now));
        if is_another || self.is_something_lost(observers) {
            steps = self.begin_epoch();
            steps.push(Step::ObserveAnew);
        }
        self.sent_before = [self.sent_before[1], self.sent];
        let unnamed = self.regions.keys().filter(|name| regions.iter().all(|it| it.region != **name));
        let unnamed: Vec<RegionName> = unnamed.cloned().collect();
        unnamed.iter().for_each(|name| steps.extend(self.link_is(name, None)));
        for region in regions {
            steps.extend(self.link_is(&region.region, region.link));
            if self.regions.len() < NOTICE_REGIONS_MAX || self.regions.contains_key(&region.region) {
                self.regions.insert(region.region.clone(), region);
            }
        }
        steps
    }

    /// The keeper says that a region holds something. Returns what is to be done before that is believed; nothing if it is not
    /// to be believed.
    pub fn reached(&mut self, by: Uuid, epoch: u64, region: &RegionName, link: LinkId) -> Option<Vec<Step>> {
        if self.keeper.is_none_or(|(keeper, _)| keeper != by) || epoch != self.epoch {
            return None;
        }
        self.heard += 1;
        // A region that was not named yet is with the next statement.
        let steps = self.link_is(region, Some(link));
        self.regions.get(region).is_some_and(|it| it.link == Some(link)).then_some(steps)
    }

    /// The epoch and the number of an observation that is about to be told; nothing if nobody is known who would take it:
    /// when there is somebody, everything is observed anew.
    pub fn next_observation(&mut self) -> Option<(u64, u64)> {
        self.keeper?;
        self.sent += 1;
        Some((self.epoch, self.sent))
    }

    /// Time has passed: to be called about twice a second.
    pub fn tick(&mut self, now: Moment) -> Vec<Step> {
        match self.keeper {
            Some((_, heard)) if now.0.saturating_sub(heard.0) > SILENCE_MS => self.lose(),
            _ => Vec::new(),
        }
    }

    /// There is no telling who keeps the links: this node does itself, or may have missed notices.
    pub fn lose(&mut self) -> Vec<Step> {
        self.keeper = None;
        self.begin_epoch()
    }

    fn begin_epoch(&mut self) -> Vec<Step> {
        (self.epoch, self.sent, self.sent_before, self.heard) = (self.epoch + 1, 0, [0; 2], 0);
        let names: Vec<RegionName> = self.regions.keys().cloned().collect();
        names.iter().filter_map(|name| self.link_is(name, None).pop()).collect()
    }

    fn link_is(&mut self, region: &RegionName, link: Option<LinkId>) -> Vec<Step> {
        let Some(known) = self.regions.get_mut(region) else { return Vec::new() };
        let former = std::mem::replace(&mut known.link, link);
        if former.is_some() && former != link { vec![Step::Forget(region.clone())] } else { Vec::new() }
    }

    /// Whether the keeper lacks an observation that it should have, or has told what did not come.
    fn is_something_lost(&self, observers: &[ObserverStanding]) -> bool {
        let own = observers.iter().find(|it| it.node == self.node && it.epoch == self.epoch);
        match own {
            Some(own) => own.taken < self.sent_before[0] || own.told > self.heard,
            None => self.sent_before[0] > 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use isobar_protocol::ids::StorageId;

    use super::*;

    const ME: Uuid = Uuid::from_u128(1);
    const KEEPER: Uuid = Uuid::from_u128(2);
    const OTHER: Uuid = Uuid::from_u128(3);

    fn name(region: &str) -> RegionName {
        RegionName::new(region).expect("a short name")
    }

    fn region(of: &str, link: Option<u64>) -> KnownRegion {
        let storage_id = StorageId::new(of).expect("a short name");
        KnownRegion { region: name(of), storage_id, client_url: None, link: link.map(LinkId) }
    }

    fn standing(epoch: u64, taken: u64, told: u64) -> ObserverStanding {
        ObserverStanding { node: ME, epoch, taken, told }
    }

    fn forget(region: &str) -> Step {
        Step::Forget(name(region))
    }

    /// A node that has heard its keeper, which has a link to "far"; and its epoch.
    fn linked() -> (Keeper, u64) {
        let mut keeper = Keeper::new(ME);
        assert_eq!(keeper.next_observation(), None, "nobody would take it");
        let steps = keeper.stated(Moment(0), KEEPER, vec![region("far", Some(1))], &[]);
        assert_eq!(steps, [Step::ObserveAnew]);
        let (epoch, first) = keeper.next_observation().expect("there is a keeper");
        assert_eq!(first, 1);
        (keeper, epoch)
    }

    #[test]
    fn what_is_known_of_a_region_ends_with_the_link_it_is_known_by() {
        let (mut keeper, epoch) = linked();
        let far = name("far");
        assert_eq!(keeper.reached(KEEPER, epoch, &far, LinkId(1)), Some(vec![]));
        assert_eq!(keeper.reached(OTHER, epoch, &far, LinkId(1)), None, "it is not the keeper");
        assert_eq!(keeper.reached(KEEPER, epoch - 1, &far, LinkId(1)), None, "it was asked anew since");
        assert_eq!(keeper.reached(KEEPER, epoch, &name("unknown"), LinkId(1)), None);
        // That the link ended was lost; that there is another shows by itself.
        assert_eq!(keeper.reached(KEEPER, epoch, &far, LinkId(2)), Some(vec![forget("far")]));
        let own = [standing(epoch, 1, 3)];
        assert_eq!(keeper.stated(Moment(1), KEEPER, vec![region("far", Some(2))], &own), []);
        assert!(keeper.is_linked());
        assert_eq!(keeper.stated(Moment(2), KEEPER, vec![region("far", None)], &own), [forget("far")]);
        assert!(!keeper.is_linked());
        assert_eq!(keeper.regions().count(), 1, "it is known that it exists");
    }

    #[test]
    fn what_was_lost_on_either_way_begins_an_epoch() {
        let state = |keeper: &mut Keeper, standing: &[ObserverStanding]| {
            keeper.stated(Moment(1), KEEPER, vec![region("far", Some(1))], standing)
        };
        let anew = [forget("far"), Step::ObserveAnew];
        let (mut keeper, epoch) = linked();
        for _ in 0..2 {
            assert_eq!(state(&mut keeper, &[]), [], "it may be under way");
        }
        assert_eq!(state(&mut keeper, &[]), anew, "the first observation is lost");
        assert_eq!(keeper.next_observation(), Some((epoch + 1, 1)));

        let (mut keeper, epoch) = linked();
        for taken in [0, 1, 1, 1] {
            assert_eq!(state(&mut keeper, &[standing(epoch, taken, 0)]), []);
        }
        keeper.next_observation();
        for _ in 0..2 {
            assert_eq!(state(&mut keeper, &[standing(epoch, 1, 0)]), []);
        }
        assert_eq!(state(&mut keeper, &[standing(epoch, 1, 0)]), anew, "the second is lost");

        let (mut keeper, epoch) = linked();
        keeper.reached(KEEPER, epoch, &name("far"), LinkId(1));
        assert_eq!(state(&mut keeper, &[standing(epoch, 1, 1)]), []);
        assert_eq!(state(&mut keeper, &[standing(epoch, 1, 2)]), anew, "an answer is lost");
    }

    #[test]
    fn another_keeper_or_none_makes_all_void() {
        let (mut keeper, epoch) = linked();
        assert_eq!(keeper.tick(Moment(SILENCE_MS)), []);
        let steps = keeper.stated(Moment(SILENCE_MS), OTHER, vec![region("near", Some(7))], &[]);
        assert_eq!(steps, [forget("far"), Step::ObserveAnew]);
        assert_eq!(keeper.next_observation(), Some((epoch + 1, 1)));
        assert_eq!(keeper.tick(Moment(2 * SILENCE_MS)), []);
        assert_eq!(keeper.tick(Moment(2 * SILENCE_MS + 1)), [forget("near")], "it is silent");
        assert_eq!(keeper.next_observation(), None);
        assert_eq!(keeper.tick(Moment(3 * SILENCE_MS)), [], "once");
        let steps = keeper.stated(Moment(3 * SILENCE_MS), OTHER, vec![region("near", Some(7))], &[]);
        assert_eq!(steps, [Step::ObserveAnew]);
        assert_eq!(keeper.regions().count(), 2);
    }
}
