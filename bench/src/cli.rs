//! What does the command line ask for.

use std::net::{SocketAddr, ToSocketAddrs as _};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use clap::{Args, Parser, Subcommand};
use sluice_bench::workload::{Plan, Workload, cores};

use crate::compare::dns::DnsCompareArgs;
use crate::compare::{CompareArgs, HopArgs};
use crate::names::DnsArgs;
use crate::scenario::churn::ChurnArgs;
use crate::scenario::drain::DrainArgs;
use crate::scenario::idle::IdleArgs;
use crate::scenario::scale::ScaleArgs;

/// Load for data planes: connections, requests and bulk data against a target, and comparisons of peers.
#[derive(Debug, Parser)]
#[command(name = "sluice-bench", version, disable_help_subcommand = true)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// New connections a second: connect, one request, its answer, close.
    Cps(LoadArgs),
    /// Requests and answers a second on kept connections.
    Rr(LoadArgs),
    /// Gbit/s of bulk data, every byte checked.
    Bulk(BulkArgs),
    /// Questions about names a second, to any name server.
    Dns(DnsArgs),
    /// Memory and processor time of many idle connections.
    Idle(IdleArgs),
    /// Load while the routing table changes many times a second: errors and latency (needs root).
    Churn(ChurnArgs),
    /// A rolling update under load: failed opens, resets, connections that moved (needs root).
    Drain(DrainArgs),
    /// How soon packets follow a change, and what a first packet costs, at many Services (needs root).
    Scale(ScaleArgs),
    /// The server that these loads need behind their target.
    Serve(ServeArgs),
    /// Sluice, HAProxy, nginx and nftables rules side by side, as ratios to dialling the Pods directly (needs root).
    Compare(CompareArgs),
    /// Sluice and CoreDNS on the same objects of a real API server (needs root and scripts/kube/build).
    DnsCompare(DnsCompareArgs),
    /// A peer of `compare`: the least that a hop through TUN can cost.
    #[command(hide = true)]
    Hop(HopArgs),
}

#[derive(Debug, Args)]
pub(crate) struct LoadArgs {
    #[command(flatten)]
    pub(crate) common: CommonArgs,
    /// Connections at a time.
    #[arg(long, default_value_t = 16)]
    connections: usize,
    /// Threads that share the connections [default: one a core].
    #[arg(long)]
    threads: Option<usize>,
    /// Requests a second, each sent when it is due, its latency counted from then (open loop). Without it every
    /// connection sends its next request when the last was answered (closed loop).
    #[arg(long)]
    rate: Option<f64>,
    /// Bytes of an answer.
    #[arg(long, default_value_t = 64)]
    answer_size: u32,
}

#[derive(Debug, Args)]
pub(crate) struct BulkArgs {
    #[command(flatten)]
    pub(crate) common: CommonArgs,
    /// Streams at a time, each with a thread of its own.
    #[arg(long, visible_alias = "connections", default_value_t = 1)]
    streams: usize,
    /// Send to the server instead of receiving from it.
    #[arg(long)]
    upload: bool,
}

#[derive(Debug, Args)]
pub(crate) struct CommonArgs {
    /// Whom to dial, HOST:PORT; several are dialled in turn. Behind it must be `sluice-bench serve`.
    #[arg(long, required = true)]
    target: Vec<String>,
    /// How long is measured, e.g. 10s.
    #[arg(long, default_value = "10s", value_parser = parse_duration)]
    duration: Duration,
    /// Load before that.
    #[arg(long, default_value = "1s", value_parser = parse_duration)]
    warmup: Duration,
    /// Bound on connecting and on each answer.
    #[arg(long, default_value = "5s", value_parser = parse_duration)]
    timeout: Duration,
    /// Print the result as one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
    /// Write a report with charts, in one HTML file.
    #[arg(long)]
    pub(crate) html: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct ServeArgs {
    /// TCP port, on all addresses.
    #[arg(long)]
    pub(crate) port: u16,
    /// Threads.
    #[arg(long, default_value_t = cores())]
    pub(crate) threads: usize,
}

impl LoadArgs {
    pub(crate) fn plan(&self, workload: Workload) -> Result<Plan> {
        Ok(Plan {
            connections: self.connections,
            threads: self.threads.unwrap_or_else(cores),
            rate: self.rate,
            answer_size: self.answer_size,
            ..self.common.plan(workload)?
        })
    }
}

impl BulkArgs {
    pub(crate) fn plan(&self) -> Result<Plan> {
        Ok(Plan { connections: self.streams, upload: self.upload, ..self.common.plan(Workload::Bulk)? })
    }
}

impl CommonArgs {
    fn plan(&self, workload: Workload) -> Result<Plan> {
        let mut targets = Vec::new();
        for target in &self.target {
            targets.push(resolve(target)?);
        }
        Ok(Plan { duration: self.duration, warmup: self.warmup, timeout: self.timeout, ..Plan::new(workload, targets) })
    }
}

pub(crate) fn resolve(target: &str) -> Result<SocketAddr> {
    let mut found = target.to_socket_addrs().with_context(|| format!("--target {target}"))?;
    found.next().with_context(|| format!("--target {target}: no such host"))
}

/// `500ms`, `1.5s`, `2m`; a number alone is seconds.
pub(crate) fn parse_duration(text: &str) -> Result<Duration> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let seconds = match &text[digits.len()..] {
        "ms" => 0.001,
        "" | "s" => 1.0,
        "m" => 60.0,
        unit => anyhow::bail!("unknown unit {unit:?}: use ms, s or m"),
    };
    let number: f64 = digits.parse().with_context(|| format!("{digits:?} is no number"))?;
    ensure!((0.0..1e6).contains(&number), "use a time from 0 up");
    Ok(Duration::from_secs_f64(number * seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_consistent() {
        use clap::CommandFactory as _;
        Cli::command().debug_assert();
    }

    #[test]
    fn durations() {
        for (text, millis) in [("500ms", 500), ("1.5s", 1500), ("2m", 120_000), ("3", 3000)] {
            assert_eq!(parse_duration(text).unwrap(), Duration::from_millis(millis));
        }
        for text in ["", "s", "-1s", "1h", "x"] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
    }
}
