//! The routes, and the socket that they are served on.

use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use axum::Router;
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixListener;

use super::{ErrorBody, ErrorInfo};
use crate::control::Control;

/// Largest body of a request.
const BODY_BYTES_MAX: usize = 64 << 10;

type Shared = State<Arc<Control>>;

/// Every route of the API.
pub fn router(control: Arc<Control>) -> Router {
    Router::new()
        .route("/v1/vm", get(show))
        .route("/v1/vm/pause", post(pause))
        .route("/v1/vm/resume", post(resume))
        .route("/v1/vm/stop", post(stop))
        .route("/v1/vm/save", post(save))
        .route("/v1/guest", get(guest).post(tell_guest))
        .route("/v1/migration", get(migration).post(send))
        .route("/v1/migration/cancel", post(cancel))
        .route("/v1/migration/retry", post(retry))
        .route("/v1/migration/resume-here", post(resume_here))
        .route("/v1/migration/discard", post(discard))
        .route("/v1/check", post(check))
        .fallback(no_route)
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .with_state(control)
}

/// Serves until the process ends.
///
/// # Errors
/// If the socket can't be made, for one because another process listens there.
pub async fn serve(path: &Path, control: Arc<Control>) -> Result<()> {
    let listener = listen(path)?;
    tracing::info!(api = %path.display(), "answering");
    axum::serve(listener, router(control)).await.context("serve the control API")
}

fn listen(path: &Path) -> Result<UnixListener> {
    match std::os::unix::net::UnixStream::connect(path) {
        Ok(_) => bail!("another process serves {}; take another --api", path.display()),
        Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).with_context(|| format!("remove the old {}", path.display()))?;
        }
        Err(_) => {}
    }
    let listener = UnixListener::bind(path).with_context(|| format!("listen on {}", path.display()))?;
    let owner_only = std::fs::Permissions::from_mode(0o600);
    std::fs::set_permissions(path, owner_only).with_context(|| format!("guard {}", path.display()))?;
    Ok(listener)
}

fn status_of(kind: &str) -> StatusCode {
    match kind {
        "not-found" => StatusCode::NOT_FOUND,
        "invalid" => StatusCode::BAD_REQUEST,
        "state" | "busy" | "incompatible" | "cancelled" => StatusCode::CONFLICT,
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

fn refuse(error: anyhow::Error) -> Response {
    let info = match error.downcast::<ErrorInfo>() {
        Ok(info) => info,
        Err(error) => ErrorInfo { kind: "io".into(), message: format!("{error:#}") },
    };
    let status = status_of(&info.kind);
    let body = serde_json::to_vec(&ErrorBody { error: info }).unwrap_or_default();
    (status, [(header::CONTENT_TYPE, "application/json")], body).into_response()
}

/// Runs what may block in a thread of its own, and answers with what it returns.
async fn answer<T: Serialize + Send + 'static>(
    control: Arc<Control>,
    call: impl FnOnce(&Arc<Control>) -> Result<T> + Send + 'static,
) -> Response {
    let called = tokio::task::spawn_blocking(move || call(&control)).await;
    let result = called.unwrap_or_else(|e| Err(anyhow::anyhow!("the request broke off: {e}")));
    match result.and_then(|value| serde_json::to_vec(&value).context("write the answer down")) {
        Ok(body) => ([(header::CONTENT_TYPE, "application/json")], body).into_response(),
        Err(error) => refuse(error),
    }
}

/// Bodies are read as JSON whatever their content type says, so that `curl -d` works as it is typed.
fn parse<T: DeserializeOwned>(body: &Bytes) -> Result<T> {
    let body: &[u8] = if body.is_empty() { b"{}" } else { body };
    serde_json::from_slice(body).map_err(|e| {
        let message = format!("the body is not the JSON that is expected: {e}");
        ErrorInfo { kind: "invalid".into(), message }.into()
    })
}

async fn no_route() -> Response {
    let message = "there is nothing at this path; kvm-shim's API begins with /v1/vm".to_owned();
    refuse(ErrorInfo { kind: "not-found".into(), message }.into())
}

async fn show(State(control): Shared) -> Response {
    answer(control, |control| control.info()).await
}

async fn pause(State(control): Shared) -> Response {
    answer(control, |control| control.pause()).await
}

async fn resume(State(control): Shared) -> Response {
    answer(control, |control| control.resume()).await
}

async fn stop(State(control): Shared) -> Response {
    answer(control, |control| control.stop()).await
}

async fn save(State(control): Shared, body: Bytes) -> Response {
    answer(control, move |control| control.save(&parse(&body)?)).await
}

async fn guest(State(control): Shared) -> Response {
    answer(control, |control| control.guest()).await
}

async fn tell_guest(State(control): Shared, body: Bytes) -> Response {
    answer(control, move |control| control.tell_guest(&parse(&body)?)).await
}

async fn send(State(control): Shared, body: Bytes) -> Response {
    answer(control, move |control| control.send(&parse(&body)?)).await
}

async fn migration(State(control): Shared) -> Response {
    answer(control, |control| control.migration()).await
}

async fn cancel(State(control): Shared) -> Response {
    answer(control, |control| control.cancel()).await
}

async fn retry(State(control): Shared) -> Response {
    answer(control, |control| control.retry()).await
}

async fn resume_here(State(control): Shared) -> Response {
    answer(control, |control| control.resume_here()).await
}

async fn discard(State(control): Shared) -> Response {
    answer(control, |control| control.discard()).await
}

async fn check(State(control): Shared, body: Bytes) -> Response {
    answer(control, move |control| control.check(&parse(&body)?)).await
}
