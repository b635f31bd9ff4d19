//! How do peers compare: all of them in one run, interleaved round by round, as ratios to dialling the Pods directly.

mod chart;
pub(crate) mod dns;
mod flows;
mod hop;
pub(crate) mod html;
pub(crate) mod kube_proxy;
mod nft;
mod peer;
mod proxy;
mod report;
pub(crate) mod stats;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use serde::Serialize;
use sluice_bench::workload::{self, Cpu, Plan, Workload, cores};

use crate::cli::parse_duration;
use crate::daemon;
use crate::lab::Mode;
use crate::process;
use crate::progress::{Line, micros, number};
pub(crate) use hop::{HopArgs, run as hop};
use peer::{Peer, Running};
use report::{Report, Round, Section, Table};

/// Part of the direct request rate at which latency is compared: nobody is near saturation there.
const LATENCY_LOAD: f64 = 0.15;

#[derive(Debug, Args)]
pub(crate) struct CompareArgs {
    /// Who is compared: direct, sluice, sluice-WORKERS, haproxy, nginx, kube-proxy (nftables mode), nft (the rules it
    /// renders), hop (the least that a hop through TUN costs).
    #[arg(long, value_delimiter = ',', default_value = "sluice-1,sluice-2,hop,haproxy,nginx,kube-proxy,nft")]
    peers: Vec<Peer>,
    /// How often all are measured.
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// How long each is measured each time.
    #[arg(long, default_value = "1", value_parser = parse_duration)]
    seconds: Duration,
    /// Load before that.
    #[arg(long, default_value = "200ms", value_parser = parse_duration)]
    warmup: Duration,
    /// cps, rr, bulk (one stream), streams (eight), latency (rr at a rate that nobody is saturated by).
    #[arg(long, value_delimiter = ',', default_value = "cps,rr,bulk,streams,latency")]
    workloads: Vec<Cell>,
    /// A client outside the cluster dials the node port: its address is hidden from Pods (the default).
    #[arg(long)]
    masquerade: bool,
    /// A client in a Pod dials the ClusterIP: Pods see its address (proxies hide it all the same).
    #[arg(long)]
    preserve: bool,
    /// Pods behind the Service.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=200))]
    pods: u8,
    /// Connections at a time of cps, rr and latency.
    #[arg(long, default_value_t = 32)]
    connections: usize,
    /// Threads of the load [default: one a core].
    #[arg(long)]
    threads: Option<usize>,
    /// Measure every sluice with so many Services too, e.g. 100,10000: the rate must not depend on them.
    #[arg(long, value_delimiter = ',', value_parser = clap::value_parser!(u32).range(2..=200_000))]
    services: Vec<u32>,
    /// Measure every sluice with so many more flows in its table too, e.g. 100000.
    #[arg(long, value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..=flows::MOST as i64))]
    flows: Vec<u32>,
    /// The `sluice` program [default: the one beside this].
    #[arg(long)]
    sluice: Option<PathBuf>,
    /// Write all figures as JSON.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Write a report with charts, in one HTML file.
    #[arg(long)]
    html: Option<PathBuf>,
}

/// One kind of measurement.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Cell {
    Cps,
    Rr,
    Bulk,
    Streams,
    Latency,
}

impl Cell {
    fn title(self) -> &'static str {
        match self {
            Self::Cps => "cps: new connections/s",
            Self::Rr => "rr: requests/s on kept connections",
            Self::Bulk => "bulk: Gbit/s of one stream",
            Self::Streams => "streams: Gbit/s of eight streams",
            Self::Latency => "latency: µs p50 of requests at a fixed rate (lower is better)",
        }
    }

    fn plan(self, arguments: &CompareArgs, running: &Running, mode: Mode, latency_rate: f64) -> Plan {
        let (workload, connections) = match self {
            Self::Cps => (Workload::Cps, arguments.connections),
            Self::Rr | Self::Latency => (Workload::Rr, arguments.connections),
            Self::Bulk => (Workload::Bulk, 1),
            Self::Streams => (Workload::Bulk, 8),
        };
        Plan {
            connections,
            threads: arguments.threads.unwrap_or_else(cores),
            warmup: arguments.warmup,
            duration: arguments.seconds,
            rate: (self == Self::Latency).then_some(latency_rate),
            sources: running.lab.sources(mode),
            ..Plan::new(workload, running.targets.clone())
        }
    }
}

impl CompareArgs {
    /// But for direct, each once.
    fn all_peers(&self) -> Vec<Peer> {
        let mut all = Vec::new();
        for peer in &self.peers {
            let services = self.services.iter().map(|services| peer.with(*services as usize - 1, 0));
            let flows = self.flows.iter().map(|flows| peer.with(0, *flows as usize));
            for peer in [*peer].into_iter().chain(services).chain(flows) {
                if peer != Peer::Direct && !all.contains(&peer) {
                    all.push(peer);
                }
            }
        }
        all
    }
}

