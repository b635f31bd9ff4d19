//! HTTP surfaces: metrics and admin API on one address, health on another.
//!
//! | path | answer |
//! | --- | --- |
//! | `/metrics` | Prometheus text |
//! | `/healthz`, `/livez` | 200 or 503, JSON as kube-proxy's |
//! | `/api/v1/services`, `endpoints`, `frontends`, `flows` | lists behind `sluice get` |
//! | `/api/v1/trace?from=IP&to=IP:PORT&proto=tcp` | what happens to a new flow, behind `sluice trace --admin` |
//! | `/api/v1/resolve?name=NAME&type=TYPE&from=NS` | what a name is answered with, behind `sluice resolve --admin` |
//! | `POST /api/v1/drain`, `undrain` | drains by hand, behind `sluice drain` |
//! | `POST /api/v1/retire` | new connections are another service proxy's, behind `sluice retire` |
//! | `/api/v1/problems` | everything that is wrong with objects now |
//! | `/api/v1/status` | whether all is well, behind `sluice status` |
//! | `/proxyMode`, `/configz`, `/flagz`, `/statusz` | what kube-proxy says there, of us |

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use anyhow::Result;
use axum::extract::{ConnectInfo, Query, Request, State as Extract};
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use sluice_dataplane::net::Family;
use socket2::{Domain, Socket, Type};
use tokio::net::TcpListener;
use tokio::task::JoinSet;

use crate::host::Lacking;
use crate::host::sysctl::has_family;
use crate::state::State;
use crate::trace::Question;

pub mod drain;
pub mod health;
pub mod kube_proxy;
pub mod metrics;
pub mod names;
pub mod pages;
pub mod status;
pub mod views;

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 128;

/// Listens on both addresses. The servers end when the set is dropped.
pub fn serve(state: &Arc<State>) -> Result<JoinSet<std::io::Result<()>>> {
    let health = Router::new()
        .route("/healthz", get(health::healthz))
        .route("/livez", get(health::livez))
        .with_state(Arc::clone(state));
    let changes = Router::new()
        .route("/api/v1/drain", post(drain::drain))
        .route("/api/v1/undrain", post(drain::undrain))
        .route("/api/v1/retire", post(retire))
        .route_layer(from_fn_with_state(Arc::clone(state), only_from_here));
    let admin = Router::new()
        .route("/metrics", get(render_metrics))
        .route("/api/v1/services", get(|Extract(state): Extract<Arc<State>>| list(state, views::services)))
        .route("/api/v1/endpoints", get(|Extract(state): Extract<Arc<State>>| list(state, views::endpoints)))
        .route("/api/v1/frontends", get(|Extract(state): Extract<Arc<State>>| list(state, views::frontends)))
        .route("/api/v1/flows", get(|Extract(state): Extract<Arc<State>>| list(state, views::flows)))
        .route("/api/v1/trace", get(trace))
        .route("/api/v1/resolve", get(resolve))
        .route("/api/v1/problems", get(|Extract(state): Extract<Arc<State>>| list(state, views::problems)))
        .route("/api/v1/status", get(status::status))
        .route("/proxyMode", get(pages::PROXY_MODE))
        .route("/configz", get(pages::configz))
        .route("/flagz", get(pages::flagz))
        .route("/statusz", get(pages::statusz))
        .merge(changes)
        .with_state(Arc::clone(state))
        .merge(health.clone());
    let mut servers = JoinSet::new();
    for (address, router, flag) in [(state.config.admin, admin, "--admin"), (state.config.health, health, "--health")] {
        let listener = listen(address, flag)?;
        let service = router.into_make_service_with_connect_info::<SocketAddr>();
        servers.spawn(async move { axum::serve(listener, service).await });
    }
    Ok(servers)
}

fn listen(address: SocketAddr, flag: &str) -> Result<TcpListener> {
    // All IPv4 addresses means all addresses, as in kube-proxy; without IPv6 it means what it says.
    let all = address.ip() == IpAddr::V4(Ipv4Addr::UNSPECIFIED) && has_family(Family::V6);
    let bind = || -> std::io::Result<TcpListener> {
        let address = if all { SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), address.port()) } else { address };
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
        if address.is_ipv6() {
            socket.set_only_v6(!all)?;
        }
        socket.set_reuse_address(true)?;
        socket.set_nonblocking(true)?;
        socket.bind(&address.into())?;
        socket.listen(BACKLOG)?;
        TcpListener::from_std(socket.into())
    };
    bind().map_err(|error| Lacking(format!("cannot listen on {address}: {error}: choose another with {flag}")).into())
}

/// Metrics may be asked for from anywhere; what changes something comes from this node.
async fn only_from_here(
    Extract(state): Extract<Arc<State>>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    request: Request,
    next: Next,
) -> Response {
    let peer = peer.ip().to_canonical();
    if peer.is_loopback() || state.shared.table().node().is_local(peer) {
        next.run(request).await
    } else {
        (StatusCode::FORBIDDEN, "only from the node itself\n").into_response()
    }
}

/// From now on new connections are another service proxy's. Answers with the number of flows that are left.
async fn retire(Extract(state): Extract<Arc<State>>) -> impl IntoResponse {
    state.retiring.store(true, Relaxed);
    Json(state.shared.flow_count())
}

async fn render_metrics(Extract(state): Extract<Arc<State>>) -> impl IntoResponse {
    let text = tokio::task::spawn_blocking(move || metrics::render(&state)).await.unwrap_or_default();
    ([(CONTENT_TYPE, "text/plain; version=0.0.4")], text)
}

/// Asks the table in force, as packets do.
async fn trace(Extract(state): Extract<Arc<State>>, Query(question): Query<Question>) -> impl IntoResponse {
    match question.flow() {
        Ok(flow) => Json(crate::trace::trace(&state.shared.table(), &flow)).into_response(),
        Err(reason) => (StatusCode::BAD_REQUEST, reason + "\n").into_response(),
    }
}

/// Asks as clients of the responder do.
async fn resolve(Extract(state): Extract<Arc<State>>, Query(asked): Query<crate::dns::Asked>) -> impl IntoResponse {
    let Some(names) = &state.names else {
        return (StatusCode::NOT_FOUND, "names are not answered: dns is not configured\n").into_response();
    };
    match crate::dns::ask(names, &asked).await {
        Ok(resolved) => Json(resolved).into_response(),
        Err(reason) => (StatusCode::BAD_REQUEST, reason + "\n").into_response(),
    }
}

/// A list, made off the threads that serve: it may be long.
async fn list<T: serde::Serialize + Send + 'static>(
    state: Arc<State>,
    view: fn(&State) -> views::List<T>,
) -> impl IntoResponse {
    match tokio::task::spawn_blocking(move || view(&state)).await {
        Ok(list) => Json(list).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("the list cannot be made: {error}")).into_response(),
    }
}
