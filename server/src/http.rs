//! The listeners: what is reachable where. Handlers map HTTP to the node and nothing else.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::ws::WebSocketUpgrade;
use axum::extract::{ConnectInfo, FromRequestParts, Request, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;

use crate::connection::Connection;
use crate::node::Node;
pub use listener::{CountingListener, Traffic};

mod listener;

/// How long a readiness check may wait for the database.
const READY_TIMEOUT: Duration = Duration::from_secs(2);

/// Room for reading from a client's socket. A keystroke's frame is 300 bytes; larger frames grow the buffer.
const READ_BUFFER_BYTES: usize = 4 << 10;

/// Bytes that the WebSocket layer gathers before it writes by itself. The connection flushes, so nothing waits here.
const WRITE_BUFFER_BYTES: usize = 4 << 10;

/// What the handlers share.
#[derive(Clone)]
struct Shared {
    node: Arc<Node>,
    connections: TaskTracker,
}

/// What clients reach.
pub fn client_routes(node: Arc<Node>, connections: TaskTracker) -> Router {
    health_routes()
        .route("/", get(client))
        .route("/sync", get(client))
        .with_state(Shared { node, connections })
}

/// What operators reach.
pub fn admin_routes(node: Arc<Node>, connections: TaskTracker) -> Router {
    health_routes().route("/metrics", get(metrics)).with_state(Shared { node, connections })
}

fn health_routes() -> Router<Shared> {
    Router::new().route("/livez", get(|| async { "alive\n" })).route("/readyz", get(ready))
}

/// Whether this node should be sent clients: its database answers and it is not shutting down.
async fn ready(State(shared): State<Shared>) -> Response {
    if shared.node.is_draining() {
        return (StatusCode::SERVICE_UNAVAILABLE, "draining\n").into_response();
    }
    match tokio::time::timeout(READY_TIMEOUT, shared.node.storage.check()).await {
        Ok(Ok(())) => "ready\n".into_response(),
        Ok(Err(error)) => {
            tracing::warn!(%error, "not ready");
            (StatusCode::SERVICE_UNAVAILABLE, "storage is unavailable\n").into_response()
        }
        Err(_) => (StatusCode::SERVICE_UNAVAILABLE, "storage does not answer\n").into_response(),
    }
}

async fn metrics(State(shared): State<Shared>) -> Response {
    let node = &shared.node;
    node.metrics.commit_queue_bytes.set(node.committer.queued_bytes() as f64);
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], node.metrics.render()).into_response()
}

/// A client's WebSocket; anybody else gets a sentence.
async fn client(State(shared): State<Shared>, request: Request) -> Response {
    let (mut parts, _) = request.into_parts();
    let traffic =
        parts.extensions.get::<ConnectInfo<Traffic>>().map_or_else(Traffic::default, |it| it.0.clone());
    let upgrade = match WebSocketUpgrade::from_request_parts(&mut parts, &()).await {
        Ok(upgrade) => upgrade,
        Err(_) => {
            let text = "This is Isobar, a sync service for Automerge documents. Connect with a WebSocket.\n";
            return (StatusCode::UPGRADE_REQUIRED, [(header::UPGRADE, "websocket")], text).into_response();
        }
    };
    let node = shared.node;
    let open = shared.connections.len();
    if node.is_draining() || open >= node.settings.connections_max {
        return (StatusCode::SERVICE_UNAVAILABLE, [(header::RETRY_AFTER, "5")], "no room at the moment\n")
            .into_response();
    }
    let token = shared.connections.token();
    upgrade
        .read_buffer_size(READ_BUFFER_BYTES)
        .write_buffer_size(WRITE_BUFFER_BYTES)
        .max_message_size(node.settings.frame_bytes_max)
        .max_frame_size(node.settings.frame_bytes_max)
        .on_upgrade(async move |socket| {
            let _open = Open::new(node.clone(), token);
            Box::pin(Connection::serve(node, socket, traffic)).await;
        })
}

/// An open connection, counted until the value is dropped.
struct Open {
    node: Arc<Node>,
    _token: TaskTrackerToken,
}

impl Open {
    fn new(node: Arc<Node>, token: TaskTrackerToken) -> Self {
        node.metrics.connections.increment(1.0);
        node.metrics.connections_opened.increment(1);
        Self { node, _token: token }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.node.metrics.connections.decrement(1.0);
    }
}
