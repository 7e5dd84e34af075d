//! The control API's client: HTTP/1.1 with JSON over the daemon's Unix socket, one connection a request.

use std::path::{Path, PathBuf};
use std::time::Duration;

use blockd_api::{
    AttachRequest, DiskInfo, ErrorBody, Event, Handover, Job, JobSettings, MergeRequest, MoveRequest,
    Receipt, ResizeRequest, Resized, SnapshotRequest,
};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use crate::failure::Failure;

/// The longest answer that is read into memory: far more than any list of disks or jobs needs.
const MAX_ANSWER_BYTES: usize = 64 << 20;
/// How long a question may wait for its answer.
const ANSWER: Duration = Duration::from_secs(30);
/// The longest line of the stream of events.
const MAX_EVENT_BYTES: usize = 1 << 20;

/// A daemon, by its socket. Nothing is sent before the first request.
#[derive(Debug, Clone)]
pub(crate) struct Client {
    socket: PathBuf,
}

impl Client {
    /// The daemon at `api`, else at the place where a daemon of this user listens.
    ///
    /// # Errors
    /// Wrong usage when there is no such place and none was named.
    pub(crate) fn new(api: Option<&Path>) -> Result<Self, Failure> {
        if let Some(socket) = api {
            return Ok(Self { socket: socket.to_owned() });
        }
        if nix::unistd::geteuid().is_root() {
            return Ok(Self { socket: "/run/blockd/api.sock".into() });
        }
        match std::env::var_os("XDG_RUNTIME_DIR") {
            Some(dir) if !dir.is_empty() => Ok(Self { socket: Path::new(&dir).join("blockd/api.sock") }),
            _ => Err(Failure::usage(
                "XDG_RUNTIME_DIR is not set, so there is no usual place for the daemon's socket; name it with --api or BLOCKD_API",
            )),
        }
    }

    /// `GET /v1/disks`
    pub(crate) async fn disks(&self) -> Result<Vec<DiskInfo>, Failure> {
        self.get("/v1/disks").await
    }

    /// `GET /v1/disks/{id}`
    pub(crate) async fn disk(&self, id: &str) -> Result<DiskInfo, Failure> {
        self.get(&format!("/v1/disks/{}", segment(id))).await
    }

    /// `POST /v1/disks`
    pub(crate) async fn attach(&self, request: &AttachRequest) -> Result<DiskInfo, Failure> {
        self.send(Method::POST, "/v1/disks", Some(request)).await
    }

    /// `DELETE /v1/disks/{id}`
    pub(crate) async fn detach(&self, id: &str, force: bool) -> Result<(), Failure> {
        let query = if force { "?force=true" } else { "" };
        let path = format!("/v1/disks/{}{query}", segment(id));
        self.send::<(), serde::de::IgnoredAny>(Method::DELETE, &path, None).await.map(|_| ())
    }

    /// `POST /v1/disks/{id}/flush`
    pub(crate) async fn flush(&self, id: &str) -> Result<(), Failure> {
        let path = format!("/v1/disks/{}/flush", segment(id));
        self.send::<(), serde::de::IgnoredAny>(Method::POST, &path, None).await.map(|_| ())
    }

    /// `POST /v1/disks/{id}/release`, waiting for a move for so many milliseconds.
    pub(crate) async fn release(&self, id: &str, force: bool, wait_ms: u64) -> Result<Handover, Failure> {
        let path = format!("/v1/disks/{}/release?force={force}&wait_ms={wait_ms}", segment(id));
        self.send::<(), Handover>(Method::POST, &path, None).await
    }

    /// `POST /v1/disks/{id}/reclaim`
    pub(crate) async fn reclaim(&self, id: &str) -> Result<DiskInfo, Failure> {
        self.send::<(), DiskInfo>(Method::POST, &format!("/v1/disks/{}/reclaim", segment(id)), None).await
    }

    /// `POST /v1/disks/{id}/resize`
    pub(crate) async fn resize(&self, id: &str, request: &ResizeRequest) -> Result<Resized, Failure> {
        self.send(Method::POST, &format!("/v1/disks/{}/resize", segment(id)), Some(request)).await
    }

    /// `POST /v1/disks/{id}/merge`
    pub(crate) async fn merge(&self, id: &str, request: &MergeRequest) -> Result<Job, Failure> {
        self.send(Method::POST, &format!("/v1/disks/{}/merge", segment(id)), Some(request)).await
    }

