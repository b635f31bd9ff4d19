//! What is said in the end: medians, ratios to direct with their bounds, and whether the noise allows to conclude.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use comfy_table::{CellAlignment, Table as TextTable, presets};
use hdrhistogram::Histogram;
use serde::Serialize;
use sluice_bench::workload::{Cpu, Outcome, cores, new_histogram};

use super::peer::Peer;
use super::stats::Figure;
use super::{Cell, show};
use crate::lab::Mode;
use crate::progress::{PERCENTILES, micros};

/// How far a rate may be from what it is with one Service and without other flows.
const FLAT: f64 = 0.1;
/// How far direct may typically be from itself; beyond, nothing is concluded.
const NOISE_LIMIT: f64 = 0.1;

/// One measurement of one peer.
pub(super) struct Round {
    pub(super) outcome: Outcome,
    /// What clients and servers of this program used, a request.
    pub(super) tool_cpu: Cpu,
    /// What the peer's processes used, a request, in microseconds.
    pub(super) peer_cpu_us: f64,
    /// What the kernel used in interrupts, a request, in microseconds.
    pub(super) interrupt_cpu_us: f64,
    /// Part of the machine that other programs used meanwhile.
    pub(super) others: f64,
}

impl Round {
    fn all_cpu_us(&self) -> f64 {
        self.tool_cpu.user_us + self.tool_cpu.system_us + self.peer_cpu_us + self.interrupt_cpu_us
    }
}

/// One workload, round after round.
pub(super) struct Table {
    pub(super) cell: Cell,
    latency_rate: f64,
    /// In the order in which peers were first measured; direct's second measurements are apart.
    rounds: Vec<(Peer, Vec<Round>)>,
    again: Vec<Round>,
}

impl Table {
    pub(super) fn new(cell: Cell, latency_rate: f64) -> Self {
        Self { cell, latency_rate, rounds: Vec::new(), again: Vec::new() }
    }

    pub(super) fn add(&mut self, peer: Peer, again: bool, round: Round) {
        if again {
            self.again.push(round);
        } else if let Some((_, rounds)) = self.rounds.iter_mut().find(|(known, _)| *known == peer) {
            rounds.push(round);
        } else {
            self.rounds.push((peer, vec![round]));
            self.rounds.sort_by_key(|(peer, _)| *peer != Peer::Direct);
        }
    }

    /// The latest figures in a line.
    pub(super) fn last_round(&self) -> String {
        let mut text = String::new();
        for (peer, rounds) in &self.rounds {
            let value = rounds.last().map_or(f64::NAN, |round| self.value(round));
            // Writing to a string cannot fail.
            let _ = write!(text, "{}{peer} {}", if text.is_empty() { "" } else { ", " }, show(self.cell, value));
        }
        format!("{} — {text}", self.cell.title())
    }

    fn value(&self, round: &Round) -> f64 {
        match self.cell {
            Cell::Latency => round.outcome.latency_us(50.0),
            Cell::Cps | Cell::Rr | Cell::Bulk | Cell::Streams => round.outcome.rate,
        }
    }

    fn values<'a>(&'a self, rounds: &'a [Round]) -> impl Iterator<Item = f64> + 'a {
        rounds.iter().map(|round| self.value(round))
    }

    fn summary(&self) -> Summary {
        let direct = self.rounds.iter().find(|(peer, _)| *peer == Peer::Direct).map_or(&[][..], |(_, rounds)| rounds);
        let itself = self.values(&self.again).zip(self.values(direct)).map(|(again, first)| again / first).collect();
        // What a round's ratios are to: both of its direct measurements.
        let base: Vec<f64> = self.values(&self.again).zip(self.values(direct)).map(|(a, b)| (a + b) / 2.0).collect();
        let row = |(peer, rounds): &(Peer, Vec<Round>)| {
            let plain = self.rounds.iter().find(|(other, _)| *other == peer.plain() && other != peer);
            let to_plain = |(_, plain): &(Peer, Vec<Round>)| {
                Figure::of(self.values(rounds).zip(self.values(plain)).map(|(value, plain)| value / plain).collect())
            };
            Some(Row { to_plain: plain.and_then(to_plain), ..self.row(*peer, rounds, &base)? })
        };
        let rows = self.rounds.iter().filter_map(row).collect();
        let noise = Figure::of(itself);
        let all = self.rounds.iter().flat_map(|(_, rounds)| rounds).chain(&self.again);
        let others = Figure::of(all.map(|round| round.others).collect());
        Summary {
            cell: self.cell,
            title: self.cell.title(),
            offered_rate: (self.cell == Cell::Latency).then_some(self.latency_rate),
            conclusive: noise.as_ref().is_some_and(|noise| noise.deviation(1.0) <= NOISE_LIMIT),
            others,
            direct_to_itself: noise,
            rows,
        }
    }

