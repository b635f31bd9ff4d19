//! `sessionAffinity` and its timeout.

use std::time::Duration;

use k8s_openapi::api::core::v1::ServiceSpec;

use super::problems::Problems;

/// What the API server fills in, seconds.
const DEFAULT_TIMEOUT: i32 = 10_800;
/// Longest that the API server allows, seconds.
const LONGEST_TIMEOUT: i32 = 86_400;

/// The timeout of ClientIP affinity, when the Service wants affinity.
pub(super) fn timeout(spec: &ServiceSpec, problems: &mut Problems<'_>) -> Option<Duration> {
    match spec.session_affinity.as_deref() {
        None | Some("" | "None") => return None,
        Some("ClientIP") => {}
        Some(other) => {
            problems.error("spec.sessionAffinity", format!("{other:?} is neither ClientIP nor None: no affinity"));
            return None;
        }
    }
    let config = spec.session_affinity_config.as_ref().and_then(|config| config.client_ip.as_ref());
    let declared = config.and_then(|config| config.timeout_seconds).unwrap_or(DEFAULT_TIMEOUT);
    let seconds = if (1..=LONGEST_TIMEOUT).contains(&declared) {
        declared
    } else {
        let message = format!("{declared} is not from 1 to {LONGEST_TIMEOUT}: {DEFAULT_TIMEOUT} is used");
        problems.error("spec.sessionAffinityConfig.clientIP.timeoutSeconds", message);
        DEFAULT_TIMEOUT
    };
    Some(Duration::from_secs(seconds.unsigned_abs().into()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::resolve::testing::{resolved, service};

    #[test]
    fn the_timeout_has_a_default_and_bounds() {
        let with = |seconds| json!({"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": seconds}}});
        for (spec, seconds, problems) in [
            (json!({}), None, 0),
            (json!({"sessionAffinity": "None"}), None, 0),
            (json!({"sessionAffinity": "ClientIP"}), Some(10_800), 0),
            (with(1), Some(1), 0),
            (with(86_400), Some(86_400), 0),
            (with(0), Some(10_800), 1),
            (with(-5), Some(10_800), 1),
            (with(86_401), Some(10_800), 1),
            (json!({"sessionAffinity": "Cookie"}), None, 1),
        ] {
            let found = resolved(&service(spec.clone()), &[]);
            let timeout = found.spec.unwrap().ports[0].affinity.map(|timeout| timeout.as_secs());
            assert_eq!((timeout, found.problems.len()), (seconds, problems), "{spec}");
        }
    }
}
