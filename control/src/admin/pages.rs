//! Pages that every component of Kubernetes has, for people who debug: mode, configuration, flags, status.

use std::fmt::Write as _;
use std::sync::Arc;

use axum::Json;
use axum::extract::State as Extract;
use axum::response::IntoResponse;
use jiff::{SignedDuration, Timestamp};
use serde_json::json;

use crate::state::State;

/// `/proxyMode`, as one of kube-proxy's modes stands there: bare, without a line break.
pub(super) const PROXY_MODE: &str = "sluice";

const WARNING: &str = "Warning: This endpoint is not meant to be machine parseable, has no formatting compatibility \
                       guarantees and is for debugging purposes only.";

/// `/configz`: the configuration in force, flags and defaults included. It is a valid configuration file.
pub(super) async fn configz(Extract(state): Extract<Arc<State>>) -> impl IntoResponse {
    Json(json!({"sluice.dev": state.config}))
}

/// `/flagz`: the flags this process was started with.
pub(super) async fn flagz() -> impl IntoResponse {
    format!("\nsluice flagz\n{WARNING}\n\n{}", flags(std::env::args().skip(1)))
}

/// `/statusz`: who this is and since when.
pub(super) async fn statusz(Extract(state): Extract<Arc<State>>) -> impl IntoResponse {
    let now = Timestamp::now();
    let up = SignedDuration::from_secs(now.duration_since(state.started).as_secs());
    format!(
        "\nsluice statusz\n{WARNING}\n\nStarted: {}\nUp: {up:#}\nBinary version: {}\nTable generation: {}\n\n\
         Paths: /configz /flagz /healthz /livez /metrics /proxyMode /statusz /api/v1/status /api/v1/problems\n",
        state.started,
        env!("CARGO_PKG_VERSION"),
        state.shared.table().generation(),
    )
}

/// One `name=value` a line, sorted. A flag without a value is `true`.
fn flags(arguments: impl Iterator<Item = String>) -> String {
    let mut arguments = arguments.peekable();
    let mut flags = Vec::new();
    while let Some(argument) = arguments.next() {
        let Some(flag) = argument.strip_prefix("--") else { continue };
        let value = match flag.split_once('=') {
            Some(_) => None,
            None => Some(arguments.next_if(|next| !next.starts_with("--")).unwrap_or_else(|| "true".to_owned())),
        };
        flags.push(value.map_or_else(|| flag.to_owned(), |value| format!("{flag}={value}")));
    }
    flags.sort();
    flags.iter().fold(String::new(), |mut text, flag| {
        let _ = writeln!(text, "{flag}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_read_in_both_forms() {
        let arguments = ["run", "--workers", "2", "--leave-on-stop", "--admin=127.0.0.1:1", "--manifests", "/a b"];
        let text = flags(arguments.map(str::to_owned).into_iter());
        assert_eq!(text, "admin=127.0.0.1:1\nleave-on-stop=true\nmanifests=/a b\nworkers=2\n");
    }
}
