//! What is remembered of a change's ancestors, so that the door need not look for them.

use std::sync::Arc;

use super::{Graph, Refusal};
use crate::base::ActorSet;

/// What a change, or several together, have among themselves and their ancestors. Shared along a line of changes.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Past {
    pub(super) actors: ActorSet,
    pub(super) reach: Reach,
}

/// How much of the base it contains.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Reach {
    /// All of it, also if there is none.
    Whole,
    /// What these positions of the base, in ascending order, descend from, with themselves.
    From(Vec<u64>),
}

/// What may still be spent on looking at ancestors. Whoever would need more is refused.
#[derive(Debug)]
pub(super) struct Steps {
    left: u64,
}

impl Steps {
    pub(super) fn new(left: u64) -> Self {
        Self { left }
    }

    pub(super) fn left(&self) -> u64 {
        self.left
    }

    pub(super) fn spend(&mut self, steps: usize) -> Result<(), Refusal> {
        match self.left.checked_sub(steps as u64) {
            Some(left) => {
                self.left = left;
                Ok(())
            }
            None => {
                self.left = 0;
                Err(Refusal::TooTangled)
            }
        }
    }
}

impl Past {
    /// How many numbers it keeps.
    pub(super) fn size(&self) -> usize {
        let entries = match &self.reach {
            Reach::Whole => 0,
            Reach::From(entries) => entries.len(),
        };
        self.actors.run_count() + entries
    }

    fn includes(&self, other: &Self) -> bool {
        let reaches = match (&self.reach, &other.reach) {
            (Reach::Whole, _) => true,
            (Reach::From(_), Reach::Whole) => false,
            (Reach::From(all), Reach::From(some)) => some.iter().all(|it| all.binary_search(it).is_ok()),
        };
        reaches && self.actors.includes(&other.actors)
    }

    pub(super) fn with_actor(self: Arc<Self>, actor: u32) -> Arc<Self> {
        if self.actors.contains(actor) {
            return self;
        }
        Arc::new(Self { actors: self.actors.with(actor), reach: self.reach.clone() })
    }
}

impl Graph {
    /// What has these changes together; the same one is shared where one has all of the other.
    pub(super) fn merge(
        &self,
        left: Arc<Past>,
        right: &Arc<Past>,
        steps: &mut Steps,
    ) -> Result<Arc<Past>, Refusal> {
        if Arc::ptr_eq(&left, right) {
            return Ok(left);
        }
        steps.spend(left.size() + right.size())?;
        if left.includes(right) {
            return Ok(left);
        }
        if right.includes(&left) {
            return Ok(right.clone());
        }
        let reach = self.merge_reach(&left.reach, &right.reach);
        Ok(Arc::new(Past { actors: left.actors.union(&right.actors), reach }))
    }

    pub(super) fn merge_reach(&self, left: &Reach, right: &Reach) -> Reach {
        match (left, right) {
            (Reach::From(left), Reach::From(right)) => self.reach_from(left.iter().chain(right).copied()),
            _ => Reach::Whole,
        }
    }

    /// What these positions of the base, in any order, descend from.
    pub(super) fn reach_from(&self, entries: impl Iterator<Item = u64>) -> Reach {
        let mut entries: Vec<u64> = entries.collect();
        entries.sort_unstable();
        entries.dedup();
        let whole = self.base.heads.iter().all(|head| entries.binary_search(&head.position).is_ok());
        if whole { Reach::Whole } else { Reach::From(entries) }
    }
}
