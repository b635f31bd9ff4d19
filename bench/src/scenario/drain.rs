//! What do clients notice of a rolling update: failed opens, resets, and connections that moved?

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use clap::Args;
use hdrhistogram::Histogram;
use serde_json::json;
use sluice_bench::netns::NetNs;
use sluice_bench::topology::Pod;
use sluice_bench::workload::new_histogram;

use super::polite::{Server, ask, connect};
use super::{CommonArgs, Failures, ModeArgs, add, at, count, named, percentiles, sum, table};
use crate::cli::parse_duration;
use crate::daemon::{Daemon, PROBE};
use crate::lab::{Lab, POD_PORT};
use crate::manifests::{Condition, Endpoint, ready};
use crate::progress::Line;

/// Bound on connecting and on each answer.
const TIMEOUT: Duration = Duration::from_secs(5);
/// Pause of a kept connection between two requests.
const PAUSE: Duration = Duration::from_millis(5);

#[derive(Debug, Args)]
pub(crate) struct DrainArgs {
    #[command(flatten)]
    common: CommonArgs,
    #[command(flatten)]
    mode: ModeArgs,
    /// Pods of the Deployment: each is replaced, one at a time.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=60))]
    pods: u8,
    /// Clients that open one connection after another.
    #[arg(long, default_value_t = 4)]
    opening: usize,
    /// Connections that are kept, with a request every 5 ms; a client opens another when a server has said goodbye.
    #[arg(long, default_value_t = 32)]
    kept: usize,
    /// Between the moment a Pod is said to terminate and the one in which its server stops listening: a preStop hook.
    /// Without one, the Pod's kernel resets what it has accepted and the server has not: no data plane can help that.
    #[arg(long, default_value = "0s", value_parser = parse_duration)]
    pre_stop: Duration,
    /// Between that and the end of the Pod.
    #[arg(long, default_value = "1s", value_parser = parse_duration)]
    grace: Duration,
}

/// Measures; whether there were no errors.
pub(crate) fn run(arguments: &DrainArgs) -> Result<bool> {
    ensure!(arguments.opening + arguments.kept > 0, "--opening, --kept: use more than 0 clients");
    let mode = arguments.mode.mode();
    let lab = Lab::bare()?;
    let mut update = Update { lab: &lab, pods: Vec::new(), made: 0 };
    for _ in 0..arguments.pods {
        update.add_pod()?;
    }
    let (program, target) = (arguments.common.program()?, lab.service(mode));
    let daemon = Daemon::start_with(&lab, &program, None, &update.endpoints(None), || {
        lab.client(mode).run(|| Ok(connect(target, PROBE).and_then(|stream| ask(&stream)).map(drop)))
    })?;
    let clients = Clients { ns: lab.client(mode), target, phase: AtomicU64::new(CALM) };
    let (mut tally, lasted) = thread::scope(|scope| -> Result<(Tally, Duration)> {
        let opening = (0..arguments.opening).map(|_| scope.spawn(|| clients.open_over_and_over()));
        let kept = (0..arguments.kept).map(|_| scope.spawn(|| clients.keep()));
        let running: Vec<_> = opening.chain(kept).collect();
        let updated = update.roll(&daemon, arguments, &clients.phase);
        clients.phase.store(OVER, Relaxed);
        let mut sum = Tally::new();
        for thread in running {
            sum.merge(&thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?);
        }
        Ok((sum, updated?))
    })?;
    tally.resets = tally.kept_failures.remove("reset").unwrap_or(0);
    if arguments.common.json {
        println!("{}", tally.to_json(arguments, lasted));
    } else {
        tally.print(arguments, lasted);
    }
    Ok(sum(&tally.open_failures) + sum(&tally.kept_failures) + tally.resets == 0)
}

const CALM: u64 = 0;
const ROLLING: u64 = 1;
const OVER: u64 = 2;

/// The Deployment.
struct Update<'a> {
    lab: &'a Lab,
    pods: Vec<(Pod, Server)>,
    made: u8,
}

impl Update<'_> {
    fn add_pod(&mut self) -> Result<()> {
        self.made += 1;
        let pod = self.lab.add_pod(self.made)?;
        let server = Server::start(&pod.ns, self.made, POD_PORT)?;
        self.pods.push((pod, server));
        Ok(())
    }

    fn endpoints(&self, leaving: Option<IpAddr>) -> Vec<Endpoint> {
        let addresses = self.pods.iter().filter_map(|(pod, _)| pod.addresses.first().copied());
        let mut endpoints = ready(addresses);
        for (address, condition) in &mut endpoints {
            if Some(*address) == leaving {
                *condition = Condition::Terminating;
            }
        }
        endpoints
    }

    /// Replaces every Pod; how long that took.
    fn roll(&mut self, daemon: &Daemon, arguments: &DrainArgs, phase: &AtomicU64) -> Result<Duration> {
        let mut line = Line::new();
        thread::sleep(Duration::from_secs(1));
        phase.store(ROLLING, Relaxed);
        let begun = Instant::now();
        for number in 1..=arguments.pods {
            line.say(&format!("replacing Pod {number} of {}", arguments.pods));
            self.add_pod()?;
            daemon.set_endpoints(&self.endpoints(None))?;
            // As its readiness does: a Pod is replaced only after its successor is known.
            thread::sleep(Duration::from_millis(200));
            daemon.set_endpoints(&self.endpoints(self.pods[0].0.addresses.first().copied()))?;
            thread::sleep(arguments.pre_stop);
            self.pods[0].1.finish();
            thread::sleep(arguments.grace);
            let (pod, server) = self.pods.remove(0);
            drop(server);
            daemon.set_endpoints(&self.endpoints(None))?;
            self.lab.topology.remove_pod(&pod.name)?;
        }
        let lasted = begun.elapsed();
        thread::sleep(Duration::from_millis(500));
        line.clear();
        Ok(lasted)
    }
}

