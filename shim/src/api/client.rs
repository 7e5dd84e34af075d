//! A client of HTTP with JSON on a Unix socket: of this program's own API, and of blockd's. It blocks.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use super::{ErrorBody, ErrorInfo};

/// Longest answer that is read.
const ANSWER_BYTES_MAX: usize = 16 << 20;
/// How long a question may wait for its answer, where nothing else is said.
pub const ANSWER: Duration = Duration::from_secs(30);

/// Whoever listens on a socket. Nothing is sent before the first call.
#[derive(Debug, Clone)]
pub struct Client {
    socket: PathBuf,
    timeout: Duration,
}

impl Client {
    /// The one at this socket.
    pub fn new(socket: &Path) -> Self {
        Self { socket: socket.to_owned(), timeout: ANSWER }
    }

    /// Waits so long for answers.
    #[must_use]
    pub fn with_timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// The socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// `GET`.
    ///
    /// # Errors
    /// As [`Client::call`].
    pub fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        self.call::<(), T>(Method::GET, path, None)
    }

    /// `POST`.
    ///
    /// # Errors
    /// As [`Client::call`].
    pub fn post<B: Serialize, T: DeserializeOwned>(&self, path: &str, body: Option<&B>) -> Result<T> {
        self.call(Method::POST, path, body)
    }

    /// One request and its answer.
    ///
    /// # Errors
    /// If nobody listens, nothing is answered in time, or the answer is a refusal: then the error holds its [`ErrorInfo`]
    /// (`downcast_ref`).
    pub fn call<B: Serialize, T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&B>,
    ) -> Result<T> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let bytes = match body {
            Some(body) => serde_json::to_vec(body).context("write the request down")?,
            None => Vec::new(),
        };
        let answered = runtime
            .block_on(async { tokio::time::timeout(self.timeout, self.exchange(method, path, bytes)).await });
        let (status, body) = answered.map_err(|_| {
            anyhow!("{} did not answer {path} within {:?}", self.socket.display(), self.timeout)
        })??;
        if !status.is_success() {
            let info = serde_json::from_slice::<ErrorBody>(&body).map_or_else(
                |_| ErrorInfo {
                    kind: "internal".into(),
                    message: format!("{path} was answered with {status}"),
                },
                |body| body.error,
            );
            return Err(info.into());
        }
        let body: &[u8] = if body.is_empty() { b"null" } else { &body };
        serde_json::from_slice(body)
            .with_context(|| format!("{} answered {path} with something else", self.socket.display()))
    }

    async fn exchange(
        &self,
        method: Method,
        path: &str,
        body: Vec<u8>,
    ) -> Result<(hyper::StatusCode, Bytes)> {
        let socket = self.socket.display();
        let stream = UnixStream::connect(&self.socket)
            .await
            .with_context(|| format!("connect to {socket} (does it run, and is the path right?)"))?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "localhost")
            .header("content-type", "application/json")
            .body(Full::new(Bytes::from(body)))?;
        let response = sender
            .send_request(request)
            .await
            .with_context(|| format!("{socket} ended while it was asked for {path}"))?;
        let status = response.status();
        let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX)
            .collect()
            .await
            .map_err(|e| anyhow!("the answer of {socket} to {path} broke off: {e}"))?;
        Ok((status, body.to_bytes()))
    }
}
