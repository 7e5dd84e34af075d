//! The control API over HTTP: routes, and answers that are JSON even when something is wrong.
//!
//! Bodies are read as JSON whatever their content type says, so that `curl -d` works as it is typed.

use std::sync::Arc;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::rejection::{BytesRejection, PathRejection, QueryRejection};
use axum::extract::{DefaultBodyLimit, FromRequest, FromRequestParts, Path, Query, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use blockd_api::{
    AttachRequest, DiskInfo, ErrorBody, Event, Handover, Job, JobSettings, MergeRequest, MoveRequest,
    Receipt, ResizeRequest, Resized, SnapshotRequest,
};
use serde::Deserialize;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::error::{DaemonError, Kind};
use super::{Daemon, Verb, metrics, openapi};

/// Largest body of a request in bytes; the largest sensible one is far below.
pub const BODY_BYTES_MAX: usize = 64 << 10;

type Shared = State<Arc<Daemon>>;

/// Every route of the API.
pub fn router(daemon: Arc<Daemon>) -> Router {
    Router::new()
        .route("/v1/disks", get(list_disks).post(attach_disk))
        .route("/v1/disks/{id}", get(show_disk).delete(detach_disk))
        .route("/v1/disks/{id}/flush", post(flush_disk))
        .route("/v1/disks/{id}/snapshot", post(snapshot_disk))
        .route("/v1/disks/{id}/resize", post(resize_disk))
        .route("/v1/disks/{id}/release", post(release_disk))
        .route("/v1/disks/{id}/reclaim", post(reclaim_disk))
        .route("/v1/moves", post(start_move))
        .route("/v1/disks/{id}/merge", post(merge_disk))
        .route("/v1/jobs", get(list_jobs))
        .route("/v1/jobs/{job}", get(show_job).patch(set_job))
        .route("/v1/jobs/{job}/pause", post(pause_job))
        .route("/v1/jobs/{job}/resume", post(resume_job))
        .route("/v1/jobs/{job}/switch", post(switch_job))
        .route("/v1/jobs/{job}/cancel", post(cancel_job))
        .route("/v1/jobs/{job}/receipt", get(job_receipt))
        .route("/v1/events", get(events))
        .route("/metrics", get(show_metrics))
        .route("/openapi.json", get(show_openapi))
        .fallback(no_route)
        .method_not_allowed_fallback(no_method)
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .with_state(daemon)
}

/// What every handler answers: JSON, or an error that becomes JSON.
type Answer<T> = Result<Json<T>, DaemonError>;

/// A JSON body, in both directions.
pub(super) struct Json<T>(T);

impl<T: Serialize> IntoResponse for Json<T> {
    fn into_response(self) -> Response {
        match serde_json::to_vec(&self.0) {
            Ok(body) => ([(header::CONTENT_TYPE, "application/json")], body).into_response(),
            Err(e) => DaemonError::new(Kind::Internal, format!("the answer is no JSON: {e}")).into_response(),
        }
    }
}

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Json<T> {
    type Rejection = DaemonError;

    async fn from_request(request: axum::extract::Request, state: &S) -> Result<Self, DaemonError> {
        let body = Bytes::from_request(request, state).await.map_err(|e: BytesRejection| {
            DaemonError::invalid(format!("the body can't be read (at most {BODY_BYTES_MAX} bytes): {e}"))
        })?;
        let parsed = serde_json::from_slice(&body);
        parsed.map(Json).map_err(|e| {
            DaemonError::invalid(format!("the body is not the JSON that is expected: {e}; see /openapi.json"))
        })
    }
}

/// A part of the path.
pub(super) struct Name(String);

impl<S: Send + Sync> FromRequestParts<S> for Name {
    type Rejection = DaemonError;

    async fn from_request_parts(
        parts: &mut axum::http::request::Parts,
        state: &S,
    ) -> Result<Self, DaemonError> {
        let part: Result<Path<String>, PathRejection> = Path::from_request_parts(parts, state).await;
        let part = part.map_err(|e| DaemonError::invalid(format!("the path can't be read: {e}")))?;
        Ok(Self(part.0))
    }
}

/// What follows the question mark.
pub(super) struct Options<T>(T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for Options<T> {
    type Rejection = DaemonError;

    async fn from_request_parts(
        parts: &mut axum::http::request::Parts,
        state: &S,
    ) -> Result<Self, DaemonError> {
        let query: Result<Query<T>, QueryRejection> = Query::from_request_parts(parts, state).await;
        let query = query.map_err(|e| DaemonError::invalid(format!("the query is not understood: {e}")))?;
        Ok(Self(query.0))
    }
}

impl IntoResponse for DaemonError {
    fn into_response(self) -> Response {
        let status =
            StatusCode::from_u16(self.kind.http_status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        (status, Json(self.body())).into_response()
    }
}

/// Runs what may wait for a disk on a thread that may wait.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, DaemonError> + Send + 'static,
) -> Answer<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done.map(Json),
        Err(e) => {
            tracing::error!(error = %e, "a request ended in a panic");
            Err(DaemonError::new(
                Kind::Internal,
                "a bug of blockd has ended this request; its log has the place",
            ))
        }
    }
}

