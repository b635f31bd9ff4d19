//! Loads that need the daemon itself: many idle connections, a table that changes, a rolling update, many Services.

mod api_load;
mod api_scale;
pub(crate) mod churn;
pub(crate) mod drain;
pub(crate) mod idle;
mod polite;
pub(crate) mod scale;

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context as _, Result};
use clap::Args;
use comfy_table::{CellAlignment, Table, presets};
use hdrhistogram::Histogram;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde_json::{Value, json};
use sluice_bench::client::Failure;

use crate::daemon::{PacketPath, Program};
use crate::lab::Mode;
use crate::progress::{PERCENTILES, micros};

#[derive(Debug, Args)]
pub(crate) struct CommonArgs {
    /// The `sluice` program [default: the one beside this].
    #[arg(long)]
    sluice: Option<PathBuf>,
    /// `packetPath` of the daemon.
    #[arg(long, value_enum, default_value_t)]
    packet_path: PacketPath,
    /// Print the result as one JSON object.
    #[arg(long)]
    json: bool,
}

impl CommonArgs {
    fn program(&self) -> Result<Program> {
        Program::new(self.sluice.as_deref(), self.packet_path)
    }
}

#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct ModeArgs {
    /// A client in a Pod dials the ClusterIP, instead of one outside the node port: Pods see its address.
    #[arg(long)]
    preserve: bool,
}

impl ModeArgs {
    fn mode(self) -> Mode {
        if self.preserve { Mode::Preserve } else { Mode::Masquerade }
    }
}

/// Failures by kind.
type Failures = BTreeMap<String, u64>;

fn count(failures: &mut Failures, failure: Failure) {
    *failures.entry(failure.to_string()).or_default() += 1;
}

fn add(failures: &mut Failures, more: &Failures) {
    for (kind, count) in more {
        *failures.entry(kind.clone()).or_default() += count;
    }
}

fn sum(failures: &Failures) -> u64 {
    failures.values().sum()
}

/// `3 reset, 1 timeout`, or `none`.
fn named(failures: &Failures) -> String {
    if failures.is_empty() {
        return "none".to_owned();
    }
    failures.iter().map(|(kind, count)| format!("{count} {kind}")).collect::<Vec<_>>().join(", ")
}

/// Latencies in nanoseconds, for programs.
pub(crate) fn percentiles(latency: &Histogram<u64>) -> Value {
    let at = |percentile: f64| latency.value_at_percentile(percentile) as f64 / 1000.0;
    let named = PERCENTILES.iter().map(|percentile| (format!("p{percentile}"), json!(at(*percentile))));
    named.chain([("max".to_owned(), json!(at(100.0))), ("count".to_owned(), json!(latency.len()))]).collect()
}

/// The same percentile for people.
pub(crate) fn at(latency: &Histogram<u64>, percentile: f64) -> String {
    if latency.is_empty() {
        return "-".to_owned();
    }
    micros(latency.value_at_percentile(percentile) as f64 / 1000.0)
}

/// A table for people: numbers stand right.
pub(crate) fn table(header: &[&str], rows: Vec<Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(header.iter().copied());
    table.add_rows(rows);
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table.to_string()
}

/// As many open files as this process may have.
pub(crate) fn raise_file_limit() -> Result<u64> {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).context("cannot read the limit of open files")?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most).context("cannot raise the limit of open files")?;
    Ok(most)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_are_named() {
        let mut failures = Failures::new();
        assert_eq!(named(&failures), "none");
        count(&mut failures, Failure::Reset);
        add(&mut failures, &BTreeMap::from([("reset".to_owned(), 2), ("timeout".to_owned(), 1)]));
        assert_eq!((named(&failures).as_str(), sum(&failures)), ("3 reset, 1 timeout", 4));
    }
}