    fn row(&self, peer: Peer, rounds: &[Round], base: &[f64]) -> Option<Row> {
        let ratios = self.values(rounds).zip(base).map(|(value, base)| value / base).collect();
        let mut latency = new_histogram();
        let mut failures = BTreeMap::new();
        for Round { outcome, .. } in rounds {
            latency.add(&outcome.latency).expect("all histograms have the same bounds");
            for (kind, count) in &outcome.failures {
                *failures.entry(kind.clone()).or_default() += count;
            }
        }
        let median = |of: fn(&Round) -> f64| Figure::of(rounds.iter().map(of).collect()).map(|figure| figure.median);
        Some(Row {
            peer,
            value: Figure::of(self.values(rounds).collect())?,
            ratio: Figure::of(ratios)?,
            latency_us: percentiles(&latency),
            tool_user_us: median(|round| round.tool_cpu.user_us)?,
            tool_system_us: median(|round| round.tool_cpu.system_us)?,
            peer_cpu_us: median(|round| round.peer_cpu_us)?,
            interrupt_cpu_us: median(|round| round.interrupt_cpu_us)?,
            to_plain: None,
            all_cpu_us: median(Round::all_cpu_us)?,
            failures,
            series: rounds
                .iter()
                .map(|round| round.outcome.samples.iter().filter(|s| s.measured).map(|s| s.rate).collect())
                .collect(),
            latency,
        })
    }
}

fn percentiles(latency: &Histogram<u64>) -> BTreeMap<String, f64> {
    if latency.is_empty() {
        return BTreeMap::new();
    }
    PERCENTILES.iter().map(|p| (format!("p{p}"), latency.value_at_percentile(*p) as f64 / 1000.0)).collect()
}

/// All peers in one mode.
pub(super) struct Section {
    pub(super) mode: Mode,
    pub(super) skipped: Vec<(Peer, String)>,
    pub(super) tables: Vec<Table>,
}

/// The whole comparison.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Report {
    pub(super) host: Host,
    pub(super) modes: Vec<ModeReport>,
}

/// Where it ran.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Host {
    pub(super) kernel: String,
    pub(super) cores: usize,
    pub(super) processor: String,
    pub(super) version: &'static str,
    pub(super) command: String,
}

/// One mode's results.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct ModeReport {
    pub(super) mode: Mode,
    pub(super) left_out: BTreeMap<String, String>,
    pub(super) workloads: Vec<Summary>,
}

/// One workload's results.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Summary {
    pub(super) cell: Cell,
    pub(super) title: &'static str,
    pub(super) offered_rate: Option<f64>,
    /// Second direct measurement of each round to its first.
    pub(super) direct_to_itself: Option<Figure>,
    /// Whether that is close enough to 1 often enough.
    pub(super) conclusive: bool,
    /// Part of the machine that other programs used.
    pub(super) others: Option<Figure>,
    pub(super) rows: Vec<Row>,
}

/// One peer's results.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Row {
    pub(super) peer: Peer,
    pub(super) value: Figure,
    pub(super) ratio: Figure,
    pub(super) latency_us: BTreeMap<String, f64>,
    pub(super) tool_user_us: f64,
    pub(super) tool_system_us: f64,
    pub(super) peer_cpu_us: f64,
    pub(super) interrupt_cpu_us: f64,
    /// With more Services or flows: its rate (for latency, its latency) to that of the same peer without them, round by round.
    pub(super) to_plain: Option<Figure>,
    /// All of these: what a saturated machine spends on it.
    pub(super) all_cpu_us: f64,
    pub(super) failures: BTreeMap<String, u64>,
    /// Rate ten times a second, a list for each round.
    pub(super) series: Vec<Vec<f64>>,
    #[serde(skip)]
    pub(super) latency: Histogram<u64>,
}

impl Report {
    pub(super) fn new(sections: Vec<Section>) -> Self {
        let modes = sections
            .into_iter()
            .map(|section| ModeReport {
                mode: section.mode,
                left_out: section.skipped.iter().map(|(peer, why)| (peer.to_string(), why.clone())).collect(),
                workloads: section.tables.iter().map(Table::summary).collect(),
            })
            .collect();
        Self { host: Host::here(), modes }
    }

    /// Failures of all peers.
    pub(super) fn failed(&self) -> u64 {
        let summaries = self.modes.iter().flat_map(|mode| &mode.workloads);
        summaries.flat_map(|summary| &summary.rows).flat_map(|row| row.failures.values()).sum()
    }

    pub(super) fn print(&self) {
        let Host { kernel, cores, processor, version, command } = &self.host;
        println!("sluice-bench {version}, Linux {kernel}, {cores} × {processor}\n{command}");
        for mode in &self.modes {
            println!("\n{}", mode.mode.as_str());
            for (peer, why) in &mode.left_out {
                println!("{peer} is left out: {why}");
            }
            for summary in &mode.workloads {
                summary.print();
            }
        }
    }
}

