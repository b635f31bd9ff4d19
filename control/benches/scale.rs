//! What one changed EndpointSlice costs among many, what a full load costs, and how much memory objects and table take.
//!
//! `cargo bench -p sluice-control --bench scale`. `cargo test` runs it in small: only whether it works.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use hdrhistogram::Histogram;
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use serde_json::{Value, json};
use sluice_control::config::Config;
use sluice_control::host::Plan;
use sluice_control::object::Object;
use sluice_control::problem::Origin;
use sluice_control::publish::Publisher;
use sluice_control::saved::Saved;
use sluice_control::source::{Change, Update};
use sluice_dataplane::packet_path::{Settings, Shared};

/// Tells a process which size to run, and whether with local controllers.
const RUN: &str = "SLUICE_SCALE_RUN";

/// So many Services with so many endpoints, each in the one slice of its Service.
struct Size {
    services: usize,
    endpoints: usize,
    changes: usize,
}

fn main() -> Result<()> {
    // As criterion tells them apart: cargo bench says --bench, cargo test does not.
    let has = |flag: &str| std::env::args().any(|argument| argument == flag);
    let is_test = !has("--bench") || has("--test");
    let sizes = match is_test {
        true => vec![Size { services: 50, endpoints: 250, changes: 20 }],
        false => vec![
            Size { services: 10_000, endpoints: 50_000, changes: 20_000 },
            Size { services: 44_000, endpoints: 250_000, changes: 20_000 },
        ],
    };
    if let Some(wanted) = std::env::var_os(RUN) {
        let (index, local_controllers) = serde_json::from_slice(wanted.as_encoded_bytes())?;
        let index: usize = index;
        return run(&sizes[index], local_controllers);
    }
    for index in 0..sizes.len() {
        for local_controllers in [false, true] {
            // A process of its own: what an earlier run freed would blur the memory.
            let mut command = Command::new(std::env::current_exe()?);
            command.args(std::env::args().skip(1)).env(RUN, json!([index, local_controllers]).to_string());
            anyhow::ensure!(command.status()?.success(), "a run failed");
        }
    }
    Ok(())
}

fn run(size: &Size, local_controllers: bool) -> Result<()> {
    let controllers = if local_controllers { "on" } else { "off" };
    println!("\n{} Services, {} endpoints, local controllers {controllers}", size.services, size.endpoints);
    let config = Config {
        node_name: Some("node-1".to_owned()),
        local_controllers,
        service_cidrs: Some(vec!["10.96.0.0/12".parse()?]),
        cluster_cidrs: Some(vec!["10.128.0.0/9".parse()?]),
        ..Config::default()
    };
    let settings = Settings {
        workers: 2,
        flow_capacity: 1,
        masquerade_addresses: vec!["192.168.0.2".parse()?],
        masquerade_ports: 61000..=65534,
        seed: 1,
        ..Settings::default()
    };
    let shared = Shared::new(settings);
    let mut publisher = Publisher::new(config.clone(), vec!["192.168.0.2".parse()?], Arc::clone(&shared.slots));
    let before = resident()?;
    let mut changes = Vec::with_capacity(2 * size.services);
    for index in 0..size.services {
        changes.push(apply(Object::Service(Arc::new(service(index)?))));
        changes.push(apply(Object::EndpointSlice(Arc::new(slice(size, index, 0)?))));
    }
    let objects = resident()?;
    let begun = Instant::now();
    let table = publisher.update(Update { changes, ..Update::default() }).context("a load changes the table")?;
    shared.publish(Arc::clone(&table));
    let loaded = begun.elapsed();
    let after = resident()?;
    println!("full load from objects    {loaded:>10.1?}, {} frontends", table.len());
    let each = |bytes: u64, of: usize| bytes as f64 / of as f64;
    for (what, bytes) in
        [("objects", objects.saturating_sub(before)), ("objects and table", after.saturating_sub(before))]
    {
        let (service, endpoint) = (each(bytes, size.services), each(bytes, size.endpoints));
        let mib = bytes >> 20;
        println!("resident, {what:<17} {mib:>5} MiB: {service:.0} bytes a Service, or {endpoint:.0} bytes an endpoint");
    }
    drop(table);
    // Load took what it will need; changes are measured in a warm process.
    let mut rng = fastrand::Rng::with_seed(1);
    let masquerade = ["192.168.0.2".parse()?];
    let (mut applied, mut planned) = (histogram()?, histogram()?);
    for round in 1..=size.changes {
        let change = apply(Object::EndpointSlice(Arc::new(slice(size, rng.usize(..size.services), round)?)));
        let begun = Instant::now();
        let table = publisher.update(Update { changes: vec![change], ..Update::default() });
        let table = table.context("each change changes an endpoint")?;
        shared.publish(Arc::clone(&table));
        record(&mut applied, begun.elapsed())?;
        if round % (size.changes / 20) == 0 {
            let begun = Instant::now();
            let plan = Plan::new(&table, &config, &masquerade);
            record(&mut planned, begun.elapsed())?;
            anyhow::ensure!(!plan.services.is_empty(), "the Service range is in the plan");
        }
        if round % 1000 == 0 {
            publisher.release_idle();
        }
    }
    report("one changed slice applied", &applied);
    report("plan for the host, whole", &planned);
    let begun = Instant::now();
    let problems = publisher.problems().len();
    println!("all problems              {:>10.1?}, {problems} found", begun.elapsed());
    let folder = tempfile::tempdir()?;
    let saved = Saved::new(folder.path(), "bench");
    let begun = Instant::now();
    let bytes = saved.write(publisher.store().objects())?;
    println!("objects saved             {:>10.1?}, {} MiB", begun.elapsed(), bytes >> 20);
    let begun = Instant::now();
    let earlier = saved.read()?.context("they are there")?;
    println!("objects read again        {:>10.1?}, {}", begun.elapsed(), earlier.update.changes.len());
    let begun = Instant::now();
    anyhow::ensure!(publisher.update(earlier.update).is_none(), "they are the same");
    println!("the same objects anew     {:>10.1?}", begun.elapsed());
    let begun = Instant::now();
    publisher.release_idle();
    println!("idle counters released    {:>10.1?}", begun.elapsed());
    println!("resident at the end       {} MiB", resident()?.saturating_sub(before) >> 20);
    Ok(())
}

