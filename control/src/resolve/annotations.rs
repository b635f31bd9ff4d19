//! The annotations of ours that a Service may have.

use std::time::Duration;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use sluice_dataplane::net::Protocol;
use sluice_dataplane::table::{Balancing, DrainTimeout};

use super::problems::Problems;
use crate::config::{parse_drain_timeout, parse_duration};

/// Clients give up by then.
const LONGEST_HOLD: Duration = Duration::from_secs(300);
/// `on` or `off`: new connections that their endpoint does not take.
const RETRY: &str = "sluice.dev/retry";
/// A duration, or `never`.
const DRAIN_TIMEOUT: &str = "sluice.dev/drain-timeout";
/// A duration: new connections wait so long for a first endpoint.
const HOLD: &str = "sluice.dev/hold";
/// Names the algorithm of endpoint selection.
const LOAD_BALANCER: &str = "sluice.dev/load-balancer";

/// The Service's own endpoint selection, when it chooses one.
pub(super) fn balancing(metadata: &ObjectMeta, problems: &mut Problems<'_>) -> Option<Balancing> {
    match value(metadata, LOAD_BALANCER)? {
        "least-connections" => Some(Balancing::LeastConnections),
        "round-robin" => Some(Balancing::RoundRobin),
        "random" => Some(Balancing::Random),
        other => {
            let message = format!("{other:?} is not known: use least-connections, round-robin or random");
            problems.error(format!("metadata.annotations[{LOAD_BALANCER}]"), message);
            None
        }
    }
}

/// The default for a protocol. Nobody sees a UDP conversation end: how many an endpoint has says nothing of its load.
pub(super) fn default_balancing(default: Balancing, protocol: Protocol) -> Balancing {
    match (default, protocol) {
        (Balancing::LeastConnections, Protocol::Udp) => Balancing::Random,
        (default, Protocol::Tcp | Protocol::Udp | Protocol::Sctp) => default,
    }
}

/// Whether the Service's new connections are tried at another endpoint when theirs does not take them.
pub(super) fn retry(metadata: &ObjectMeta, default: bool, problems: &mut Problems<'_>) -> bool {
    match value(metadata, RETRY) {
        None => default,
        Some("on") => true,
        Some("off") => false,
        Some(other) => {
            problems.error(format!("metadata.annotations[{RETRY}]"), format!("{other:?} is not known: use on or off"));
            default
        }
    }
}

/// How long an endpoint that leaves the Service without having been terminating keeps its flows.
pub(super) fn drain_timeout(metadata: &ObjectMeta, default: DrainTimeout, problems: &mut Problems<'_>) -> DrainTimeout {
    let Some(text) = value(metadata, DRAIN_TIMEOUT) else { return default };
    parse_drain_timeout(text).unwrap_or_else(|reason| {
        problems.error(format!("metadata.annotations[{DRAIN_TIMEOUT}]"), reason);
        default
    })
}

/// How long the Service's new connections wait for a first endpoint where there is none.
pub(super) fn hold(metadata: &ObjectMeta, problems: &mut Problems<'_>) -> Option<Duration> {
    let hold = match parse_duration(value(metadata, HOLD)?) {
        Ok(hold) if hold <= LONGEST_HOLD => return Some(hold).filter(|hold| !hold.is_zero()),
        Ok(_) => "use at most 5m: clients give up by then".to_owned(),
        Err(reason) => reason,
    };
    problems.error(format!("metadata.annotations[{HOLD}]"), hold);
    None
}

fn value<'m>(metadata: &'m ObjectMeta, name: &str) -> Option<&'m str> {
    metadata.annotations.as_ref()?.get(name).map(String::as_str)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::json;
    use sluice_dataplane::net::Protocol;
    use sluice_dataplane::table::Balancing::{LeastConnections, Random, RoundRobin};
    use sluice_dataplane::table::DrainTimeout;

    use crate::resolve::Rules;
    use crate::resolve::testing::{fields, resolved_by, rules, service};

    #[test]
    fn a_service_chooses_its_endpoint_selection() {
        let rules = Rules { balancing: Random, ..rules() };
        for (value, balancing, problems) in [
            (None, Random, 0),
            (Some("least-connections"), LeastConnections, 0),
            (Some("round-robin"), RoundRobin, 0),
            (Some("random"), Random, 0),
            (Some("fastest"), Random, 1),
            (Some(""), Random, 1),
        ] {
            let mut web = service(json!({}));
            if let Some(value) = value {
                web["metadata"]["annotations"] = json!({"sluice.dev/load-balancer": value});
            }
            let found = resolved_by(&web, &[], &rules);
            assert_eq!(fields(&found).len(), problems, "{value:?}");
            assert_eq!(found.spec.unwrap().ports[0].balancing, balancing, "{value:?}");
        }
    }

    #[test]
    fn a_service_says_how_its_connections_end_and_are_retried() {
        for (name, value, retry, drain, problems) in [
            ("sluice.dev/retry", "off", false, 600, 0),
            ("sluice.dev/retry", "on", true, 600, 0),
            ("sluice.dev/retry", "false", true, 600, 1),
            ("sluice.dev/drain-timeout", "90s", true, 90, 0),
            ("sluice.dev/drain-timeout", "1h 30m", true, 5400, 0),
            ("sluice.dev/drain-timeout", "soon", true, 600, 1),
        ] {
            let mut web = service(json!({}));
            web["metadata"]["annotations"] = json!({name: value});
            let found = resolved_by(&web, &[], &rules());
            assert_eq!(fields(&found).len(), problems, "{name}: {value}");
            let port = &found.spec.unwrap().ports[0];
            assert_eq!(port.retry, retry, "{name}: {value}");
            assert_eq!(port.drain_timeout, DrainTimeout::After(Duration::from_secs(drain)), "{name}: {value}");
        }
    }

    #[test]
    fn conversations_are_not_counted_unless_asked_for() {
        for (default, protocol, balancing) in [
            (LeastConnections, Protocol::Tcp, LeastConnections),
            (LeastConnections, Protocol::Sctp, LeastConnections),
            (LeastConnections, Protocol::Udp, Random),
            (RoundRobin, Protocol::Udp, RoundRobin),
        ] {
            assert_eq!(super::default_balancing(default, protocol), balancing, "{default:?} {protocol}");
        }
    }

    #[test]
    fn connections_wait_as_long_as_the_service_says() {
        for (value, hold, problems) in [
            ("10s", Some(Duration::from_secs(10)), 0),
            ("0s", None, 0),
            ("5m", Some(Duration::from_secs(300)), 0),
            ("6m", None, 1),
            ("long", None, 1),
        ] {
            let mut web = service(json!({}));
            web["metadata"]["annotations"] = json!({"sluice.dev/hold": value});
            let resolved = resolved_by(&web, &[], &rules());
            assert_eq!(resolved.spec.as_ref().unwrap().ports[0].hold, hold, "{value}");
            assert_eq!(fields(&resolved).len(), problems, "{value}");
        }
    }
}
