//! `/healthz` and `/livez` with kube-proxy's codes and JSON (KEP-3836).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::State as Extract;
use axum::http::StatusCode;
use axum::response::IntoResponse;
use jiff::Timestamp;
use serde::Serialize;

use super::kube_proxy;
use crate::state::State;

/// An update that waits this long means that we are stuck: kube-proxy's twice `syncPeriod`.
const STALE: Duration = Duration::from_secs(60);

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Health {
    last_updated: Timestamp,
    current_time: Timestamp,
    #[serde(skip_serializing_if = "Option::is_none")]
    node_eligible: Option<bool>,
    healthy: bool,
    status: BTreeMap<String, FamilyHealth>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct FamilyHealth {
    last_updated: Timestamp,
    healthy: bool,
}

/// Whether load balancers may send here: tables are applied and the node stays.
pub async fn healthz(Extract(state): Extract<Arc<State>>) -> impl IntoResponse {
    let eligible = state.publisher().node().eligible;
    answer(&state, "kubeproxy_proxy_healthz_total", Some(eligible))
}

/// Whether the daemon works.
pub async fn livez(Extract(state): Extract<Arc<State>>) -> impl IntoResponse {
    answer(&state, "kubeproxy_proxy_livez_total", None)
}

/// Whether updates are applied in time.
#[must_use]
pub fn is_healthy(state: &State) -> bool {
    state.progress().pending_since.is_none_or(|since| since.elapsed() < STALE)
}

fn answer(state: &State, counter: &'static str, node_eligible: Option<bool>) -> impl IntoResponse + use<> {
    let healthy = is_healthy(state);
    let now = Timestamp::now();
    // While all is well this is the time of asking: nothing that waits could be older.
    let last_updated = if healthy { now } else { state.progress().last_applied };
    let families = state.families().into_iter();
    let status = families.map(|family| (family.to_string(), FamilyHealth { last_updated, healthy })).collect();
    let code = if healthy && node_eligible != Some(false) { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    kube_proxy::answered(counter, code);
    let body = Health { last_updated, current_time: now, node_eligible, healthy, status };
    let headers = [("Content-Type", "application/json"), ("X-Content-Type-Options", "nosniff")];
    (code, headers, serde_json::to_string(&body).unwrap_or_default())
}
