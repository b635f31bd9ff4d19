//! Reports as one HTML file: tables and charts, nothing loaded from elsewhere.

use std::fmt::Write as _;

use hdrhistogram::Histogram;
use sluice_bench::workload::{Outcome, Plan, Sample, Workload};

use super::chart::{Bar, Line, Scale, bars, colour, escape, lines};
use super::report::{Host, ModeReport, Report, Summary};
use super::{Cell, show};
use crate::progress::{micros, number};

const STYLE: &str = "
body{font:15px/1.5 system-ui,sans-serif;max-width:56rem;margin:2rem auto;padding:0 1rem;color:#1f2937;background:#fff}
table{border-collapse:collapse;width:100%;font-size:14px}th,td{padding:.2rem .6rem;text-align:right;border-bottom:1px solid #e5e7eb}
th:first-child,td:first-child{text-align:left}code{font-size:13px}h3{margin:1rem 0 .2rem;font-size:15px}
svg{width:100%;font:11px system-ui,sans-serif;fill:#374151}.grid{stroke:#e5e7eb}.bound{stroke:#111827;stroke-width:2}
.mark{stroke:#b91c1c;stroke-dasharray:4 3}.noisy{color:#b91c1c;font-weight:600}
@media(prefers-color-scheme:dark){body{color:#e5e7eb;background:#111827}svg{fill:#d1d5db}.grid,th,td{stroke:#374151;border-color:#374151}.bound{stroke:#f9fafb}}";

/// Percentiles up to this one are drawn.
const LAST_PERCENTILE: f64 = 99.99;

/// The report of one load.
pub(crate) fn load_page(plan: &Plan, outcome: &Outcome) -> String {
    let (workload, unit) = (plan.workload.as_str(), plan.workload.unit());
    let mut html = head(workload, &Host::here());
    let cpu = outcome.cpu.user_us + outcome.cpu.system_us;
    let each = if plan.workload == Workload::Bulk { "MB" } else { "request" };
    html += &format!(
        "<p>{} {unit}, {} errors, {} overdue at the end; own CPU a {each} {cpu:.1} µs</p>",
        number(outcome.rate),
        outcome.failed(),
        outcome.overdue
    );
    for (kind, count) in &outcome.failures {
        html += &format!("<p class='noisy'>{count} {}</p>", escape(kind));
    }
    let series = |of: fn(&Sample) -> f64| {
        let points = outcome.samples.iter().map(|sample| (sample.at, of(sample))).collect();
        lines(&[Line { name: workload, points, colour: colour(1) }], &Scale::Linear, &Scale::Linear, "s")
    };
    if plan.workload != Workload::Bulk {
        html +=
            &format!("<h3>latency by percentile</h3>{}", percentile_curve(&[(workload.to_owned(), &outcome.latency)]));
        html += &format!("<h3>mean latency over time, µs</h3>{}", series(|sample| sample.mean_us));
    }
    html + &format!("<h3>{unit} over time, warm-up included</h3>{}</html>\n", series(|sample| sample.rate))
}

fn head(what: &str, host: &Host) -> String {
    format!(
        "<!doctype html><html lang='en'><meta charset='utf-8'><meta name='viewport' content='width=device-width'>\
         <title>sluice-bench {what}</title><style>{STYLE}</style><h1>sluice-bench {what}</h1>\
         <p>sluice-bench {}, Linux {}, {} × {}<br><code>{}</code></p>",
        escape(host.version),
        escape(&host.kernel),
        host.cores,
        escape(&host.processor),
        escape(&host.command)
    )
}

pub(super) fn page(report: &Report) -> String {
    let mut html = head("compare", &report.host);
    html += "<p>Peers take turns, round by round, each in network namespaces of its own. A ratio is to the mean of both \
             direct measurements of the same round; the thin line is the interval in which its true median lies.</p>";
    for mode in &report.modes {
        mode_section(&mut html, mode);
    }
    html + "</html>\n"
}

fn mode_section(html: &mut String, mode: &ModeReport) {
    *html += &format!("<h2>{}</h2>", escape(mode.mode.as_str()));
    for (peer, why) in &mode.left_out {
        *html += &format!("<p>{} is left out: {}</p>", escape(peer), escape(why));
    }
    for summary in &mode.workloads {
        *html += &format!("<h3>{}</h3>{}", escape(&summary.heading()), table(summary));
        let class = if summary.conclusive { "" } else { "noisy" };
        *html += &format!("<p class='{class}'>{}</p>", escape(&summary.noise()));
        for text in summary.rows.iter().filter_map(|row| summary.compared_to_plain(row)) {
            *html += &format!("<p>{}</p>", escape(&text));
        }
        *html += &ratios(summary);
        if !summary.is_bulk() {
            let latencies: Vec<_> = summary.rows.iter().map(|row| (row.peer.to_string(), &row.latency)).collect();
            *html += &format!("<h3>latency by percentile</h3>{}", percentile_curve(&latencies));
        }
        if summary.cell != Cell::Latency {
            *html += &format!("<h3>rate over time, all rounds</h3>{}", time_series(summary));
        }
    }
}

fn table(summary: &Summary) -> String {
    let each = if summary.is_bulk() { "MB" } else { "request" };
    let mut html = format!(
        "<table><tr><th>peer<th>median<th>min – max<th>to direct<th>p50<th>p99<th>tool CPU a {each}<th>peer CPU<th>interrupts<th>all CPU (direct's part)\
         <th>errors"
    );
    for row in &summary.rows {
        let latency = |name: &str| row.latency_us.get(name).map_or("–".to_owned(), |us| micros(*us));
        let written = write!(
            html,
            "<tr><td>{}<td>{}<td>{} – {}<td>{:.2} [{:.2} – {:.2}]<td>{}<td>{}<td>{:.1} µs<td>{:.1} µs<td>{:.1} µs<td>{:.1} µs ({:.2})<td>{}",
            row.peer,
            show(summary.cell, row.value.median),
            show(summary.cell, row.value.min),
            show(summary.cell, row.value.max),
            row.ratio.median,
            row.ratio.low,
            row.ratio.high,
            latency("p50"),
            latency("p99"),
            row.tool_user_us + row.tool_system_us,
            row.peer_cpu_us,
            row.interrupt_cpu_us,
            row.all_cpu_us,
            summary.part_of_direct(row),
            row.failures.values().sum::<u64>()
        );
        written.expect("writing to a string cannot fail");
    }
    html + "</table>"
}

fn ratios(summary: &Summary) -> String {
    let names: Vec<String> = summary.rows.iter().map(|row| row.peer.to_string()).collect();
    let data: Vec<Bar<'_>> = summary
        .rows
        .iter()
        .zip(&names)
        .enumerate()
        .map(|(position, (row, name))| Bar {
            name,
            value: row.ratio.median,
            low: row.ratio.low,
            high: row.ratio.high,
            colour: colour(position),
        })
        .collect();
    bars(&data, 1.0)
}

/// Where a percentile is drawn: every nine more takes as much room.
fn nines(percentile: f64) -> f64 {
    -(1.0 - percentile / 100.0).log10()
}

fn percentile_curve(latencies: &[(String, &Histogram<u64>)]) -> String {
    let curve = |latency: &Histogram<u64>| {
        (0..=80)
            .map(|step| nines(LAST_PERCENTILE) * f64::from(step) / 80.0)
            .map(|at| (at, latency.value_at_percentile(100.0 - 100.0 * 10_f64.powf(-at)) as f64 / 1000.0))
            .collect()
    };
    let marks = [0.0, 50.0, 90.0, 99.0, 99.9, 99.99].map(|p| (nines(p), format!("p{p}"))).to_vec();
    let line = |(position, (name, latency))| Line { name, points: curve(latency), colour: colour(position) };
    let numbered = latencies.iter().map(|(name, latency)| (name.as_str(), *latency)).enumerate();
    let data: Vec<Line<'_>> = numbered.map(line).collect();
    lines(&data, &Scale::Marks(marks), &Scale::Logarithmic, "µs")
}

fn time_series(summary: &Summary) -> String {
    let names: Vec<String> = summary.rows.iter().map(|row| row.peer.to_string()).collect();
    let data: Vec<Line<'_>> = summary
        .rows
        .iter()
        .zip(&names)
        .enumerate()
        .map(|(position, (row, name))| {
            let samples = row.series.iter().flatten().enumerate();
            Line {
                name,
                points: samples.map(|(at, rate)| (at as f64 / 10.0, *rate)).collect(),
                colour: colour(position),
            }
        })
        .collect();
    lines(&data, &Scale::Linear, &Scale::Linear, "s")
}
