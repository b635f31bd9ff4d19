//! Sluice and kube-proxy with a real API server that has many objects: how soon they serve, what memory they take, and how soon
//! packets follow a slice that was written.

use std::fs;
use std::net::IpAddr;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use hdrhistogram::Histogram;
use serde_json::{Value, json};
use sluice_bench::control_plane::ControlPlane;
use sluice_bench::topology::Pod;
use sluice_bench::workload::new_histogram;

use super::api_load::{Watch, replace};
use super::polite::{Server, ask, connect};
use super::scale::{PODS, ScaleArgs, Size, TIMEOUT, record};
use super::{Failures, at, count, named, percentiles, sum, table};
use crate::compare::kube_proxy;
use crate::daemon::{PROBE, Program};
use crate::lab::{CLUSTER_IP, Lab, Lacking, Mode, POD_PORT};
use crate::manifests::{self, NODE, Others, WEB, ready};
use crate::process::{Process, Usage};
use crate::progress::Line;

/// Bound on the first sync.
const PATIENCE: Duration = Duration::from_secs(900);
/// How long memory is left to settle after it.
const SETTLE: Duration = Duration::from_secs(5);
/// Pause after a change, in milliseconds: longer than the second in which kube-proxy does not sync again, which would be in its
/// figures otherwise.
const PAUSE: std::ops::Range<u64> = 1100..1400;

/// Who is measured: name, and what its log says when a list has come.
const PEERS: [(&str, [&str; 2]); 2] = [
    ("Sluice", ["listed resource=\"services\"", "listed resource=\"endpointslices"]),
    ("kube-proxy", ["controller=\"service config\"", "controller=\"endpoint slice config\""]),
];

/// Measures; whether there were no errors.
pub(super) fn run(arguments: &ScaleArgs, sizes: &[Size], program: &Program) -> Result<bool> {
    if let Some(missing) = kube_proxy::missing() {
        return Err(anyhow::Error::new(Lacking(missing.into())));
    }
    let mut line = Line::new();
    let mut results = Vec::new();
    for size in sizes {
        results.extend(measure(*size, arguments, program, &mut line)?);
    }
    line.clear();
    if arguments.common.json {
        let sizes: Vec<Value> = results.iter().map(Measured::to_json).collect();
        println!("{}", json!({"workload": "scale --api", "results": sizes}));
    } else {
        print(&results);
    }
    Ok(results.iter().all(|measured| sum(&measured.failures) == 0))
}

fn measure(size: Size, arguments: &ScaleArgs, program: &Program, line: &mut Line) -> Result<Vec<Measured>> {
    let lab = Lab::bare()?;
    let pods: Vec<Pod> = (1..=PODS).map(|number| lab.add_pod(number)).collect::<Result<_>>()?;
    let servers = pods.iter().zip(1..).map(|(pod, number)| Server::start(&pod.ns, number, POD_PORT));
    let _servers: Vec<Server> = servers.collect::<Result<_>>()?;
    let addresses: Vec<IpAddr> = pods.iter().flat_map(|pod| pod.addresses.iter().copied()).collect();
    let plane = kube_proxy::control_plane(&lab)?;
    let others = Others {
        services: size.services - 1,
        endpoints: size.endpoints.saturating_sub(addresses.len()),
        ..Others::default()
    };
    for object in [manifests::node(&lab), manifests::web(), manifests::slice(WEB, &ready(addresses.iter().copied()))] {
        plane.create(&object)?;
    }
    let what = format!("{} Services, {} endpoints", size.services, size.endpoints);
    line.doing(&format!("{what}: writing"));
    let begun = Instant::now();
    plane.create_all((0..others.services).flat_map(|index| others.objects(index)))?;
    line.say(&format!("{what}: written in {:.0} s", begun.elapsed().as_secs_f64()));
    let mut results = Vec::new();
    for (peer, lists) in PEERS {
        let mut measured = Measured::new(peer, size);
        let folder = tempfile::tempdir().context("a folder for the configuration")?;
        let command = match peer {
            "Sluice" => sluice(&lab, &plane, folder.path(), program)?,
            _ => kube_proxy::command(&lab, &plane, folder.path())?,
        };
        let process = measured.sync(&lab, command, folder, lists, line)?;
        measured.changes(&lab, &plane, &process, &addresses, arguments.changes, line)?;
        results.push(measured);
        drop(process);
        if peer != "Sluice" {
            // It leaves its rules.
            for family in ["ip", "ip6"] {
                drop(lab.topology.node.command("nft").args(["delete", "table", family, "kube-proxy"]).output());
            }
        }
    }
    Ok(results)
}

