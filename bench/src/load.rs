//! How do many connections fare: clients that ask over and over, and the tally of who answered.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context as _, Result};
use hdrhistogram::Histogram;

use crate::client::{Attempt, Failure, Target, ask};
use crate::netns::NetNs;

/// What a load does.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Asked in turn.
    pub targets: Vec<Target>,
    /// Connections in all; `None`: until [`Load::stop`].
    pub connections: Option<u64>,
    /// Clients at a time, each with a thread of its own.
    pub concurrency: usize,
    /// Bound on connecting and on each wait.
    pub timeout: Duration,
    /// Pause of a client between two connections.
    pub pause: Duration,
}

impl Plan {
    /// Eight clients without pauses, five seconds' patience, until stopped.
    #[must_use]
    pub fn new(targets: Vec<Target>) -> Self {
        Self { targets, connections: None, concurrency: 8, timeout: Duration::from_secs(5), pause: Duration::ZERO }
    }
}

/// What came of a load.
#[derive(Clone, Debug)]
pub struct Tally {
    /// Answers by the Pod that gave them.
    pub answered: BTreeMap<String, u64>,
    /// Failures by kind.
    pub failures: BTreeMap<Failure, u64>,
    /// Time from connecting to the answer, in microseconds, of those answered.
    pub latency: Histogram<u64>,
}

impl Default for Tally {
    fn default() -> Self {
        Self {
            answered: BTreeMap::new(),
            failures: BTreeMap::new(),
            latency: Histogram::new_with_bounds(1, 60_000_000, 3).expect("the bounds and the precision are valid"),
        }
    }
}

impl Tally {
    /// Counts one attempt.
    pub fn record(&mut self, attempt: &Attempt) {
        match &attempt.result {
            Ok(name) => {
                match self.answered.get_mut(name) {
                    Some(count) => *count += 1,
                    None => {
                        self.answered.insert(name.clone(), 1);
                    }
                }
                let micros = attempt.latency.as_micros().try_into().unwrap_or(u64::MAX);
                self.latency.saturating_record(micros);
            }
            Err(failure) => *self.failures.entry(*failure).or_default() += 1,
        }
    }

    /// Adds another tally to this one.
    pub fn merge(&mut self, other: &Self) {
        for (name, count) in &other.answered {
            *self.answered.entry(name.clone()).or_default() += count;
        }
        for (failure, count) in &other.failures {
            *self.failures.entry(*failure).or_default() += count;
        }
        self.latency.add(&other.latency).expect("all tallies have the same bounds");
    }

    /// Connections that were answered.
    #[must_use]
    pub fn answers(&self) -> u64 {
        self.answered.values().sum()
    }

    /// Connections that were not.
    #[must_use]
    pub fn failed(&self) -> u64 {
        self.failures.values().sum()
    }
}

/// A load that is running. Dropping it stops it.
#[derive(Debug)]
pub struct Load {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Tally>>,
}

impl Load {
    /// Starts the clients inside `ns`.
    pub fn start(ns: &NetNs, plan: &Plan) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let left = Arc::new(AtomicU64::new(plan.connections.unwrap_or(u64::MAX)));
        let mut load = Self { stop, threads: Vec::new() };
        for index in 0..plan.concurrency {
            let (ns, plan) = (ns.clone(), plan.clone());
            let (stop, left) = (Arc::clone(&load.stop), Arc::clone(&left));
            let (entered, ready) = std::sync::mpsc::channel();
            let thread = thread::Builder::new()
                .name(format!("client {index}"))
                .spawn(move || {
                    let inside = ns.enter();
                    let failed = inside.is_err();
                    // The receiver waits for exactly this.
                    drop(entered.send(inside));
                    if failed { Tally::default() } else { run_client(&plan, index, &stop, &left) }
                })
                .context("cannot start a client's thread")?;
            load.threads.push(thread);
            ready.recv().context("a client ended at once")??;
        }
        Ok(load)
    }

    /// Waits until all connections of the plan were made.
    #[must_use]
    pub fn wait(mut self) -> Tally {
        self.join()
    }

    /// Ends it after the connections under way.
    #[must_use]
    pub fn stop(mut self) -> Tally {
        self.stop.store(true, Ordering::Relaxed);
        self.join()
    }

    fn join(&mut self) -> Tally {
        let mut sum = Tally::default();
        for thread in self.threads.drain(..) {
            match thread.join() {
                Ok(tally) => sum.merge(&tally),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        sum
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// Runs a plan with a set number of connections inside `ns` to its end.
pub fn run(ns: &NetNs, plan: &Plan) -> Result<Tally> {
    Ok(Load::start(ns, plan)?.wait())
}

fn run_client(plan: &Plan, index: usize, stop: &AtomicBool, left: &AtomicU64) -> Tally {
    let mut tally = Tally::default();
    let take = |left: u64| left.checked_sub(1);
    for target in plan.targets.iter().cycle().skip(index) {
        if stop.load(Ordering::Relaxed) || left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_err() {
            break;
        }
        tally.record(&ask(*target, plan.timeout));
        if !plan.pause.is_zero() {
            thread::sleep(plan.pause);
        }
    }
    tally
}
