//! `sluice demo`: a private cluster on this machine, real connections through the real daemon, and how they fared.
//!
//! [`workloads`] says which Pods the manifests ask for, [`pods`] runs them, [`cluster`] publishes what a cluster's API
//! would serve, [`daemon`] runs `sluice run` on it, [`traffic`] dials [`mod@frontends`], [`rollout`] changes the cluster
//! meanwhile, [`naming`] asks for names, [`mod@report`] sums up.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use sluice_bench::netns::has_ipv6;
use sluice_bench::topology::{Topology, TopologyConfig};
use sluice_dataplane::net::Family;

use crate::host::Lacking;
use crate::object::Object;
use crate::problem::Severity;
use crate::source::folder::Folder;
use crate::source::{Change, manifest};

mod cluster;
mod daemon;
mod environment;
mod folder;
mod frontends;
mod interrupt;
mod names;
mod naming;
mod pods;
mod progress;
mod report;
mod rollout;
mod traffic;
mod workloads;

pub use interrupt::Interrupted;

use cluster::Cluster;
use daemon::Daemon;
use environment::Privilege;
use folder::DemoFolder;
use frontends::{Expect, Frontends, Surroundings, frontends};
use interrupt::Interrupt;
use naming::Naming;
use pods::Pods;
use progress::{Progress, grouped};
use report::{Report, Results, report};
use rollout::Stage;
use traffic::{Phase, Traffic};
use workloads::Plan;

/// Played when no manifests are given.
const EXAMPLE: &str = include_str!("example.yaml");
/// How long traffic flows before, between and after the changes.
const STEADY: Duration = Duration::from_secs(3);

/// Plays the manifests, or the built-in example. `false`: a connection failed that should not have.
///
/// The process must have one thread only: without privileges it moves into a user namespace.
pub fn run(manifests: Option<&Path>) -> Result<bool> {
    let privilege = environment::prepare()?;
    let interrupt = Interrupt::catch()?;
    let mut progress = Progress::new();
    let plan = read(manifests, &progress)?;
    let folder = DemoFolder::new(&std::env::temp_dir())?;
    let topology =
        Topology::new(TopologyConfig::default()).map_err(|error| Lacking(format!("no cluster here: {error:#}")))?;
    let node: Vec<_> = topology.config.node.iter().map(ipnet::IpNet::addr).filter(is_usable).collect();
    let manifests = folder.path().join("manifests");
    let mut stage = Stage {
        cluster: Cluster::new(&manifests, &node)?,
        pods: Pods::new(&topology),
        daemon: None,
        naming: None,
        served: BTreeSet::new(),
        fates: BTreeMap::new(),
        interrupt: interrupt.clone(),
    };

    progress.doing("starting Pods");
    stage.cluster.add_services(plan.services.clone())?;
    stage.start_all(&plan.workloads)?;
    let client = stage.pods.client()?;
    let as_whom = match privilege {
        Privilege::Own => "",
        Privilege::UserNamespace => ", without root",
    };
    progress.done(&format!(
        "{} Pods of {} workloads run, each in a network namespace of its own{as_whom}",
        stage.pods.count(),
        plan.workloads.len()
    ));

    progress.doing("starting the daemon");
    let begun = Instant::now();
    stage.daemon = Some(Daemon::start(&topology.node, cluster::NODE, folder.path(), &manifests, &interrupt)?);
    stage.naming = Some(Naming::new(&client.ns, &stage.cluster.slices())?);
    let around = Surroundings {
        outside: topology.config.client.iter().map(ipnet::IpNet::addr).filter(is_usable).collect(),
        families: Family::BOTH.into_iter().filter(|family| *family == Family::V4 || has_ipv6()).collect(),
        node,
    };
    let Frontends { lanes, notes } = frontends(&stage.cluster.services(), &stage.cluster.slices(), &around);
    if lanes.is_empty() {
        bail!("there is nothing to dial: {}", notes.join("; "));
    }
    let answering = lanes.iter().filter(|lane| lane.expect == Expect::Answer);
    stage.served = answering.map(|lane| lane.port.service.clone()).collect();
    progress.done(&format!(
        "the daemon serves {} frontends of {} Services, {} ms after its start",
        lanes.len(),
        lanes.iter().map(|lane| &lane.port.service).collect::<BTreeSet<_>>().len(),
        begun.elapsed().as_millis()
    ));

    let first_table = generation(&stage)?;
    let traffic = Traffic::start(lanes, &client.ns, &topology.client)?;
    progress.follow(traffic.counters());
    let changed = change_under_load(&mut stage, &plan, &traffic, &progress);
    progress.doing("waiting for the last answers");
    let results = traffic.finish();
    progress.finish();
    changed?;
    interrupt.check()?;
    let tables = generation(&stage)? - first_table;
    let stopped = stage.daemon.take().map(Daemon::stop);

    let summary = report(Results { lanes: &results, endpoints: stage.cluster.endpoints_ever(), fates: &stage.fates });
    let problems = stage.cluster.problems().iter().map(ToString::to_string).collect();
    let naming = stage.naming.as_ref().and_then(Naming::summary);
    conclude(&progress, &summary, tables, naming, &[plan.notes, notes, problems].concat(), stopped.transpose().err())
}

