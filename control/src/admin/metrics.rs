//! Metrics: every name, label and meaning. Counters of Services and endpoints are read from their slots when somebody
//! asks, so they cost the packet path nothing more.

use std::collections::BTreeMap;
use std::sync::OnceLock;
use std::time::Duration;

use anyhow::{Context as _, Result};
use jiff::Timestamp;
use metrics::{Label, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use sluice_dataplane::net::Direction;
use sluice_dataplane::table::{Failure, FrontendKind, PortName};

use super::{kube_proxy, names, views};
use crate::problem::Severity;
use crate::state::State;

const APPLY_SECONDS: &str = "sluice_table_apply_duration_seconds";
const PROGRAMMING_SECONDS: &str = "coredns_kubernetes_dns_programming_duration_seconds";
const DRAIN_SECONDS: &str = "sluice_drain_duration_seconds";
const EJECTIONS: &str = "sluice_ejections_total";
const SOURCE_ERRORS: &str = "sluice_source_errors_total";
const REPAIRS: &str = "sluice_host_repairs_total";

/// Events counted since start, in the process-wide recorder.
static EVENTS: OnceLock<PrometheusHandle> = OnceLock::new();

/// Installs the process-wide recorder.
pub fn install() -> Result<()> {
    let buckets: Vec<f64> = (0..15).map(|power| 0.0001 * f64::from(1 << power)).collect();
    let recorder = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Full(APPLY_SECONDS.to_owned()), &buckets)
        .and_then(|builder| {
            let seconds = [0.1, 0.5, 1.0, 5.0, 15.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0];
            builder.set_buckets_for_metric(Matcher::Full(DRAIN_SECONDS.to_owned()), &seconds)
        })
        .and_then(kube_proxy::buckets)
        .and_then(|builder| {
            let seconds: Vec<f64> = (0..20).map(|power| 0.001 * f64::from(1 << power)).collect();
            builder.set_buckets_for_metric(Matcher::Full(PROGRAMMING_SECONDS.to_owned()), &seconds)
        })
        .context("buckets of a histogram")?
        .build_recorder();
    EVENTS.get_or_init(|| recorder.handle());
    metrics::set_global_recorder(recorder).map_err(|error| anyhow::anyhow!("metrics: {error}"))?;
    describe_histogram!(APPLY_SECONDS, "Time from an update to its routing table being in force");
    describe_histogram!(
        PROGRAMMING_SECONDS,
        "Time from a change of endpoints to names that show it, by kind of Service"
    );
    describe_histogram!(DRAIN_SECONDS, "Time from the beginning of a drain to the end of the endpoint's last flow");
    describe_counter!(EJECTIONS, "Endpoints that got no new flows for a while because too many failed");
    describe_counter!(SOURCE_ERRORS, "Requests to the API server that failed, by resource, verb and code");
    describe_counter!(REPAIRS, "Host state of ours that somebody else changed and that was put right");
    kube_proxy::describe();
    Ok(())
}

/// A table is in force.
pub fn table_applied(took: Duration) {
    histogram!(APPLY_SECONDS).record(took);
}

/// A change of endpoints is in the zone that is in force.
pub fn names_changed(service_kind: &'static str, took: Duration) {
    histogram!(PROGRAMMING_SECONDS, "service_kind" => service_kind).record(took);
}

/// An endpoint was ejected.
pub fn ejected(port: &PortName) {
    counter!(EJECTIONS, port_labels(port, &[])).increment(1);
}

/// A request to the API server failed. `code`: of the answer; none when there was no whole one.
pub fn source_failed(resource: &'static str, verb: &'static str, code: Option<u16>) {
    let code = code.map_or_else(|| "none".to_owned(), |code| code.to_string());
    counter!(SOURCE_ERRORS, "resource" => resource, "verb" => verb, "code" => code).increment(1);
}

