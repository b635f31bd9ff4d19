//! The Service `web` with Pods that come and go, said state by state.
#![allow(clippy::unwrap_used, clippy::missing_panics_doc, reason = "a test that cannot go on")]

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use serde_json::{Value, json};
use sluice_bench::client::{Connection, Failure, Target};
use sluice_bench::load::{Load, Plan};
use sluice_bench::netns::NetNs;
use sluice_bench::serve::PodServer;

use crate::cluster::{Cluster, SOON};
use crate::manifests;

/// The Service `web` with Pods that come and go.
pub struct Web {
    /// Node, client and daemon.
    pub cluster: Cluster,
    /// Servers of the Pods, by number.
    pub servers: BTreeMap<u8, PodServer>,
}

/// Address of the Pod with this number.
#[must_use]
pub fn address(number: u8) -> IpAddr {
    IpAddr::V4(Ipv4Addr::new(10, 244, 0, number))
}

impl Web {
    /// Pods with these numbers, all ready, and the daemon running.
    pub fn new(pods: impl IntoIterator<Item = u8>) -> Self {
        let mut web = Self { cluster: Cluster::new().unwrap(), servers: BTreeMap::new() };
        let pods: Vec<u8> = pods.into_iter().collect();
        pods.iter().for_each(|number| web.add(*number, *number));
        let ready: Vec<(u8, &str)> = pods.iter().map(|number| (*number, "ready")).collect();
        web.write(&ready, json!({}));
        web.cluster.start().unwrap();
        web
    }

    /// A Pod `web-NUMBER` that has the address of `host`.
    pub fn add(&mut self, number: u8, host: u8) {
        let pod = self.cluster.topology.add_pod(&format!("web-{number}"), &[address(host)]).unwrap();
        let server = PodServer::start(&pod.ns, &pod.name, &[8080], &[5353]).unwrap();
        self.servers.insert(number, server);
    }

    /// Writes the Service with endpoints: number of the Pod, state (`ready`, `terminating`, else neither).
    pub fn write(&self, endpoints: &[(u8, &str)], annotations: Value) {
        let named: Vec<(u8, u8, &str)> = endpoints.iter().map(|(number, state)| (*number, *number, *state)).collect();
        self.write_named(&named, annotations);
    }

    /// Writes the Service with endpoints: number of the Pod, host of its address, state.
    pub fn write_named(&self, endpoints: &[(u8, u8, &str)], annotations: Value) {
        let mut service = manifests::service("web", 10);
        service["metadata"]["annotations"] = annotations;
        let entries: Vec<Value> = endpoints
            .iter()
            .map(|(number, host, state)| {
                let (ready, terminating) = (*state == "ready", *state == "terminating");
                json!({
                    "addresses": [address(*host).to_string()],
                    "conditions": {"ready": ready, "serving": ready || terminating, "terminating": terminating},
                    "nodeName": manifests::NODE,
                    "targetRef": {"kind": "Pod", "namespace": "default", "name": format!("web-{number}"), "uid": format!("uid-{number}")},
                })
            })
            .collect();
        let mut slice = manifests::slices("web", &[]).remove(0);
        slice["endpoints"] = Value::Array(entries);
        self.cluster.write("web.json", &[service, slice]).unwrap();
    }

    /// Publishes these endpoints and waits until the table is in force.
    pub fn publish(&self, endpoints: &[(u8, &str)]) {
        let generation = self.cluster.generation().unwrap();
        self.write(endpoints, json!({}));
        self.cluster.wait_for_table_after(generation).unwrap();
    }

    /// The outside client.
    #[must_use]
    pub fn outside(&self) -> &NetNs {
        &self.cluster.topology.client
    }

    /// The ClusterIP.
    #[must_use]
    pub fn frontend(&self) -> SocketAddr {
        self.cluster.web(true)[0]
    }

    /// A long-lived connection, and the Pod that it reached.
    #[must_use]
    pub fn connect(&self) -> (String, Connection) {
        let open = || {
            let failed = |failure: Failure| anyhow::anyhow!("{failure}");
            let mut connection = Connection::open(self.frontend(), SOON).map_err(failed)?;
            Ok((connection.get("/").map_err(failed)?, connection))
        };
        self.outside().run(open).unwrap()
    }

    /// Clients that open connections all the time.
    #[must_use]
    pub fn load(&self, concurrency: usize) -> Load {
        let plan =
            Plan { concurrency, pause: Duration::from_millis(5), ..Plan::new(vec![Target::Http(self.frontend())]) };
        Load::start(self.outside(), &plan).unwrap()
    }

    /// What the daemon says of the endpoint with this number.
    #[must_use]
    pub fn endpoint(&self, number: u8) -> Option<Value> {
        let list: Value = serde_json::from_str(&self.cluster.admin("/api/v1/endpoints").unwrap()).unwrap();
        let wanted = SocketAddr::new(address(number), 8080).to_string();
        list["items"].as_array().unwrap().iter().find(|item| item["address"] == wanted.as_str()).cloned()
    }
}
