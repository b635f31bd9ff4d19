//! What does the user see while a load runs and when it is over.

use std::io::{IsTerminal as _, Write as _};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use sluice_bench::workload::{Outcome, Plan, Sample, Workload};

const INTERVAL: Duration = Duration::from_millis(250);

/// A line on a terminal that is written over; nothing elsewhere.
pub(crate) struct Line {
    on: bool,
    last: Instant,
    failures: u64,
}

impl Line {
    pub(crate) fn new() -> Self {
        Self { on: std::io::stderr().is_terminal(), last: Instant::now(), failures: 0 }
    }

    pub(crate) fn sample(&mut self, prefix: &str, workload: Workload, sample: &Sample) {
        self.failures += sample.failures;
        if self.on && self.last.elapsed() >= INTERVAL {
            self.last = Instant::now();
            let phase = if sample.measured { "" } else { " (warm-up)" };
            let latency = match workload {
                Workload::Bulk => String::new(),
                Workload::Cps | Workload::Rr => format!(", mean {}", micros(sample.mean_us)),
            };
            eprint!(
                "\r\x1b[K{prefix}{:.1} s{phase}: {} {}{latency}, {} errors",
                sample.at,
                number(sample.rate),
                workload.unit(),
                self.failures
            );
            // A terminal that is gone is no reason to stop measuring.
            drop(std::io::stderr().flush());
        }
    }

    /// What is being done, on a terminal.
    pub(crate) fn doing(&mut self, text: &str) {
        if self.on {
            eprint!("\r\x1b[K{text}");
            drop(std::io::stderr().flush());
        }
    }

    /// Text in the place of the line, on a terminal; elsewhere a line of its own.
    pub(crate) fn say(&mut self, text: &str) {
        self.clear();
        eprintln!("{text}");
    }

    pub(crate) fn clear(&self) {
        if self.on {
            eprint!("\r\x1b[K");
        }
    }
}

/// The result of one load for people.
pub(crate) fn print(plan: &Plan, outcome: &Outcome) {
    let unit = plan.workload.unit();
    match plan.rate {
        Some(rate) => println!("{} {unit} of {} offered", number(outcome.rate), number(rate)),
        None => println!("{} {unit}", number(outcome.rate)),
    }
    let Plan { connections, threads, duration, .. } = plan;
    match plan.workload {
        Workload::Bulk => {
            let checked = if outcome.failed() == 0 { ", all data as expected" } else { "" };
            println!("{connections} streams, {:.1} s{checked}", duration.as_secs_f64());
        }
        Workload::Cps | Workload::Rr => {
            println!("{connections} connections, {threads} threads, {:.1} s", duration.as_secs_f64());
            let at = |percentile| micros(outcome.latency_us(percentile));
            println!(
                "latency p50 {} p90 {} p99 {} p99.9 {} p99.99 {} max {}",
                at(50.0),
                at(90.0),
                at(99.0),
                at(99.9),
                at(99.99),
                at(100.0)
            );
        }
    }
    let each = if plan.workload == Workload::Bulk { "MB" } else { "request" };
    let cpu = outcome.cpu;
    println!("own CPU a {each}: {:.2} µs + {:.2} µs in the kernel", cpu.user_us, cpu.system_us);
    if outcome.overdue > 0 {
        println!("overdue at the end: {}", outcome.overdue);
    }
    for (failure, count) in &outcome.failures {
        println!("errors: {count} {failure}");
    }
}

/// The result of one load for programs.
pub(crate) fn to_json(plan: &Plan, outcome: &Outcome) -> Value {
    let percentiles: serde_json::Map<String, Value> = PERCENTILES
        .iter()
        .map(|percentile| (format!("p{percentile}"), json!(outcome.latency_us(*percentile))))
        .collect();
    let mut latency = Value::Object(percentiles);
    latency["mean"] = json!(outcome.latency.mean() / 1000.0);
    latency["max"] = json!(outcome.latency.max() as f64 / 1000.0);
    json!({
        "workload": plan.workload, "unit": plan.workload.unit(), "plan": plan, "result": outcome,
        "latencyMicroseconds": if plan.workload == Workload::Bulk { Value::Null } else { latency },
    })
}

/// Percentiles that reports name.
pub(crate) const PERCENTILES: [f64; 6] = [50.0, 90.0, 95.0, 99.0, 99.9, 99.99];

/// Three digits or so.
pub(crate) fn number(value: f64) -> String {
    match value {
        v if v >= 100_000.0 => format!("{:.0}k", v / 1000.0),
        v if v >= 10_000.0 => format!("{:.1}k", v / 1000.0),
        v if v >= 100.0 => format!("{v:.0}"),
        v => format!("{v:.2}"),
    }
}

/// A time given in microseconds.
pub(crate) fn micros(value: f64) -> String {
    match value {
        v if v >= 1e6 => format!("{:.2} s", v / 1e6),
        v if v >= 1e4 => format!("{:.1} ms", v / 1e3),
        v if v >= 1e3 => format!("{:.2} ms", v / 1e3),
        v => format!("{v:.0} µs"),
    }
}
