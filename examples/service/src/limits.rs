//! How many requests are served at once.
//!
//! Invariant: a request counts from its headers until the last byte of its response has gone to the
//! kernel, so that clients that do not read count too. Called by `routes`.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use axum::body::{Body, HttpBody};
use axum::extract::{Request, State};
use axum::http::header::RETRY_AFTER;
use axum::http::{HeaderValue, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use hyper::body::{Frame, SizeHint};
use parking_lot::Mutex;
use tokio::sync::OwnedSemaphorePermit;

use crate::error::ApiError;
use crate::state::App;

/// Where a request comes from; `server` sets it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Peer(pub(crate) SocketAddr);

/// The requests, or the connections, of each client's address.
#[derive(Debug, Default)]
pub(crate) struct Clients(Mutex<HashMap<IpAddr, usize>>);

/// One request of one address, counted until this is dropped.
#[derive(Debug)]
pub(crate) struct Counted {
    clients: Arc<Clients>,
    address: IpAddr,
}

/// What counts as one client: of IPv6 the network, in which a client has its pick of addresses.
fn client_of(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => IpAddr::V6((address.to_bits() & (!0 << 64)).into()),
        address => address,
    }
}

impl Clients {
    /// Counts a request.
    ///
    /// # Errors
    ///
    /// 429 if there are `max` already.
    pub(crate) fn count(
        self: &Arc<Self>,
        Peer(address): Peer,
        max: usize,
        what: &str,
    ) -> Result<Counted, ApiError> {
        self.try_count(address.ip(), max).ok_or_else(|| {
            let message = format!("a client has at most {max} {what} at once");
            ApiError::new(StatusCode::TOO_MANY_REQUESTS, "too_many_requests", message)
        })
    }

    /// The same, without a word for the client.
    pub(crate) fn try_count(self: &Arc<Self>, address: IpAddr, max: usize) -> Option<Counted> {
        let address = client_of(address);
        let mut table = self.0.lock();
        let count = table.entry(address).or_default();
        if *count >= max {
            return None;
        }
        *count += 1;
        Some(Counted { clients: self.clone(), address })
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        let mut table = self.clients.0.lock();
        if let Some(count) = table.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                table.remove(&self.address);
            }
        }
    }
}

/// What a request counts as.
type Slots = (OwnedSemaphorePermit, Option<Counted>);

/// A body that keeps something, such as what its request counts as, until its bytes have gone.
struct Keeping<T> {
    body: Body,
    kept: Arc<T>,
}

/// A body of these bytes that keeps something until they have gone. The HTTP layer takes what is
/// short as a whole, and then has the bytes and no body any more.
pub(crate) fn charged<T: Send + 'static>(bytes: Vec<u8>, kept: T) -> Body {
    Body::from(Bytes::from_owner(Charged { bytes, _kept: kept }))
}

/// Bytes that keep something.
struct Charged<B, T> {
    bytes: B,
    _kept: T,
}

impl<B: AsRef<[u8]>, T> AsRef<[u8]> for Charged<B, T> {
    fn as_ref(&self) -> &[u8] {
        self.bytes.as_ref()
    }
}

/// Keeps `kept` until this body has ended and all of its bytes have gone.
fn keeping<T: Send + Sync + 'static>(body: Body, kept: T) -> Body {
    Body::new(Keeping { body, kept: Arc::new(kept) })
}

impl<T: Send + Sync + 'static> HttpBody for Keeping<T> {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let next = ready!(Pin::new(&mut self.body).poll_frame(context));
        let charge = |bytes| Bytes::from_owner(Charged { bytes, _kept: self.kept.clone() });
        Poll::Ready(next.map(|frame| frame.map(|frame| frame.map_data(charge))))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Serves a request if there is a place for it.
pub(crate) async fn limit(State(app): State<App>, request: Request, next: Next) -> Response {
    let mut response = match admit(&app, &request) {
        Ok(slots) => {
            let response = next.run(request).await;
            response.map(|body| keeping(body, slots))
        }
        Err(error) => error.into_response(),
    };
    if response.headers().contains_key(RETRY_AFTER) {
        let seconds = app.limits.retry_after.as_secs().max(1);
        response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(seconds));
    }
    response
}

/// # Errors
///
/// 429 if the client has too many requests, 503 if all have.
fn admit(app: &App, request: &Request) -> Result<Slots, ApiError> {
    app.check_open()?;
    let full = |_| ApiError::unavailable("busy", "the service has all the requests that it may");
    let all = app.requests.clone().try_acquire_owned().map_err(full)?;
    let max = app.limits.max_requests_per_client;
    let peer = request.extensions().get::<Peer>().filter(|_| max > 0);
    let counted = peer.map(|&peer| app.clients.count(peer, max, "requests")).transpose()?;
    Ok((all, counted))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_one_client_count_together() {
        let of = |text: &str| client_of(text.parse().unwrap());
        assert_eq!(of("2001:db8::1"), of("2001:db8::ffff:1:2:3"));
        assert_ne!(of("2001:db8::1"), of("2001:db8:0:1::1"));
        assert_eq!(of("::ffff:192.0.2.1"), of("192.0.2.1"));
        assert_ne!(of("192.0.2.1"), of("192.0.2.2"));
        let clients = Arc::new(Clients::default());
        let first = clients.try_count("2001:db8::1".parse().unwrap(), 1).unwrap();
        assert!(clients.try_count("2001:db8::2".parse().unwrap(), 1).is_none());
        drop(first);
        assert!(clients.0.lock().is_empty());
    }
}
