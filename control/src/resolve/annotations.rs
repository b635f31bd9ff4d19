//! The annotations of ours that a Service may have.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use sluice_dataplane::table::Balancing;

use super::problems::Problems;

/// Names the algorithm of endpoint selection.
const LOAD_BALANCER: &str = "sluice.dev/load-balancer";

/// The Service's own endpoint selection, or `default`.
pub(super) fn balancing(metadata: &ObjectMeta, default: Balancing, problems: &mut Problems<'_>) -> Balancing {
    let Some(name) = metadata.annotations.as_ref().and_then(|annotations| annotations.get(LOAD_BALANCER)) else {
        return default;
    };
    match name.as_str() {
        "least-connections" => Balancing::LeastConnections,
        "round-robin" => Balancing::RoundRobin,
        "random" => Balancing::Random,
        other => {
            let message = format!("{other:?} is not known: use least-connections, round-robin or random");
            problems.error(format!("metadata.annotations[{LOAD_BALANCER}]"), message);
            default
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use sluice_dataplane::table::Balancing::{LeastConnections, Random, RoundRobin};

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
}
