//! How this region stands to the others, as their logs say and as the last check found.

use std::collections::BTreeMap;
use std::time::UNIX_EPOCH;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use isobar_protocol::ids::RegionName;
use isobar_protocol::replica::LinkStatus;
use isobar_protocol::scrub::Difference;
use serde::Serialize;

use super::{Shared, problem};
use crate::replication::{Checked, Divergence, Replication};

/// Documents that are listed, of each region and of those that are missing.
const DOCUMENTS_MAX: usize = 100;

/// How this region stands to another.
#[derive(Serialize)]
struct Region {
    #[serde(flatten)]
    standing: Standing,
    #[serde(skip_serializing_if = "Option::is_none")]
    last_check: Option<LastCheck>,
}

#[derive(Serialize)]
#[serde(tag = "state", rename_all = "lowercase")]
enum Standing {
    Equal,
    Behind {
        changes: u64,
    },
    Ahead {
        changes: u64,
    },
    /// Each has what the other lacks.
    Apart {
        behind_changes: u64,
        ahead_changes: u64,
    },
    /// They differ in documents although both have all that the other logged.
    Diverged {
        documents: Vec<Document>,
        /// Whether there are, or may be, more.
        more: bool,
    },
    Unlinked,
    /// It was away for so long that log entries are given up without it.
    #[serde(rename = "needs-snapshot")]
    NeedsSnapshot,
}

/// The last check with a region.
#[derive(Serialize)]
struct LastCheck {
    /// Milliseconds of Unix time.
    finished_at_ms: u64,
    result: &'static str,
    /// Documents that differed because they were being written to.
    moving: usize,
    divergences: Vec<Document>,
    more: bool,
}

/// A document in which regions differed.
#[derive(Serialize)]
struct Document {
    document: String,
    /// Where it lacks something, as far as that is known.
    difference: &'static str,
    /// Whether it came to the same by the check.
    repaired: bool,
}

#[derive(Serialize)]
struct Convergence {
    region: String,
    /// Whether this node keeps the region's links. If not, it says nothing of vectors and regions: another node does.
    keeps_links: bool,
    /// The last entry that is stored here, by origin.
    vector: BTreeMap<String, u64>,
    regions: BTreeMap<String, Region>,
    forked_origins: Vec<String>,
    /// Documents that lack some of what the vector claims, because a snapshot lacked them; the first of them.
    missing_documents: Vec<String>,
    /// Whether a check is under way.
    checking: bool,
}

fn document(divergence: &Divergence) -> Document {
    Document {
        document: divergence.document.to_string(),
        difference: match divergence.difference {
            Difference::MissingHere => "missing_here",
            Difference::MissingThere => "missing_there",
            Difference::Different => "different",
        },
        repaired: divergence.repaired,
    }
}

fn last_check(checked: &Checked) -> LastCheck {
    let finished_at = checked.finished_at.duration_since(UNIX_EPOCH).unwrap_or_default();
    LastCheck {
        finished_at_ms: u64::try_from(finished_at.as_millis()).unwrap_or(u64::MAX),
        result: checked.outcome.name(),
        moving: checked.moving,
        divergences: checked.divergences.iter().take(DOCUMENTS_MAX).map(document).collect(),
        more: checked.more || checked.divergences.len() > DOCUMENTS_MAX,
    }
}

fn standing(link: &LinkStatus, checked: Option<&Checked>) -> Standing {
    let unrepaired = checked.iter().flat_map(|it| &it.divergences).filter(|it| !it.repaired);
    let mut documents: Vec<Document> = unrepaired.map(document).collect();
    if !documents.is_empty() {
        let more = documents.len() > DOCUMENTS_MAX || checked.is_some_and(|it| it.more);
        documents.truncate(DOCUMENTS_MAX);
        return Standing::Diverged { documents, more };
    }
    match (link.behind, link.ahead) {
        (0, 0) => Standing::Equal,
        (changes, 0) => Standing::Behind { changes },
        (0, changes) => Standing::Ahead { changes },
        (behind_changes, ahead_changes) => Standing::Apart { behind_changes, ahead_changes },
    }
}

pub(super) async fn show(State(shared): State<Shared>) -> Response {
    let node = &shared.node;
    let mut answer = Convergence {
        region: node.settings.region.clone(),
        keeps_links: node.replication.as_ref().is_none_or(Replication::keeps_links),
        vector: BTreeMap::new(),
        regions: BTreeMap::new(),
        forked_origins: Vec::new(),
        missing_documents: Vec::new(),
        checking: false,
    };
    if let Some(replication) = &node.replication {
        let view = replication.view();
        let checked = replication.checked();
        answer.checking = replication.is_checking();
        answer.vector = view.vector.iter().map(|it| (it.origin.0.to_string(), it.seq.0)).collect();
        answer.forked_origins = view.forked.iter().map(|it| it.0.to_string()).collect();
        let missing = view.missing.iter().take(DOCUMENTS_MAX);
        answer.missing_documents = missing.map(|it| it.to_string()).collect();
        let mut enter = |region: &RegionName, standing| {
            let last_check = checked.get(region).map(last_check);
            answer.regions.insert(region.to_string(), Region { standing, last_check });
        };
        // Who does not keep the links does not know who is linked.
        if replication.keeps_links() {
            for member in replication.members() {
                let absent = if member.needs_snapshot { Standing::NeedsSnapshot } else { Standing::Unlinked };
                enter(&member.region, absent);
            }
        }
        view.links.iter().for_each(|link| enter(&link.region, standing(link, checked.get(&link.region))));
    }
    Json(answer).into_response()
}

/// The documents in which the last check with each region found a difference, repaired or not.
pub(super) async fn divergences(State(shared): State<Shared>) -> Response {
    let checked = shared.node.replication.iter().flat_map(|it| it.checked());
    let found = checked.map(|(region, checked)| (region.to_string(), last_check(&checked)));
    Json(found.collect::<BTreeMap<_, _>>()).into_response()
}

/// Has this region compared with all others now. What comes of it shows where it is asked how regions stand.
pub(super) async fn check(State(shared): State<Shared>) -> Response {
    let Some(replication) = shared.node.replication.as_ref().filter(|it| it.keeps_links()) else {
        let title = "this node keeps no links to other regions";
        let detail = "ask the node that does, if the region has one".into();
        return problem(StatusCode::CONFLICT, "/problems/no-links", title, detail);
    };
    let begun = replication.check_now();
    #[derive(Serialize)]
    struct Accepted {
        /// `false`: one was under way already.
        begun: bool,
    }
    (StatusCode::ACCEPTED, Json(Accepted { begun })).into_response()
}