struct Clients<'a> {
    ns: &'a NetNs,
    target: SocketAddr,
    phase: AtomicU64,
}

impl Clients<'_> {
    fn open_over_and_over(&self) -> Result<Tally> {
        self.ns.enter()?;
        let mut tally = Tally::new();
        loop {
            let (phase, begun) = (self.phase.load(Relaxed), Instant::now());
            if phase == OVER {
                return Ok(tally);
            }
            match connect(self.target, TIMEOUT).and_then(|stream| ask(&stream)) {
                Ok(_) => {
                    let nanos = begun.elapsed().as_nanos().try_into().unwrap_or(u64::MAX);
                    tally.opens[usize::from(phase == ROLLING)].saturating_record(nanos);
                }
                Err(failure) => count(&mut tally.open_failures, failure),
            }
            thread::sleep(Duration::from_millis(1));
        }
    }

    fn keep(&self) -> Result<Tally> {
        self.ns.enter()?;
        let mut tally = Tally::new();
        let mut earlier = None;
        'open: while self.phase.load(Relaxed) != OVER {
            let stream = match connect(self.target, TIMEOUT) {
                Ok(stream) => stream,
                Err(failure) => {
                    count(&mut tally.open_failures, failure);
                    thread::sleep(PAUSE);
                    continue;
                }
            };
            while self.phase.load(Relaxed) != OVER {
                match ask(&stream) {
                    Ok(answer) => {
                        tally.requests += 1;
                        tally.moved += u64::from(earlier.take().is_some_and(|pod: u8| pod != answer.pod));
                        if answer.last {
                            earlier = Some(answer.pod);
                            continue 'open;
                        }
                    }
                    Err(failure) => {
                        count(&mut tally.kept_failures, failure);
                        thread::sleep(PAUSE);
                        continue 'open;
                    }
                }
                thread::sleep(PAUSE);
            }
        }
        Ok(tally)
    }
}

/// What clients noticed.
struct Tally {
    /// Before the update, and during it, in nanoseconds.
    opens: [Histogram<u64>; 2],
    open_failures: Failures,
    requests: u64,
    kept_failures: Failures,
    resets: u64,
    /// Kept connections whose server said goodbye, and whose successor another Pod answered.
    moved: u64,
}

impl Tally {
    fn new() -> Self {
        Self {
            opens: [new_histogram(), new_histogram()],
            open_failures: Failures::new(),
            requests: 0,
            kept_failures: Failures::new(),
            resets: 0,
            moved: 0,
        }
    }

    fn merge(&mut self, other: &Self) {
        for (own, more) in self.opens.iter_mut().zip(&other.opens) {
            own.add(more).expect("all histograms have the same bounds");
        }
        add(&mut self.open_failures, &other.open_failures);
        add(&mut self.kept_failures, &other.kept_failures);
        self.requests += other.requests;
        self.moved += other.moved;
    }

    fn to_json(&self, arguments: &DrainArgs, lasted: Duration) -> serde_json::Value {
        json!({
            "workload": "drain", "podsReplaced": arguments.pods, "seconds": lasted.as_secs_f64(),
            "opens": {
                "beforeMicroseconds": percentiles(&self.opens[0]), "duringMicroseconds": percentiles(&self.opens[1]),
                "failures": self.open_failures,
            },
            "kept": {
                "connections": arguments.kept, "requests": self.requests, "moved": self.moved, "resets": self.resets,
                "failures": self.kept_failures,
            },
        })
    }

    fn print(&self, arguments: &DrainArgs, lasted: Duration) {
        println!("{} Pods replaced in {:.1} s", arguments.pods, lasted.as_secs_f64());
        let row = |name: &str, latency: &Histogram<u64>| {
            let times = [50.0, 99.0, 99.9, 100.0].map(|percentile| at(latency, percentile));
            [vec![name.to_owned(), latency.len().to_string()], times.to_vec()].concat()
        };
        let rows = vec![row("before", &self.opens[0]), row("during", &self.opens[1])];
        println!("{}", table(&["opens", "answered", "p50", "p99", "p99.9", "max"], rows));
        println!("failed opens: {}", named(&self.open_failures));
        println!(
            "{} kept connections: {} requests, {} moved, {} resets, other errors: {}",
            arguments.kept,
            self.requests,
            self.moved,
            self.resets,
            named(&self.kept_failures)
        );
    }
}
