//! A node whose Services come from a real API server.

use std::net::IpAddr;
use std::ops::Range;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use crate::cluster::{Cluster, SOON};
use crate::control_plane::ControlPlane;
use crate::manifests;

/// Where the API server is, as a Pod of the cluster.
pub const ADDRESS: &str = "10.244.255.1";

/// The node with two Pods, and the control plane; the Node and the Service `web` with the first Pod are there.
pub fn cluster() -> Result<(Cluster, ControlPlane)> {
    let mut cluster = Cluster::new()?;
    cluster.add_pod(1)?;
    cluster.add_pod(2)?;
    let pod = cluster.topology.add_pod("control-plane", &[ADDRESS.parse()?])?;
    let plane = ControlPlane::start(pod.ns, ADDRESS)?;
    let addresses: Vec<IpAddr> = cluster.topology.config.node.iter().map(ipnet::IpNet::addr).collect();
    plane.create(&manifests::node(&addresses))?;
    publish(&cluster, &plane, "web", 10)?;
    cluster.watch_api(plane.kubeconfig("proxy"));
    cluster.arguments(&["--log-level", "info,sluice_control::source::api=debug"]);
    Ok((cluster, plane))
}

/// Creates a Service whose endpoint is the first Pod.
pub fn publish(cluster: &Cluster, plane: &ControlPlane, name: &str, host: u8) -> Result<()> {
    plane.create(&service(name, host))?;
    slices(cluster, name, 0..1).iter().try_for_each(|slice| plane.create(slice))
}

/// With one port: an API server gives a node port number to one port only.
#[must_use]
pub fn service(name: &str, host: u8) -> Value {
    let mut service = manifests::service(name, host);
    if let Some(ports) = service["spec"]["ports"].as_array_mut() {
        ports.truncate(1);
    }
    service
}

/// The slices of a Service with these Pods as endpoints.
#[must_use]
pub fn slices(cluster: &Cluster, name: &str, pods: Range<usize>) -> Vec<Value> {
    let pods: Vec<(String, Vec<IpAddr>)> =
        cluster.pods[pods].iter().map(|pod| (pod.pod.name.clone(), pod.pod.addresses.clone())).collect();
    manifests::slices(name, &pods)
}

/// Waits until the endpoints that a new connection to this ClusterIP may get are these.
pub fn wait_for(cluster: &Cluster, host: u8, outcome: &str, endpoints: &[&str]) -> Result<()> {
    let to = format!("10.96.0.{host}:80");
    let trace = ["trace", "--from", "10.244.0.7", "--to", &to, "--admin", "127.0.0.1:10249", "-o", "json"];
    let wanted = json!(endpoints);
    let deadline = Instant::now() + SOON;
    loop {
        let answer: Value = serde_json::from_str(&cluster.sluice(&trace)?)?;
        if answer["outcome"] == outcome && (answer["endpoints"] == wanted || endpoints.is_empty()) {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "{to}: {answer} instead of {outcome} {wanted}\n{}", cluster.log());
        std::thread::sleep(Duration::from_millis(20));
    }
}
