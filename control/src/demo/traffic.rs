//! How do connections fare: clients in a Pod and outside, what each lane met, and in which phase.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use hdrhistogram::Histogram;
use sluice_bench::client::{Attempt, Failure, ask};
use sluice_bench::netns::NetNs;

use super::frontends::{Expect, From, Lane};

/// Clients at a time in each place.
const CLIENTS: usize = 4;
/// Pause of a client between two connections: the machine does more than this.
const PAUSE: Duration = Duration::from_millis(1);
/// Shortest time between two connections of a lane from outside. They are masqueraded: some 4,500 ports are shared towards
/// each endpoint, and a Pod remembers a closed connection for a minute and may take a new one on its port for a stray
/// packet, so that its SYN waits a second. At this pace two lanes to one endpoint need no port twice.
const OUTSIDE_INTERVAL: Duration = Duration::from_millis(8);
/// Bound on connecting and on each wait: longer than a lost SYN takes to be sent again, so that only real failures fail.
const PATIENCE: Duration = Duration::from_secs(5);

/// What happens to the cluster meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Phase {
    /// Nothing.
    Steady,
    /// Every Pod is replaced.
    RollingUpdate,
    /// Pods are added.
    ScaleUp,
}

impl Phase {
    /// In a sentence.
    #[must_use]
    pub(super) fn words(self) -> &'static str {
        match self {
            Self::Steady => "while nothing changed",
            Self::RollingUpdate => "during the rolling update",
            Self::ScaleUp => "during the scale-up",
        }
    }
}

/// What came of a lane.
#[derive(Clone, Debug, Default)]
pub(super) struct LaneTally {
    /// Time to the answer in microseconds, by the Pod that gave it.
    pub(super) answered: BTreeMap<String, Histogram<u64>>,
    /// Connections not answered, by when they began and what they met.
    pub(super) failures: BTreeMap<(Phase, Failure), u64>,
}

impl LaneTally {
    /// Counts one attempt.
    pub(super) fn record(&mut self, phase: Phase, attempt: &Attempt) {
        match &attempt.result {
            Ok(pod) => {
                let micros = attempt.latency.as_micros().try_into().unwrap_or(u64::MAX);
                if !self.answered.contains_key(pod) {
                    self.answered.insert(pod.clone(), histogram());
                }
                if let Some(latency) = self.answered.get_mut(pod) {
                    latency.saturating_record(micros);
                }
            }
            Err(failure) => *self.failures.entry((phase, *failure)).or_default() += 1,
        }
    }

    /// Connections in all.
    #[must_use]
    pub(super) fn connections(&self) -> u64 {
        self.answered.values().map(Histogram::len).sum::<u64>() + self.failures.values().sum::<u64>()
    }
}

/// An empty histogram of microseconds, up to a minute.
#[must_use]
pub(super) fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 60_000_000, 2).expect("the bounds and the precision are valid")
}

/// Figures to look at while it runs.
#[derive(Debug, Default)]
pub(super) struct Counters {
    connections: AtomicU64,
    errors: AtomicU64,
}

impl Counters {
    /// Connections that have ended, and those of them that went wrong.
    #[must_use]
    pub(super) fn read(&self) -> (u64, u64) {
        (self.connections.load(Ordering::Relaxed), self.errors.load(Ordering::Relaxed))
    }
}

/// Clients at work. Dropping it stops them.
#[derive(Debug)]
pub(super) struct Traffic {
    shared: Arc<Shared>,
    clients: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    lanes: Vec<Dialled>,
    phase: Mutex<Phase>,
    stop: AtomicBool,
    counters: Arc<Counters>,
}

#[derive(Debug)]
struct Dialled {
    lane: Lane,
    tally: Mutex<LaneTally>,
    /// Not to be dialled before.
    due: Mutex<Instant>,
}

impl Dialled {
    /// Whether it may be dialled now, which then is done.
    fn take_turn(&self, now: Instant) -> bool {
        let mut due = lock(&self.due);
        if *due > now {
            return false;
        }
        *due = match self.lane.from {
            From::Pod => now,
            From::Outside => now + OUTSIDE_INTERVAL,
        };
        true
    }
}

impl Traffic {
    /// Starts clients in both places, as far as there is something to dial from there.
    pub(super) fn start(lanes: Vec<Lane>, pod: &NetNs, outside: &NetNs) -> Result<Self> {
        let now = Instant::now();
        let dialled = |lane| Dialled { lane, tally: Mutex::default(), due: Mutex::new(now) };
        let lanes = lanes.into_iter().map(dialled).collect();
        let shared =
            Shared { lanes, phase: Mutex::new(Phase::Steady), stop: AtomicBool::new(false), counters: Arc::default() };
        let mut traffic = Self { shared: Arc::new(shared), clients: Vec::new() };
        for (from, ns) in [(From::Pod, pod), (From::Outside, outside)] {
            let own = traffic.shared.lanes.iter().enumerate().filter(|(_, dialled)| dialled.lane.from == from);
            let own: Vec<usize> = own.map(|(position, _)| position).collect();
            for client in 0..if own.is_empty() { 0 } else { CLIENTS } {
                // Clients begin at different lanes, so that the load is spread from the start.
                let skip = client * own.len().div_ceil(CLIENTS);
                let own: Vec<usize> = own.iter().copied().cycle().skip(skip).take(own.len()).collect();
                traffic.spawn_client(ns, own)?;
            }
        }
        Ok(traffic)
    }

