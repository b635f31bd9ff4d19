//! What `sluice drain` and `sluice undrain` ask of the daemon.

use std::sync::Arc;

use axum::Json;
use axum::extract::State as Extract;
use axum::http::StatusCode;
use axum::response::IntoResponse;
use serde::{Deserialize, Serialize};
use sluice_dataplane::packet_path::now_ms;
use sluice_dataplane::table::{Deadline, DrainTimeout};

use super::views;
use crate::drains::Target;
use crate::state::State;

/// Body of both requests.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Request {
    /// Endpoint.
    pub target: Target,
    /// Milliseconds after which flows are cut; `null` inside: never. Left out: the configured timeout.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "timeout")]
    pub timeout_ms: Option<Option<u64>>,
}

/// Tells a field that is `null` from one that is not there.
mod timeout {
    use serde::{Deserialize as _, Deserializer, Serialize as _, Serializer};

    pub(super) fn serialize<S: Serializer>(value: &Option<Option<u64>>, serializer: S) -> Result<S::Ok, S::Error> {
        value.flatten().serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Option<u64>>, D::Error> {
        Option::<u64>::deserialize(deserializer).map(Some)
    }
}

/// What was done.
#[derive(Debug, Serialize, Deserialize)]
pub struct Drained {
    /// Whether the target was drained before.
    pub known: bool,
    /// Endpoints that are meant.
    pub endpoints: usize,
    /// Their flows.
    pub flows: u64,
}

/// `POST /api/v1/drain`.
pub async fn drain(Extract(state): Extract<Arc<State>>, Json(request): Json<Request>) -> impl IntoResponse {
    let deadline = match request.timeout_ms {
        Some(Some(after)) => Deadline::At(now_ms().saturating_add(after)),
        Some(None) => Deadline::Never,
        None => match state.config.drain.timeout {
            DrainTimeout::After(after) => Deadline::At(now_ms().saturating_add(after.as_millis() as u64)),
            DrainTimeout::Never => Deadline::Never,
        },
    };
    set(state, request.target, Some(deadline)).await
}

/// `POST /api/v1/undrain`.
pub async fn undrain(Extract(state): Extract<Arc<State>>, Json(request): Json<Request>) -> impl IntoResponse {
    set(state, request.target, None).await
}

async fn set(state: Arc<State>, target: Target, deadline: Option<Deadline>) -> axum::response::Response {
    let work = move || -> std::io::Result<Drained> {
        let known = state.set_drain(target, deadline)?;
        let endpoints = views::endpoints(&state).items;
        let meant = endpoints.iter().filter(|view| target.covers(view.address));
        let (endpoints, flows) = meant.fold((0, 0), |(count, flows), view| (count + 1, flows + view.active));
        tracing::info!(%target, endpoints, flows, "{}", if deadline.is_some() { "drained by hand" } else { "no longer drained" });
        Ok(Drained { known, endpoints, flows })
    };
    match tokio::task::spawn_blocking(work).await {
        Ok(Ok(drained)) => Json(drained).into_response(),
        Ok(Err(error)) => {
            (StatusCode::INTERNAL_SERVER_ERROR, format!("the drain cannot be saved: {error}")).into_response()
        }
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}
