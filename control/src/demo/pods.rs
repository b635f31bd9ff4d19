//! The Pods: each a namespace with servers that answer with its name, and the object that a kubelet would keep of it.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use anyhow::{Context as _, Result};
use k8s_openapi::api::core::v1::{Pod, PodCondition, PodIP, PodStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use sluice_bench::netns::has_ipv6;
use sluice_bench::serve::PodServer;
use sluice_bench::topology::Topology;
use sluice_dataplane::table::ServiceName;

use super::cluster::NODE;
use super::workloads::Workload;

/// How long requests under way may take when a Pod ends.
const FINISH: Duration = Duration::from_secs(2);

/// All Pods that run.
#[derive(Debug)]
pub(super) struct Pods<'t> {
    topology: &'t Topology,
    running: BTreeMap<ServiceName, Running>,
    addresses_given: u16,
}

#[derive(Debug)]
struct Running {
    server: PodServer,
    object: Pod,
}

impl<'t> Pods<'t> {
    /// None yet.
    #[must_use]
    pub(super) fn new(topology: &'t Topology) -> Self {
        Self { topology, running: BTreeMap::new(), addresses_given: 0 }
    }

    /// Starts a Pod of a workload; it is ready when this returns.
    pub(super) fn start(&mut self, workload: &Workload, name: &str, revision: u32) -> Result<Pod> {
        let key = ServiceName::new(&workload.name.namespace, name);
        let addresses = self.next_addresses();
        let pod = self.topology.add_pod(&key.to_string(), &addresses)?;
        let ports = |ports: &std::collections::BTreeSet<u16>| ports.iter().copied().collect::<Vec<u16>>();
        let server = PodServer::start(&pod.ns, name, &ports(&workload.tcp), &ports(&workload.udp))
            .with_context(|| format!("cannot start Pod {key}"))?;
        let mut object = workload.pod(name, revision, NODE);
        object.status = Some(ready(&addresses));
        self.running.insert(key, Running { server, object: object.clone() });
        Ok(object)
    }

    /// A Pod without servers and without an object, for clients.
    pub(super) fn client(&mut self) -> Result<sluice_bench::topology::Pod> {
        let addresses = self.next_addresses();
        self.topology.add_pod("client", &addresses)
    }

    /// The object of a Pod that is asked to end: its servers go on. `None` if there is no such Pod.
    pub(super) fn terminating(&mut self, name: &ServiceName) -> Option<Pod> {
        let running = self.running.get_mut(name)?;
        running.object.metadata.deletion_timestamp = Some(Time(Timestamp::now()));
        Some(running.object.clone())
    }

    /// The object of a Pod that fails its readiness probe from now on. `None` if there is no such Pod.
    pub(super) fn not_ready(&mut self, name: &ServiceName) -> Option<Pod> {
        let running = self.running.get_mut(name)?;
        let conditions = running.object.status.iter_mut().flat_map(|status| status.conditions.iter_mut().flatten());
        for condition in conditions {
            condition.status = "False".to_owned();
        }
        Some(running.object.clone())
    }

    /// Ends a Pod: its servers finish what they are at, then its namespace goes.
    pub(super) fn remove(&mut self, name: &ServiceName) -> Result<()> {
        if let Some(running) = self.running.remove(name) {
            running.server.finish(FINISH);
            self.topology.remove_pod(&name.to_string())?;
        }
        Ok(())
    }

    /// How many run.
    #[must_use]
    pub(super) fn count(&self) -> usize {
        self.running.len()
    }

    /// Addresses that no Pod has had, one of each family that the kernel has.
    fn next_addresses(&mut self) -> Vec<IpAddr> {
        self.addresses_given += 1;
        let [high, low] = self.addresses_given.to_be_bytes();
        let mut addresses = vec![IpAddr::V4(Ipv4Addr::new(10, 244, high, low))];
        if has_ipv6() {
            addresses.push(Ipv6Addr::new(0xfd00, 0x10, 0x244, 0, 0, 0, 0, self.addresses_given).into());
        }
        addresses
    }
}

fn ready(addresses: &[IpAddr]) -> PodStatus {
    let condition =
        |kind: &str| PodCondition { type_: kind.to_owned(), status: "True".to_owned(), ..PodCondition::default() };
    PodStatus {
        phase: Some("Running".to_owned()),
        conditions: Some(vec![condition("ContainersReady"), condition("Ready")]),
        pod_ip: addresses.first().map(ToString::to_string),
        pod_ips: Some(addresses.iter().map(|ip| PodIP { ip: ip.to_string() }).collect()),
        ..PodStatus::default()
    }
}
