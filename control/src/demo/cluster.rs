//! What would a cluster's API serve: complete Services, EndpointSlices and the Node, written where the daemon reads them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use k8s_openapi::api::core::v1::{LoadBalancerIngress, Node, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use serde_json::{Value, json};
use sluice_dataplane::table::ServiceName;

use crate::config::Config;
use crate::local::LocalControllers;
use crate::object::{Key, Object, service_of};
use crate::problem::{Origin, Problem};
use crate::source::Change;

/// Name of the node.
pub(super) const NODE: &str = "demo-node";
const FILE: &str = "cluster.json";

/// The cluster's objects. Its controllers are those that the folder source plays; the demo adds the cloud's part.
#[derive(Debug)]
pub(super) struct Cluster {
    folder: PathBuf,
    controllers: LocalControllers,
    objects: BTreeMap<Key, Object>,
    /// Every endpoint there ever was: Pods by Service.
    endpoints: BTreeMap<ServiceName, BTreeSet<String>>,
}

impl Cluster {
    /// An empty cluster with one Node, written to `folder`.
    pub(super) fn new(folder: &Path, node_addresses: &[IpAddr]) -> Result<Self> {
        fs::create_dir(folder).context("cannot make the folder of manifests")?;
        let mut cluster = Self {
            folder: folder.to_owned(),
            controllers: LocalControllers::new(&Config::default()),
            objects: BTreeMap::new(),
            endpoints: BTreeMap::new(),
        };
        cluster.keep(vec![apply(Object::Node(node(node_addresses)?.into()))]);
        cluster.write()?;
        Ok(cluster)
    }

    /// Adds Services: controllers complete them, and the cloud gives load balancers their addresses.
    pub(super) fn add_services(&mut self, services: Vec<Service>) -> Result<()> {
        let changes = services.into_iter().map(|service| apply(Object::Service(service.into()))).collect();
        let completed = self.controllers.complete(changes);
        self.keep(completed);
        let waiting = self.services().into_iter().filter(|service| waits_for_cloud(service));
        let with_status: Vec<Change> = waiting
            .enumerate()
            .map(|(number, service)| apply(Object::Service(from_cloud(service, number + 1).into())))
            .collect();
        let completed = self.controllers.complete(with_status);
        self.keep(completed);
        self.write()
    }

    /// Applies changes of Pods. Returns the Services whose EndpointSlices changed.
    pub(super) fn update(&mut self, changes: Vec<Change>) -> Result<Vec<ServiceName>> {
        let completed = self.controllers.complete(changes);
        let touched = self.keep(completed);
        self.write()?;
        Ok(touched)
    }

    /// All Services, complete.
    #[must_use]
    pub(super) fn services(&self) -> Vec<&Service> {
        let services = self.objects.values().filter_map(|object| match object {
            Object::Service(service) => Some(&**service),
            _ => None,
        });
        services.collect()
    }

    /// All EndpointSlices.
    #[must_use]
    pub(super) fn slices(&self) -> Vec<&EndpointSlice> {
        let slices = self.objects.values().filter_map(|object| match object {
            Object::EndpointSlice(slice) => Some(&**slice),
            _ => None,
        });
        slices.collect()
    }

    /// Pods that are or were endpoints, by Service.
    #[must_use]
    pub(super) fn endpoints_ever(&self) -> &BTreeMap<ServiceName, BTreeSet<String>> {
        &self.endpoints
    }

    /// What the controllers could not make up.
    #[must_use]
    pub(super) fn problems(&self) -> Vec<Problem> {
        self.controllers.problems()
    }

