//! The client's end of the API.

use std::io;
use std::path::{Path, PathBuf};

use http_body_util::{BodyExt as _, Full};
use hyper::body::Bytes;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::header::HOST;
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use tokio::net::UnixStream;
use tokio::runtime::{self, Runtime};
use vmm::control::Phase;

/// Why something was not done.
#[derive(Debug, thiserror::Error)]
pub(super) enum RemoteError {
    /// Nobody can be asked.
    #[error("--api-socket {}: cannot connect: {source}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
    /// Nobody answers any more.
    #[error("{endpoint}: no answer, so it may have been done or not: {source}")]
    Lost {
        /// What was asked.
        endpoint: &'static str,
        /// What happened.
        #[source]
        source: hyper::Error,
    },
    /// The migration has not come about.
    #[error("the migration has {}: {}", end(*phase), messages.join(": "))]
    NotMigrated {
        /// How it ended.
        phase: Phase,
        /// Why, from the top to the root cause.
        messages: Vec<String>,
    },
    /// The VMM says no.
    #[error("{endpoint}: {} ({status})", messages.join(": "))]
    Refused {
        /// What was asked.
        endpoint: &'static str,
        /// The status of its answer.
        status: StatusCode,
        /// Why, from the top to the root cause.
        messages: Vec<String>,
    },
}

fn end(phase: Phase) -> &'static str {
    match phase {
        Phase::Cancelled => "been cancelled, and the VM is here as it was",
        Phase::InDoubt => "come to an end that is not known: the VM runs there, or nowhere",
        _ => "failed, and the VM is here as it was",
    }
}

impl RemoteError {
    /// The exit status that tells scripts which it was.
    pub(super) fn exit_status(&self) -> u8 {
        match self {
            Self::Refused { .. } => 1,
            Self::Connect { .. } | Self::Lost { .. } => 2,
            Self::NotMigrated { phase, .. } => match phase {
                Phase::Cancelled => 6,
                Phase::InDoubt => 7,
                _ => 1,
            },
        }
    }
}

/// A connection to a VMM. One request at a time.
pub(super) struct Client {
    runtime: Runtime,
    sender: SendRequest<Full<Bytes>>,
}

impl Client {
    /// Connects to the VMM that serves its API on `path`.
    pub(super) fn connect(path: &Path) -> Result<Self, RemoteError> {
        let error = |source| RemoteError::Connect {
            path: path.to_owned(),
            source,
        };
        let runtime = runtime::Builder::new_current_thread()
            .enable_io()
            .build()
            .map_err(error)?;
        let sender = runtime
            .block_on(async {
                let stream = UnixStream::connect(path).await?;
                let (sender, connection) = handshake(TokioIo::new(stream))
                    .await
                    .map_err(io::Error::other)?;
                tokio::spawn(connection);
                Ok(sender)
            })
            .map_err(error)?;
        Ok(Self { runtime, sender })
    }

    /// Asks for something.
    pub(super) fn get(&mut self, endpoint: &'static str) -> Result<Bytes, RemoteError> {
        self.send(Method::GET, endpoint, Bytes::new())
    }

    /// Has something done that needs no more words.
    pub(super) fn put(&mut self, endpoint: &'static str) -> anyhow::Result<()> {
        Ok(self.send(Method::PUT, endpoint, Bytes::new()).map(drop)?)
    }

    /// Has something done that `body` describes.
    pub(super) fn put_json(
        &mut self,
        endpoint: &'static str,
        body: &impl Serialize,
    ) -> anyhow::Result<()> {
        let body = serde_json::to_vec(body)?;
        Ok(self.send(Method::PUT, endpoint, body.into()).map(drop)?)
    }

    /// Sends a request, and returns the body of its answer.
    pub(super) fn send(
        &mut self,
        method: Method,
        endpoint: &'static str,
        body: Bytes,
    ) -> Result<Bytes, RemoteError> {
        let lost = |source| RemoteError::Lost { endpoint, source };
        let mut request = Request::new(Full::new(body));
        *request.method_mut() = method;
        // An endpoint's name is always a path.
        *request.uri_mut() = format!("{}/{endpoint}", vmm::api::ROOT)
            .parse()
            .unwrap_or_default();
        let host = hyper::header::HeaderValue::from_static("localhost");
        request.headers_mut().insert(HOST, host);
        let (status, body) = self
            .runtime
            .block_on(async {
                self.sender.ready().await?;
                let response = self.sender.send_request(request).await?;
                let status = response.status();
                let body = response.into_body().collect().await?.to_bytes();
                Ok((status, body))
            })
            .map_err(lost)?;
        if status.is_success() {
            return Ok(body);
        }
        let messages = serde_json::from_slice(&body)
            .unwrap_or_else(|_| vec![String::from_utf8_lossy(&body).into_owned()]);
        Err(RemoteError::Refused {
            endpoint,
            status,
            messages,
        })
    }
}
