//! What load is put on a target, and what came of it.

mod bulk;
pub mod dns;
mod exchange;
mod meter;
pub mod questions;
mod schedule;
mod waiter;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use hdrhistogram::Histogram;
use serde::Serialize;

pub use meter::{Cpu, new_histogram};

use crate::client::Failure;
use crate::netns::NetNs;
use crate::protocol::{HEAD, MAX_ANSWER};
use meter::{Live, Meter};

/// Kinds of load.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Workload {
    /// New connections: connect, one request, its answer, close.
    Cps,
    /// Requests and answers on kept connections.
    Rr,
    /// Bulk data, every byte of it checked.
    Bulk,
}

impl Workload {
    /// As it is called on the command line.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Cps => "cps",
            Self::Rr => "rr",
            Self::Bulk => "bulk",
        }
    }

    /// What its rate counts.
    #[must_use]
    pub fn unit(self) -> &'static str {
        match self {
            Self::Cps => "connections/s",
            Self::Rr => "requests/s",
            Self::Bulk => "Gbit/s",
        }
    }
}

/// A load.
#[derive(Clone, Debug, Serialize)]
pub struct Plan {
    /// Its kind.
    pub workload: Workload,
    /// Dialled in turn.
    pub targets: Vec<SocketAddr>,
    /// Own addresses that `cps` and `rr` dial from in turn; none: as the system chooses. One address has some ten thousand ports to a
    /// target, and from as many connections a second on the search for a free one is what is measured.
    pub sources: Vec<IpAddr>,
    /// Connections at a time; for bulk data, streams.
    pub connections: usize,
    /// Threads that share them (bulk data: a thread a stream whatever this says).
    pub threads: usize,
    /// Load before anything is measured.
    pub warmup: Duration,
    /// How long is measured.
    pub duration: Duration,
    /// Requests a second in all, sent when they are due whether or not earlier ones were answered in time (open loop).
    /// `None`: each connection sends its next one when the last is answered (closed loop).
    pub rate: Option<f64>,
    /// Bytes of an answer.
    pub answer_size: u32,
    /// Bulk data from the client to the server instead of the other way.
    pub upload: bool,
    /// Bound on connecting and on each answer.
    pub timeout: Duration,
}

impl Plan {
    /// Closed loop, 16 connections (one stream), as many threads as cores, ten seconds after one of warm-up.
    #[must_use]
    pub fn new(workload: Workload, targets: Vec<SocketAddr>) -> Self {
        Self {
            workload,
            targets,
            sources: Vec::new(),
            connections: if workload == Workload::Bulk { 1 } else { 16 },
            threads: cores(),
            warmup: Duration::from_secs(1),
            duration: Duration::from_secs(10),
            rate: None,
            answer_size: 64,
            upload: false,
            timeout: Duration::from_secs(5),
        }
    }

    fn check(&self) -> Result<()> {
        ensure!(!self.targets.is_empty(), "no target");
        ensure!(self.connections > 0, "--connections: use at least 1");
        ensure!(!self.duration.is_zero(), "--duration: use more than 0");
        ensure!(
            (HEAD as u32..=MAX_ANSWER).contains(&self.answer_size),
            "--answer-size: use {HEAD} to {MAX_ANSWER} bytes"
        );
        if let Some(rate) = self.rate {
            ensure!(self.workload != Workload::Bulk, "--rate is for cps and rr");
            ensure!(rate > 0.0 && rate.is_finite(), "--rate: use a number above 0");
        }
        Ok(())
    }
}

/// Threads that can run at a time on this machine.
#[must_use]
pub fn cores() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

/// A moment of a running load.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Sample {
    /// Seconds since the load began, warm-up included.
    pub at: f64,
    /// Whether it is measured, or warm-up.
    pub measured: bool,
    /// Since the last sample, in the workload's unit a second.
    pub rate: f64,
    /// Failures since the last sample.
    pub failures: u64,
    /// Mean latency since the last sample, in microseconds.
    pub mean_us: f64,
}

