//! The last good objects. Says which Services an update touches, so that nothing else is resolved again.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use ahash::AHashMap;
use k8s_openapi::api::core::v1::{Namespace, Node, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::ServiceCIDR;
use sluice_dataplane::table::ServiceName;

use crate::object::{Key, Kind, Object, service_of};
use crate::problem::Origin;
use crate::source::Change;

/// An object and where it comes from.
#[derive(Clone, Debug, PartialEq)]
pub struct Stored<T> {
    /// The object.
    pub object: Arc<T>,
    /// Where it comes from.
    pub origin: Origin,
}

/// What an update touched.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Touched {
    /// Services to resolve again, those that are gone among them.
    pub services: BTreeSet<ServiceName>,
    /// Names of Nodes that changed.
    pub nodes: BTreeSet<String>,
    /// A ServiceCIDR changed.
    pub service_cidrs: bool,
    /// Namespaces that came or went.
    pub namespaces: BTreeSet<String>,
    /// Pods that came, changed or went.
    pub pods: BTreeSet<ServiceName>,
}

/// All objects that the data plane is made of.
#[derive(Debug, Default)]
pub struct Store {
    services: AHashMap<ServiceName, Stored<Service>>,
    slices: AHashMap<ServiceName, BTreeMap<Arc<str>, Stored<EndpointSlice>>>,
    /// Slices whose label names no Service.
    unlabelled: BTreeMap<ServiceName, Stored<EndpointSlice>>,
    pods: AHashMap<ServiceName, Stored<Pod>>,
    nodes: BTreeMap<String, Stored<Node>>,
    service_cidrs: BTreeMap<String, Stored<ServiceCIDR>>,
    namespaces: BTreeMap<String, Stored<Namespace>>,
}

impl Store {
    /// Applies changes and says what they touched.
    pub fn apply(&mut self, changes: impl IntoIterator<Item = Change>) -> Touched {
        let mut touched = Touched::default();
        for change in changes {
            match change {
                Change::Apply(object, origin) => self.put(object, origin, &mut touched),
                Change::Delete(key) => self.delete(&key, &mut touched),
            }
        }
        touched
    }

    /// A Service.
    #[must_use]
    pub fn service(&self, name: &ServiceName) -> Option<&Stored<Service>> {
        self.services.get(name)
    }

    /// Every Service, in no order.
    pub fn services(&self) -> impl Iterator<Item = (&ServiceName, &Stored<Service>)> {
        self.services.iter()
    }

    /// The EndpointSlices of a Service, by name.
    pub fn slices(&self, service: &ServiceName) -> impl Iterator<Item = &Stored<EndpointSlice>> {
        self.slices.get(service).into_iter().flat_map(BTreeMap::values)
    }

    /// Services that EndpointSlices name, whether they exist or not, in no order.
    pub fn services_of_slices(&self) -> impl Iterator<Item = &ServiceName> {
        self.slices.keys()
    }

    /// Slices of Services that do not exist, or of none, in no order.
    pub fn slices_without_service(&self) -> impl Iterator<Item = &Stored<EndpointSlice>> {
        let orphans = self.slices.iter().filter(|(service, _)| !self.services.contains_key(*service));
        orphans.flat_map(|(_, slices)| slices.values()).chain(self.unlabelled.values())
    }

    /// Every Pod, in no order.
    pub fn pods(&self) -> impl Iterator<Item = (&ServiceName, &Stored<Pod>)> {
        self.pods.iter()
    }

    /// A Pod.
    #[must_use]
    pub fn pod(&self, name: &ServiceName) -> Option<&Stored<Pod>> {
        self.pods.get(name)
    }

    /// A Namespace.
    #[must_use]
    pub fn namespace(&self, name: &str) -> Option<&Stored<Namespace>> {
        self.namespaces.get(name)
    }

    /// A Node.
    #[must_use]
    pub fn node(&self, name: &str) -> Option<&Stored<Node>> {
        self.nodes.get(name)
    }

    /// Every ServiceCIDR, by name.
    pub fn service_cidrs(&self) -> impl Iterator<Item = &Stored<ServiceCIDR>> {
        self.service_cidrs.values()
    }

    fn put(&mut self, object: Object, origin: Origin, touched: &mut Touched) {
        let name = object.key().name;
        match object {
            Object::Service(object) => {
                self.services.insert(name.clone(), Stored { object, origin });
                touched.services.insert(name);
            }
            Object::EndpointSlice(object) => {
                // Without the label, or with an empty one, it is nobody's.
                if let Some(service) = service_of(&object) {
                    let slices = self.slices.entry(service.clone()).or_default();
                    slices.insert(name.name, Stored { object, origin });
                    touched.services.insert(service);
                } else {
                    self.unlabelled.insert(name, Stored { object, origin });
                }
            }
            Object::Pod(object) => {
                self.pods.insert(name.clone(), Stored { object, origin });
                touched.pods.insert(name);
            }
            Object::Node(object) => {
                self.nodes.insert(name.name.to_string(), Stored { object, origin });
                touched.nodes.insert(name.name.to_string());
            }
            Object::ServiceCidr(object) => {
                self.service_cidrs.insert(name.name.to_string(), Stored { object, origin });
                touched.service_cidrs = true;
            }
            Object::Namespace(object) => {
                self.namespaces.insert(name.name.to_string(), Stored { object, origin });
                touched.namespaces.insert(name.name.to_string());
            }
            // Only `demo` uses them.
            Object::Deployment(_) | Object::StatefulSet(_) => {}
        }
    }

    fn delete(&mut self, key: &Key, touched: &mut Touched) {
        let name = &key.name;
        match key.kind {
            Kind::Service => {
                if self.services.remove(name).is_some() {
                    touched.services.insert(name.clone());
                }
            }
            Kind::EndpointSlice => self.remove_slice(key, touched),
            Kind::Pod => {
                self.pods.remove(name);
                touched.pods.insert(name.clone());
            }
            Kind::Node => {
                self.nodes.remove(&*name.name);
                touched.nodes.insert(name.name.to_string());
            }
            Kind::ServiceCIDR => {
                self.service_cidrs.remove(&*name.name);
                touched.service_cidrs = true;
            }
            Kind::Namespace => {
                self.namespaces.remove(&*name.name);
                touched.namespaces.insert(name.name.to_string());
            }
            Kind::Deployment | Kind::StatefulSet => {}
        }
    }

    fn remove_slice(&mut self, key: &Key, touched: &mut Touched) {
        let Some(service) = &key.service else {
            self.unlabelled.remove(&key.name);
            return;
        };
        let service = ServiceName::new(&key.name.namespace, service);
        if let Some(slices) = self.slices.get_mut(&service) {
            slices.remove(&key.name.name);
            if slices.is_empty() {
                self.slices.remove(&service);
            }
        }
        touched.services.insert(service);
    }
}
