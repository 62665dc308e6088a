//! Requests, with the whole of their answers.
//!
//! Invariant: an answer is whole, or it is lost. Sent again is only what was never sent, since the
//! connection had ended.

use std::fmt;

use axum::body::Body;
use axum::http::{HeaderMap, Method, Request, StatusCode};
use bytes::Bytes;
use http_body_util::BodyExt;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;

/// A client of one service.
#[derive(Clone, Debug)]
pub struct Http {
    client: Client<HttpConnector, Body>,
    base: String,
}

/// A whole answer.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The status.
    pub status: StatusCode,
    /// The headers.
    pub headers: HeaderMap,
    /// The body.
    pub body: Bytes,
}

/// There was no answer, or it was cut off.
#[derive(Debug)]
pub struct Lost(String);

impl fmt::Display for Lost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Answer {
    /// The text of a header, or nothing.
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
    }
}

impl Http {
    /// A client of the service at this address.
    pub fn new(base: &str) -> Self {
        let client = Client::builder(TokioExecutor::new()).build_http();
        Http { client, base: base.trim_end_matches('/').to_owned() }
    }

    /// Sends a request.
    ///
    /// # Errors
    ///
    /// [`Lost`] if no whole answer came.
    pub async fn send(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: impl Into<Body>,
    ) -> Result<Answer, Lost> {
        let mut request = Request::builder().method(method).uri(format!("{}{path}", self.base));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(body.into()).map_err(|error| Lost(error.to_string()))?;
        let response =
            self.client.request(request).await.map_err(|error| Lost(format!("{error:?}")))?;
        let (parts, body) = response.into_parts();
        let body = body.collect().await.map_err(|error| Lost(format!("{error:?}")))?;
        Ok(Answer { status: parts.status, headers: parts.headers, body: body.to_bytes() })
    }
}