#[derive(Serialize, utoipa::ToSchema)]
pub(super) struct Nothing {}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct DetachOptions {
    #[serde(default)]
    force: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ReleaseOptions {
    #[serde(default)]
    force: bool,
    #[serde(default)]
    wait_ms: u64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct EventsOptions {
    #[serde(default)]
    follow: bool,
}

/// Every disk, by name.
#[utoipa::path(get, path = "/v1/disks", responses((status = 200, body = [DiskInfo])))]
async fn list_disks(State(daemon): Shared) -> Answer<Vec<DiskInfo>> {
    blocking(move || Ok(daemon.list())).await
}

/// Serves an image as a disk.
#[utoipa::path(
    post, path = "/v1/disks", request_body = AttachRequest,
    responses(
        (status = 200, body = DiskInfo),
        (status = 400, body = ErrorBody), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody),
        (status = 422, body = ErrorBody), (status = 500, body = ErrorBody), (status = 507, body = ErrorBody)
    )
)]
async fn attach_disk(State(daemon): Shared, Json(request): Json<AttachRequest>) -> Answer<DiskInfo> {
    blocking(move || daemon.attach(&request)).await
}

/// One disk.
#[utoipa::path(
    get, path = "/v1/disks/{id}", params(("id" = String, Path, description = "the disk's name")),
    responses((status = 200, body = DiskInfo), (status = 404, body = ErrorBody))
)]
async fn show_disk(State(daemon): Shared, Name(id): Name) -> Answer<DiskInfo> {
    blocking(move || daemon.show(&id)).await
}

/// Ends serving a disk and forgets it; the image stays.
#[utoipa::path(
    delete, path = "/v1/disks/{id}",
    params(
        ("id" = String, Path, description = "the disk's name"),
        ("force" = Option<bool>, Query, description = "even if a front end uses it or a move works on it")
    ),
    responses((status = 200, body = Nothing), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody))
)]
async fn detach_disk(
    State(daemon): Shared,
    Name(id): Name,
    Options(options): Options<DetachOptions>,
) -> Answer<Nothing> {
    blocking(move || daemon.detach(&id, options.force).map(|()| Nothing {})).await
}

/// Makes durable what the guest has written so far.
#[utoipa::path(
    post, path = "/v1/disks/{id}/flush", params(("id" = String, Path, description = "the disk's name")),
    responses((status = 200, body = Nothing), (status = 404, body = ErrorBody), (status = 500, body = ErrorBody))
)]
async fn flush_disk(State(daemon): Shared, Name(id): Name) -> Answer<Nothing> {
    blocking(move || daemon.flush(&id).map(|()| Nothing {})).await
}

/// Lets a disk go on in a new differencing image, of which the one so far is the parent.
#[utoipa::path(
    post, path = "/v1/disks/{id}/snapshot", params(("id" = String, Path, description = "the disk's name")),
    request_body = SnapshotRequest,
    responses(
        (status = 200, body = DiskInfo),
        (status = 400, body = ErrorBody), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody),
        (status = 422, body = ErrorBody), (status = 500, body = ErrorBody), (status = 507, body = ErrorBody)
    )
)]
async fn snapshot_disk(
    State(daemon): Shared,
    Name(id): Name,
    Json(request): Json<SnapshotRequest>,
) -> Answer<DiskInfo> {
    blocking(move || daemon.snapshot(&id, &request)).await
}

