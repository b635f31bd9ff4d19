//! How does load fare while the routing table changes many times a second?

use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use clap::Args;
use serde_json::json;
use sluice_bench::workload::{self, Outcome, Plan, Workload, cores, new_histogram};

use super::{CommonArgs, Failures, ModeArgs, add, at, named, percentiles, sum, table};
use crate::cli::parse_duration;
use crate::compare::stats::Figure;
use crate::daemon::Daemon;
use crate::lab::Lab;
use crate::manifests::{Others, ready};
use crate::progress::{Line, number};

/// So many of the other Services change.
const LOOSE: usize = 16;

#[derive(Debug, Args)]
pub(crate) struct ChurnArgs {
    #[command(flatten)]
    common: CommonArgs,
    #[command(flatten)]
    mode: ModeArgs,
    /// Changes a second: every other one takes a Pod out of the Service that is dialled, or puts it back, the rest give
    /// another Service other endpoints.
    #[arg(long, default_value_t = 50.0)]
    changes: f64,
    /// cps or rr.
    #[arg(long, default_value = "cps")]
    workload: Workload,
    /// Requests a second (open loop), as for `cps` and `rr`.
    #[arg(long)]
    rate: Option<f64>,
    /// Connections at a time.
    #[arg(long, default_value_t = 32)]
    connections: usize,
    /// Other Services.
    #[arg(long, default_value_t = 1000)]
    services: usize,
    /// How often both are measured: without changes, and with.
    #[arg(long, default_value_t = 3)]
    rounds: u32,
    /// How long each is measured each time.
    #[arg(long, default_value = "3", value_parser = parse_duration)]
    seconds: Duration,
    /// Pods behind the Service that is dialled.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(2..=200))]
    pods: u8,
}

/// Measures; whether there were no errors.
pub(crate) fn run(arguments: &ChurnArgs) -> Result<bool> {
    ensure!(arguments.workload != Workload::Bulk, "--workload: use cps or rr");
    ensure!(arguments.changes > 0.0 && arguments.changes <= 10_000.0, "--changes: use a number above 0, at most 10000");
    ensure!(arguments.services > 0 && arguments.rounds > 0, "--services, --rounds: use more than 0");
    let mode = arguments.mode.mode();
    let lab = Lab::new(arguments.pods)?;
    let services = arguments.services;
    let others = Others { services, endpoints: 5 * services, loose: services.min(LOOSE), ..Others::default() };
    let daemon = Daemon::start(&lab, &arguments.common.program()?, Some(&others), mode)?;
    let plan = Plan {
        connections: arguments.connections,
        threads: cores(),
        rate: arguments.rate,
        warmup: Duration::from_millis(200),
        duration: arguments.seconds,
        ..Plan::new(arguments.workload, vec![lab.service(mode)])
    };
    let changer = Changer { daemon: &daemon, others: &others, pods: lab.endpoints().iter().map(|e| e.ip()).collect() };
    let (mut line, mut calm, mut changing) = (Line::new(), Row::new(), Row::new());
    let (mut made, mut tables) = (0, 0);
    for round in 1..=arguments.rounds {
        let prefix = |what| format!("round {round}/{} {what}, ", arguments.rounds);
        let quiet = prefix("without changes");
        calm.add(workload::run(Some(lab.client(mode)), &plan, |sample| line.sample(&quiet, plan.workload, sample))?);
        let (before, stop, loud) = (daemon.generation(&lab)?, AtomicBool::new(false), prefix("with changes"));
        let outcome = thread::scope(|scope| {
            let changes = scope.spawn(|| changer.change(arguments.changes, &stop));
            let outcome = workload::run(Some(lab.client(mode)), &plan, |s| line.sample(&loud, plan.workload, s));
            stop.store(true, Relaxed);
            made += changes.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            outcome
        })?;
        changing.add(outcome);
        thread::sleep(Duration::from_millis(200));
        tables += daemon.generation(&lab)? - before;
    }
    line.clear();
    ensure!(tables > 0, "the daemon took none of {made} changes\n{}", daemon.log());
    let measured = f64::from(arguments.rounds) * (plan.warmup + plan.duration).as_secs_f64();
    let ratio = changing.rate() / calm.rate();
    if arguments.common.json {
        let row = |row: &Row| {
            json!({"rate": row.rate(), "rates": row.rates, "latencyMicroseconds": percentiles(&row.latency),
                "failures": row.failures, "overdue": row.overdue})
        };
        let report = json!({
            "workload": "churn", "load": plan.workload, "plan": plan, "services": arguments.services + 1, "ratio": ratio,
            "changes": made, "tables": tables, "changesPerSecond": made as f64 / measured,
            "without": row(&calm), "with": row(&changing),
        });
        println!("{report}");
    } else {
        let row = |name: &str, row: &Row| {
            let latency = [50.0, 99.0, 99.9, 100.0].map(|percentile| at(&row.latency, percentile));
            [vec![name.to_owned(), number(row.rate())], latency.to_vec(), vec![named(&row.failures)]].concat()
        };
        let header = ["changes", plan.workload.unit(), "p50", "p99", "p99.9", "max", "errors"];
        let rate = format!("{} a second", number(made as f64 / measured));
        println!("{}", table(&header, vec![row("none", &calm), row(&rate, &changing)]));
        println!("{made} changes, of which the daemon made {tables} tables; rate with changes to without: {ratio:.2}");
    }
    Ok(sum(&calm.failures) + sum(&changing.failures) == 0)
}

struct Changer<'a> {
    daemon: &'a Daemon,
    others: &'a Others,
    pods: Vec<IpAddr>,
}

impl Changer<'_> {
    /// Makes changes until it is stopped, and puts all Pods back; how many there were.
    fn change(&self, rate: f64, stop: &AtomicBool) -> Result<u64> {
        let begun = Instant::now();
        let mut made: u64 = 0;
        while !stop.load(Relaxed) {
            let turn = (made / 2) as usize;
            if made.is_multiple_of(2) {
                // Each Pod goes in turn, and comes back before the next goes.
                let gone = turn.is_multiple_of(2).then_some(turn / 2 % self.pods.len());
                let present = self.pods.iter().enumerate().filter(|(index, _)| Some(*index) != gone);
                self.daemon.set_endpoints(&ready(present.map(|(_, pod)| *pod)))?;
            } else {
                let (name, slice) = self.others.loose_file(turn % self.others.loose, 1_000_000 + turn);
                self.daemon.write(&name, &slice)?;
            }
            made += 1;
            let due = begun + Duration::from_secs_f64(made as f64 / rate);
            thread::sleep(due.saturating_duration_since(Instant::now()));
        }
        self.daemon.set_endpoints(&ready(self.pods.iter().copied()))?;
        Ok(made)
    }
}

/// All rounds of one of the two.
struct Row {
    rates: Vec<f64>,
    latency: hdrhistogram::Histogram<u64>,
    failures: Failures,
    overdue: u64,
}

impl Row {
    fn new() -> Self {
        Self { rates: Vec::new(), latency: new_histogram(), failures: Failures::new(), overdue: 0 }
    }

    fn add(&mut self, outcome: Outcome) {
        self.rates.push(outcome.rate);
        self.latency.add(&outcome.latency).expect("all histograms have the same bounds");
        add(&mut self.failures, &outcome.failures);
        self.overdue += outcome.overdue;
    }

    fn rate(&self) -> f64 {
        Figure::of(self.rates.clone()).map_or(f64::NAN, |figure| figure.median)
    }
}
