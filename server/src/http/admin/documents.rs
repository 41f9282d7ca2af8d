//! Which documents the region has, and which of them it does not serve.

use axum::Json;
use axum::extract::{RawQuery, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use isobar_protocol::ids::DocumentId;
use serde::Serialize;

use super::{Shared, problem};
use crate::storage::{DocumentState, ListedDocument, Storage, StorageError};

const LIMIT_DEFAULT: u32 = 100;

const LIMIT_MAX: u32 = 1_000;

/// A state by which documents are looked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wanted {
    Live,
    Deleted,
    Quarantined,
}

impl Wanted {
    fn is_state(self, state: &DocumentState) -> bool {
        self == match state {
            DocumentState::Live => Self::Live,
            DocumentState::Deleted { .. } => Self::Deleted,
            DocumentState::Quarantined { .. } => Self::Quarantined,
        }
    }

    fn named(name: &str) -> Option<Self> {
        [Self::Live, Self::Deleted, Self::Quarantined].into_iter().find(|it| it.name() == name)
    }

    fn name(self) -> &'static str {
        match self {
            Self::Live => "live",
            Self::Deleted => "deleted",
            Self::Quarantined => "quarantined",
        }
    }
}

/// Why a query is refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
enum BadQuery {
    #[error("there is no parameter {0:?}: there are state, limit and cursor")]
    Unknown(String),
    #[error("there is no state {0:?}: there are live, deleted and quarantined")]
    State(String),
    #[error("limit must be a number from 1 to {LIMIT_MAX}, not {0:?}")]
    Limit(String),
    #[error("the cursor {0:?} is none that an answer had")]
    Cursor(String),
}

fn limit(text: &str) -> Option<u32> {
    text.parse().ok().filter(|limit| (1..=LIMIT_MAX).contains(limit))
}

/// What is asked for.
#[derive(Debug, PartialEq, Eq)]
struct Query {
    wanted: Option<Wanted>,
    limit: u32,
    after: Option<DocumentId>,
}

impl Query {
    /// Names and values consist of what stands for itself in a URL.
    fn parse(text: &str) -> Result<Self, BadQuery> {
        let mut query = Self { wanted: None, limit: LIMIT_DEFAULT, after: None };
        for pair in text.split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let quoted = || value.to_owned();
            match name {
                "state" => {
                    query.wanted = Some(Wanted::named(value).ok_or_else(|| BadQuery::State(quoted()))?)
                }
                "limit" => query.limit = limit(value).ok_or_else(|| BadQuery::Limit(quoted()))?,
                "cursor" => {
                    let after = DocumentId::from_text(value);
                    query.after = Some(after.map_err(|_| BadQuery::Cursor(quoted()))?);
                }
                name => return Err(BadQuery::Unknown(name.to_owned())),
            }
        }
        Ok(query)
    }

    /// The documents of a page, and the last that was looked at if there may be more. At most `limit` are looked at, so a page
    /// may be empty although another follows; quarantined ones, which are few, are found without looking at the others.
    async fn page(
        &self,
        storage: &dyn Storage,
    ) -> Result<(Vec<ListedDocument>, Option<DocumentId>), StorageError> {
        let after = self.after.as_ref();
        let mut listed = match self.wanted {
            Some(Wanted::Quarantined) => storage.list_quarantined(after, self.limit).await?,
            _ => storage.list_documents(after, self.limit).await?,
        };
        let is_full = listed.len() >= self.limit as usize;
        let cursor = listed.last().filter(|_| is_full).map(|last| last.id.clone());
        listed.retain(|document| self.wanted.is_none_or(|wanted| wanted.is_state(&document.state)));
        Ok((listed, cursor))
    }
}

#[derive(Serialize)]
struct Page {
    documents: Vec<Document>,
    /// With which the next page is asked for, if there may be one.
    #[serde(skip_serializing_if = "Option::is_none")]
    cursor: Option<String>,
}

#[derive(Serialize)]
struct Document {
    id: String,
    group: String,
    state: &'static str,
    /// Why it is quarantined.
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    /// Milliseconds of Unix time.
    #[serde(skip_serializing_if = "Option::is_none")]
    deleted_at_ms: Option<u64>,
}

impl Document {
    fn of(listed: ListedDocument) -> Self {
        let (state, reason, deleted_at_ms) = match listed.state {
            DocumentState::Live => (Wanted::Live, None, None),
            DocumentState::Deleted { deleted_at_ms } => (Wanted::Deleted, None, Some(deleted_at_ms)),
            DocumentState::Quarantined { reason } => (Wanted::Quarantined, Some(reason), None),
        };
        Self {
            id: listed.id.to_string(),
            group: listed.group.to_string(),
            state: state.name(),
            reason,
            deleted_at_ms,
        }
    }
}

/// The documents of a state, or all, by id.
pub(super) async fn list(State(shared): State<Shared>, RawQuery(query): RawQuery) -> Response {
    let query = match Query::parse(query.as_deref().unwrap_or("")) {
        Ok(query) => query,
        Err(error) => {
            let title = "not a query for documents";
            return problem(StatusCode::BAD_REQUEST, "/problems/bad-query", title, error.to_string());
        }
    };
    match query.page(&*shared.node.storage).await {
        Ok((listed, cursor)) => {
            let documents = listed.into_iter().map(Document::of).collect();
            Json(Page { documents, cursor: cursor.map(|id| id.to_string()) }).into_response()
        }
        Err(error) => {
            tracing::warn!(%error, "documents not listed");
            let title = "the documents could not be listed at the moment";
            problem(StatusCode::SERVICE_UNAVAILABLE, "/problems/storage", title, "try again".into())
        }
    }
}