fn generation(stage: &Stage<'_>) -> Result<u64> {
    stage.daemon.as_ref().map_or(Ok(0), Daemon::generation)
}

/// `1 error`, `2 errors`.
fn counted(number: u64, what: &str) -> String {
    format!("{} {what}{}", grouped(number), if number == 1 { "" } else { "s" })
}

fn is_usable(address: &std::net::IpAddr) -> bool {
    address.is_ipv4() || has_ipv6()
}

/// The manifests' objects as a plan. What is wrong with them is shown, and is no reason not to play the rest.
fn read(manifests: Option<&Path>, progress: &Progress) -> Result<Plan> {
    let (objects, problems, skipped): (Vec<Object>, Vec<String>, _) = match manifests {
        None => {
            let read = manifest::parse(EXAMPLE);
            (read.objects.into_iter().map(|(object, _)| object).collect(), Vec::new(), read.skipped)
        }
        Some(path) => {
            std::fs::metadata(path).with_context(|| format!("cannot read {}", path.display()))?;
            let update = Folder::new(path, true).scan();
            let objects = update.changes.into_iter().filter_map(|change| match change {
                Change::Apply(object, _) => Some(object),
                Change::Delete(_) => None,
            });
            let errors = update.problems.iter().filter(|problem| problem.severity == Severity::Error);
            (objects.collect(), errors.map(ToString::to_string).collect(), update.skipped)
        }
    };
    for problem in problems {
        progress.line(&progress.paint.red(&problem));
    }
    let plan = workloads::plan(&objects, &skipped);
    if plan.services.is_empty() {
        bail!("there is no Service in the manifests");
    }
    Ok(plan)
}

fn change_under_load(stage: &mut Stage<'_>, plan: &Plan, traffic: &Traffic, progress: &Progress) -> Result<()> {
    progress.doing("nothing changes yet");
    stage.interrupt.sleep(STEADY)?;
    let (connections, errors) = traffic.counters().read();
    progress.done(&format!("{} connections, {} while nothing changes", grouped(connections), counted(errors, "error")));

    progress.doing("rolling update");
    traffic.set_phase(Phase::RollingUpdate);
    let begun = Instant::now();
    let replaced = stage.roll(&plan.workloads)?;
    let lasted = begun.elapsed();
    stage.interrupt.sleep(STEADY / 3)?;
    say_change(progress, traffic, (connections, errors), &format!("{replaced} Pods replaced"), lasted);

    let before = traffic.counters().read();
    progress.doing("scale-up");
    traffic.set_phase(Phase::ScaleUp);
    let begun = Instant::now();
    let added = stage.scale_up(&plan.workloads)?;
    let lasted = begun.elapsed();
    stage.interrupt.sleep(STEADY)?;
    say_change(progress, traffic, before, &format!("{added} Pods added"), lasted);
    Ok(())
}

fn say_change(progress: &Progress, traffic: &Traffic, before: (u64, u64), what: &str, lasted: Duration) {
    let (connections, errors) = traffic.counters().read();
    progress.done(&format!(
        "{} connections, {} while {what} ({:.1} s)",
        grouped(connections - before.0),
        counted(errors - before.1, "error"),
        lasted.as_secs_f64()
    ));
}

/// Prints what there is to say in the end.
fn conclude(
    progress: &Progress,
    report: &Report,
    tables: u64,
    naming: Option<String>,
    notes: &[String],
    stop: Option<anyhow::Error>,
) -> Result<bool> {
    let paint = progress.paint;
    let mut lines = vec![String::new()];
    for (number, line) in report.table.lines().enumerate() {
        let is_service = !line.starts_with("  ");
        lines.push(if number == 0 || is_service { paint.bold(line) } else { line.to_owned() });
    }
    lines.push(String::new());
    lines.extend(notes.iter().map(|note| paint.dim(&format!("note: {note}"))));
    lines.extend(report.failures.iter().map(|failure| paint.red(&format!("failed: {failure}"))));
    let is_good = report.errors == 0 && report.failures.is_empty() && stop.is_none();
    let refused = match report.refused {
        0 => String::new(),
        refused => format!(", {} refused as they should be", grouped(refused)),
    };
    let verdict = format!(
        "{} connections{refused}, {}, p50 {}, p99 {}, slowest {}; {tables} routing tables swapped in meanwhile",
        grouped(report.connections),
        counted(report.errors, "error"),
        report::quantile(&report.latency, 0.5),
        report::quantile(&report.latency, 0.99),
        report::quantile(&report.latency, 1.0),
    );
    lines.extend(naming);
    if let Some(error) = stop {
        lines.push(paint.red(&format!("failed: {error:#}")));
    }
    lines.push(if is_good { paint.green(&paint.bold(&verdict)) } else { paint.red(&verdict) });
    crate::cli::print(&(lines.join("\n") + "\n"))?;
    Ok(is_good)
}