/// The last flow of an endpoint that drained has ended.
pub fn drained(port: &PortName, after: Duration) {
    histogram!(DRAIN_SECONDS, port_labels(port, &[])).record(after);
}

fn port_labels(name: &PortName, more: &[(&'static str, String)]) -> Vec<Label> {
    labels(&name.service.namespace, &name.service.name, &name.port, name.protocol.name(), more)
}

/// Host state was put right.
pub fn host_repaired(object: &str) {
    counter!(REPAIRS, "object" => object.to_owned()).increment(1);
}

/// All metrics as Prometheus text.
#[must_use]
pub fn render(state: &State) -> String {
    // A recorder of the moment: what no longer exists leaves no series behind.
    let recorder = PrometheusBuilder::new().build_recorder();
    state.shared.count_offloaded();
    metrics::with_local_recorder(&recorder, || {
        describe();
        record_services(state);
        record_endpoints(state);
        record_packet_path(state);
        record_source(state);
        kube_proxy::record(state);
        process();
    });
    let events = EVENTS.get().map(PrometheusHandle::render).unwrap_or_default();
    recorder.handle().render() + &events + &names::render(state)
}

/// Processor time, memory and files of this process, under the names that every Prometheus client has.
fn process() {
    let process = metrics_process::Collector::default();
    process.describe();
    process.collect();
}

fn describe() {
    describe_counter!("sluice_flows_opened_total", "Flows opened, by Service port and kind of frontend");
    describe_gauge!("sluice_flows_active", "Flows open now, by Service port");
    describe_counter!("sluice_flows_rejected_total", "Flows refused because no endpoint could serve, by Service port");
    describe_counter!("sluice_flows_dropped_total", "Flows dropped by a rule, by Service port");
    describe_counter!(
        "sluice_connect_failures_total",
        "Opens that an endpoint did not take, by Service port and reason"
    );
    describe_counter!("sluice_connect_retries_total", "Opens moved to another endpoint, by Service port");
    describe_gauge!("sluice_held_clients", "Connections that wait for a first endpoint now, by Service port");
    describe_counter!(
        "sluice_held_clients_total",
        "Connections that waited for a first endpoint, by Service port and whether one came"
    );
    describe_gauge!("sluice_endpoint_states", "Endpoints, by Service port and state");
    describe_gauge!("sluice_flows_draining", "Flows of endpoints that drain, by Service port");
    describe_counter!("sluice_flows_ended_total", "Flows ended because their endpoint was gone, by reason");
    describe_counter!("sluice_bytes_total", "Bytes of IP packets, by Service port; in is from clients");
    describe_counter!("sluice_packets_total", "Packets, by Service port; an offloaded segment train counts once");
    describe_counter!("sluice_endpoint_flows_opened_total", "Flows opened, by endpoint of a Service port");
    describe_gauge!("sluice_endpoint_flows_active", "Flows open now, by endpoint of a Service port");
    describe_counter!("sluice_endpoint_bytes_total", "Bytes of IP packets, by endpoint; in is from clients");
    describe_counter!("sluice_endpoint_packets_total", "Packets, by endpoint of a Service port");
    describe_gauge!("sluice_endpoints", "Endpoints that new flows may get, by Service port");
    describe_gauge!("sluice_table_generation", "Number of the routing table in force");
    describe_gauge!("sluice_table_services", "Services in the routing table");
    describe_gauge!("sluice_table_frontends", "Frontends in the routing table");
    describe_gauge!("sluice_flow_table_entries", "Flows in the flow table");
    describe_gauge!("sluice_flow_table_capacity", "Most flows the flow table holds");
    describe_counter!("sluice_flow_table_evictions_total", "Flows pushed out of a full flow table");
    describe_counter!("sluice_drops_total", "Packets dropped, by reason");
    describe_counter!("sluice_sent_on_links_total", "Packets sent straight on a link (packetPath: links, offload)");
    describe_counter!("sluice_offloaded_packets_total", "Packets that the kernel carried (packetPath: offload)");
    describe_gauge!("sluice_offloaded_flows", "Connections that the kernel carries now (packetPath: offload)");
    describe_gauge!(
        "sluice_source_synced",
        "1 once the source has told all there is; 0: objects of an earlier process serve"
    );
    describe_gauge!("sluice_objects_age_seconds", "For how long changes may have been missed; 0: they come in");
    describe_gauge!("sluice_problems", "Things wrong with objects now, by severity");
    describe_gauge!("sluice_skipped_objects", "Objects of kinds that are not used, by kind");
    describe_gauge!("sluice_build_info", "1, labelled with the version");
}

fn labels(namespace: &str, service: &str, port: &str, protocol: &str, more: &[(&'static str, String)]) -> Vec<Label> {
    let mut labels = vec![
        Label::new("namespace", namespace.to_owned()),
        Label::new("service", service.to_owned()),
        Label::new("port", port.to_owned()),
        Label::new("protocol", protocol.to_owned()),
    ];
    labels.extend(more.iter().map(|(name, value)| Label::new(*name, value.clone())));
    labels
}

fn record_services(state: &State) {
    let publisher = state.publisher();
    let (builder, slots) = (publisher.builder(), &state.shared.slots);
    let mut count = 0_u32;
    for spec in builder.services() {
        count += 1;
        for ports in views::by_port(spec) {
            let port = ports[0];
            let labels = |more: &[(&'static str, String)]| {
                labels(&spec.name.namespace, &spec.name.name, &port.name, port.protocol.name(), more)
            };
            let Some(slot) = builder.port_slot(&spec.name, &port.name, port.protocol) else { continue };
            let totals = slots.port_totals(slot);
            for kind in FrontendKind::ALL {
                let opened = totals.opened[kind as usize];
                // A Service without node ports needs no series about them.
                if opened > 0 || kind == FrontendKind::ClusterIp {
                    counter!("sluice_flows_opened_total", labels(&[("frontend", kind.name().to_owned())]))
                        .absolute(opened);
                }
            }
            counter!("sluice_flows_rejected_total", labels(&[("reason", "no_endpoints".to_owned())]))
                .absolute(totals.rejected);
            counter!("sluice_flows_dropped_total", labels(&[])).absolute(totals.dropped);
            counter!("sluice_connect_retries_total", labels(&[])).absolute(totals.retried);
            for failure in Failure::ALL {
                let reason = [("reason", failure.label().to_owned())];
                counter!("sluice_connect_failures_total", labels(&reason)).absolute(totals.failed[failure as usize]);
            }
            for direction in [Direction::Request, Direction::Reply] {
                let at = direction.index();
                let way = [("direction", way(direction))];
                counter!("sluice_bytes_total", labels(&way)).absolute(totals.bytes[at]);
                counter!("sluice_packets_total", labels(&way)).absolute(totals.packets[at]);
            }
            if let Some(held) = state.shared.held(slot) {
                gauge!("sluice_held_clients", labels(&[])).set(held.waiting as f64);
                for (outcome, count) in [("released", held.released), ("expired", held.expired)] {
                    counter!("sluice_held_clients_total", labels(&[("outcome", outcome.to_owned())])).absolute(count);
                }
            }
            let usable: usize = ports.iter().map(|port| port.cluster.addresses.len()).sum();
            gauge!("sluice_endpoints", labels(&[])).set(usable as f64);
        }
    }
    gauge!("sluice_table_services").set(count);
    let problems = publisher.problems();
    for (severity, name) in [(Severity::Error, "error"), (Severity::Warning, "warning")] {
        let count = problems.iter().filter(|problem| problem.severity == severity).count();
        gauge!("sluice_problems", "severity" => name).set(count as f64);
    }
    for (kind, count) in publisher.skipped() {
        gauge!("sluice_skipped_objects", "kind" => kind.clone()).set(*count as f64);
    }
}

fn way(direction: Direction) -> String {
    match direction {
        Direction::Request => "in".to_owned(),
        Direction::Reply => "out".to_owned(),
    }
}

fn record_endpoints(state: &State) {
    let mut of_port = BTreeMap::<_, OfPort>::new();
    for view in views::endpoints(state).items {
        let labels = |more: &[(&'static str, String)]| {
            let endpoint = [("endpoint", view.address.to_string())];
            labels(&view.namespace, &view.service, &view.port_name, &view.protocol, &[&endpoint, more].concat())
        };
        // Endpoints nobody has used yet cost no series.
        if view.opened > 0 || view.active > 0 {
            counter!("sluice_endpoint_flows_opened_total", labels(&[])).absolute(view.opened);
            gauge!("sluice_endpoint_flows_active", labels(&[])).set(view.active as f64);
            for (way, bytes, packets) in
                [("in", view.bytes_in, view.packets_in), ("out", view.bytes_out, view.packets_out)]
            {
                let way = [("direction", way.to_owned())];
                counter!("sluice_endpoint_bytes_total", labels(&way)).absolute(bytes);
                counter!("sluice_endpoint_packets_total", labels(&way)).absolute(packets);
            }
        }
        let of_port = of_port.entry((view.namespace, view.service, view.port_name, view.protocol)).or_default();
        of_port.active += view.active;
        let state = if view.ejected_seconds.is_some() { "ejected".to_owned() } else { view.state };
        if state != "ready" && state != "ejected" {
            of_port.draining += view.active;
        }
        *of_port.states.entry(state).or_default() += 1;
    }
    for ((namespace, service, port, protocol), of_port) in of_port {
        let labels = |more: &[(&'static str, String)]| labels(&namespace, &service, &port, &protocol, more);
        gauge!("sluice_flows_active", labels(&[])).set(of_port.active as f64);
        gauge!("sluice_flows_draining", labels(&[])).set(of_port.draining as f64);
        for (state, count) in of_port.states {
            gauge!("sluice_endpoint_states", labels(&[("state", state)])).set(f64::from(count));
        }
    }
}

/// Sums over the endpoints of a Service port.
#[derive(Default)]
struct OfPort {
    active: u64,
    draining: u64,
    states: BTreeMap<String, u32>,
}

fn record_source(state: &State) {
    let freshness = state.freshness();
    gauge!("sluice_source_synced").set(f64::from(u8::from(freshness.is_synced)));
    let age = freshness.behind_since.map(|since| Timestamp::now().duration_since(since).as_secs_f64().max(0.0));
    gauge!("sluice_objects_age_seconds").set(age.unwrap_or_default());
}

fn record_packet_path(state: &State) {
    let (shared, table) = (&state.shared, state.shared.table());
    gauge!("sluice_table_generation").set(table.generation() as f64);
    gauge!("sluice_table_frontends").set(table.len() as f64);
    gauge!("sluice_flow_table_entries").set(shared.flow_count() as f64);
    gauge!("sluice_flow_table_capacity").set(shared.flow_capacity() as f64);
    counter!("sluice_flow_table_evictions_total").absolute(shared.evictions());
    let ended = shared.ended();
    for (reason, flows) in
        [("endpoint_gone", ended.terminated), ("drain_deadline", ended.deadline), ("forgotten", ended.forgotten)]
    {
        counter!("sluice_flows_ended_total", "reason" => reason).absolute(flows);
    }
    counter!("sluice_sent_on_links_total").absolute(shared.sent_on_links());
    let (packets, flows) = shared.offloaded().unwrap_or_default();
    counter!("sluice_offloaded_packets_total").absolute(packets);
    gauge!("sluice_offloaded_flows").set(flows as f64);
    for (reason, packets) in shared.drops() {
        counter!("sluice_drops_total", "reason" => reason).absolute(packets);
    }
    gauge!("sluice_build_info", "version" => env!("CARGO_PKG_VERSION")).set(1);
}
