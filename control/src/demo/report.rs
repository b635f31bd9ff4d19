//! How did it go: a table by Service port and endpoint, and every failure in words. Pure.

use std::collections::{BTreeMap, BTreeSet};

use comfy_table::{CellAlignment, Table, presets};
use hdrhistogram::Histogram;
use sluice_bench::client::Failure;
use sluice_dataplane::net::Family;
use sluice_dataplane::table::{FrontendKind, ServiceName};

use super::frontends::{Expect, Lane, PortKey};
use super::progress::grouped;
use super::rollout::Fate;
use super::traffic::{LaneTally, Phase, histogram};

/// What the clients met, and what they should have.
#[derive(Clone, Copy, Debug)]
pub(super) struct Results<'r> {
    /// Every lane with its tally.
    pub(super) lanes: &'r [(Lane, LaneTally)],
    /// Pods that are or were endpoints, by Service.
    pub(super) endpoints: &'r BTreeMap<ServiceName, BTreeSet<String>>,
    /// What became of the Pods, by namespace and name.
    pub(super) fates: &'r BTreeMap<ServiceName, Fate>,
}

/// What is said in the end.
#[derive(Clone, Debug)]
pub(super) struct Report {
    /// The table.
    pub(super) table: String,
    /// Connections in all.
    pub(super) connections: u64,
    /// Those that were refused, as they should have been.
    pub(super) refused: u64,
    /// Those that went wrong.
    pub(super) errors: u64,
    /// Latency of all that were answered, in microseconds.
    pub(super) latency: Histogram<u64>,
    /// What went wrong, in words. Empty when nothing did.
    pub(super) failures: Vec<String>,
}

/// Sums up.
#[must_use]
pub(super) fn report(results: Results<'_>) -> Report {
    let mut ports: BTreeMap<&PortKey, Vec<(&Lane, &LaneTally)>> = BTreeMap::new();
    for (lane, tally) in results.lanes {
        ports.entry(&lane.port).or_default().push((lane, tally));
    }
    let mut report = Report {
        table: String::new(),
        connections: 0,
        refused: 0,
        errors: 0,
        latency: histogram(),
        failures: Vec::new(),
    };
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(["SERVICE / ENDPOINT", "REACHED BY", "CONNECTIONS", "SHARE", "ERRORS", "P50", "P99"]);
    for column in table.column_iter_mut().skip(2) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    for (port, lanes) in ports {
        add_port(&mut report, &mut table, port, &lanes, results);
    }
    let lines: Vec<String> = table.lines().map(|line| line.trim_end().to_owned()).collect();
    report.table = lines.join("\n");
    report
}

fn add_port(
    report: &mut Report,
    table: &mut Table,
    port: &PortKey,
    lanes: &[(&Lane, &LaneTally)],
    results: Results<'_>,
) {
    let mut all = histogram();
    let mut by_pod: BTreeMap<&str, Histogram<u64>> = BTreeMap::new();
    let (mut connections, mut errors, mut refused) = (0, 0, 0);
    for (lane, tally) in lanes {
        let judged = judge(lane, tally, results.endpoints.get(&port.service));
        connections += tally.connections();
        errors += judged.errors;
        refused += judged.refused;
        report.failures.extend(judged.failures);
        for (pod, latency) in &tally.answered {
            add(&mut all, latency);
            add(by_pod.entry(pod).or_insert_with(histogram), latency);
        }
    }
    report.connections += connections;
    report.errors += errors;
    report.refused += refused;
    add(&mut report.latency, &all);
    table.add_row([
        title(port),
        reached_by(lanes),
        grouped(connections),
        String::new(),
        grouped(errors),
        quantile(&all, 0.5),
        quantile(&all, 0.99),
    ]);
    if refused > 0 {
        table.add_row(["  no endpoint: refused at once", "", &grouped(refused), "", "", "", ""]);
    }
    for (pod, latency) in by_pod {
        let fate = results.fates.get(&ServiceName::new(&port.service.namespace, pod));
        table.add_row([
            format!("  {pod}"),
            fate.map_or("", |fate| words(*fate)).to_owned(),
            grouped(latency.len()),
            format!("{:.1} %", latency.len() as f64 * 100.0 / all.len().max(1) as f64),
            String::new(),
            quantile(&latency, 0.5),
            quantile(&latency, 0.99),
        ]);
    }
}