/// Gives a disk another size while it is served.
#[utoipa::path(
    post, path = "/v1/disks/{id}/resize", params(("id" = String, Path, description = "the disk's name")),
    request_body = ResizeRequest,
    responses(
        (status = 200, body = Resized),
        (status = 400, body = ErrorBody), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody),
        (status = 422, body = ErrorBody), (status = 500, body = ErrorBody), (status = 507, body = ErrorBody)
    )
)]
async fn resize_disk(
    State(daemon): Shared,
    Name(id): Name,
    Json(request): Json<ResizeRequest>,
) -> Answer<Resized> {
    blocking(move || daemon.resize(&id, &request)).await
}

/// Ends serving a disk so that another daemon can take it over.
#[utoipa::path(
    post, path = "/v1/disks/{id}/release",
    params(
        ("id" = String, Path, description = "the disk's name"),
        ("force" = Option<bool>, Query, description = "even if a front end runs its rings"),
        ("wait_ms" = Option<u64>, Query, description = "how long to wait for a move to put its target in place, at most 600000")
    ),
    responses(
        (status = 200, body = Handover),
        (status = 404, body = ErrorBody), (status = 409, body = ErrorBody), (status = 500, body = ErrorBody),
        (status = 507, body = ErrorBody)
    )
)]
async fn release_disk(
    State(daemon): Shared,
    Name(id): Name,
    Options(options): Options<ReleaseOptions>,
) -> Answer<Handover> {
    let wait = std::time::Duration::from_millis(options.wait_ms);
    blocking(move || daemon.release(&id, options.force, wait)).await
}

/// Serves a disk again that was released here and that nobody has taken over.
#[utoipa::path(
    post, path = "/v1/disks/{id}/reclaim", params(("id" = String, Path, description = "the disk's name")),
    responses(
        (status = 200, body = DiskInfo),
        (status = 404, body = ErrorBody), (status = 409, body = ErrorBody), (status = 422, body = ErrorBody),
        (status = 500, body = ErrorBody), (status = 507, body = ErrorBody)
    )
)]
async fn reclaim_disk(State(daemon): Shared, Name(id): Name) -> Answer<DiskInfo> {
    blocking(move || daemon.reclaim(&id)).await
}

/// Starts a move; with several disks, one a disk, and the answer is the first.
#[utoipa::path(
    post, path = "/v1/moves", request_body = MoveRequest,
    responses(
        (status = 200, body = Job),
        (status = 400, body = ErrorBody), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody),
        (status = 422, body = ErrorBody), (status = 500, body = ErrorBody), (status = 507, body = ErrorBody)
    )
)]
async fn start_move(State(daemon): Shared, Json(request): Json<MoveRequest>) -> Answer<Job> {
    blocking(move || daemon.start_moves(&request)).await
}

/// Folds the newest images of a disk's chain into the one below them, while the guest writes.
#[utoipa::path(
    post, path = "/v1/disks/{id}/merge", params(("id" = String, Path, description = "the disk's name")),
    request_body = MergeRequest,
    responses(
        (status = 200, body = Job),
        (status = 400, body = ErrorBody), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody),
        (status = 422, body = ErrorBody), (status = 500, body = ErrorBody), (status = 507, body = ErrorBody)
    )
)]
async fn merge_disk(State(daemon): Shared, Name(id): Name, Json(request): Json<MergeRequest>) -> Answer<Job> {
    blocking(move || daemon.merge(&id, &request)).await
}

/// Every job, oldest first.
#[utoipa::path(get, path = "/v1/jobs", responses((status = 200, body = [Job])))]
async fn list_jobs(State(daemon): Shared) -> Answer<Vec<Job>> {
    blocking(move || Ok(daemon.job_list())).await
}

/// One job.
#[utoipa::path(
    get, path = "/v1/jobs/{job}", params(("job" = String, Path, description = "the job's id")),
    responses((status = 200, body = Job), (status = 404, body = ErrorBody))
)]
async fn show_job(State(daemon): Shared, Name(job): Name) -> Answer<Job> {
    blocking(move || daemon.job(&job)).await
}

