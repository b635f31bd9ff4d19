//! What does the API server say: whether all is at rest, and which endpoints are ready.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result};
use serde_json::Value;
use sluice_tests::control_plane::ControlPlane;
use sluice_tests::manifests::NODE;

/// A moment's objects.
pub(crate) struct Truth {
    nodes: Vec<Value>,
    workloads: Vec<Value>,
    jobs: Vec<Value>,
    /// Those that have not ended.
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
        workloads.extend(list("/apis/apps/v1/daemonsets")?);
        let mut pods = list("/api/v1/pods")?;
        pods.retain(|pod| pod["status"]["phase"] != "Succeeded");
        Ok(Self {
            nodes: list("/api/v1/nodes")?,
            workloads,
            jobs: list("/apis/batch/v1/jobs")?,
            pods,
            services: list("/api/v1/services")?,
            slices: list("/apis/discovery.k8s.io/v1/endpointslices")?,
        })
    }

    /// What is still to be done by controllers or kubelet; `None`: nothing.
    pub(crate) fn unrest(&self) -> Option<String> {
        let wanted: u64 = self.workloads.iter().map(|workload| self.pods_wanted(workload)).sum();
        if let Some(workload) = self.workloads.iter().find(|it| !is_settled(it, self.pods_wanted(it))) {
            return Some(format!("{}: {}", name(workload), workload["status"]));
        }
        let is_complete = |condition: &Value| condition["type"] == "Complete" && condition["status"] == "True";
        if let Some(job) = self.jobs.iter().find(|job| !items(&job["status"]["conditions"]).any(is_complete)) {
            return Some(format!("Job {}: {}", name(job), job["status"]));
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

    /// Ready endpoints of all Services that have a ClusterIP, on this node where no other may be taken, as `NAMESPACE/SERVICE PORT-NAME/PROTOCOL ADDRESS:PORT`.
    pub(crate) fn endpoints(&self) -> BTreeSet<String> {
        let mut all = BTreeSet::new();
        for service in self.services.iter().filter(|service| service["spec"]["clusterIP"] != "None") {
            for slice in self.slices_of(service) {
                let may_be_taken = |endpoint: &&Value| !stays_on_node(service) || endpoint["nodeName"] == NODE;
                let addresses: Vec<&str> = ready(slice).filter(may_be_taken).map(address).collect();
                for (port, address) in
                    items(&slice["ports"]).flat_map(|port| addresses.iter().map(move |at| (port, at)))
                {
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

    /// How many Pods a workload is to have: a DaemonSet one for each Node that it may run on.
    fn pods_wanted(&self, workload: &Value) -> u64 {
        let nodes = || self.nodes.iter().filter(|node| may_run_on(workload, node)).count() as u64;
        workload["spec"]["replicas"].as_u64().unwrap_or_else(nodes)
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
        self.slices_of(service).flat_map(ready).map(|endpoint| address(endpoint).to_owned()).collect()
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

/// Whether clients of a Service get only endpoints of their own node.
pub(crate) fn stays_on_node(service: &Value) -> bool {
    service["spec"]["type"] == "ClusterIP" && service["spec"]["internalTrafficPolicy"] == "Local"
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

/// The ready endpoints of a slice.
fn ready(slice: &Value) -> impl Iterator<Item = &Value> {
    items(&slice["endpoints"]).filter(|endpoint| endpoint["conditions"]["ready"] != false)
}

fn address(endpoint: &Value) -> &str {
    text(&endpoint["addresses"][0])
}

/// Whether the Pods of a DaemonSet are for this Node: its labels, and no taint that they do not tolerate.
fn may_run_on(set: &Value, node: &Value) -> bool {
    let spec = &set["spec"]["template"]["spec"];
    let has_labels = spec["nodeSelector"].is_null() || selects(&spec["nodeSelector"], &node["metadata"]["labels"]);
    let is_tolerated = |taint: &Value| {
        items(&spec["tolerations"]).any(|toleration| {
            (toleration["key"].is_null() || toleration["key"] == taint["key"])
                && (toleration["effect"].is_null() || toleration["effect"] == taint["effect"])
                && (toleration["operator"] == "Exists" || text(&toleration["value"]) == text(&taint["value"]))
        })
    };
    has_labels && items(&node["spec"]["taints"]).all(is_tolerated)
}

/// Whether all Pods of a workload are there, of the newest revision, and ready.
fn is_settled(workload: &Value, wanted: u64) -> bool {
    let status = &workload["status"];
    let counts: &[&str] = if workload["spec"]["replicas"].is_null() {
        &[
            "desiredNumberScheduled",
            "currentNumberScheduled",
            "updatedNumberScheduled",
            "numberReady",
            "numberAvailable",
        ]
    } else {
        &["replicas", "updatedReplicas", "readyReplicas", "availableReplicas"]
    };
    status["observedGeneration"] == workload["metadata"]["generation"]
        && counts.iter().all(|field| status[*field].as_u64().unwrap_or(0) == wanted)
        && status["currentRevision"] == status["updateRevision"]
}

fn is_ready(pod: &Value) -> bool {
    let is_true = |condition: &Value| condition["type"] == "Ready" && condition["status"] == "True";
    pod["metadata"]["deletionTimestamp"].is_null() && items(&pod["status"]["conditions"]).any(is_true)
}
