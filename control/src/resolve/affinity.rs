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