#[derive(Debug, Default)]
struct Judged {
    errors: u64,
    refused: u64,
    failures: Vec<String>,
}

/// What of a lane is not as it should be.
fn judge(lane: &Lane, tally: &LaneTally, endpoints: Option<&BTreeSet<String>>) -> Judged {
    let mut judged = Judged::default();
    let mut fail = |errors: u64, what: String| {
        judged.errors += errors;
        judged.failures.push(format!("{} by {}: {what}", title(&lane.port), way(lane)));
    };
    for (pod, latency) in &tally.answered {
        if lane.expect == Expect::Refusal {
            fail(latency.len(), format!("{} answered by {pod}, though there is no endpoint", latency.len()));
        } else if !endpoints.is_some_and(|endpoints| endpoints.contains(pod)) {
            fail(latency.len(), format!("{} answered by {pod}, which is no endpoint of it", latency.len()));
        }
    }
    for ((phase, failure), count) in &tally.failures {
        if (lane.expect, *failure) == (Expect::Refusal, Failure::Refused) {
            judged.refused += count;
        } else {
            fail(*count, failed(*count, *phase, *failure));
        }
    }
    if tally.connections() == 0 {
        judged.failures.push(format!("{} by {}: no connection came to an end", title(&lane.port), way(lane)));
    }
    judged
}

fn failed(count: u64, phase: Phase, failure: Failure) -> String {
    let why = match failure {
        Failure::Refused => "no endpoint was in force, or the chosen one had stopped listening",
        Failure::Unreachable => "there was no way to the endpoint, or to the frontend itself",
        Failure::Timeout => {
            "nothing came in time: packets were lost or dropped (sluice_packets_dropped_total says why)"
        }
        Failure::Reset => "an open connection was ended from the other side",
        Failure::Closed => "the connection ended before the answer did",
        Failure::Malformed => "the answer was no HTTP",
        Failure::Other(_) => "the client's system refused",
    };
    format!("{count} failed {}: {failure} ({why})", phase.words())
}

fn title(port: &PortKey) -> String {
    let name = if port.name.is_empty() { String::new() } else { format!(" {}", port.name) };
    format!("{}{name} {}/{}", port.service, port.port, port.protocol)
}

fn way(lane: &Lane) -> String {
    format!("{} {}", kind(lane.kind), lane.address)
}

fn kind(kind: FrontendKind) -> &'static str {
    match kind {
        FrontendKind::ClusterIp => "ClusterIP",
        FrontendKind::NodePort => "NodePort",
        FrontendKind::LoadBalancer => "LoadBalancer",
        FrontendKind::ExternalIp => "ExternalIP",
    }
}

fn words(fate: Fate) -> &'static str {
    match fate {
        Fate::Stayed => "",
        Fate::Replaced => "replaced",
        Fate::New => "new",
        Fate::ReplacedInPlace => "replaced in place",
        Fate::Added => "added",
    }
}

fn reached_by(lanes: &[(&Lane, &LaneTally)]) -> String {
    let kinds: BTreeSet<FrontendKind> = lanes.iter().map(|(lane, _)| lane.kind).collect();
    let families: BTreeSet<&str> = lanes
        .iter()
        .map(|(lane, _)| match Family::of(lane.address.ip()) {
            Family::V4 => "IPv4",
            Family::V6 => "IPv6",
        })
        .collect();
    let kinds: Vec<&str> = kinds.into_iter().map(kind).collect();
    let sticky = if lanes.iter().any(|(lane, _)| lane.is_sticky) { " · ClientIP" } else { "" };
    format!("{} · {}{sticky}", kinds.join(", "), families.into_iter().collect::<Vec<_>>().join(", "))
}

fn add(sum: &mut Histogram<u64>, other: &Histogram<u64>) {
    sum.add(other).expect("all histograms have the same bounds");
}