    /// `POST /v1/disks/{id}/snapshot`
    pub(crate) async fn snapshot(&self, id: &str, request: &SnapshotRequest) -> Result<DiskInfo, Failure> {
        self.send(Method::POST, &format!("/v1/disks/{}/snapshot", segment(id)), Some(request)).await
    }

    /// `POST /v1/moves`
    pub(crate) async fn start_move(&self, request: &MoveRequest) -> Result<Job, Failure> {
        self.send(Method::POST, "/v1/moves", Some(request)).await
    }

    /// `GET /v1/jobs`
    pub(crate) async fn jobs(&self) -> Result<Vec<Job>, Failure> {
        self.get("/v1/jobs").await
    }

    /// `GET /v1/jobs/{job}`
    pub(crate) async fn job(&self, job: &str) -> Result<Job, Failure> {
        self.get(&format!("/v1/jobs/{}", segment(job))).await
    }

    /// `POST /v1/jobs/{job}/{verb}`, the verb being `pause`, `resume`, `switch` or `cancel`.
    pub(crate) async fn job_verb(&self, job: &str, verb: &str) -> Result<Job, Failure> {
        self.send::<(), Job>(Method::POST, &format!("/v1/jobs/{}/{verb}", segment(job)), None).await
    }

    /// `PATCH /v1/jobs/{job}`
    pub(crate) async fn set_job(&self, job: &str, settings: &JobSettings) -> Result<Job, Failure> {
        self.send(Method::PATCH, &format!("/v1/jobs/{}", segment(job)), Some(settings)).await
    }

    /// `GET /v1/jobs/{job}/receipt`
    pub(crate) async fn receipt(&self, job: &str) -> Result<Receipt, Failure> {
        self.get(&format!("/v1/jobs/{}/receipt", segment(job))).await
    }

    /// `GET /v1/events`: what is remembered, and with `follow` what happens from now on.
    pub(crate) async fn events(&self, follow: bool) -> Result<Events, Failure> {
        let path = if follow { "/v1/events?follow=true" } else { "/v1/events" };
        let response = self.request::<()>(Method::GET, path, None).await?;
        let response = self.refuse_failures(response).await?;
        Ok(Events { body: response.into_body(), pending: Vec::new(), socket: self.socket.clone() })
    }

    async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, Failure> {
        // What is only looked up takes no time, where an order may have to wait for a disk.
        let answer = self.send::<(), T>(Method::GET, path, None);
        tokio::time::timeout(ANSWER, answer).await.unwrap_or_else(|_| {
            let socket = self.socket.display();
            let message =
                format!("the daemon at {socket} has not answered for {} s; see its log", ANSWER.as_secs());
            Err(Failure::new("unreachable", message))
        })
    }

