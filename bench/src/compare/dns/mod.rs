//! Sluice and CoreDNS answer names of the same objects from the same API server: how many, how soon, with what memory.

mod objects;
mod peer;
mod report;

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use clap::Args;
use hdrhistogram::Histogram;
use sluice_bench::control_plane::{self, ControlPlane};
use sluice_bench::name_client::NameClient;
use sluice_bench::workload::dns::{self, Codes, DnsPlan};
use sluice_bench::workload::questions::{HEADLESS_EVERY, Mix, Question, generated};
use sluice_bench::workload::{Outcome, Plan, Workload, cores, new_histogram};

use crate::cli::parse_duration;
use crate::compare::stats::Figure;
use crate::daemon;
use crate::lab::{Lab, Lacking};
use crate::manifests;
use crate::progress::Line;
use peer::{Peer, on_core};

/// Where the API server is, as a Pod of the cluster.
const API_SERVER: &str = "10.244.255.1";
/// The core of the name servers, and that of the load.
const CORES: [usize; 2] = [0, 1];
/// Bound on a change to be seen; a cache may keep what it has for 30 s.
const SEEN: Duration = Duration::from_secs(45);

/// Between two questions while a change is waited for.
const PAUSE: Duration = Duration::from_micros(200);

#[derive(Debug, Args)]
pub(crate) struct DnsCompareArgs {
    /// The CoreDNS to compare with [default: the one in PATH, or beside the programs of scripts/kube/build]; without one,
    /// Sluice is measured alone.
    #[arg(long)]
    coredns: Option<PathBuf>,
    /// The `sluice` program [default: the one beside this].
    #[arg(long)]
    sluice: Option<PathBuf>,
    /// Services, of which each fifth is headless.
    #[arg(long, default_value_t = 10_000)]
    services: usize,
    /// Endpoints in all.
    #[arg(long, default_value_t = 50_000)]
    endpoints: usize,
    /// Shares of the kinds of questions [default: a=40,aaaa=20,srv=5,headless=15,nxdomain=20].
    #[arg(long)]
    mix: Option<Mix>,
    /// Rounds, in which the peers take turns.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// How long each is measured in a round.
    #[arg(long, default_value = "3s", value_parser = parse_duration)]
    seconds: Duration,
    /// Changes of a slice that are waited for.
    #[arg(long, default_value_t = 30)]
    changes: u32,
    /// The same with CoreDNS's cache, which may take 30 s each.
    #[arg(long, default_value_t = 2)]
    cached_changes: u32,
    /// Print the result as one JSON object.
    #[arg(long)]
    json: bool,
}

/// What is measured of a peer.
struct Measured {
    name: &'static str,
    ready_after: Duration,
    /// Resident bytes when all names were asked for.
    memory: u64,
    /// Questions a second that one core answers, and its processor time for each in microseconds.
    rate: Vec<f64>,
    cpu: Vec<f64>,
    /// Open loop: rate, and latency from the moment a question was due.
    paced: Vec<Paced>,
    /// From before a slice is written to the answer that shows it, in nanoseconds.
    changes: Histogram<u64>,
    unseen: u32,
    failures: u64,
    unexpected: u64,
}

struct Paced {
    rate: f64,
    latency: Histogram<u64>,
    /// Of each round, in microseconds.
    p99: Vec<f64>,
    /// Questions that were not answered in time.
    missed: u64,
}

impl Measured {
    fn new(peer: &Peer) -> Self {
        let (name, ready_after) = (peer.name, peer.ready_after);
        Self {
            name,
            ready_after,
            memory: 0,
            rate: Vec::new(),
            cpu: Vec::new(),
            paced: Vec::new(),
            changes: new_histogram(),
            unseen: 0,
            failures: 0,
            unexpected: 0,
        }
    }

    fn median_rate(&self) -> f64 {
        Figure::of(self.rate.clone()).map_or(0.0, |figure| figure.median)
    }
}