fn apply(object: Object) -> Change {
    Change::Apply(object, Origin::File { path: Path::new("scale.yaml").into(), document: 1 })
}

/// One in ten has a node port, one in a hundred a load-balancer address, one in twenty two ports.
fn service(index: usize) -> Result<Service> {
    let mut ports = vec![json!({"name": "http", "protocol": "TCP", "port": 80})];
    if index % 20 == 5 {
        ports.push(json!({"name": "metrics", "protocol": "TCP", "port": 9090}));
    }
    let mut kind = "ClusterIP";
    if index.is_multiple_of(10) && index / 10 < 2700 {
        kind = "NodePort";
        ports[0]["nodePort"] = json!(30000 + index / 10);
    }
    let status = if index.is_multiple_of(100) {
        json!({"loadBalancer": {"ingress": [{"ip": address(198, 18, index / 100)}]}})
    } else {
        json!({})
    };
    let ip = address(10, 96, index + 1);
    let object = json!({
        "metadata": {"namespace": format!("team-{}", index % 100), "name": format!("service-{index}"),
            "creationTimestamp": "2026-01-01T00:00:00Z", "labels": {"app": format!("app-{index}")}},
        "spec": {"type": kind, "clusterIP": ip, "clusterIPs": [ip], "ipFamilies": ["IPv4"], "ports": ports,
            "selector": {"app": format!("app-{index}")}},
        "status": status,
    });
    Ok(serde_json::from_value(object)?)
}

/// The slice of a Service. Each round gives its first endpoint another address.
fn slice(size: &Size, index: usize, round: usize) -> Result<EndpointSlice> {
    let (first, end) = (index * size.endpoints / size.services, (index + 1) * size.endpoints / size.services);
    let endpoint = |number: usize| -> Value {
        let moved = if number == first { round * 7 % 500_000 + size.endpoints } else { number };
        json!({"addresses": [address(10, 128, moved)], "nodeName": format!("node-{}", number % 1000), "zone": "a",
            "conditions": {"ready": true, "serving": true, "terminating": false},
            "targetRef": {"kind": "Pod", "namespace": format!("team-{}", index % 100), "name": format!("pod-{number}"), "uid": format!("uid-{number}")}})
    };
    let endpoints: Vec<Value> = (first..end).map(endpoint).collect();
    let object = json!({
        "metadata": {"namespace": format!("team-{}", index % 100), "name": format!("service-{index}-x7k2p"),
            "creationTimestamp": "2026-01-01T00:00:00Z",
            "labels": {"kubernetes.io/service-name": format!("service-{index}")}},
        "addressType": "IPv4", "endpoints": endpoints,
        "ports": [{"name": "http", "protocol": "TCP", "port": 8080}, {"name": "metrics", "protocol": "TCP", "port": 9090}],
    });
    Ok(serde_json::from_value(object)?)
}

/// The address so far behind the first of a range.
fn address(a: u8, b: u8, number: usize) -> String {
    let address = u32::from_be_bytes([a, b, 0, 0]) + number as u32;
    std::net::Ipv4Addr::from(address).to_string()
}

fn histogram() -> Result<Histogram<u64>> {
    Ok(Histogram::new_with_bounds(1, 60_000_000_000, 3)?)
}

fn record(histogram: &mut Histogram<u64>, time: Duration) -> Result<()> {
    Ok(histogram.record(u64::try_from(time.as_nanos())?.max(1))?)
}

fn report(what: &str, times: &Histogram<u64>) {
    let at = |quantile| Duration::from_nanos(times.value_at_quantile(quantile));
    let (median, p99, most) = (at(0.5), at(0.99), Duration::from_nanos(times.max()));
    println!("{what:<25} median {median:>9.1?}, p99 {p99:>9.1?}, most {most:>9.1?} of {}", times.len());
}

/// Bytes of this process in memory.
fn resident() -> Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).context("no VmRSS")?;
    let kilobytes: u64 = line.split_whitespace().nth(1).context("VmRSS without a number")?.parse()?;
    Ok(kilobytes * 1024)
}
