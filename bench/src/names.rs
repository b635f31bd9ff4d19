//! `sluice-bench dns`: questions to any name server.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, ensure};
use clap::Args;
use serde_json::{Value, json};
use sluice_bench::workload::dns::{self, Codes, DnsPlan};
use sluice_bench::workload::questions::{Mix, generated, listed, name_of};
use sluice_bench::workload::{Outcome, Plan, Workload, cores};

use crate::cli::{parse_duration, resolve};
use crate::progress::{Line, micros, number, to_json};

#[derive(Debug, Args)]
pub(crate) struct DnsArgs {
    /// Whom to ask, IP:PORT; several are asked in turn, a socket each.
    #[arg(long, required = true)]
    target: Vec<String>,
    #[command(flatten)]
    what: WhatArgs,
    /// Sockets.
    #[arg(long, default_value_t = 8)]
    sockets: usize,
    /// Questions that may be open at a time on each socket.
    #[arg(long, default_value_t = 8)]
    open: usize,
    /// Threads that share the sockets [default: one a core].
    #[arg(long)]
    threads: Option<usize>,
    /// Questions a second, each asked when it is due, its latency counted from then (open loop). Without it the next one is
    /// asked when one is answered (closed loop).
    #[arg(long)]
    rate: Option<f64>,
    /// How long is measured, e.g. 10s.
    #[arg(long, default_value = "10s", value_parser = parse_duration)]
    duration: Duration,
    /// Load before that.
    #[arg(long, default_value = "1s", value_parser = parse_duration)]
    warmup: Duration,
    /// An answer that comes later is none.
    #[arg(long, default_value = "2s", value_parser = parse_duration)]
    timeout: Duration,
    /// Print the result as one JSON object.
    #[arg(long)]
    json: bool,
}

/// What is asked.
#[derive(Debug, Args)]
struct WhatArgs {
    /// Questions of a file, NAME TYPE [CODE] a line: dnsperf's form, and the code of the answer.
    #[arg(long, conflicts_with_all = ["services", "mix"])]
    names: Option<PathBuf>,
    /// Else questions for so many Services `other-N` of the namespace `default`, of which each fifth is headless.
    #[arg(long, default_value_t = 1000)]
    services: usize,
    /// Shares of the kinds of those questions [default: a=40,aaaa=20,srv=5,headless=15,nxdomain=20].
    #[arg(long)]
    mix: Option<Mix>,
    /// Zone of those Services.
    #[arg(long, default_value = "cluster.local")]
    zone: String,
    /// What questions say of sizes, by EDNS [default: nothing].
    #[arg(long, value_name = "BYTES")]
    edns: Option<u16>,
}

impl DnsArgs {
    fn plan(&self) -> Result<DnsPlan> {
        let targets = self.target.iter().map(|target| resolve(target)).collect::<Result<Vec<SocketAddr>>>()?;
        let what = &self.what;
        let questions = match &what.names {
            Some(file) => listed(file, what.edns)?,
            None => generated(what.services, &what.zone, what.mix.unwrap_or_default(), what.edns, 1)?,
        };
        ensure!(self.sockets >= targets.len(), "--sockets: each target needs one");
        let load = Plan {
            connections: self.sockets,
            threads: self.threads.unwrap_or_else(cores),
            rate: self.rate,
            duration: self.duration,
            warmup: self.warmup,
            timeout: self.timeout,
            ..Plan::new(Workload::Rr, targets)
        };
        Ok(DnsPlan { load, open: self.open, questions })
    }
}

/// Asks; whether all answers came and were right.
pub(crate) fn run(arguments: &DnsArgs) -> Result<bool> {
    let plan = arguments.plan()?;
    let mut line = Line::new();
    let (outcome, codes) = dns::run(None, &plan, |sample| line.sample("", Workload::Rr, sample))?;
    line.clear();
    if arguments.json {
        println!("{}", json(&plan, &outcome, &codes));
    } else {
        print(&plan, &outcome, &codes);
    }
    Ok(outcome.failed() == 0 && codes.unexpected == 0)
}

fn print(plan: &DnsPlan, outcome: &Outcome, codes: &Codes) {
    let offered = plan.load.rate.map(|rate| format!(" of {} offered", number(rate))).unwrap_or_default();
    println!("{} questions/s{offered}", number(outcome.rate));
    let Plan { connections, threads, duration, .. } = plan.load;
    println!("{connections} sockets, {} open on each, {threads} threads, {:.1} s", plan.open, duration.as_secs_f64());
    let at = |percentile| micros(outcome.latency_us(percentile));
    let [p50, p90, p99, p999, max] = [50.0, 90.0, 99.0, 99.9, 100.0].map(at);
    println!("latency p50 {p50} p90 {p90} p99 {p99} p99.9 {p999} max {max}");
    let answers: Vec<String> = by_code(codes).map(|(code, count)| format!("{count} {code}")).collect();
    println!("answers: {}", answers.join(", "));
    for (count, what) in [
        (codes.truncated, "said that there is more"),
        (codes.unexpected, "had another code than is right"),
        (codes.late, "came too late or twice"),
    ] {
        if count > 0 {
            println!("of these {count} {what}");
        }
    }
    println!("own CPU a question: {:.2} µs + {:.2} µs in the kernel", outcome.cpu.user_us, outcome.cpu.system_us);
    if outcome.overdue > 0 {
        println!("overdue at the end: {}", outcome.overdue);
    }
    for (failure, count) in &outcome.failures {
        println!("errors: {count} {failure}");
    }
}

fn by_code(codes: &Codes) -> impl Iterator<Item = (String, u64)> {
    (0_u8..).zip(codes.answers).filter(|(_, count)| *count > 0).map(|(code, count)| (name_of(code), count))
}

fn json(plan: &DnsPlan, outcome: &Outcome, codes: &Codes) -> Value {
    let mut report = to_json(&plan.load, outcome);
    (report["workload"], report["unit"]) = (json!("dns"), json!("questions/s"));
    report["plan"]["open"] = json!(plan.open);
    report["codes"] = by_code(codes).map(|(code, count)| (code, json!(count))).collect();
    report["truncated"] = json!(codes.truncated);
    report["unexpectedCodes"] = json!(codes.unexpected);
    report["late"] = json!(codes.late);
    report
}
