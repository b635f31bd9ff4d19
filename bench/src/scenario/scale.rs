//! How soon do packets follow a changed EndpointSlice, and what does a first packet cost, at many Services?

use std::net::SocketAddr;
use std::str::FromStr;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use clap::Args;
use hdrhistogram::Histogram;
use serde_json::{Value, json};
use sluice_bench::client::Failure;
use sluice_bench::topology::Pod;
use sluice_bench::workload::new_histogram;

use super::polite::{Server, ask, connect};
use super::{CommonArgs, Failures, api_scale, at, count, named, percentiles, sum, table};
use crate::daemon::{self, Daemon, PROBE};
use crate::lab::{CLUSTER_IP, Lab, Mode, POD_PORT};
use crate::manifests::{Others, ready};
use crate::process::Usage;
use crate::progress::Line;

/// Bound on connecting and on each answer.
pub(super) const TIMEOUT: Duration = Duration::from_secs(5);
/// Pods behind each Service that is dialled.
pub(super) const PODS: u8 = 2;
/// Dials of a kind in a row.
const BLOCK: usize = 100;

#[derive(Debug, Args)]
pub(crate) struct ScaleArgs {
    #[command(flatten)]
    pub(super) common: CommonArgs,
    /// How many Services and endpoints, SERVICES/ENDPOINTS; several are measured one after another [default:
    /// 1/2,1000/5000,30000/150000,44000/250000; with --api 10000/100000].
    #[arg(long, value_delimiter = ',')]
    sizes: Vec<Size>,
    /// With a real API server, of scripts/kube/build, and kube-proxy beside Sluice.
    #[arg(long)]
    pub(super) api: bool,
    /// Changes of one slice, at each size.
    #[arg(long, default_value_t = 200)]
    pub(super) changes: u32,
    /// First packets, at each size and as many to the Pods themselves.
    #[arg(long, default_value_t = 5000)]
    dials: usize,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Size {
    pub(super) services: usize,
    pub(super) endpoints: usize,
}

/// What is measured when nothing is said.
const SIZES: [(usize, usize); 4] = [(1, 2), (1000, 5000), (30_000, 150_000), (44_000, 250_000)];
/// The same with an API server.
const API_SIZES: [(usize, usize); 1] = [(10_000, 100_000)];

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parsed = text.split_once('/').and_then(|(services, endpoints)| {
            Some(Self { services: services.parse().ok()?, endpoints: endpoints.parse().ok()? })
        });
        // Beyond, addresses of the ranges would run out.
        parsed
            .filter(|size| (1..=500_000).contains(&size.services) && size.endpoints <= 4_000_000)
            .ok_or_else(|| "use SERVICES/ENDPOINTS, at most 500000/4000000".to_owned())
    }
}

/// Measures; whether there were no errors.
pub(crate) fn run(arguments: &ScaleArgs) -> Result<bool> {
    let program = arguments.common.program()?;
    ensure!(arguments.changes > 0 && arguments.dials > 0, "--changes, --dials: use more than 0");
    let sizes = arguments.sizes();
    if arguments.api {
        return api_scale::run(arguments, &sizes, &program);
    }
    let mut line = Line::new();
    let mut results = Vec::new();
    for size in &sizes {
        results.push(Measured::of(*size, arguments, &program, &mut line)?);
    }
    line.clear();
    if arguments.common.json {
        let sizes: Vec<Value> = results.iter().map(Measured::to_json).collect();
        println!("{}", json!({"workload": "scale", "sizes": sizes}));
    } else {
        print(&results);
    }
    Ok(results.iter().all(|measured| sum(&measured.failures) == 0))
}

impl ScaleArgs {
    fn sizes(&self) -> Vec<Size> {
        let usual = if self.api { &API_SIZES[..] } else { &SIZES };
        match &*self.sizes {
            [] => {
                usual.iter().map(|(services, endpoints)| Size { services: *services, endpoints: *endpoints }).collect()
            }
            said => said.to_vec(),
        }
    }
}

struct Measured {
    size: Size,
    /// From the daemon's start to the first answer through it.
    loaded: Duration,
    usage: Usage,
    /// From before a slice was written to the answer of the Pod that it names, in nanoseconds.
    changes: Histogram<u64>,
    /// Of `connect`, to the Pods and to Services.
    direct: Histogram<u64>,
    first: Histogram<u64>,
    failures: Failures,
}