/// Changes a running job.
#[utoipa::path(
    patch, path = "/v1/jobs/{job}", params(("job" = String, Path, description = "the job's id")),
    request_body = JobSettings,
    responses((status = 200, body = Job), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody))
)]
async fn set_job(State(daemon): Shared, Name(job): Name, Json(settings): Json<JobSettings>) -> Answer<Job> {
    blocking(move || daemon.set_job(&job, &settings)).await
}

macro_rules! job_verb {
    ($handler:ident, $verb:ident, $path:literal, $what:literal) => {
        #[doc = $what]
        #[utoipa::path(
            post, path = $path, params(("job" = String, Path, description = "the job's id")),
            responses(
                (status = 200, body = Job), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody)
            )
        )]
        async fn $handler(State(daemon): Shared, Name(job): Name) -> Answer<Job> {
            blocking(move || daemon.tell_job(&job, Verb::$verb)).await
        }
    };
}

job_verb!(pause_job, Pause, "/v1/jobs/{job}/pause", "Lets a move rest; the guest goes on.");
job_verb!(resume_job, Resume, "/v1/jobs/{job}/resume", "Lets a paused move go on.");
job_verb!(switch_job, Switch, "/v1/jobs/{job}/switch", "Switches a synced move over to the target.");
job_verb!(cancel_job, Cancel, "/v1/jobs/{job}/cancel", "Ends a move; the source stays the disk.");

/// What a finished move did.
#[utoipa::path(
    get, path = "/v1/jobs/{job}/receipt", params(("job" = String, Path, description = "the job's id")),
    responses((status = 200, body = Receipt), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody))
)]
async fn job_receipt(State(daemon): Shared, Name(job): Name) -> Answer<Receipt> {
    blocking(move || daemon.receipt(&job)).await
}

/// What happened, one event a line: the last 1,000, and with `follow` all that are to come.
#[utoipa::path(
    get, path = "/v1/events",
    params(("follow" = Option<bool>, Query, description = "stay and stream what is to come")),
    responses((status = 200, body = Event, content_type = "application/x-ndjson"))
)]
async fn events(
    State(daemon): Shared,
    Options(options): Options<EventsOptions>,
) -> Result<Response, DaemonError> {
    let events = daemon.events().clone();
    let body = if options.follow {
        let follower = events.follow();
        let lines = futures_util::stream::unfold((events, follower), |(events, mut follower)| async move {
            let batch = follower.next(&events).await?;
            Some((Ok::<_, std::convert::Infallible>(json_lines(&batch)), (events, follower)))
        });
        Body::from_stream(lines)
    } else {
        Body::from(json_lines(&events.since(0)))
    };
    Ok(([(header::CONTENT_TYPE, "application/x-ndjson")], body).into_response())
}

fn json_lines(events: &[Event]) -> Bytes {
    let mut lines = Vec::new();
    for event in events {
        // An event is strings and a number: there is nothing in it that could fail.
        if serde_json::to_writer(&mut lines, event).is_ok() {
            lines.push(b'\n');
        }
    }
    lines.into()
}

/// Counters for Prometheus.
#[utoipa::path(get, path = "/metrics", responses((status = 200, body = String, content_type = "text/plain")))]
async fn show_metrics(State(daemon): Shared) -> Result<Response, DaemonError> {
    let Json(text) = blocking(move || Ok(metrics::render(&daemon))).await?;
    Ok(([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], text).into_response())
}

/// This document.
#[utoipa::path(get, path = "/openapi.json", responses((status = 200, body = Object)))]
async fn show_openapi() -> Answer<utoipa::openapi::OpenApi> {
    Ok(Json(openapi::document()))
}

async fn no_route(uri: axum::http::Uri) -> DaemonError {
    DaemonError::new(Kind::NotFound, format!("there is no {}; /openapi.json tells what there is", uri.path()))
}

async fn no_method(method: axum::http::Method, uri: axum::http::Uri) -> Response {
    let e = DaemonError::invalid(format!("{} does not take {method}; see /openapi.json", uri.path()));
    (StatusCode::METHOD_NOT_ALLOWED, Json(e.body())).into_response()
}
