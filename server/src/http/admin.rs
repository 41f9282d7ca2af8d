//! The region's REST API for operators, as far as it goes: documents, links, convergence.
//!
//! Errors are problem details (RFC 9457). Handlers map HTTP to the node and nothing else.

use std::collections::BTreeMap;

use axum::Json;
use axum::Router;
use axum::extract::{Path, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use isobar_protocol::ids::{DocumentId, RegionName};
use isobar_protocol::replica::{FetchStatus, LinkStatus};
use serde::Serialize;

use super::Shared;
use crate::documents::DeleteError;
use crate::replication::{ForgetError, Lag, Replication};
use crate::storage::Member;

mod convergence;
mod documents;

pub(super) fn routes() -> Router<Shared> {
    Router::new()
        .route("/admin/v1/documents", get(documents::list))
        .route("/admin/v1/documents/{id}", delete(delete_document))
        .route("/admin/v1/peers", get(peers))
        .route("/admin/v1/peers/{region}", delete(forget_peer))
        .route("/admin/v1/convergence", get(convergence::show))
        .route("/admin/v1/convergence/divergences", get(convergence::divergences))
        .route("/admin/v1/convergence/checks", post(convergence::check))
}

/// An error as RFC 9457 has it.
#[derive(Serialize)]
struct Problem {
    #[serde(rename = "type")]
    kind: &'static str,
    title: &'static str,
    status: u16,
    detail: String,
}

pub(super) fn problem(
    status: StatusCode,
    kind: &'static str,
    title: &'static str,
    detail: String,
) -> Response {
    let body = Problem { kind, title, status: status.as_u16(), detail };
    (status, [(header::CONTENT_TYPE, "application/problem+json")], Json(body)).into_response()
}

/// Deletes a document for good, in every region. Repeating it changes nothing.
async fn delete_document(State(shared): State<Shared>, Path(id): Path<String>) -> Response {
    // What clients put into links is the same id behind a prefix.
    let id = id.strip_prefix("automerge:").unwrap_or(&id);
    let document = match DocumentId::from_text(id) {
        Ok(document) => document,
        Err(error) => {
            let title = "not a document's id";
            return problem(StatusCode::BAD_REQUEST, "/problems/bad-document-id", title, error.to_string());
        }
    };
    let node = &shared.node;
    match node.documents.delete(&document, &node.committer).await {
        Ok(_) => StatusCode::NO_CONTENT.into_response(),
        Err(error @ DeleteError::OutsideGroup(_)) => {
            let title = "the document is another region's to delete";
            problem(StatusCode::CONFLICT, "/problems/placement-group", title, error.to_string())
        }
        Err(error) => {
            tracing::warn!(%document, %error, "document not deleted");
            let title = "the document could not be deleted at the moment";
            problem(StatusCode::SERVICE_UNAVAILABLE, "/problems/storage", title, "try again".into())
        }
    }
}

/// A region that was ever linked, and the link to it, if there is one: else those fields are not there that only a link tells.
#[derive(Serialize)]
struct PeerView {
    region: String,
    up: bool,
    /// When it was linked last, in milliseconds of Unix time.
    linked_at_ms: Option<u64>,
    /// It was away for so long that log entries are given up without it.
    needs_snapshot: bool,
    #[serde(flatten)]
    link: Option<LinkView>,
}

/// A link to another region.
#[derive(Serialize)]
struct LinkView {
    round_trip_ms: Option<u64>,
    /// Log entries that the region has announced and that are not stored here.
    behind_changes: u64,
    /// Log entries that are stored here and not announced by the region.
    ahead_changes: u64,
    /// For how long the oldest entry that was accepted here and not announced by the region has been stored here; 0 if
    /// the region has them all.
    lag_ms: u64,
    /// Bytes of log entries that were accepted here since the node started and not announced by the region.
    lag_bytes: u64,
    in_flight_bytes: usize,
    /// Origins that are taken from this region.
    routes: usize,
    fetches_snapshot: bool,
    /// How far the snapshot is that is fetched from this region.
    snapshot: Option<SnapshotView>,
}

/// A snapshot that is being fetched. How much it will be nobody knows before its end.
#[derive(Serialize)]
struct SnapshotView {
    /// Stored so far.
    documents: u64,
    bytes: u64,
    /// What could not be had so far.
    missing_documents: usize,
    /// Since when, on whichever links.
    running_ms: u64,
}

fn link_view(link: &LinkStatus, lag: Lag, fetch: Option<&FetchStatus>) -> LinkView {
    LinkView {
        round_trip_ms: link.round_trip_ms,
        behind_changes: link.behind,
        ahead_changes: link.ahead,
        lag_ms: lag.ms,
        lag_bytes: lag.bytes,
        in_flight_bytes: link.in_flight_bytes,
        routes: link.routes,
        fetches_snapshot: link.fetches_snapshot,
        snapshot: fetch.filter(|_| link.fetches_snapshot).map(|it| SnapshotView {
            documents: it.documents,
            bytes: it.bytes,
            missing_documents: it.missing,
            running_ms: it.running_ms,
        }),
    }
}

async fn peers(State(shared): State<Shared>) -> Response {
    let replication = shared.node.replication.as_ref();
    if replication.is_some_and(|it| !it.keeps_links()) {
        let title = "another node of this region keeps its links";
        let detail = "ask that one: isobar_keeps_links says which it is";
        return problem(StatusCode::CONFLICT, "/problems/links-kept-elsewhere", title, detail.into());
    }
    let peers = replication.map(peer_views).unwrap_or_default();
    Json(peers.into_values().collect::<Vec<_>>()).into_response()
}

fn peer_views(replication: &Replication) -> BTreeMap<RegionName, PeerView> {
    let absent = |member: Member| PeerView {
        region: member.region.to_string(),
        up: false,
        linked_at_ms: Some(member.linked_at_ms),
        needs_snapshot: member.needs_snapshot,
        link: None,
    };
    let members = replication.members().into_iter();
    let mut peers: BTreeMap<_, _> = members.map(|it| (it.region.clone(), absent(it))).collect();
    let view = replication.view();
    for (link, lag) in view.links.iter().zip(view.lags) {
        let linked_at_ms = peers.get(&link.region).and_then(|it| it.linked_at_ms);
        let link_view = link_view(link, lag, view.fetch.as_ref());
        let region = link.region.to_string();
        let peer = PeerView { region, up: true, linked_at_ms, needs_snapshot: false, link: Some(link_view) };
        peers.insert(link.region.clone(), peer);
    }
    peers
}

/// Forgets a region that was removed. It must not be linked.
async fn forget_peer(State(shared): State<Shared>, Path(region): Path<String>) -> Response {
    let unknown = || {
        let detail = ForgetError::Unknown.to_string();
        problem(StatusCode::NOT_FOUND, "/problems/unknown-region", "unknown region", detail)
    };
    let (Some(replication), Ok(region)) = (&shared.node.replication, RegionName::new(&region)) else {
        return unknown();
    };
    match replication.forget(&region, &*shared.node.storage).await {
        Ok(()) => {
            shared.node.metrics.needs_snapshot(&region, false);
            StatusCode::NO_CONTENT.into_response()
        }
        Err(ForgetError::Unknown) => unknown(),
        Err(error @ (ForgetError::Linked | ForgetError::KeptElsewhere)) => {
            let title = "the region cannot be forgotten";
            problem(StatusCode::CONFLICT, "/problems/region-in-use", title, error.to_string())
        }
        Err(ForgetError::Storage(error)) => {
            tracing::warn!(%region, %error, "region not forgotten");
            let title = "the region could not be forgotten at the moment";
            problem(StatusCode::SERVICE_UNAVAILABLE, "/problems/storage", title, "try again".into())
        }
    }
}
