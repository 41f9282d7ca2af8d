//! What goes wrong, and when: drawn from a seed.

use std::fmt;
use std::time::Duration;

/// Regions of a campaign.
pub const REGIONS: usize = 3;

/// How long a round of faults takes. Each has every kind of fault.
const ROUND: Duration = Duration::from_secs(16);

/// SplitMix64: the same seed, the same numbers.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `count`.
    pub fn below(&mut self, count: usize) -> usize {
        (self.next() % count as u64) as usize
    }

    pub fn between_ms(&mut self, least: u64, most: u64) -> Duration {
        Duration::from_millis(least + self.next() % (most - least))
    }

    fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last + 1));
        }
    }
}

/// Something that is done to the regions or to the ways between them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// All nodes of the region are killed in mid-stride and started again.
    Kill {
        region: usize,
    },
    /// One node of a region that has several is killed in mid-stride, and started again when another keeps the links: the
    /// one that kept them, or one that did not.
    KillOne {
        region: usize,
        keeper: bool,
    },
    /// As a kill; in between its database is copied.
    Copy {
        region: usize,
    },
    /// Every way from and to the region is cut.
    Isolate {
        region: usize,
    },
    /// The region is killed, and started with its newest copy in the place of its database; its ways are healed.
    Restore {
        region: usize,
    },
    /// The region is killed, and started with an empty database; its ways are healed.
    Empty {
        region: usize,
    },
    /// Nothing gets through any more on what `from` has dialled, nothing is reset.
    Cut {
        from: usize,
        to: usize,
    },
    /// What `from` has dialled is reset, and so is whatever it dials.
    Refuse {
        from: usize,
        to: usize,
    },
    Heal {
        from: usize,
        to: usize,
    },
    /// A document that is written to is deleted, and another takes its place.
    Delete {
        region: usize,
    },
}

#[derive(Debug, Clone, Copy)]
pub struct Step {
    /// Since the load began.
    pub at: Duration,
    pub fault: Fault,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:7.2} s  {:?}", self.at.as_secs_f64(), self.fault)
    }
}

/// The faults of a campaign, in the order of their time: as many rounds as fit, at least one. The region `several`, if there
/// is one, has more than one node.
pub fn plan(seed: u64, length: Duration, several: Option<usize>) -> Vec<Step> {
    let mut random = Random::new(seed);
    let rounds = (length.as_secs_f64() / ROUND.as_secs_f64()).round().max(1.0) as u32;
    let round = length / rounds;
    let mut steps = Vec::new();
    for number in 0..rounds {
        let begin = round * number;
        let planned = plan_round(&mut random, round, several);
        steps.extend(planned.into_iter().map(|step| Step { at: begin + step.at, ..step }));
    }
    steps.sort_by_key(|step| step.at);
    steps
}

fn plan_round(random: &mut Random, round: Duration, several: Option<usize>) -> Vec<Step> {
    let mut regions = [0, 1, 2];
    random.shuffle(&mut regions);
    let [restored, emptied, other] = regions;
    let any = random.below(REGIONS);
    let mut faults = vec![
        vec![Fault::Kill { region: any }],
        vec![Fault::Kill { region: other }],
        cut(random, true),
        cut(random, false),
        refuse(random),
        vec![Fault::Delete { region: random.below(REGIONS) }],
        vec![Fault::Isolate { region: restored }, Fault::Restore { region: restored }],
        vec![Fault::Isolate { region: emptied }, Fault::Empty { region: emptied }],
    ];
    if let Some(region) = several {
        faults.extend([true, false].map(|keeper| vec![Fault::KillOne { region, keeper }]));
    }
    random.shuffle(&mut faults);
    // The copy is there before anything is restored, and has something in it.
    let mut steps = vec![Step { at: round / 10, fault: Fault::Copy { region: restored } }];
    let slot = round.mul_f64(0.75) / faults.len() as u32;
    for (place, fault) in faults.into_iter().enumerate() {
        let mut at = round / 6 + slot * place as u32 + random.between_ms(0, 300);
        let (begins, ends) = fault.split_at(fault.len().div_ceil(2));
        steps.extend(begins.iter().map(|&fault| Step { at, fault }));
        at += random.between_ms(700, 2_500);
        steps.extend(ends.iter().map(|&fault| Step { at, fault }));
    }
    steps
}

/// A pair of regions in either order.
fn pair(random: &mut Random) -> (usize, usize) {
    let from = random.below(REGIONS);
    (from, (from + 1 + random.below(REGIONS - 1)) % REGIONS)
}

/// A link that hangs for a while: both ways, or what one side has dialled.
fn cut(random: &mut Random, both: bool) -> Vec<Fault> {
    let (from, to) = pair(random);
    let (there, back) = (Fault::Cut { from, to }, Fault::Cut { from: to, to: from });
    let (heal_there, heal_back) = (Fault::Heal { from, to }, Fault::Heal { from: to, to: from });
    if both { vec![there, back, heal_there, heal_back] } else { vec![there, heal_there] }
}

/// A link that is dropped and stays down for a while.
fn refuse(random: &mut Random) -> Vec<Fault> {
    let (from, to) = pair(random);
    let there = [Fault::Refuse { from, to }, Fault::Refuse { from: to, to: from }];
    let heal = [Fault::Heal { from, to }, Fault::Heal { from: to, to: from }];
    [there, heal].concat()
}

#[test]
fn the_same_seed_makes_the_same_plan_and_every_copy_comes_before_its_restore() {
    let length = Duration::from_secs(40);
    let shown = |seed| plan(seed, length, Some(0)).iter().map(Step::to_string).collect::<Vec<_>>();
    assert_eq!(shown(1), shown(1));
    assert_ne!(shown(1), shown(2));
    for seed in 0..200 {
        let steps = plan(seed, length, None);
        for (place, step) in steps.iter().enumerate() {
            let Fault::Restore { region } = step.fault else { continue };
            let copied = steps[..place].iter().any(|it| it.fault == Fault::Copy { region });
            assert!(copied, "seed {seed}");
        }
    }
}
