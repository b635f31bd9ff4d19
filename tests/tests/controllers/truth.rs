//! What does the API server say: whether all is at rest, and which endpoints are ready.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result};
use serde_json::Value;
use sluice_tests::control_plane::ControlPlane;

/// A moment's objects.
pub(crate) struct Truth {
    workloads: Vec<Value>,
    pods: Vec<Value>,
    services: Vec<Value>,
    slices: Vec<Value>,
}

impl Truth {
    /// Asks for all of them.
    pub(crate) fn read(plane: &ControlPlane) -> Result<Self> {
        let list = |path: &str| -> Result<Vec<Value>> {
            let mut list = plane.get(path)?;
            let items = list["items"].as_array_mut().with_context(|| format!("{path} has no items"))?;
            Ok(std::mem::take(items))
        };
        let mut workloads = list("/apis/apps/v1/deployments")?;
        workloads.extend(list("/apis/apps/v1/statefulsets")?);
        Ok(Self {
            workloads,
            pods: list("/api/v1/pods")?,
            services: list("/api/v1/services")?,
            slices: list("/apis/discovery.k8s.io/v1/endpointslices")?,
        })
    }

    /// What is still to be done by controllers or kubelet; `None`: nothing.
    pub(crate) fn unrest(&self) -> Option<String> {
        let wanted: u64 = self.workloads.iter().filter_map(|it| it["spec"]["replicas"].as_u64()).sum();
        if let Some(workload) = self.workloads.iter().find(|workload| !is_settled(workload)) {
            return Some(format!("{}: {}", name(workload), workload["status"]));
        }
        if let Some(pod) = self.pods.iter().find(|pod| !is_ready(pod)) {
            return Some(format!("Pod {}: {}", name(pod), pod["status"]));
        }
        if self.pods.len() as u64 != wanted {
            return Some(format!("{} Pods instead of {wanted}", self.pods.len()));
        }
        self.services.iter().find_map(|service| {
            let (wanted, have) = (self.ready_pods(service), self.ready_addresses(service));
            (wanted != have).then(|| format!("slices of {} have {have:?} instead of {wanted:?}", name(service)))
        })
    }

    /// Ready endpoints of all Services that have a ClusterIP, as `NAMESPACE/SERVICE PORT-NAME/PROTOCOL ADDRESS:PORT`.
    pub(crate) fn endpoints(&self) -> BTreeSet<String> {
        let mut all = BTreeSet::new();
        for service in self.services.iter().filter(|service| service["spec"]["clusterIP"] != "None") {
            for slice in self.slices_of(service) {
                for (port, address) in items(&slice["ports"]).flat_map(|port| ready(slice).map(move |at| (port, at))) {
                    let number = &port["port"];
                    let place = if address.contains(':') {
                        format!("[{address}]:{number}")
                    } else {
                        format!("{address}:{number}")
                    };
                    let (port, protocol) = (text(&port["name"]), text(&port["protocol"]).to_lowercase());
                    all.insert(format!("{} {port}/{protocol} {place}", name(service)));
                }
            }
        }
        all
    }

    /// Addresses of the ready Pods that a Service selects, of its families.
    fn ready_pods(&self, service: &Value) -> BTreeSet<String> {
        let families: Vec<&str> = items(&service["spec"]["ipFamilies"]).map(text).collect();
        let of_family = |ip: &&str| families.contains(&if ip.contains(':') { "IPv6" } else { "IPv4" });
        let namespace = &service["metadata"]["namespace"];
        let selected = self.pods.iter().filter(|pod| {
            pod["metadata"]["namespace"] == *namespace
                && selects(&service["spec"]["selector"], &pod["metadata"]["labels"])
        });
        let addresses = selected.flat_map(|pod| items(&pod["status"]["podIPs"]).map(|ip| text(&ip["ip"])));
        addresses.filter(of_family).map(str::to_owned).collect()
    }

    /// Addresses that slices call ready.
    fn ready_addresses(&self, service: &Value) -> BTreeSet<String> {
        self.slices_of(service).flat_map(ready).map(str::to_owned).collect()
    }

    fn slices_of<'t>(&'t self, service: &'t Value) -> impl Iterator<Item = &'t Value> {
        let own = &service["metadata"];
        self.slices.iter().filter(move |slice| {
            let metadata = &slice["metadata"];
            metadata["namespace"] == own["namespace"] && metadata["labels"]["kubernetes.io/service-name"] == own["name"]
        })
    }
}

/// Whether a selector is for these labels; none, or an empty one, is for nothing.
pub(crate) fn selects(selector: &Value, labels: &Value) -> bool {
    selector
        .as_object()
        .is_some_and(|selector| !selector.is_empty() && selector.iter().all(|(label, value)| labels[label] == *value))
}

/// `NAMESPACE/NAME`.
pub(crate) fn name(object: &Value) -> String {
    format!("{}/{}", text(&object["metadata"]["namespace"]), text(&object["metadata"]["name"]))
}

/// The items of a list, which may be missing.
pub(crate) fn items(list: &Value) -> impl Iterator<Item = &Value> {
    list.as_array().into_iter().flatten()
}

/// A text, which may be missing.
pub(crate) fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

/// Addresses of the ready endpoints of a slice.
fn ready(slice: &Value) -> impl Iterator<Item = &str> {
    let ready = items(&slice["endpoints"]).filter(|endpoint| endpoint["conditions"]["ready"] != false);
    ready.map(|endpoint| text(&endpoint["addresses"][0]))
}

/// Whether all Pods of a Deployment or StatefulSet are there, of the newest revision, and ready.
fn is_settled(workload: &Value) -> bool {
    let (status, replicas) = (&workload["status"], &workload["spec"]["replicas"]);
    let counts = ["replicas", "updatedReplicas", "readyReplicas", "availableReplicas"];
    let all = |field: &&str| status[*field].as_u64().unwrap_or(0) == replicas.as_u64().unwrap_or(0);
    status["observedGeneration"] == workload["metadata"]["generation"]
        && counts.iter().all(all)
        && status["currentRevision"] == status["updateRevision"]
}

fn is_ready(pod: &Value) -> bool {
    let is_true = |condition: &Value| condition["type"] == "Ready" && condition["status"] == "True";
    pod["metadata"]["deletionTimestamp"].is_null() && items(&pod["status"]["conditions"]).any(is_true)
}