/// The daemon on the lab's node.
fn sluice(lab: &Lab, plane: &ControlPlane, folder: &Path, program: &Program) -> Result<Command> {
    let config = folder.join("config.yaml");
    let text = format!("localControllers: false\npacketPath: {}\n", program.packet_path.name());
    fs::write(&config, text).context("cannot write the configuration")?;
    let mut command = lab.topology.node.command(&program.file);
    command.arg("run").arg("--kubeconfig").arg(plane.kubeconfig("proxy")).arg("--config").arg(config);
    command.args(["--node-name", NODE, "--log-level", "info,sluice_control::source::api=debug", "--state-dir"]);
    command.arg(folder.join("state"));
    Ok(command)
}

struct Measured {
    peer: &'static str,
    size: Size,
    /// From its start until the lists had come, and until the first answer through it.
    listed: Option<Duration>,
    synced: Duration,
    /// Once it serves, and after the changes.
    usage: Usage,
    after: Usage,
    /// From the API server's word that it has a slice: until our own watch tells of it, until the first packet follows, and from
    /// the later of both until then. In nanoseconds.
    watch: Histogram<u64>,
    follows: Histogram<u64>,
    above: Histogram<u64>,
    failures: Failures,
}

impl Measured {
    fn new(peer: &'static str, size: Size) -> Self {
        Self {
            peer,
            size,
            listed: None,
            synced: Duration::ZERO,
            usage: Usage::default(),
            after: Usage::default(),
            watch: new_histogram(),
            follows: new_histogram(),
            above: new_histogram(),
            failures: Failures::new(),
        }
    }

    /// Starts a peer and waits until the Service answers through it.
    fn sync(
        &mut self,
        lab: &Lab,
        command: Command,
        folder: tempfile::TempDir,
        lists: [&str; 2],
        line: &mut Line,
    ) -> Result<Process> {
        let begun = Instant::now();
        let mut process = Process::start(command, folder)?;
        line.doing(&format!("{}: first sync", self.peer));
        let is_answered = || {
            lab.client(Mode::Preserve).run(|| Ok(connect(CLUSTER_IP, PROBE).and_then(|stream| ask(&stream)).is_ok()))
        };
        while !is_answered()? {
            if let Some(status) = process.ended()? {
                bail!("{} ended: {status}\n{}", self.peer, process.log());
            }
            ensure!(begun.elapsed() < PATIENCE, "{} does not serve\n{}", self.peer, process.log());
            self.look_for(&process, lists, begun);
            thread::sleep(Duration::from_millis(5));
        }
        self.synced = begun.elapsed();
        self.look_for(&process, lists, begun);
        thread::sleep(SETTLE);
        self.usage = process.usage();
        Ok(process)
    }

    /// Notes when the log says first that both lists have come.
    fn look_for(&mut self, process: &Process, lists: [&str; 2], begun: Instant) {
        if self.listed.is_none() {
            let log = process.log();
            self.listed = lists.iter().all(|words| log.contains(words)).then(|| begun.elapsed());
        }
    }

