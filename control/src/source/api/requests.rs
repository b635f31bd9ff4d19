//! Requests to the API server, counted under the names that every Kubernetes client has.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use axum::http::{Request, Response};
use metrics::{counter, histogram};
use tower::{Layer, Service};

/// Name of the histogram.
pub const SECONDS: &str = "rest_client_request_duration_seconds";
/// Name of the counter.
pub const COUNT: &str = "rest_client_requests_total";

/// Counts what goes through to this host and port.
#[derive(Clone, Debug)]
pub(super) struct Count {
    pub(super) host: Arc<str>,
}

impl<S> Layer<S> for Count {
    type Service = Counted<S>;

    fn layer(&self, inner: S) -> Counted<S> {
        Counted { inner, host: Arc::clone(&self.host) }
    }
}

/// A service whose requests are counted.
#[derive(Debug)]
pub(super) struct Counted<S> {
    inner: S,
    host: Arc<str>,
}

impl<S, A, B> Service<Request<A>> for Counted<S>
where
    S: Service<Request<A>, Response = Response<B>>,
    S::Future: Send + 'static,
{
    type Response = Response<B>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Response<B>, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<A>) -> Self::Future {
        let (method, host, begun) = (request.method().to_string(), self.host.to_string(), Instant::now());
        let answer = self.inner.call(request);
        Box::pin(async move {
            let answer = answer.await;
            // As the clients in Go say that there was none.
            let code =
                answer.as_ref().map_or_else(|_| "<error>".to_owned(), |answer| answer.status().as_str().to_owned());
            histogram!(SECONDS, "verb" => method.clone(), "host" => host.clone()).record(begun.elapsed());
            counter!(COUNT, "code" => code, "method" => method, "host" => host).increment(1);
            answer
        })
    }
}