    async fn send<B: Serialize, T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&B>,
    ) -> Result<T, Failure> {
        let response = self.request(method, path, body).await?;
        let response = self.refuse_failures(response).await?;
        let bytes = self.collect(response).await?;
        serde_json::from_slice(&bytes).map_err(|e| self.confused(path, &e.to_string()))
    }

    async fn request<B: Serialize>(
        &self,
        method: Method,
        path: &str,
        body: Option<&B>,
    ) -> Result<Response<Incoming>, Failure> {
        let stream = UnixStream::connect(&self.socket).await.map_err(|e| self.unreachable(&e))?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|e| self.confused(path, &e.to_string()))?;
        // The connection's own error comes back through the request as well.
        tokio::spawn(connection);
        let bytes = match body {
            Some(body) => {
                serde_json::to_vec(body).map_err(|e| Failure::new("internal", format!("{path}: {e}")))?
            }
            None => Vec::new(),
        };
        let mut request = Request::builder().method(method).uri(path).header("host", "blockd");
        if body.is_some() {
            request = request.header("content-type", "application/json");
        }
        let request = request
            .body(Full::new(Bytes::from(bytes)))
            .map_err(|e| Failure::new("internal", format!("{path}: {e}")))?;
        sender.send_request(request).await.map_err(|e| self.broken(&e))
    }

    async fn refuse_failures(&self, response: Response<Incoming>) -> Result<Response<Incoming>, Failure> {
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let bytes = self.collect(response).await?;
        Err(match serde_json::from_slice::<ErrorBody>(&bytes) {
            Ok(body) => body.error.into(),
            Err(_) => self.unknown_failure(status),
        })
    }

    async fn collect(&self, response: Response<Incoming>) -> Result<Bytes, Failure> {
        let body = Limited::new(response.into_body(), MAX_ANSWER_BYTES);
        body.collect().await.map(http_body_util::Collected::to_bytes).map_err(|e| {
            Failure::new(
                "unreachable",
                format!("the daemon at {} broke off its answer: {e}", self.socket.display()),
            )
        })
    }

    fn unreachable(&self, e: &std::io::Error) -> Failure {
        let reason = match e.kind() {
            std::io::ErrorKind::NotFound => "there is no such socket".to_owned(),
            std::io::ErrorKind::ConnectionRefused => "nobody listens there any more".to_owned(),
            std::io::ErrorKind::PermissionDenied => "this user may not connect to it".to_owned(),
            _ => e.to_string(),
        };
        let socket = self.socket.display();
        Failure::new(
            "unreachable",
            format!(
                "no daemon answers at {socket}: {reason}; start one with `blockd --api {socket}` or name another with --api"
            ),
        )
    }

    fn broken(&self, e: &hyper::Error) -> Failure {
        let socket = self.socket.display();
        Failure::new(
            "unreachable",
            format!(
                "the daemon at {socket} ended the connection before it answered: {e}; see whether it still runs"
            ),
        )
    }

    fn confused(&self, path: &str, reason: &str) -> Failure {
        let socket = self.socket.display();
        Failure::new(
            "internal",
            format!("what answers at {socket} does not speak this version of the API ({path}: {reason})"),
        )
    }

    fn unknown_failure(&self, status: StatusCode) -> Failure {
        let kind = if status == StatusCode::NOT_FOUND { "not-found" } else { "internal" };
        let socket = self.socket.display();
        Failure::new(kind, format!("the daemon at {socket} refused with status {status} and no reason"))
    }
}

/// The stream of events.
#[derive(Debug)]
pub(crate) struct Events {
    body: Incoming,
    pending: Vec<u8>,
    socket: PathBuf,
}

impl Events {
    /// The next event, or `None` when the daemon has no more.
    pub(crate) async fn next(&mut self) -> Result<Option<Event>, Failure> {
        loop {
            if let Some(end) = self.pending.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = self.pending.drain(..=end).collect();
                if line.trim_ascii().is_empty() {
                    continue;
                }
                return self.parse(&line).map(Some);
            }
            if self.pending.len() > MAX_EVENT_BYTES {
                return Err(self.broken("a line of the events is longer than 1 MiB"));
            }
            match self.body.frame().await {
                Some(Ok(frame)) => {
                    if let Some(data) = frame.data_ref() {
                        self.pending.extend_from_slice(data);
                    }
                }
                Some(Err(e)) => return Err(self.broken(&e.to_string())),
                None if self.pending.trim_ascii().is_empty() => return Ok(None),
                None => {
                    let line = std::mem::take(&mut self.pending);
                    return self.parse(&line).map(Some);
                }
            }
        }
    }

    fn parse(&self, line: &[u8]) -> Result<Event, Failure> {
        serde_json::from_slice(line).map_err(|e| self.broken(&e.to_string()))
    }

    fn broken(&self, reason: &str) -> Failure {
        Failure::new(
            "unreachable",
            format!("the events of the daemon at {} broke off: {reason}", self.socket.display()),
        )
    }
}

/// A name as one segment of a path: what is not plainly allowed there is percent-encoded.
fn segment(name: &str) -> String {
    let mut out = String::new();
    for byte in name.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'~' => out.push(byte as char),
            // A lone dot would be taken for "this folder" by a strict server.
            b'.' if !name.trim_matches('.').is_empty() => out.push('.'),
            _ => out.push_str(&format!("%{byte:02X}")),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_can_not_break_out_of_its_segment() {
        assert_eq!(segment("db-1.main_x"), "db-1.main_x");
        assert_eq!(segment("../jobs?x=1"), "..%2Fjobs%3Fx%3D1");
        assert_eq!(segment(".."), "%2E%2E");
        assert_eq!(segment("ä"), "%C3%A4");
    }
}