    /// Leaves the Service one Pod after the other, and dials until that answers.
    fn changes(
        &mut self,
        lab: &Lab,
        plane: &ControlPlane,
        process: &Process,
        addresses: &[IpAddr],
        changes: u32,
        line: &mut Line,
    ) -> Result<()> {
        let slice = |pod: IpAddr| manifests::slice(WEB, &ready([pod]));
        let client = plane.client()?;
        let mut watch = Watch::start(client, &slice(addresses[0]))?;
        let mut one = |round: u32| -> Result<()> {
            let number = (round % u32::from(PODS)) as usize;
            let (accepted, version) = replace(client, &slice(addresses[number]))?;
            let answered = loop {
                match connect(CLUSTER_IP, TIMEOUT).and_then(|stream| ask(&stream)) {
                    Ok(answer) if usize::from(answer.pod) == number + 1 => break Instant::now(),
                    Ok(_) if accepted.elapsed() > PATIENCE => {
                        bail!("{}: no packet follows a change\n{}", self.peer, process.log())
                    }
                    // What dials more often takes the processor from whom it waits for.
                    Ok(_) => thread::sleep(Duration::from_micros(500)),
                    Err(failure) => count(&mut self.failures, failure),
                }
            };
            let told = watch.when(&version, TIMEOUT)?;
            // The first one, which leaves one of all, is no change that is seen.
            if round > 0 {
                record(&mut self.watch, told.saturating_duration_since(accepted));
                record(&mut self.follows, answered.saturating_duration_since(accepted));
                record(&mut self.above, answered.saturating_duration_since(told.max(accepted)));
            }
            thread::sleep(Duration::from_millis(fastrand::u64(PAUSE)));
            Ok(())
        };
        let peer = self.peer;
        lab.client(Mode::Preserve).run(|| {
            (0..=changes).try_for_each(|round| {
                line.doing(&format!("{peer}: change {round} of {changes}"));
                one(round)
            })
        })?;
        self.after = process.usage();
        Ok(())
    }

    /// From when the lists had come to the first answer.
    fn after_lists(&self) -> Option<Duration> {
        self.listed.map(|listed| self.synced.saturating_sub(listed))
    }

    fn to_json(&self) -> Value {
        json!({
            "peer": self.peer, "services": self.size.services, "endpoints": self.size.endpoints,
            "syncSeconds": self.synced.as_secs_f64(),
            "syncAfterListsSeconds": self.after_lists().map(|after| after.as_secs_f64()),
            "syncCpuSeconds": self.usage.cpu_us / 1e6,
            "residentBytes": self.usage.memory, "residentAfterChangesBytes": self.after.memory,
            "changeCpuMilliseconds": (self.after.cpu_us - self.usage.cpu_us) / 1e3 / self.follows.len().max(1) as f64,
            "watchMicroseconds": percentiles(&self.watch),
            "changeMicroseconds": percentiles(&self.follows),
            "aboveWatchMicroseconds": percentiles(&self.above),
            "failures": self.failures,
        })
    }
}

fn print(results: &[Measured]) {
    let row = |measured: &Measured| {
        let after = measured.after_lists().map_or("-".to_owned(), |after| format!("{:.2} s", after.as_secs_f64()));
        let of = |latency| [50.0, 99.0].map(|percentile| at(latency, percentile)).to_vec();
        [
            vec![
                measured.peer.to_owned(),
                measured.size.services.to_string(),
                measured.size.endpoints.to_string(),
                format!("{:.2} s", measured.synced.as_secs_f64()),
                after,
                format!("{} MiB", measured.usage.memory >> 20),
                format!("{} MiB", measured.after.memory >> 20),
            ],
            of(&measured.watch),
            of(&measured.follows),
            of(&measured.above),
            vec![named(&measured.failures)],
        ]
        .concat()
    };
    let header = [
        "peer",
        "Services",
        "endpoints",
        "synced",
        "after the lists",
        "resident",
        "in the end",
        "watch p50",
        "p99",
        "change p50",
        "p99",
        "above the watch p50",
        "p99",
        "errors",
    ];
    println!("{}", table(&header, results.iter().map(row).collect()));
}
