//! Whether all is well, a line a subsystem: what `sluice status` shows.

use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use axum::Json;
use axum::extract::State as Extract;
use axum::http::StatusCode;
use axum::response::IntoResponse;
use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};
use sluice_dataplane::packet_path::Shared;

use super::health;
use crate::problem::{Problem, Severity};
use crate::state::{Freshness, State};

/// Host state that somebody else changed so recently means that somebody works against us.
const DISPUTED: Duration = Duration::from_secs(60);
/// How full, in hundredths, the flow table may be.
const FULL: usize = 90;

/// The whole.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    /// `sluice.dev/v1alpha1`.
    pub api_version: String,
    /// `Status`.
    pub kind: String,
    /// Some subsystem is degraded.
    pub degraded: bool,
    /// Subsystems, always the same ones in the same order.
    pub subsystems: Vec<Subsystem>,
}

/// One subsystem.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Subsystem {
    /// `source`, `table`, `packets`, `host`, `flows` or `health`.
    pub name: String,
    /// It does not do all it should.
    pub degraded: bool,
    /// How it is, for people.
    pub message: String,
}

impl Subsystem {
    fn new(name: &str, degraded: bool, message: String) -> Self {
        Self { name: name.to_owned(), degraded, message }
    }
}

/// `/api/v1/status`.
pub(super) async fn status(Extract(state): Extract<Arc<State>>) -> impl IntoResponse {
    match tokio::task::spawn_blocking(move || view(&state)).await {
        Ok(status) => Json(status).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

fn view(state: &State) -> Status {
    let now = Timestamp::now();
    let problems = super::views::problems(state).items;
    let of_source: Vec<&Problem> = problems.iter().filter(|problem| problem.object.is_none()).collect();
    let repairs = *state.repairs.lock().unwrap_or_else(PoisonError::into_inner);
    let subsystems = vec![
        source(&state.source, state.freshness(), &of_source, now),
        table(state, problems.iter().filter(|problem| problem.object.is_some())),
        packets(&state.shared),
        host(repairs.count, repairs.last.map(|last| last.elapsed())),
        flows(state.shared.flow_count(), state.shared.flow_capacity(), state.shared.evictions()),
        health(state),
    ];
    Status {
        api_version: "sluice.dev/v1alpha1".to_owned(),
        kind: "Status".to_owned(),
        degraded: subsystems.iter().any(|subsystem| subsystem.degraded),
        subsystems,
    }
}

fn source(name: &str, freshness: Freshness, problems: &[&Problem], now: Timestamp) -> Subsystem {
    let age = |since: Timestamp| span(now.duration_since(since).unsigned_abs());
    let mut message = match (freshness.is_synced, freshness.behind_since) {
        (false, since) => {
            format!(
                "{name}: not synced: objects of an earlier process serve, {} old",
                since.map_or("?".to_owned(), age)
            )
        }
        (true, Some(since)) => format!("{name}: changes have not come in for {}", age(since)),
        (true, None) => format!("{name}: followed"),
    };
    let mut wrong = problems.iter().filter(|problem| problem.severity == Severity::Error);
    if let Some(problem) = wrong.next() {
        message += &format!("; {}", problem.message.replace('\n', " "));
        let more = wrong.count();
        if more > 0 {
            message += &format!(", and {more} more");
        }
    }
    Subsystem::new("source", !freshness.is_fresh() || problems.iter().any(|it| it.severity == Severity::Error), message)
}

fn table<'p>(state: &State, of_objects: impl Iterator<Item = &'p Problem>) -> Subsystem {
    let table = state.shared.table();
    let (errors, warnings) = of_objects.fold((0, 0), |(errors, warnings), problem| match problem.severity {
        Severity::Error => (errors + 1, warnings),
        Severity::Warning => (errors, warnings + 1),
    });
    let services = state.publisher().builder().services().count();
    let mut message = format!("generation {}: {services} Services, {} frontends", table.generation(), table.len());
    if errors + warnings > 0 {
        message += &format!("; objects have {errors} errors, {warnings} warnings: see /api/v1/problems");
    }
    let is_late = !health::is_healthy(state);
    if is_late {
        let pending = state.progress().pending_since.map(|since| span(Instant::now() - since)).unwrap_or_default();
        message += &format!("; an update has waited for {pending}");
    }
    Subsystem::new("table", is_late, message)
}

fn packets(shared: &Shared) -> Subsystem {
    let dropped: u64 = shared.drops().iter().map(|(_, packets)| packets).sum();
    // Without its threads the daemon ends.
    Subsystem::new("packets", false, format!("{} threads, {dropped} packets dropped", shared.workers()))
}

fn host(repairs: u64, last: Option<Duration>) -> Subsystem {
    let message = match last {
        None => "as set up".to_owned(),
        Some(ago) => format!("put right {repairs} times, last {} ago", span(ago)),
    };
    Subsystem::new("host", last.is_some_and(|ago| ago < DISPUTED), message)
}

fn flows(count: usize, capacity: usize, evictions: u64) -> Subsystem {
    Subsystem::new("flows", count * 100 >= capacity * FULL, format!("{count} of {capacity}, {evictions} pushed out"))
}

fn health(state: &State) -> Subsystem {
    let eligible = state.publisher().node().eligible;
    let ports = state.health_problems.lock().unwrap_or_else(PoisonError::into_inner);
    let message = match (eligible, ports.first()) {
        (false, _) => "/healthz answers 503: the Node is being deleted, or was".to_owned(),
        (true, _) if !health::is_healthy(state) => "/healthz answers 503: an update is late".to_owned(),
        (true, Some(problem)) => format!("/healthz answers 200; {problem}"),
        (true, None) => "/healthz answers 200".to_owned(),
    };
    Subsystem::new("health", !(eligible && health::is_healthy(state) && ports.is_empty()), message)
}

/// Such as `1h 2m 3s`.
fn span(duration: Duration) -> String {
    SignedDuration::try_from(Duration::from_secs(duration.as_secs()))
        .map_or_else(|_| "long".to_owned(), |it| format!("{it:#}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_is_degraded_while_its_changes_do_not_come_in_or_a_part_of_it_cannot_be_read() {
        let now: Timestamp = "2026-01-01T01:00:00Z".parse().unwrap();
        let earlier = "2026-01-01T00:58:55Z".parse().unwrap();
        let problem = Problem::error("", "cannot list nodes: forbidden: no");
        let warning = Problem::warning("", "odd");
        for (is_synced, behind_since, problems, degraded, message) in [
            (true, None, &[][..], false, "it: followed"),
            (true, None, &[&warning], false, "it: followed"),
            (true, None, &[&problem], true, "it: followed; cannot list nodes: forbidden: no"),
            (
                true,
                Some(earlier),
                &[&problem, &problem],
                true,
                "it: changes have not come in for 1m 5s; cannot list nodes: forbidden: no, and 1 more",
            ),
            (false, Some(earlier), &[], true, "it: not synced: objects of an earlier process serve, 1m 5s old"),
        ] {
            let status = source("it", Freshness { is_synced, behind_since }, problems, now);
            assert_eq!((status.degraded, &*status.message), (degraded, message));
        }
    }

    #[test]
    fn a_host_in_dispute_and_a_full_flow_table_are_degraded() {
        assert!(!host(0, None).degraded && !host(3, Some(Duration::from_secs(61))).degraded);
        let disputed = host(3, Some(Duration::from_secs(2)));
        assert_eq!((disputed.degraded, &*disputed.message), (true, "put right 3 times, last 2s ago"));
        assert!(!flows(899, 1000, 0).degraded && flows(900, 1000, 0).degraded);
    }
}