/// Compares; whether there were no errors.
pub(crate) fn run(arguments: &CompareArgs) -> Result<bool> {
    ensure!(!arguments.seconds.is_zero() && arguments.connections > 0, "--seconds, --connections: use more than 0");
    let modes = match (arguments.masquerade, arguments.preserve) {
        (true, true) => vec![Mode::Masquerade, Mode::Preserve],
        (_, true) => vec![Mode::Preserve],
        (_, false) => vec![Mode::Masquerade],
    };
    let sections = modes.into_iter().map(|mode| section(arguments, mode)).collect::<Result<_>>()?;
    let report = Report::new(sections);
    report.print();
    if let Some(path) = &arguments.json {
        let text = serde_json::to_string_pretty(&report)?;
        std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    if let Some(path) = &arguments.html {
        std::fs::write(path, html::page(&report)).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(report.failed() == 0)
}

/// All peers in one mode.
fn section(arguments: &CompareArgs, mode: Mode) -> Result<Section> {
    let mut line = Line::new();
    let sluice = daemon::program(arguments.sluice.as_deref())?;
    let start = |peer| peer::start(peer, mode, arguments.pods, &sluice);
    let direct = start(Peer::Direct)?.map_err(anyhow::Error::msg)?;
    let (mut running, mut skipped) = (vec![(Peer::Direct, direct)], Vec::new());
    for peer in arguments.all_peers() {
        match start(peer)? {
            Ok(peer_running) => running.push((peer, peer_running)),
            Err(why) => {
                line.say(&format!("{peer} is left out: {why}"));
                skipped.push((peer, why));
            }
        }
    }
    let latency_rate = latency_rate(arguments, &running[0].1, mode)?;
    let mut tables: Vec<Table> = arguments.workloads.iter().map(|cell| Table::new(*cell, latency_rate)).collect();
    for round in 0..arguments.rounds as usize {
        for table in &mut tables {
            // Direct is measured twice, with others in between; who comes first changes from round to round.
            let count = running.len();
            let order = (0..count).map(|index| (index, false)).chain([(0, true)]);
            for position in 0..=count {
                let (index, again) = order.clone().cycle().nth(position + round).expect("a cycle has no end");
                let (peer, running) = &running[index];
                let plan = table.cell.plan(arguments, running, mode, latency_rate);
                let prefix = format!("round {}/{} {peer}, ", round + 1, arguments.rounds);
                let measured = measure(&plan, running, mode, |sample| line.sample(&prefix, plan.workload, sample))?;
                table.add(*peer, again, measured);
            }
            let last = table.last_round();
            line.say(&format!("{} round {}: {last}", mode_word(mode), round + 1));
        }
    }
    line.clear();
    Ok(Section { mode, skipped, tables })
}

fn mode_word(mode: Mode) -> &'static str {
    match mode {
        Mode::Masquerade => "masquerade",
        Mode::Preserve => "preserve",
    }
}

/// A rate that is small beside what the Pods can answer.
fn latency_rate(arguments: &CompareArgs, direct: &Running, mode: Mode) -> Result<f64> {
    if !arguments.workloads.contains(&Cell::Latency) {
        return Ok(0.0);
    }
    let plan = Cell::Rr.plan(arguments, direct, mode, 0.0);
    let rate = measure(&plan, direct, mode, |_| {})?.outcome.rate * LATENCY_LOAD;
    // A round number is easier to talk about, and to repeat.
    Ok(((rate / 500.0).round() * 500.0).max(500.0))
}

fn measure(plan: &Plan, running: &Running, mode: Mode, watch: impl FnMut(&workload::Sample)) -> Result<Round> {
    let (own, theirs, before) = (Cpu::of_process(), running.usage().cpu_us, MachineCpu::now());
    let outcome = workload::run(Some(running.lab.client(mode)), plan, watch)?;
    let (own, theirs, after) = (Cpu::of_process().since(own), running.usage().cpu_us - theirs, MachineCpu::now());
    let lasted = (plan.warmup + plan.duration).as_secs_f64() * 1e6 * cores() as f64;
    let programs = after.programs_us - before.programs_us;
    Ok(Round {
        tool_cpu: own.each(outcome.total),
        peer_cpu_us: theirs / outcome.total.max(1.0),
        interrupt_cpu_us: (after.interrupts_us - before.interrupts_us) / outcome.total.max(1.0),
        others: ((programs - own.user_us - own.system_us - theirs) / lasted).max(0.0),
        outcome,
    })
}

/// Processor time of this machine since its start.
struct MachineCpu {
    programs_us: f64,
    /// Soft interrupts too: there the kernel does most of its networking. Not part of any program's time where the kernel
    /// keeps account of them.
    interrupts_us: f64,
}

impl MachineCpu {
    fn now() -> Self {
        let stat = std::fs::read_to_string("/proc/stat").unwrap_or_default();
        // cpu user nice system idle iowait irq softirq
        let ticks: Vec<f64> = stat.split_whitespace().skip(1).take(7).filter_map(|ticks| ticks.parse().ok()).collect();
        let sum =
            |range: std::ops::Range<usize>| ticks.get(range).unwrap_or_default().iter().sum::<f64>() * process::TICK_US;
        Self { programs_us: sum(0..3), interrupts_us: sum(5..7) }
    }
}

/// How a figure of this cell is written.
fn show(cell: Cell, value: f64) -> String {
    match cell {
        Cell::Latency => micros(value),
        Cell::Cps | Cell::Rr | Cell::Bulk | Cell::Streams => number(value),
    }
}