/// Measures; whether every answer was right.
pub(crate) fn run(arguments: &DnsCompareArgs) -> Result<bool> {
    let program = daemon::program(arguments.sluice.as_deref())?;
    ensure!(program.exists(), "{} is not built (cargo build --release --bins)", program.display());
    ensure!(arguments.rounds > 0, "--rounds: use more than 0");
    ensure!(arguments.services >= HEADLESS_EVERY, "--services: use at least {HEADLESS_EVERY}");
    ensure!(arguments.endpoints >= arguments.services, "--endpoints: each Service needs one");
    if let Some(missing) = control_plane::missing(&["kube-apiserver"]) {
        bail!(Lacking(missing.into()));
    }
    if cores() < 2 {
        bail!(Lacking("the load needs a core of its own: two in all".into()));
    }
    let mut line = Line::new();
    let coredns = match peer::find_coredns(arguments.coredns.as_deref()) {
        Ok(program) => Some(program),
        Err(why) => {
            line.say(&format!("not compared with CoreDNS: {why}"));
            None
        }
    };
    let lab = Lab::bare()?;
    line.doing(&format!("{} Services and {} endpoints into an API server", arguments.services, arguments.endpoints));
    let plane = control_plane(&lab, arguments)?;
    let measured = Comparison { arguments, lab: &lab, plane: &plane, line }.measure(&program, coredns.as_deref())?;
    let is_right = measured.iter().all(|it| it.unexpected == 0 && it.unseen == 0);
    if arguments.json {
        println!("{}", report::json(arguments, &measured));
    } else {
        report::print(&measured);
    }
    Ok(is_right)
}

fn control_plane(lab: &Lab, arguments: &DnsCompareArgs) -> Result<ControlPlane> {
    let pod = lab.topology.add_pod("control-plane", &[API_SERVER.parse()?])?;
    let plane = ControlPlane::start(pod.ns, API_SERVER)?;
    let deadline = Instant::now() + Duration::from_secs(30);
    while let Err(error) = plane.get("/api/v1/namespaces/default") {
        ensure!(Instant::now() < deadline, "no default namespace: {error:#}");
        std::thread::sleep(Duration::from_millis(100));
    }
    // Sluice waits for the addresses of its own Node, and those are status.
    plane.create(&manifests::node(lab))?;
    plane.create_all(objects::all(arguments.services, arguments.endpoints))?;
    Ok(plane)
}

struct Comparison<'a> {
    arguments: &'a DnsCompareArgs,
    lab: &'a Lab,
    plane: &'a ControlPlane,
    line: Line,
}