    /// Says what happens from now on.
    pub(super) fn set_phase(&self, phase: Phase) {
        *lock(&self.shared.phase) = phase;
    }

    /// Figures to look at.
    #[must_use]
    pub(super) fn counters(&self) -> Arc<Counters> {
        Arc::clone(&self.shared.counters)
    }

    /// Ends it after the connections under way.
    #[must_use]
    pub(super) fn finish(mut self) -> Vec<(Lane, LaneTally)> {
        self.shared.stop.store(true, Ordering::Relaxed);
        for client in self.clients.drain(..) {
            if let Err(panic) = client.join() {
                std::panic::resume_unwind(panic);
            }
        }
        self.shared.lanes.iter().map(|dialled| (dialled.lane.clone(), lock(&dialled.tally).clone())).collect()
    }

    fn spawn_client(&mut self, ns: &NetNs, lanes: Vec<usize>) -> Result<()> {
        let (ns, shared) = (ns.clone(), Arc::clone(&self.shared));
        let (entered, ready) = std::sync::mpsc::channel();
        let work = move || {
            let inside = ns.enter();
            let failed = inside.is_err();
            // The receiver waits for exactly this.
            drop(entered.send(inside));
            if !failed {
                run_client(&shared, &lanes);
            }
        };
        let client = std::thread::Builder::new().name("client".to_owned()).spawn(work);
        self.clients.push(client.context("cannot start a client's thread")?);
        ready.recv().context("a client ended at once")?
    }
}

impl Drop for Traffic {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
    }
}

fn run_client(shared: &Shared, lanes: &[usize]) {
    for position in lanes.iter().cycle() {
        if shared.stop.load(Ordering::Relaxed) {
            return;
        }
        let dialled = &shared.lanes[*position];
        if !dialled.take_turn(Instant::now()) {
            std::thread::sleep(PAUSE);
            continue;
        }
        let (lane, phase) = (&dialled.lane, *lock(&shared.phase));
        let attempt = ask(lane.target(), PATIENCE);
        if !is_as_expected(lane.expect, &attempt.result) {
            shared.counters.errors.fetch_add(1, Ordering::Relaxed);
        }
        shared.counters.connections.fetch_add(1, Ordering::Relaxed);
        lock(&dialled.tally).record(phase, &attempt);
        std::thread::sleep(PAUSE);
    }
}

fn is_as_expected(expect: Expect, result: &Result<String, Failure>) -> bool {
    match expect {
        Expect::Answer => result.is_ok(),
        Expect::Refusal => *result == Err(Failure::Refused),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::frontends::PortKey;
    use sluice_dataplane::net::Protocol;
    use sluice_dataplane::table::{FrontendKind, ServiceName};

    #[test]
    fn attempts_are_counted_by_pod_and_by_phase() {
        let attempt = |result: Result<&str, Failure>| Attempt {
            result: result.map(str::to_owned),
            latency: Duration::from_micros(250),
        };
        let mut tally = LaneTally::default();
        for pod in ["a", "b", "a"] {
            tally.record(Phase::Steady, &attempt(Ok(pod)));
        }
        tally.record(Phase::RollingUpdate, &attempt(Err(Failure::Reset)));
        assert_eq!(tally.answered["a"].len(), 2);
        assert_eq!(tally.failures, BTreeMap::from([((Phase::RollingUpdate, Failure::Reset), 1)]));
        assert_eq!(tally.connections(), 4);
    }

    #[test]
    fn lanes_from_outside_have_a_pace() {
        let port =
            PortKey { service: ServiceName::new("n", "s"), port: 80, protocol: Protocol::Tcp, name: String::new() };
        let now = Instant::now();
        for (from, again) in [(From::Pod, true), (From::Outside, false)] {
            let lane = Lane {
                port: port.clone(),
                kind: FrontendKind::NodePort,
                address: "192.168.50.1:30080".parse().unwrap(),
                from,
                expect: Expect::Answer,
                is_sticky: false,
            };
            let dialled = Dialled { lane, tally: Mutex::default(), due: Mutex::new(now) };
            assert!(dialled.take_turn(now));
            assert_eq!(dialled.take_turn(now), again, "{from:?}");
            assert!(dialled.take_turn(now + OUTSIDE_INTERVAL));
        }
    }

    #[test]
    fn a_service_without_endpoints_is_to_refuse() {
        for (expect, result, want) in [
            (Expect::Answer, Ok("a"), true),
            (Expect::Answer, Err(Failure::Refused), false),
            (Expect::Refusal, Err(Failure::Refused), true),
            (Expect::Refusal, Err(Failure::Timeout), false),
            (Expect::Refusal, Ok("a"), false),
        ] {
            assert_eq!(is_as_expected(expect, &result.map(str::to_owned)), want, "{expect:?} {result:?}");
        }
    }
}