impl Measured {
    fn of(size: Size, arguments: &ScaleArgs, program: &daemon::Program, line: &mut Line) -> Result<Self> {
        let what = format!("{} Services, {} endpoints", size.services, size.endpoints);
        line.doing(&format!("{what}: loading"));
        let lab = Lab::bare()?;
        let pods: Vec<Pod> = (1..=PODS).map(|number| lab.add_pod(number)).collect::<Result<_>>()?;
        let servers = pods.iter().zip(1..).map(|(pod, number)| Server::start(&pod.ns, number, POD_PORT));
        let _servers: Vec<Server> = servers.collect::<Result<_>>()?;
        let addresses: Vec<_> = pods.iter().flat_map(|pod| pod.addresses.iter().copied()).collect();
        let others = Others {
            services: size.services - 1,
            endpoints: size.endpoints.saturating_sub(addresses.len()),
            pods: addresses.clone(),
            ..Others::default()
        };
        let daemon = Daemon::start_with(&lab, program, Some(&others), &ready(addresses.iter().copied()), || {
            lab.client(Mode::Preserve).run(|| Ok(connect(CLUSTER_IP, PROBE).and_then(|stream| ask(&stream)).map(drop)))
        })?;
        let mut measured = Self {
            size,
            loaded: daemon.ready_after,
            usage: daemon.usage(),
            changes: new_histogram(),
            direct: new_histogram(),
            first: new_histogram(),
            failures: Failures::new(),
        };
        let services = [others.dialled(), vec![CLUSTER_IP]].concat();
        let pods: Vec<SocketAddr> = addresses.iter().map(|address| SocketAddr::new(*address, POD_PORT)).collect();
        lab.client(Mode::Preserve).run(|| {
            line.doing(&format!("{what}: first packets"));
            measured.first_packets(&pods, &services, arguments.dials);
            for round in 0..arguments.changes {
                line.doing(&format!("{what}: change {} of {}", round + 1, arguments.changes));
                let number = (round % u32::from(PODS)) as usize;
                measured.change(&daemon, addresses[number], number as u8 + 1)?;
            }
            Ok(())
        })?;
        Ok(measured)
    }

    fn first_packets(&mut self, pods: &[SocketAddr], services: &[SocketAddr], dials: usize) {
        let mut rng = fastrand::Rng::with_seed(1);
        let mut left = dials;
        while left > 0 {
            // Both in turn, so that what disturbs one disturbs the other.
            for (targets, is_direct) in [(pods, true), (services, false)] {
                for _ in 0..left.min(BLOCK) {
                    let target = targets[rng.usize(..targets.len())];
                    match dial(target).and_then(|(stream, took)| ask(&stream).map(|_| took)) {
                        Ok(took) if is_direct => record(&mut self.direct, took),
                        Ok(took) => record(&mut self.first, took),
                        Err(failure) => count(&mut self.failures, failure),
                    }
                }
            }
            left -= left.min(BLOCK);
        }
    }

    /// Leaves the Service only this Pod, and dials until it answers.
    fn change(&mut self, daemon: &Daemon, pod: std::net::IpAddr, number: u8) -> Result<()> {
        let begun = Instant::now();
        daemon.set_endpoints(&ready([pod]))?;
        loop {
            match dial(CLUSTER_IP).and_then(|(stream, _)| ask(&stream)) {
                Ok(answer) if answer.pod == number => break,
                Ok(_) if begun.elapsed() > 2 * TIMEOUT => bail!("no packet follows a change\n{}", daemon.log()),
                Ok(_) => {}
                Err(failure) => count(&mut self.failures, failure),
            }
        }
        record(&mut self.changes, begun.elapsed());
        // Changes come one at a time, and not in step with anything.
        std::thread::sleep(Duration::from_millis(fastrand::u64(60..120)));
        Ok(())
    }

    fn to_json(&self) -> Value {
        json!({
            "services": self.size.services, "endpoints": self.size.endpoints, "loadSeconds": self.loaded.as_secs_f64(),
            "residentBytes": self.usage.memory, "loadCpuSeconds": self.usage.cpu_us / 1e6,
            "changeMicroseconds": percentiles(&self.changes),
            "connectMicroseconds": {"direct": percentiles(&self.direct), "service": percentiles(&self.first)},
            "failures": self.failures,
        })
    }

    /// How much later the first answer comes than from a Pod dialled directly, at a percentile, in microseconds.
    fn above_direct(&self, percentile: f64) -> String {
        let at = |latency: &Histogram<u64>| latency.value_at_percentile(percentile) as f64 / 1000.0;
        format!("{:+.0} µs", at(&self.first) - at(&self.direct))
    }
}

fn print(results: &[Measured]) {
    let row = |measured: &Measured| {
        let change = [50.0, 99.0, 100.0].map(|percentile| at(&measured.changes, percentile));
        let connect = |percentile| {
            let (direct, service) = (at(&measured.direct, percentile), at(&measured.first, percentile));
            format!("{direct} → {service} ({})", measured.above_direct(percentile))
        };
        [
            vec![
                measured.size.services.to_string(),
                measured.size.endpoints.to_string(),
                format!("{:.2} s", measured.loaded.as_secs_f64()),
                format!("{} MiB", measured.usage.memory >> 20),
            ],
            change.to_vec(),
            vec![connect(50.0), connect(99.0), named(&measured.failures)],
        ]
        .concat()
    };
    let header = [
        "Services",
        "endpoints",
        "loaded",
        "resident",
        "change p50",
        "p99",
        "max",
        "connect p50: direct → Service",
        "p99",
        "errors",
    ];
    println!("{}", table(&header, results.iter().map(row).collect()));
}

/// Connects; how long that took.
fn dial(target: SocketAddr) -> Result<(std::net::TcpStream, Duration), Failure> {
    let begun = Instant::now();
    let stream = connect(target, TIMEOUT)?;
    Ok((stream, begun.elapsed()))
}

pub(super) fn record(latency: &mut Histogram<u64>, took: Duration) {
    latency.saturating_record(took.as_nanos().try_into().unwrap_or(u64::MAX));
}
