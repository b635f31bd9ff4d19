//! What one changed EndpointSlice costs among many, what a full load costs, and how much memory objects and table take.
//!
//! `cargo bench -p sluice-control --bench scale`. `cargo test` runs it in small: only whether it works.

mod objects;

use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use hdrhistogram::Histogram;
use objects::{Cluster, apply, config, service, settings};
use serde_json::json;
use sluice_control::config::Config;
use sluice_control::host::Plan;
use sluice_control::object::Object;
use sluice_control::publish::Publisher;
use sluice_control::saved::Saved;
use sluice_control::source::Update;
use sluice_control::store::Store;
use sluice_dataplane::packet_path::Shared;

/// Tells a process which size to run, and whether with local controllers.
const RUN: &str = "SLUICE_SCALE_RUN";

/// What is measured.
struct Size {
    services: usize,
    endpoints: usize,
    changes: usize,
}

impl Size {
    fn cluster(&self) -> Cluster {
        Cluster { services: self.services, endpoints: self.endpoints }
    }
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
    let config = Config { local_controllers, ..config()? };
    let shared = Shared::new(settings()?);
    let mut publisher = Publisher::new(config.clone(), vec!["192.168.0.2".parse()?], Arc::clone(&shared.slots));
    let (cluster, before) = (size.cluster(), resident()?);
    let mut changes = Vec::with_capacity(2 * size.services);
    for index in 0..size.services {
        changes.push(apply(Object::Service(Arc::new(service(index)?))));
        changes.push(apply(Object::EndpointSlice(Arc::new(cluster.slice(index, 0)?))));
    }
    // Dropped again: the publisher's own will have its room.
    let mut store = Store::default();
    store.apply(changes.iter().cloned());
    let stored = resident()?;
    drop(store);
    let begun = Instant::now();
    let table = publisher.update(Update { changes, ..Update::default() }).context("a load changes the table")?;
    shared.publish(Arc::clone(&table));
    let loaded = begun.elapsed();
    let after = resident()?;
    println!("full load from objects    {loaded:>10.1?}, {} frontends", table.len());
    let each = |bytes: u64, of: usize| bytes as f64 / of as f64;
    for (what, bytes) in [
        ("objects", stored.saturating_sub(before)),
        ("table and counters", after.saturating_sub(stored)),
        ("all", after.saturating_sub(before)),
    ] {
        let (service, endpoint) = (each(bytes, size.services), each(bytes, size.endpoints));
        let mib = bytes >> 20;
        println!("resident, {what:<18} {mib:>5} MiB: {service:.0} bytes a Service, or {endpoint:.0} bytes an endpoint");
    }
    drop(table);
    // Load took what it will need; changes are measured in a warm process.
    let mut rng = fastrand::Rng::with_seed(1);
    let masquerade = ["192.168.0.2".parse()?];
    let (mut applied, mut planned) = (histogram()?, histogram()?);
    for round in 1..=size.changes {
        let change = apply(Object::EndpointSlice(Arc::new(cluster.slice(rng.usize(..size.services), round)?)));
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
