//! What is said of name servers that were compared.

use serde_json::{Value, json};

use super::{DnsCompareArgs, Measured, Paced};
use crate::compare::stats::Figure;
use crate::progress::{micros, number};
use crate::scenario::{at, percentiles, table};

/// For people.
pub(super) fn print(measured: &[Measured]) {
    let header = [
        "",
        "questions/s on a core",
        "CPU each",
        "resident",
        "ready after",
        "changes: p50",
        "p99",
        "max",
        "wrong answers",
        "lost",
    ];
    println!("{}", table(&header, measured.iter().map(row).collect()));
    let header = ["", "questions/s", "p50", "p99", "p99 by round", "max", "missed"];
    let paced = measured.iter().flat_map(|it| it.paced.iter().map(|paced| paced_row(it.name, paced)));
    println!("\n{}", table(&header, paced.collect()));
    if let [sluice, coredns, ..] = measured {
        let rate = sluice.median_rate() / coredns.median_rate();
        let memory = sluice.memory as f64 / coredns.memory as f64;
        println!("\nSluice answers {rate:.1} times as many on a core, with {memory:.2} of the memory.");
    }
}

fn row(it: &Measured) -> Vec<String> {
    let changes = |percentile| at(&it.changes, percentile);
    let is_measured = !it.rate.is_empty();
    let when = |text: String| if is_measured { text } else { "-".to_owned() };
    vec![
        it.name.to_owned(),
        spread(&it.rate, number),
        spread(&it.cpu, |micros| format!("{micros:.2} µs")),
        when(format!("{} MiB", it.memory >> 20)),
        format!("{:.1} s", it.ready_after.as_secs_f64()),
        changes(50.0),
        changes(99.0),
        changes(100.0),
        it.unexpected.to_string(),
        it.failures.to_string(),
    ]
}

fn paced_row(name: &str, paced: &Paced) -> Vec<String> {
    vec![
        name.to_owned(),
        number(paced.rate),
        at(&paced.latency, 50.0),
        at(&paced.latency, 99.0),
        spread(&paced.p99, micros),
        at(&paced.latency, 100.0),
        paced.missed.to_string(),
    ]
}

/// Median, and the least and the most.
fn spread(rounds: &[f64], text: impl Fn(f64) -> String) -> String {
    match Figure::of(rounds.to_vec()) {
        Some(Figure { median, min, max, .. }) => format!("{} ({} to {})", text(median), text(min), text(max)),
        None => "-".to_owned(),
    }
}

/// For programs.
pub(super) fn json(arguments: &DnsCompareArgs, measured: &[Measured]) -> Value {
    let peer = |it: &Measured| {
        let paced = |paced: &Paced| {
            json!({"rate": paced.rate, "latencyMicroseconds": percentiles(&paced.latency), "p99ByRound": paced.p99,
                "missed": paced.missed})
        };
        json!({
            "name": it.name, "readySeconds": it.ready_after.as_secs_f64(), "residentBytes": it.memory,
            "questionsPerSecond": Figure::of(it.rate.clone()), "cpuMicroseconds": Figure::of(it.cpu.clone()),
            "paced": it.paced.iter().map(paced).collect::<Vec<_>>(), "changeMicroseconds": percentiles(&it.changes),
            "unseenChanges": it.unseen, "lost": it.failures, "wrongAnswers": it.unexpected,
        })
    };
    json!({
        "workload": "dns-compare", "services": arguments.services, "endpoints": arguments.endpoints,
        "peers": measured.iter().map(peer).collect::<Vec<_>>(),
    })
}