    fn keep(&mut self, changes: Vec<Change>) -> Vec<ServiceName> {
        let mut touched = Vec::new();
        for change in changes {
            let key = match &change {
                Change::Apply(object, _) => object.key(),
                Change::Delete(key) => key.clone(),
            };
            let old = match change {
                Change::Apply(object, _) => {
                    if let Object::EndpointSlice(slice) = &object {
                        touched.extend(self.remember_endpoints(slice));
                    }
                    self.objects.insert(key, object)
                }
                Change::Delete(_) => self.objects.remove(&key),
            };
            if let Some(Object::EndpointSlice(slice)) = &old {
                touched.extend(service_of(slice));
            }
        }
        touched.sort_unstable();
        touched.dedup();
        touched
    }

    fn remember_endpoints(&mut self, slice: &EndpointSlice) -> Option<ServiceName> {
        let service = service_of(slice)?;
        let known = self.endpoints.entry(service.clone()).or_default();
        let targets = slice.endpoints.iter().flatten().filter_map(|endpoint| endpoint.target_ref.as_ref());
        known.extend(targets.filter_map(|target| target.name.clone()));
        Some(service)
    }

    /// One file, replaced as a whole: what changes together reaches the daemon together.
    fn write(&self) -> Result<()> {
        let items: Result<Vec<Value>, serde_json::Error> = self.objects.values().filter_map(published).collect();
        let list = json!({"apiVersion": "v1", "kind": "List", "items": items.context("cannot write objects")?});
        let hidden = self.folder.join(format!(".{FILE}.new"));
        fs::write(&hidden, list.to_string()).with_context(|| format!("cannot write {}", hidden.display()))?;
        fs::rename(&hidden, self.folder.join(FILE)).with_context(|| format!("cannot write {FILE}"))
    }
}

/// An object that is there or has changed.
#[must_use]
pub(super) fn apply(object: Object) -> Change {
    Change::Apply(object, Origin::LocalController)
}

/// What a data plane is told of an object: Pods reach it as endpoints only.
fn published(object: &Object) -> Option<Result<Value, serde_json::Error>> {
    match object {
        Object::Service(object) => Some(serde_json::to_value(&**object)),
        Object::EndpointSlice(object) => Some(serde_json::to_value(&**object)),
        Object::Node(object) => Some(serde_json::to_value(&**object)),
        Object::Pod(_)
        | Object::ServiceCidr(_)
        | Object::Namespace(_)
        | Object::Deployment(_)
        | Object::StatefulSet(_) => None,
    }
}

fn node(addresses: &[IpAddr]) -> Result<Node> {
    let addresses: Vec<Value> =
        addresses.iter().map(|ip| json!({"type": "InternalIP", "address": ip.to_string()})).collect();
    let node = json!({
        "metadata": {"name": NODE},
        "spec": {"podCIDR": "10.244.0.0/16", "podCIDRs": ["10.244.0.0/16", "fd00:10:244::/64"]},
        "status": {"addresses": addresses},
    });
    serde_json::from_value(node).context("the Node object")
}

fn waits_for_cloud(service: &Service) -> bool {
    let is_load_balancer = service.spec.as_ref().and_then(|spec| spec.type_.as_deref()) == Some("LoadBalancer");
    let status = service.status.as_ref().and_then(|status| status.load_balancer.as_ref());
    is_load_balancer && status.and_then(|status| status.ingress.as_ref()).is_none_or(Vec::is_empty)
}

/// With addresses of the families that it has.
fn from_cloud(service: &Service, number: usize) -> Service {
    let mut service = service.clone();
    let families = service.spec.iter().flat_map(|spec| spec.ip_families.iter().flatten());
    let ingress = families.map(|family| LoadBalancerIngress {
        ip: Some(if family == "IPv6" {
            format!("fd00:31::{number:x}")
        } else {
            format!("172.31.{}.{}", number / 250, number % 250 + 1)
        }),
        ip_mode: Some("VIP".to_owned()),
        ..LoadBalancerIngress::default()
    });
    let ingress: Vec<LoadBalancerIngress> = ingress.collect();
    let status = service.status.get_or_insert_default();
    status.load_balancer.get_or_insert_default().ingress = Some(ingress);
    service
}