impl Comparison<'_> {
    fn measure(mut self, sluice: &Path, coredns: Option<&Path>) -> Result<Vec<Measured>> {
        let (lab, plane, services) = (self.lab, self.plane, self.arguments.services);
        self.line.doing("starting name servers");
        let mut peers = vec![Peer::sluice(lab, sluice, plane, CORES[0], services)?];
        if let Some(program) = coredns {
            peers.push(Peer::coredns(lab, program, plane, CORES[0], services, true)?);
        }
        let mut measured: Vec<Measured> = peers.iter().map(Measured::new).collect();
        let mix = self.arguments.mix.unwrap_or_default();
        let questions = generated(services, "cluster.local", mix, None, 1)?;
        for round in 1..=self.arguments.rounds {
            for (peer, it) in peers.iter().zip(&mut measured) {
                self.saturate(round, peer, &questions, it)?;
            }
        }
        // Each at half of what Sluice answers, and at half of what it answers itself.
        let half = measured[0].median_rate() / 2.0;
        for (peer, it) in peers.iter().zip(&mut measured) {
            let own = it.median_rate() / 2.0;
            let rates = if own < half { vec![own, half] } else { vec![half] };
            for rate in rates {
                let paced = self.pace(peer, &questions, rate, it)?;
                it.paced.push(paced);
            }
            it.memory = peer.usage().memory;
        }
        if let Some(program) = coredns {
            let uncached = Peer::coredns(lab, program, plane, CORES[0], services, false)?;
            let mut of_uncached = Measured::new(&uncached);
            let mut changed = [&mut measured[0], &mut of_uncached];
            self.change(&[&peers[0], &uncached], &mut changed, 0..self.arguments.changes)?;
            measured.push(of_uncached);
            let after = self.arguments.changes;
            self.change(&[&peers[1]], &mut [&mut measured[1]], after..after + self.arguments.cached_changes)?;
        } else {
            self.change(&[&peers[0]], &mut [&mut measured[0]], 0..self.arguments.changes)?;
        }
        self.line.clear();
        Ok(measured)
    }

    /// As many questions as it answers.
    fn saturate(&mut self, round: usize, peer: &Peer, questions: &[Question], it: &mut Measured) -> Result<()> {
        let plan = self.plan(peer.address, questions, None);
        let prefix = format!("round {round}, {}: ", peer.name);
        let before = peer.usage();
        let (outcome, codes) = self.load(&prefix, &plan)?;
        it.rate.push(outcome.rate);
        it.cpu.push((peer.usage().cpu_us - before.cpu_us) / outcome.total);
        count(it, &outcome, &codes);
        Ok(())
    }

    /// At a fixed rate, in as many rounds.
    fn pace(&mut self, peer: &Peer, questions: &[Question], rate: f64, it: &mut Measured) -> Result<Paced> {
        let mut paced = Paced { rate, latency: new_histogram(), p99: Vec::new(), missed: 0 };
        let plan = self.plan(peer.address, questions, Some(rate));
        for round in 1..=self.arguments.rounds {
            let prefix = format!("{} at {rate:.0}/s, round {round}: ", peer.name);
            let (outcome, codes) = self.load(&prefix, &plan)?;
            paced.latency.add(&outcome.latency).context("all have the same bounds")?;
            paced.p99.push(outcome.latency_us(99.0));
            paced.missed += outcome.overdue + outcome.failed();
            it.unexpected += codes.unexpected;
        }
        Ok(paced)
    }

    fn plan(&self, target: SocketAddr, questions: &[Question], rate: Option<f64>) -> DnsPlan {
        let load = Plan {
            connections: 16,
            threads: 1,
            rate,
            warmup: Duration::from_millis(500),
            duration: self.arguments.seconds,
            timeout: Duration::from_secs(2),
            ..Plan::new(Workload::Rr, vec![target])
        };
        // Open loop: room for all that may be late.
        DnsPlan { load, open: if rate.is_some() { 512 } else { 16 }, questions: questions.to_vec() }
    }

    fn load(&mut self, prefix: &str, plan: &DnsPlan) -> Result<(Outcome, Codes)> {
        let (ns, line) = (self.lab.client_pod(), &mut self.line);
        on_core(CORES[1], || dns::run(Some(ns), plan, |sample| line.sample(prefix, Workload::Rr, sample)))
    }

    /// Gives a headless Service another first endpoint, again and again, and waits until all tell of it.
    fn change(&mut self, peers: &[&Peer], measured: &mut [&mut Measured], changes: std::ops::Range<u32>) -> Result<()> {
        let question = objects::question(objects::CHANGED)?;
        let clients = peers.iter().map(|peer| self.lab.client_pod().run(|| NameClient::new(peer.address)));
        let mut clients: Vec<NameClient> = clients.collect::<Result<_>>()?;
        for change in changes {
            self.line.doing(&format!("change {}", change + 1));
            let address = objects::fresh(change);
            let slice = objects::slice(objects::CHANGED, [address]);
            let (begun, plane) = (Instant::now(), self.plane);
            let seen: Vec<Result<Option<Instant>>> = std::thread::scope(|scope| {
                let mut waiting = Vec::new();
                for client in &mut clients {
                    let question = &question;
                    waiting.push(scope.spawn(move || first_seen(client, question, address, begun + SEEN)));
                }
                let written = plane.patch(&slice, &serde_json::json!({"endpoints": slice["endpoints"]}));
                let seen = waiting.into_iter().map(|thread| match thread.join() {
                    Ok(seen) => seen,
                    Err(panic) => std::panic::resume_unwind(panic),
                });
                let seen = seen.collect();
                written.map(|()| seen)
            })?;
            for (it, seen) in measured.iter_mut().zip(seen) {
                match seen? {
                    Some(at) => it.changes.saturating_record((at - begun).as_nanos().try_into().unwrap_or(u64::MAX)),
                    None => it.unseen += 1,
                }
            }
            std::thread::sleep(Duration::from_millis(fastrand::u64(50..150)));
        }
        Ok(())
    }
}

fn count(it: &mut Measured, outcome: &Outcome, codes: &Codes) {
    it.failures += outcome.failed();
    it.unexpected += codes.unexpected;
}

/// When this address is answered first; nothing when it is not by then.
fn first_seen(client: &mut NameClient, question: &Question, wanted: IpAddr, until: Instant) -> Result<Option<Instant>> {
    loop {
        let is_there = client.addresses(question)?.is_some_and(|addresses| addresses.contains(&wanted));
        let now = Instant::now();
        match is_there {
            true => return Ok(Some(now)),
            false if now > until => return Ok(None),
            false => std::thread::sleep(PAUSE),
        }
    }
}