impl Host {
    pub(crate) fn here() -> Self {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let cpuinfo = read("/proc/cpuinfo");
        let model = cpuinfo.lines().find(|line| line.starts_with("model name")).and_then(|line| line.split_once(':'));
        Self {
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            cores: cores(),
            processor: model.map_or("unknown processor", |(_, name)| name.trim()).to_owned(),
            version: env!("CARGO_PKG_VERSION"),
            command: std::env::args().collect::<Vec<_>>().join(" "),
        }
    }
}

impl Summary {
    fn print(&self) {
        println!("\n{}", self.heading());
        let confidence = self.rows.first().map_or(0.0, |row| row.value.confidence);
        let each = if self.is_bulk() { "MB" } else { "request" };
        let mut table = TextTable::new();
        table.load_style(presets::NOTHING);
        table.set_header([
            "peer".to_owned(),
            "median".to_owned(),
            "min – max".to_owned(),
            format!("to direct [{:.0} %]", confidence * 100.0),
            "p50".to_owned(),
            "p99".to_owned(),
            format!("CPU µs/{each}: tool"),
            "peer".to_owned(),
            "interrupts".to_owned(),
            "all (direct's part)".to_owned(),
            "errors".to_owned(),
        ]);
        for row in &self.rows {
            let latency = |name: &str| row.latency_us.get(name).map_or("-".to_owned(), |us| micros(*us));
            table.add_row([
                row.peer.to_string(),
                show(self.cell, row.value.median),
                format!("{} – {}", show(self.cell, row.value.min), show(self.cell, row.value.max)),
                format!("{:.2} [{:.2} – {:.2}]", row.ratio.median, row.ratio.low, row.ratio.high),
                latency("p50"),
                latency("p99"),
                format!("{:.1} + {:.1} sys", row.tool_user_us, row.tool_system_us),
                if row.peer_cpu_us > 0.0 { format!("{:.1}", row.peer_cpu_us) } else { "-".to_owned() },
                format!("{:.1}", row.interrupt_cpu_us),
                format!("{:.1} ({:.2})", row.all_cpu_us, self.part_of_direct(row)),
                row.failures.values().sum::<u64>().to_string(),
            ]);
        }
        for column in table.column_iter_mut().skip(1) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        println!("{table}\n{}", self.noise());
        for row in &self.rows {
            if let Some(text) = self.compared_to_plain(row) {
                println!("{text}");
            }
        }
        for row in &self.rows {
            for (kind, count) in &row.failures {
                println!("{}: {count} {kind}", row.peer);
            }
        }
    }

    /// Whether more Services or flows make a difference, in words.
    pub(super) fn compared_to_plain(&self, row: &Row) -> Option<String> {
        let Figure { median, low, high, confidence, .. } = row.to_plain.as_ref()?;
        let verdict = if !self.conclusive {
            "too noisy to tell"
        } else if (1.0 - FLAT..=1.0 + FLAT).contains(median) {
            "within 10 %"
        } else if *low > 1.0 + FLAT || *high < 1.0 - FLAT {
            "DIFFERENT"
        } else {
            "not told apart: use more rounds"
        };
        let (peer, plain, percent) = (row.peer, row.peer.plain(), confidence * 100.0);
        Some(format!("{peer} to {plain}: {median:.2} [{low:.2} – {high:.2}, {percent:.0} %]: {verdict}"))
    }

    /// What direct uses, to what a peer uses: the ratio of their rates on a saturated machine, and one that other programs
    /// disturb less.
    pub(super) fn part_of_direct(&self, row: &Row) -> f64 {
        let direct = self.rows.iter().find(|row| row.peer == Peer::Direct);
        direct.map_or(f64::NAN, |direct| direct.all_cpu_us / row.all_cpu_us)
    }

    pub(super) fn is_bulk(&self) -> bool {
        matches!(self.cell, Cell::Bulk | Cell::Streams)
    }

    pub(super) fn heading(&self) -> String {
        match self.offered_rate {
            Some(rate) => format!("{}: {rate:.0} requests/s", self.title),
            None => self.title.to_owned(),
        }
    }

    pub(super) fn noise(&self) -> String {
        let Some(noise) = &self.direct_to_itself else { return "no round was finished".to_owned() };
        let verdict = if self.conclusive {
            "ratios whose bounds overlap are not told apart"
        } else {
            "TOO NOISY TO CONCLUDE: use more or longer rounds, or a quieter machine"
        };
        let (typical, most) = self.others.as_ref().map_or((0.0, 0.0), |others| (others.median, others.max));
        format!(
            "direct to itself {:.2} [{:.2} – {:.2}], typically {:.0} % off; \
             other programs used {:.0} % of the processors (at most {:.0} %): {verdict}",
            noise.median,
            noise.min,
            noise.max,
            noise.deviation(1.0) * 100.0,
            typical * 100.0,
            most * 100.0
        )
    }
}
