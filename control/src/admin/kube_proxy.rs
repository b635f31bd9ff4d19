//! Metrics under kube-proxy's names, for the dashboards and alerts that go by them. One table serves both families, so the
//! series of both have the same figures.

use std::time::Duration;

use axum::http::StatusCode;
use jiff::Timestamp;
use metrics::{counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder};
use sluice_dataplane::net::Family;
use sluice_dataplane::table::{PortSpec, TrafficPolicy};

use crate::object::{Kind, Object};
use crate::source::Change;
use crate::source::api::requests;
use crate::state::State;

const SYNC: &str = "kubeproxy_sync_proxy_rules_duration_seconds";
const SYNC_ALL: &str = "kubeproxy_sync_full_proxy_rules_duration_seconds";
const SYNC_CHANGES: &str = "kubeproxy_sync_partial_proxy_rules_duration_seconds";
const PROGRAMMING: &str = "kubeproxy_network_programming_duration_seconds";
const LAST: &str = "kubeproxy_sync_proxy_rules_last_timestamp_seconds";
const QUEUED: &str = "kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds";
const SERVICE_CHANGES: &str = "kubeproxy_sync_proxy_rules_service_changes_total";
const SERVICES_PENDING: &str = "kubeproxy_sync_proxy_rules_service_changes_pending";
const ENDPOINT_CHANGES: &str = "kubeproxy_sync_proxy_rules_endpoint_changes_total";
const ENDPOINTS_PENDING: &str = "kubeproxy_sync_proxy_rules_endpoint_changes_pending";
const NO_LOCAL: &str = "kubeproxy_sync_proxy_rules_no_local_endpoints_total";

/// How much an update made anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// Everything.
    All,
    /// What had changed.
    Changes,
}

/// Changes of an update, by kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    services: u32,
    slices: u32,
}

impl Changes {
    /// Counts.
    #[must_use]
    pub fn of(changes: &[Change]) -> Self {
        changes.iter().fold(Self::default(), |mut count, change| {
            let kind = match change {
                Change::Apply(Object::Service(_), _) => Some(Kind::Service),
                Change::Apply(Object::EndpointSlice(_), _) => Some(Kind::EndpointSlice),
                Change::Apply(..) => None,
                Change::Delete(key) => Some(key.kind),
            };
            count.services += u32::from(kind == Some(Kind::Service));
            count.slices += u32::from(kind == Some(Kind::EndpointSlice));
            count
        })
    }
}

/// Buckets of kube-proxy's histograms, in seconds.
pub(super) fn buckets(builder: PrometheusBuilder) -> Result<PrometheusBuilder, BuildError> {
    let sync: Vec<f64> = (0..15).map(|power| 0.001 * f64::from(1 << power)).collect();
    let minutes = (60..120).step_by(5).chain((120..=300).step_by(30));
    let programming: Vec<f64> = [0.25, 0.5].into_iter().chain((1..60).chain(minutes).map(f64::from)).collect();
    let request = vec![0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0];
    [
        (SYNC, &sync),
        (SYNC_ALL, &sync),
        (SYNC_CHANGES, &sync),
        (PROGRAMMING, &programming),
        (requests::SECONDS, &request),
    ]
    .into_iter()
    .try_fold(builder, |builder, (name, buckets)| {
        builder.set_buckets_for_metric(Matcher::Full(name.to_owned()), buckets)
    })
}

pub(super) fn describe() {
    describe_histogram!(SYNC, "Time from an update to its routing table being in force");
    describe_histogram!(SYNC_ALL, "The same, of updates that made the whole table");
    describe_histogram!(SYNC_CHANGES, "The same, of updates that made what had changed");
    describe_histogram!(PROGRAMMING, "Time from the trigger of a change of endpoints to its being in force");
    describe_gauge!(LAST, "When the last update was in force");
    describe_gauge!(QUEUED, "When the last update came");
    describe_counter!(SERVICE_CHANGES, "Changes of Services");
    describe_gauge!(SERVICES_PENDING, "Changes of Services that are not in force yet");
    describe_counter!(ENDPOINT_CHANGES, "Changes of EndpointSlices");
    describe_gauge!(ENDPOINTS_PENDING, "Changes of EndpointSlices that are not in force yet");
    describe_counter!("kubeproxy_proxy_healthz_total", "Answers of /healthz, by code");
    describe_counter!("kubeproxy_proxy_livez_total", "Answers of /livez, by code");
    describe_counter!(requests::COUNT, "Requests to the API server, by code, method and host");
    describe_histogram!(requests::SECONDS, "Time until the API server began to answer");
}

/// An update came.
pub fn queued(families: &[Family], changes: Changes) {
    for family in families {
        gauge!(QUEUED, "ip_family" => family.to_string()).set(now());
    }
    counter!(SERVICE_CHANGES).increment(changes.services.into());
    gauge!(SERVICES_PENDING).set(changes.services);
    counter!(ENDPOINT_CHANGES).increment(changes.slices.into());
    gauge!(ENDPOINTS_PENDING).set(changes.slices);
}

/// The update is in force. `triggers`: of the changes of endpoints in it.
pub fn applied(families: &[Family], extent: Extent, took: Duration, triggers: &[(Family, Timestamp)]) {
    let of_extent = match extent {
        Extent::All => SYNC_ALL,
        Extent::Changes => SYNC_CHANGES,
    };
    for family in families.iter().map(ToString::to_string) {
        histogram!(SYNC, "ip_family" => family.clone()).record(took);
        histogram!(of_extent, "ip_family" => family.clone()).record(took);
        gauge!(LAST, "ip_family" => family).set(now());
    }
    gauge!(SERVICES_PENDING).set(0);
    gauge!(ENDPOINTS_PENDING).set(0);
    let now = Timestamp::now();
    for (family, trigger) in triggers {
        // Another machine's clock said when: it may be ahead of ours.
        let seconds = now.duration_since(*trigger).as_secs_f64().max(0.0);
        histogram!(PROGRAMMING, "ip_family" => family.to_string()).record(seconds);
    }
}

/// A health page answered.
pub(super) fn answered(counter: &'static str, code: StatusCode) {
    counter!(counter, "code" => code.as_str().to_owned()).increment(1);
}

/// What is counted when somebody asks.
pub(super) fn record(state: &State) {
    describe_gauge!(NO_LOCAL, "Service ports that drop flows because no endpoint is on this node, by policy");
    let publisher = state.publisher();
    for family in state.families() {
        let ports = || publisher.builder().services().flat_map(|spec| &spec.ports).filter(|port| port.family == family);
        for (policy, lacks) in [("internal", lacks_internal as fn(&PortSpec) -> bool), ("external", lacks_external)] {
            let count = ports().filter(|port| lacks(port)).count();
            gauge!(NO_LOCAL, "ip_family" => family.to_string(), "traffic_policy" => policy).set(count as f64);
        }
    }
}

fn lacks_internal(port: &PortSpec) -> bool {
    port.internal_policy == TrafficPolicy::Local && lacks_local(port)
}

fn lacks_external(port: &PortSpec) -> bool {
    let is_external = port.node_port.is_some() || !port.load_balancer_ips.is_empty() || !port.external_ips.is_empty();
    is_external && port.external_policy == TrafficPolicy::Local && lacks_local(port)
}

/// Without any endpoint in the cluster flows are refused, which is another matter.
fn lacks_local(port: &PortSpec) -> bool {
    port.has_any_endpoint && port.local.addresses.is_empty()
}

fn now() -> f64 {
    Timestamp::now().as_duration().as_secs_f64()
}
