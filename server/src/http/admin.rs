//! The region's REST API for operators, as far as it goes: deletion, links, convergence.
//!
//! Errors are problem details (RFC 9457). Handlers map HTTP to the node and nothing else.

use axum::Json;
use axum::Router;
use axum::extract::{Path, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use isobar_protocol::ids::DocumentId;
use serde::Serialize;

use super::Shared;
use crate::documents::DeleteError;

mod convergence;

pub(super) fn routes() -> Router<Shared> {
    Router::new()
        .route("/admin/v1/documents/{id}", delete(delete_document))
        .route("/admin/v1/peers", get(peers))
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

/// A link to another region.
#[derive(Serialize)]
struct PeerView {
    region: String,
    round_trip_ms: Option<u64>,
    /// Log entries that the region has announced and that are not stored here.
    behind_changes: u64,
    /// Log entries that are stored here and not announced by the region.
    ahead_changes: u64,
    /// For how long the oldest entry that was accepted here and not announced by the region has been stored here; 0 if
    /// the region has them all.
    lag_ms: u64,
    in_flight_bytes: usize,
    /// Origins that are taken from this region.
    routes: usize,
    fetches_snapshot: bool,
}

async fn peers(State(shared): State<Shared>) -> Response {
    let Some(replication) = &shared.node.replication else {
        return Json(Vec::<PeerView>::new()).into_response();
    };
    if !replication.keeps_links() {
        let title = "another node of this region keeps its links";
        let detail = "ask that one: isobar_keeps_links says which it is";
        return problem(StatusCode::CONFLICT, "/problems/links-kept-elsewhere", title, detail.into());
    }
    let view = replication.view();
    let peers = view.links.into_iter().zip(view.lags_ms).map(|(link, lag_ms)| PeerView {
        region: link.region.to_string(),
        round_trip_ms: link.round_trip_ms,
        behind_changes: link.behind,
        ahead_changes: link.ahead,
        lag_ms,
        in_flight_bytes: link.in_flight_bytes,
        routes: link.routes,
        fetches_snapshot: link.fetches_snapshot,
    });
    Json(peers.collect::<Vec<_>>()).into_response()
}
