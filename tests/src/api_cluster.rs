//! A node whose Services come from a real API server.
#![allow(clippy::unwrap_used, clippy::missing_panics_doc)]

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use sluice_bench::client::{Target, ask};

use crate::cluster::{Cluster, SOON};
use crate::control_plane::ControlPlane;
use crate::manifests;

/// Where the API server is, as a Pod of the cluster.
pub const ADDRESS: &str = "10.244.255.1";

/// A node whose Services come from an API server, with two Pods; the Node and the Service `web` with the first are there.
#[must_use]
pub fn cluster() -> (Cluster, ControlPlane) {
    let (mut cluster, plane) = empty();
    cluster.add_pod(1).unwrap();
    cluster.add_pod(2).unwrap();
    publish(&cluster, &plane, "web", 10);
    (cluster, plane)
}

/// A node whose Services come from an API server, which has nothing but the Node.
#[must_use]
pub fn empty() -> (Cluster, ControlPlane) {
    let mut cluster = Cluster::new().unwrap();
    let pod = cluster.topology.add_pod("control-plane", &[ADDRESS.parse().unwrap()]).unwrap();
    let plane = ControlPlane::start(pod.ns, ADDRESS).unwrap();
    let addresses: Vec<IpAddr> = cluster.topology.config.node.iter().map(ipnet::IpNet::addr).collect();
    plane.create(&manifests::node(&addresses)).unwrap();
    cluster.watch_api(plane.kubeconfig("proxy"));
    cluster.arguments(&["--log-level", "info,sluice_control::source::api=debug"]);
    (cluster, plane)
}

/// Creates a Service whose endpoint is the first Pod.
pub fn publish(cluster: &Cluster, plane: &ControlPlane, name: &str, host: u8) {
    plane.create(&service(name, host)).unwrap();
    for slice in slices(cluster, name, 0..1) {
        plane.create(&slice).unwrap();
    }
}

/// With one port: an API server gives a node port number to one port only.
#[must_use]
pub fn service(name: &str, host: u8) -> Value {
    let mut service = manifests::service(name, host);
    service["spec"]["ports"].as_array_mut().unwrap().truncate(1);
    service
}

/// The slices of a Service with the Pods of these positions.
#[must_use]
pub fn slices(cluster: &Cluster, name: &str, pods: std::ops::Range<usize>) -> Vec<Value> {
    let pods: Vec<(String, Vec<IpAddr>)> =
        cluster.pods[pods].iter().map(|pod| (pod.pod.name.clone(), pod.pod.addresses.clone())).collect();
    manifests::slices(name, &pods)
}

/// Waits until the endpoints that a new connection to this ClusterIP may get are these.
pub fn wait_for(cluster: &Cluster, host: u8, outcome: &str, endpoints: &[&str]) {
    let to = format!("10.96.0.{host}:80");
    let trace = ["trace", "--from", "10.244.0.7", "--to", &to, "--admin", "127.0.0.1:10249", "-o", "json"];
    let wanted = json!(endpoints);
    let deadline = Instant::now() + SOON;
    loop {
        let answer: Value = serde_json::from_str(&cluster.sluice(&trace).unwrap()).unwrap();
        if answer["outcome"] == outcome && (answer["endpoints"] == wanted || endpoints.is_empty()) {
            return;
        }
        assert!(Instant::now() < deadline, "{to}: {answer} instead of {outcome} {wanted}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The Pod that answers the outside client at this ClusterIP.
#[must_use]
pub fn who_answers(cluster: &Cluster, host: u8) -> Option<String> {
    let target = Target::Http(SocketAddr::from(([10, 96, 0, host], 80)));
    cluster.topology.client.run(|| Ok(ask(target, Duration::from_secs(2)).result.ok())).unwrap()
}
