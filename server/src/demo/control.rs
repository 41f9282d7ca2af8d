//! The demo's control: cut a link, kill a region, see what is up. For demonstrations only; nothing of it is in a node.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::rejection::JsonRejection;
use axum::extract::{DefaultBodyLimit, Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::{Deserialize, Serialize};

use super::links::{BYTES_PER_SECOND_MIN, ONE_WAY_MAX};
use super::regions::{LinkState, RegionState, Regions, RegionsError};

/// Largest request in bytes: two numbers.
const REQUEST_BYTES_MAX: usize = 4096;

const HELP: &str = "\
This is the control of an Isobar demo. It answers in JSON.

GET  /state                      regions and links
POST /links/A/B/cut              nothing gets through between two regions, silently
POST /links/A/B/heal             back to normal; what hung is reset
POST /links/A/B/slow             {\"one_way_ms\": 500, \"bytes_per_second\": 100000}, each optional
POST /regions/NAME/kill          ends a region in mid-stride
POST /regions/NAME/start         starts it again, on the database it has
";

#[derive(Serialize)]
struct WholeState {
    regions: Vec<RegionState>,
    links: Vec<LinkState>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Slow {
    one_way_ms: Option<u64>,
    bytes_per_second: Option<u64>,
}

type Shared = State<Arc<Regions>>;

pub fn routes(regions: Arc<Regions>) -> Router {
    Router::new()
        .route("/", get(|| async { HELP }))
        .route("/state", get(async |State(regions): Shared| state(&regions).await))
        .route("/links/{a}/{b}/cut", post(cut))
        .route("/links/{a}/{b}/heal", post(heal))
        .route("/links/{a}/{b}/slow", post(slow))
        .route("/regions/{name}/kill", post(kill))
        .route("/regions/{name}/start", post(start))
        .fallback(|| async {
            refusal(StatusCode::NOT_FOUND, "there is nothing here; GET / says what there is")
        })
        .layer(DefaultBodyLimit::max(REQUEST_BYTES_MAX))
        .with_state(regions)
}

async fn cut(State(regions): Shared, Path((a, b)): Path<(String, String)>) -> Response {
    answer(&regions, regions.cut(&a, &b)).await
}

async fn heal(State(regions): Shared, Path((a, b)): Path<(String, String)>) -> Response {
    answer(&regions, regions.heal(&a, &b)).await
}

async fn slow(
    State(regions): Shared,
    Path((a, b)): Path<(String, String)>,
    slow: Result<Json<Slow>, JsonRejection>,
) -> Response {
    let slow = match slow {
        Ok(Json(slow)) => slow,
        Err(rejection) => return refusal(rejection.status(), &rejection.body_text()),
    };
    let one_way = slow.one_way_ms.map(Duration::from_millis);
    if one_way.is_some_and(|it| it > ONE_WAY_MAX) {
        let text = format!("one_way_ms is at most {}", ONE_WAY_MAX.as_millis());
        return refusal(StatusCode::UNPROCESSABLE_ENTITY, &text);
    }
    if slow.bytes_per_second.is_some_and(|it| it < BYTES_PER_SECOND_MIN) {
        let text = format!("bytes_per_second is at least {BYTES_PER_SECOND_MIN}");
        return refusal(StatusCode::UNPROCESSABLE_ENTITY, &text);
    }
    answer(&regions, regions.slow((&a, &b), one_way, slow.bytes_per_second)).await
}

async fn kill(State(regions): Shared, Path(name): Path<String>) -> Response {
    answer(&regions, regions.kill(&name).await).await
}

async fn start(State(regions): Shared, Path(name): Path<String>) -> Response {
    answer(&regions, regions.start(&name).await).await
}

/// What was done shows in the state.
async fn answer(regions: &Regions, done: Result<(), RegionsError>) -> Response {
    match done {
        Ok(()) => state(regions).await,
        Err(error) => {
            let status = match &error {
                RegionsError::NoRegion(..) | RegionsError::NoLink(..) => StatusCode::NOT_FOUND,
                RegionsError::Already(_) => StatusCode::CONFLICT,
                RegionsError::Start(_) => StatusCode::INTERNAL_SERVER_ERROR,
            };
            refusal(status, &error.to_string())
        }
    }
}

async fn state(regions: &Regions) -> Response {
    Json(WholeState { regions: regions.region_states().await, links: regions.link_states() }).into_response()
}

fn refusal(status: StatusCode, text: &str) -> Response {
    #[derive(Serialize)]
    struct Refusal<'a> {
        error: &'a str,
    }
    (status, Json(Refusal { error: text })).into_response()
}
