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