/// What came of a load.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    /// Connections, requests or Gbit a second, by the workload's unit.
    pub rate: f64,
    /// Connections or requests that were answered while measured.
    pub answered: u64,
    /// Bytes of bulk data that came while measured.
    pub bytes: u64,
    /// Failures, warm-up included, by kind.
    pub failures: BTreeMap<String, u64>,
    /// Open loop: requests that were due and not answered at the end.
    pub overdue: u64,
    /// From the moment a request was due to its answer, in nanoseconds.
    #[serde(skip)]
    pub latency: Histogram<u64>,
    /// Requests (bulk data: megabytes) in all, warm-up included: what processor time is divided by.
    pub total: f64,
    /// What the load's own threads used, for each of those.
    pub cpu: Cpu,
    /// How it went over time.
    pub samples: Vec<Sample>,
}

impl Outcome {
    /// Failures of all kinds.
    #[must_use]
    pub fn failed(&self) -> u64 {
        self.failures.values().sum()
    }

    /// Latency in microseconds at this percentile.
    #[must_use]
    pub fn latency_us(&self, percentile: f64) -> f64 {
        self.latency.value_at_percentile(percentile) as f64 / 1000.0
    }
}

/// When a load begins, is measured and ends.
#[derive(Clone, Copy, Debug)]
struct Times {
    start: Instant,
    begin: Instant,
    end: Instant,
}

/// One thread's part of a load.
#[derive(Clone, Copy, Debug)]
struct Share {
    index: usize,
    threads: usize,
    connections: usize,
}

/// Puts a load on its targets from inside `ns` (`None`: where the caller is) and waits for its end.
///
/// `watch` gets a sample ten times a second.
pub fn run(ns: Option<&NetNs>, plan: &Plan, watch: impl FnMut(&Sample)) -> Result<Outcome> {
    plan.check()?;
    let threads = match plan.workload {
        Workload::Bulk => plan.connections,
        Workload::Cps | Workload::Rr => plan.threads.clamp(1, plan.connections),
    };
    drive(ns, plan, threads, watch, |plan, share, times, live| match plan.workload {
        Workload::Bulk => Ok(bulk::run(plan, share, times, live)),
        Workload::Cps | Workload::Rr => exchange::run(plan, share, times, live),
    })
}

/// Runs `work` in so many threads, each with its share of the connections, and adds up what they measured.
fn drive(
    ns: Option<&NetNs>,
    plan: &Plan,
    threads: usize,
    mut watch: impl FnMut(&Sample),
    work: impl Fn(&Plan, Share, Times, &Live) -> Result<Meter> + Sync,
) -> Result<Outcome> {
    let lives: Vec<Live> = (0..threads).map(|_| Live::default()).collect();
    // Threads start together, after the slowest was made.
    let start = Instant::now() + Duration::from_millis(5 + threads as u64 / 20);
    let begin = start + plan.warmup;
    let times = Times { start, begin, end: begin + plan.duration };
    thread::scope(|scope| {
        let mut running = Vec::with_capacity(threads);
        for (index, live) in lives.iter().enumerate() {
            let connections = plan.connections / threads + usize::from(index < plan.connections % threads);
            let share = Share { index, threads, connections };
            let (ns, work) = (ns.cloned(), &work);
            let body = move || -> Result<Meter> {
                if let Some(ns) = ns {
                    ns.enter()?;
                }
                thread::sleep(times.start.saturating_duration_since(Instant::now()));
                meter::with_cpu(|| work(plan, share, times, live))
            };
            let builder = thread::Builder::new().name(format!("load {index}"));
            running.push(builder.spawn_scoped(scope, body).context("cannot start a load's thread")?);
        }
        let all_ended = || running.iter().all(thread::ScopedJoinHandle::is_finished);
        let samples = meter::sample(&lives, plan, times, &mut watch, all_ended);
        let mut sum = Meter::default();
        for thread in running {
            match thread.join() {
                Ok(meter) => sum.merge(&meter?),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        Ok(sum.outcome(plan, samples))
    })
}

/// Asks once, as `cps` does; for finding out whether a target serves.
pub fn probe(ns: Option<&NetNs>, target: SocketAddr, timeout: Duration) -> Result<Result<(), Failure>> {
    match ns {
        Some(ns) => ns.run(|| Ok(bulk::probe(target, timeout))),
        None => Ok(bulk::probe(target, timeout)),
    }
}

#[cfg(test)]
mod tests;
