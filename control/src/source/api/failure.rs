//! What went wrong with a request, in words, and what that means for the next.

use std::error::Error as _;
use std::time::Duration;

/// A request that failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Failure {
    /// What was asked: `list` or `watch`; empty when it did not get so far.
    pub(super) verb: &'static str,
    /// Why it failed.
    pub(super) reason: String,
    /// The status of the answer; none when there was no whole answer.
    pub(super) code: Option<u16>,
    /// The delay that the server asks for.
    pub(super) retry_after: Option<Duration>,
}

impl Failure {
    /// Of a request.
    pub(super) fn new(verb: &'static str, error: &kube::Error) -> Self {
        if let kube::Error::Api(status) = error {
            return Self::answered(verb, status);
        }
        // The outermost words say only which layer of the client it was.
        let mut causes = Vec::new();
        let mut cause = error.source();
        while let Some(error) = cause {
            causes.push(error.to_string());
            cause = error.source();
        }
        causes.dedup();
        let reason = if causes.is_empty() { error.to_string() } else { causes.join(": ") };
        Self { verb, reason, code: None, retry_after: None }
    }

    /// An answer that says so.
    pub(super) fn answered(verb: &'static str, status: &kube::core::Status) -> Self {
        let word = match (status.code, &*status.reason) {
            (401, _) => "unauthorized".to_owned(),
            (403, _) => "forbidden".to_owned(),
            (404, _) => "not found".to_owned(),
            (410, _) => "expired".to_owned(),
            (429, _) => "too many requests".to_owned(),
            (code, "" | "Failed to parse error data") => format!("status {code}"),
            (_, reason) => reason.to_owned(),
        };
        let message = status.message.trim();
        let reason = if message.is_empty() { word } else { format!("{word}: {message}") };
        let seconds = status.details.as_ref().map(|details| details.retry_after_seconds).filter(|it| *it > 0);
        let retry_after = seconds.map(|seconds| Duration::from_secs(seconds.into()));
        Self { verb, reason, code: Some(status.code), retry_after }
    }

    /// Without an answer in time.
    pub(super) fn late(verb: &'static str, patience: Duration) -> Self {
        Self { verb, reason: format!("no answer for {patience:?}"), code: None, retry_after: None }
    }

    /// `cannot watch services: forbidden: …`.
    pub(super) fn words(&self, resource: &str) -> String {
        let verb = if self.verb.is_empty() { "reach the API server for" } else { self.verb };
        format!("cannot {verb} {resource}: {}", self.reason)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn verb_resource_and_reason_are_named() {
        for (status, words) in [
            (
                json!({"code": 403, "reason": "Forbidden", "message": "services is forbidden: User \"x\" cannot watch"}),
                "cannot watch services: forbidden: services is forbidden: User \"x\" cannot watch",
            ),
            (json!({"code": 401, "reason": "Unauthorized"}), "cannot watch services: unauthorized"),
            (
                json!({"code": 504, "reason": "Timeout", "message": "too large"}),
                "cannot watch services: Timeout: too large",
            ),
            (
                json!({"code": 502, "reason": "Failed to parse error data", "message": "Bad Gateway"}),
                "cannot watch services: status 502: Bad Gateway",
            ),
        ] {
            let failure = Failure::answered("watch", &serde_json::from_value(status).unwrap());
            assert_eq!(failure.words("services"), words);
        }
    }
}