/// A quantile of microseconds as milliseconds; nothing when there is nothing.
#[must_use]
pub(super) fn quantile(latency: &Histogram<u64>, quantile: f64) -> String {
    if latency.is_empty() {
        return String::new();
    }
    format!("{:.2} ms", latency.value_at_quantile(quantile) as f64 / 1_000.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::frontends::From;
    use sluice_bench::client::Attempt;
    use sluice_dataplane::net::Protocol;
    use std::time::Duration;

    fn lane(service: &str, expect: Expect) -> Lane {
        Lane {
            port: PortKey {
                service: ServiceName::new("n", service),
                port: 80,
                protocol: Protocol::Tcp,
                name: "http".to_owned(),
            },
            kind: FrontendKind::ClusterIp,
            address: "10.96.0.1:80".parse().unwrap(),
            from: From::Pod,
            expect,
            is_sticky: true,
        }
    }

    fn tally(attempts: &[Result<&str, Failure>]) -> LaneTally {
        let mut tally = LaneTally::default();
        for result in attempts {
            let result = result.map(str::to_owned);
            tally.record(Phase::RollingUpdate, &Attempt { result, latency: Duration::from_millis(2) });
        }
        tally
    }

    fn judged(expect: Expect, attempts: &[Result<&str, Failure>]) -> Report {
        let endpoints =
            BTreeMap::from([(ServiceName::new("n", "s"), BTreeSet::from(["a".to_owned(), "b".to_owned()]))]);
        let fates = BTreeMap::from([(ServiceName::new("n", "b"), Fate::New)]);
        let lanes = [(lane("s", expect), tally(attempts))];
        report(Results { lanes: &lanes, endpoints: &endpoints, fates: &fates })
    }

    #[test]
    fn shares_and_latencies_are_by_endpoint() {
        let report = judged(Expect::Answer, &[Ok("a"), Ok("b"), Ok("a"), Ok("a")]);
        let lines: Vec<&str> = report.table.lines().collect();
        let words = |line: &str| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>().join(" ");
        let row = words(lines[1]);
        assert!(row.starts_with("n/s http 80/TCP ClusterIP · IPv4 · ClientIP 4 0 2.0"), "{}", report.table);
        assert!(words(lines[2]).starts_with("a 3 75.0 % 2.0"), "{}", report.table);
        assert!(words(lines[3]).starts_with("b new 1 25.0 % 2.0"), "{}", report.table);
        assert_eq!((report.connections, report.errors, report.failures.len()), (4, 0, 0));
    }

    #[test]
    fn a_failure_says_where_when_and_why() {
        let report =
            judged(Expect::Answer, &[Ok("a"), Err(Failure::Refused), Err(Failure::Refused), Err(Failure::Reset)]);
        assert_eq!((report.connections, report.errors), (4, 3));
        assert_eq!(report.failures.len(), 2, "one for each kind");
        for word in ["n/s http 80/TCP", "ClusterIP 10.96.0.1:80", "2 failed during the rolling update", "refused"] {
            assert!(report.failures[0].contains(word), "{word}: {:?}", report.failures);
        }
    }

    #[test]
    fn a_pod_that_is_no_endpoint_must_not_answer() {
        let report = judged(Expect::Answer, &[Ok("a"), Ok("stranger")]);
        assert_eq!(report.errors, 1);
        assert!(report.failures[0].contains("stranger"), "{:?}", report.failures);
    }

    #[test]
    fn without_endpoints_only_refusals_are_right() {
        let report = judged(Expect::Refusal, &[Err(Failure::Refused), Err(Failure::Refused)]);
        assert_eq!((report.errors, report.refused, report.failures.len()), (0, 2, 0));
        for wrong in [Ok("a"), Err(Failure::Timeout)] {
            assert_eq!(judged(Expect::Refusal, &[Err(Failure::Refused), wrong]).errors, 1, "{wrong:?}");
        }
    }

    #[test]
    fn a_lane_that_nobody_got_through_is_a_failure() {
        assert_eq!(judged(Expect::Answer, &[]).failures.len(), 1);
    }
}
