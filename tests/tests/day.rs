//! A day of a busy cluster in minutes: thousands of random changes through a real API server, after which the daemon is as if it
//! had just begun.
//!
//! `SLUICE_BIG=1`: 10,000 changes.
#![allow(clippy::unwrap_used)]

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use sluice_tests::api_cluster::{cluster, publish, wait_for};
use sluice_tests::can_run_in_namespaces;
use sluice_tests::cluster::{Cluster, SOON};
use sluice_tests::control_plane::{self, ControlPlane};
use sluice_tests::manifests::NODE;
use sluice_tests::world::{Change, World, ZONE};

/// Services at most.
const SERVICES: u8 = 25;
/// How much more memory may be resident for nothing: what allocators keep.
const SLACK: u64 = 4 << 20;

/// Makes a change. Whether the API server took it.
fn apply(plane: &ControlPlane, change: &Change) -> anyhow::Result<bool> {
    let done = match change {
        Change::Create(object) => plane.create(object),
        Change::Replace(object) => plane.replace(object),
        Change::Delete(object) => plane.delete(object),
        Change::Zone(zone) => {
            let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE}});
            plane.patch(&node, &json!({"metadata": {"labels": {ZONE: zone}}}))
        }
    };
    match done {
        Err(error) if !format!("{error:#}").contains("422") => Err(error),
        done => Ok(done.is_ok()),
    }
}

/// Frontends, as the daemon lists them.
fn frontends(cluster: &Cluster) -> Value {
    let list: Value = serde_json::from_str(&cluster.admin("/api/v1/frontends").unwrap()).unwrap();
    list["items"].clone()
}

/// Waits until exactly these frontends are served.
fn wait_until_only(cluster: &Cluster, wanted: &Value) {
    let deadline = Instant::now() + SOON;
    loop {
        let found = frontends(cluster);
        if found == *wanted {
            return;
        }
        assert!(Instant::now() < deadline, "{found} instead of {wanted}\n{}", cluster.log());
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn thousands_of_changes_leave_nothing_behind() {
    const WHAT: &str = "a day of changes";
    if !can_run_in_namespaces(WHAT) || !control_plane::can_run(WHAT) {
        return;
    }
    let (parts, changes) = if std::env::var_os("SLUICE_BIG").is_some() { (10, 1000) } else { (2, 60) };
    let (mut cluster, plane) = cluster();
    cluster.start().unwrap();
    wait_for(&cluster, 10, "forward", &["10.244.0.1:8080"]);
    let (before, begun) = (frontends(&cluster), Instant::now());
    let mut resident = vec![cluster.resident().unwrap()];
    for part in 0..parts {
        let mut world = World::new(part, SERVICES);
        let mut made = 0;
        while made < changes {
            made += usize::from(world.step(|change| apply(&plane, change)).unwrap());
        }
        let full = cluster.resident().unwrap();
        let many = frontends(&cluster).as_array().unwrap().len();
        // Back to what there was at first.
        for object in world.objects().collect::<Vec<_>>() {
            plane.delete(object).unwrap();
        }
        wait_until_only(&cluster, &before);
        resident.push(cluster.resident().unwrap());
        let (services, slices) = world.len();
        println!(
            "{} changes, {:?}: resident {} KiB with {services} Services, {slices} slices, {many} frontends; {} KiB without",
            (part + 1) * changes as u64,
            begun.elapsed(),
            full >> 10,
            resident[resident.len() - 1] >> 10,
        );
    }
    // What is used for the first time is there to stay.
    let (early, last) = (resident[1], resident[resident.len() - 1]);
    assert!(last <= early + SLACK, "memory grows: {resident:?}");
    publish(&cluster, &plane, "still", 40);
    wait_for(&cluster, 40, "forward", &["10.244.0.1:8080"]);
}
