//! Responses: nothing, JSON, or an error as the list of its messages.

use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{FromRequest, Request};
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::control::ControlError;

/// The longest body of a request.
pub(super) const MAX_BODY: usize = 1 << 20;

/// How long a client may take to send one, or the head of a request.
pub(super) const SLOWEST: Duration = Duration::from_secs(5);

/// A body of JSON, in a request or a response.
pub(super) struct Json<T>(pub(super) T);

impl<T: Serialize> IntoResponse for Json<T> {
    fn into_response(self) -> Response {
        match serde_json::to_vec(&self.0) {
            Ok(bytes) => with_type(StatusCode::OK, bytes),
            Err(error) => {
                let what = "the answer cannot be put into words";
                Refusal::from(ControlError::failed(what, error)).into_response()
            }
        }
    }
}

impl<T: DeserializeOwned, S: Sync> FromRequest<S> for Json<T> {
    type Rejection = Refusal;

    async fn from_request(request: Request, _: &S) -> Result<Self, Refusal> {
        let bytes = receive(request.into_body()).await?;
        serde_json::from_slice(&bytes).map(Self).map_err(|error| {
            Refusal::new(
                StatusCode::BAD_REQUEST,
                format!("the body is not what it has to be: {error}"),
            )
        })
    }
}

/// The body of a request that has none.
pub(super) struct NoBody;

impl<S: Sync> FromRequest<S> for NoBody {
    type Rejection = Refusal;

    async fn from_request(request: Request, _: &S) -> Result<Self, Refusal> {
        if receive(request.into_body()).await?.is_empty() {
            Ok(Self)
        } else {
            Err(Refusal::new(
                StatusCode::BAD_REQUEST,
                "this takes no body".to_owned(),
            ))
        }
    }
}

/// A body that is of no interest, but has come: a client that is answered and cut off while it sends does not read why.
pub(super) struct AnyBody;

impl<S: Sync> FromRequest<S> for AnyBody {
    type Rejection = Refusal;

    async fn from_request(request: Request, _: &S) -> Result<Self, Refusal> {
        receive(request.into_body()).await.map(|_| Self)
    }
}

async fn receive(body: Body) -> Result<Bytes, Refusal> {
    let received = Limited::new(body, MAX_BODY).collect();
    match tokio::time::timeout(SLOWEST, received).await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(Refusal::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            format!("the body is longer than {MAX_BODY} bytes"),
        )),
        Ok(Err(error)) => Err(Refusal::new(
            StatusCode::BAD_REQUEST,
            format!("the body does not come: {error}"),
        )),
        Err(_) => Err(Refusal::new(
            StatusCode::REQUEST_TIMEOUT,
            "the body does not come".to_owned(),
        )),
    }
}

/// An error, for a client.
#[derive(Debug)]
pub(super) struct Refusal {
    status: StatusCode,
    messages: Vec<String>,
}

impl Refusal {
    pub(super) fn new(status: StatusCode, message: String) -> Self {
        Self {
            status,
            messages: vec![message],
        }
    }
}

impl From<ControlError> for Refusal {
    /// The statuses are those that Cloud Hypervisor has for the same, where it has one.
    fn from(error: ControlError) -> Self {
        let status = match &error {
            ControlError::NoVm | ControlError::NoOperation | ControlError::NothingInDoubt => {
                StatusCode::NOT_FOUND
            }
            ControlError::State { .. } => StatusCode::METHOD_NOT_ALLOWED,
            ControlError::HasVm | ControlError::Unresolved => StatusCode::CONFLICT,
            ControlError::Busy(_) => StatusCode::TOO_MANY_REQUESTS,
            ControlError::Invalid(_) => StatusCode::BAD_REQUEST,
            ControlError::NotSupported(_) => StatusCode::NOT_IMPLEMENTED,
            ControlError::Cancelled(_)
            | ControlError::Ending
            | ControlError::InDoubt { .. }
            | ControlError::Failed { .. } => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Self {
            status,
            messages: error.messages(),
        }
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        log::info!(
            "request refused: {}: {}",
            self.status,
            self.messages.join(": ")
        );
        // A list of strings can always be written.
        let body = serde_json::to_vec(&self.messages).unwrap_or_default();
        with_type(self.status, body)
    }
}

fn with_type(status: StatusCode, body: Vec<u8>) -> Response {
    let mut response = (status, body).into_response();
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}
