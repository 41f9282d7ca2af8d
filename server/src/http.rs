//! The listeners: what is reachable where. Handlers map HTTP to the node and nothing else.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::ws::WebSocketUpgrade;
use axum::extract::{ConnectInfo, FromRequestParts, Request, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use isobar_protocol::ids::{PlacementGroup, RegionName};
use isobar_protocol::notice::KnownRegion;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;

use crate::config::cluster::DEFAULT_GROUP;
use crate::connection::Connection;
use crate::node::Node;
use crate::replication::Replication;
use admin::problem;
pub use listener::{CountingListener, Traffic};

mod admin;
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
        .route("/regions", get(regions))
        .with_state(Shared { node, connections })
}

/// What operators reach.
pub fn admin_routes(node: Arc<Node>, connections: TaskTracker) -> Router {
    health_routes()
        .route("/metrics", get(metrics))
        .merge(admin::routes())
        .with_state(Shared { node, connections })
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

/// The group that a client asks for, or why it cannot have it. It is an error of its configuration, which trying again
/// does not mend.
fn group_of(node: &Node, query: Option<&str>) -> Result<PlacementGroup, String> {
    // Names of groups consist of what stands for itself in a URL.
    let named = query.unwrap_or("").split('&').find_map(|pair| pair.strip_prefix("group="));
    let name = named.unwrap_or(DEFAULT_GROUP);
    let (groups, region) = (&node.settings.groups, &node.settings.region);
    let group = PlacementGroup::new(name).map_err(|error| format!("not a placement group: {error}"))?;
    let is_here = RegionName::new(region).is_ok_and(|region| groups.holds(&group, &region));
    match groups.regions(&group) {
        _ if is_here => Ok(group),
        None => Err(format!("there is no placement group {name:?}")),
        Some(regions) => {
            let regions: Vec<&str> = regions.iter().map(RegionName::as_str).collect();
            Err(format!(
                "region {region} is not in the placement group {name:?}: that is {}",
                regions.join(", ")
            ))
        }
    }
}

/// A region, as clients see it.
#[derive(serde::Serialize)]
struct RegionView {
    name: String,
    /// Where clients reach it, if it says.
    url: Option<String>,
    /// Whether it is the one that answers.
    here: bool,
    /// Whether it can be reached from here.
    up: bool,
}

/// This region, and the others that were linked, to any of its nodes, since the node started. Any web page may read it, as any may sync.
async fn regions(State(shared): State<Shared>) -> Response {
    let node = &shared.node;
    let mut regions = vec![RegionView {
        name: node.settings.region.clone(),
        url: node.settings.advertise.clone(),
        here: true,
        up: true,
    }];
    for known in node.replication.iter().flat_map(Replication::regions) {
        let KnownRegion { region, client_url: url, link, .. } = known;
        regions.push(RegionView { name: region.to_string(), url, here: false, up: link.is_some() });
    }
    ([(header::ACCESS_CONTROL_ALLOW_ORIGIN, "*")], Json(regions)).into_response()
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
    let group = match group_of(&node, parts.uri.query()) {
        Ok(group) => group,
        Err(detail) => {
            let title = "no such placement group here";
            return problem(StatusCode::BAD_REQUEST, "/problems/placement-group", title, detail);
        }
    };
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
            Box::pin(Connection::serve(node, socket, group, traffic)).await;
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
