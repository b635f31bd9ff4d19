//! The last good objects. Says which Services an update touches, so that nothing else is resolved again.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use ahash::{AHashMap, AHashSet};
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

/// The slices of one Service, by name. Nearly every Service has one: a map's first node would have room for eleven.
#[derive(Debug, Default)]
struct Slices(Vec<(Arc<str>, Stored<EndpointSlice>)>);

impl Slices {
    fn find(&self, name: &str) -> Result<usize, usize> {
        self.0.binary_search_by(|(other, _)| (**other).cmp(name))
    }

    fn get(&self, name: &str) -> Option<&Stored<EndpointSlice>> {
        self.find(name).ok().map(|at| &self.0[at].1)
    }

    fn values(&self) -> impl Iterator<Item = &Stored<EndpointSlice>> {
        self.0.iter().map(|(_, slice)| slice)
    }

    fn insert(&mut self, name: Arc<str>, slice: Stored<EndpointSlice>) {
        match self.find(&name) {
            Ok(at) => self.0[at].1 = slice,
            Err(at) => {
                self.0.reserve_exact(1);
                self.0.insert(at, (name, slice));
            }
        }
    }

    fn remove(&mut self, name: &str) {
        if let Ok(at) = self.find(name) {
            self.0.remove(at);
        }
    }
}

/// All objects that the data plane is made of.
#[derive(Debug, Default)]
pub struct Store {
    services: AHashMap<ServiceName, Stored<Service>>,
    slices: AHashMap<ServiceName, Slices>,
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

    /// Applies changes that name all there is: what they do not name is deleted, what stays as it is touches nothing.
    pub fn replace(&mut self, changes: Vec<Change>) -> Touched {
        let named: AHashSet<Key> = changes.iter().filter_map(Change::key).collect();
        // What vanished first: its addresses may be somebody else's by now.
        let gone: Vec<Key> = self.objects().map(|object| object.key()).filter(|key| !named.contains(key)).collect();
        let mut touched = self.apply(gone.into_iter().map(Change::Delete));
        for change in changes {
            match change {
                // The new one is kept all the same: whoever sent it keeps it too, and two would take twice the memory.
                Change::Apply(object, origin) if self.holds(&object) => {
                    self.put(object, origin, &mut Touched::default())
                }
                Change::Apply(object, origin) => self.put(object, origin, &mut touched),
                Change::Delete(key) => self.delete(&key, &mut touched),
            }
        }
        touched
    }

    /// Every object, in no order.
    pub fn objects(&self) -> impl Iterator<Item = Object> {
        let services = self.services.values().map(|held| Object::Service(Arc::clone(&held.object)));
        let slices = self.slices.values().flat_map(Slices::values).chain(self.unlabelled.values());
        let slices = slices.map(|held| Object::EndpointSlice(Arc::clone(&held.object)));
        let pods = self.pods.values().map(|held| Object::Pod(Arc::clone(&held.object)));
        let nodes = self.nodes.values().map(|held| Object::Node(Arc::clone(&held.object)));
        let ranges = self.service_cidrs.values().map(|held| Object::ServiceCidr(Arc::clone(&held.object)));
        let namespaces = self.namespaces.values().map(|held| Object::Namespace(Arc::clone(&held.object)));
        services.chain(slices).chain(pods).chain(nodes).chain(ranges).chain(namespaces)
    }

    fn holds(&self, object: &Object) -> bool {
        let key = object.key();
        let name = &key.name;
        match object {
            Object::Service(object) => self.services.get(name).is_some_and(|held| held.object == *object),
            Object::EndpointSlice(object) => self.slice(&key).is_some_and(|held| held.object == *object),
            Object::Pod(object) => self.pods.get(name).is_some_and(|held| held.object == *object),
            Object::Node(object) => self.nodes.get(&*name.name).is_some_and(|held| held.object == *object),
            Object::ServiceCidr(object) => {
                self.service_cidrs.get(&*name.name).is_some_and(|held| held.object == *object)
            }
            Object::Namespace(object) => self.namespaces.get(&*name.name).is_some_and(|held| held.object == *object),
            Object::Deployment(_) | Object::StatefulSet(_) => false,
        }
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

    /// An EndpointSlice.
    #[must_use]
    pub fn slice(&self, key: &Key) -> Option<&Stored<EndpointSlice>> {
        let Some(service) = &key.service else { return self.unlabelled.get(&key.name) };
        self.slices.get(&ServiceName::new(&key.name.namespace, service))?.get(&key.name.name)
    }

    /// Services that EndpointSlices of this name are of.
    pub fn services_of_slice(&self, name: &ServiceName) -> impl Iterator<Item = &ServiceName> {
        let of = self.slices.iter().filter(|(_, slices)| slices.get(&name.name).is_some());
        of.map(|(service, _)| service).filter(|service| service.namespace == name.namespace)
    }

    /// The EndpointSlices of a Service, by name.
    pub fn slices(&self, service: &ServiceName) -> impl Iterator<Item = &Stored<EndpointSlice>> {
        self.slices.get(service).into_iter().flat_map(Slices::values)
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
            if slices.0.is_empty() {
                self.slices.remove(&service);
            }
        }
        touched.services.insert(service);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn slice(name: &str, of: &str, address: &str) -> Change {
        let object = json!({"metadata": {"namespace": "n", "name": name, "labels": {"kubernetes.io/service-name": of}},
            "addressType": "IPv4", "endpoints": [{"addresses": [address]}]});
        Change::Apply(Object::EndpointSlice(Arc::new(serde_json::from_value(object).unwrap())), Origin::Api)
    }

    fn apply(kind: &str, name: &str, spec: Value) -> Change {
        let object = json!({"metadata": {"namespace": "n", "name": name}, "spec": spec});
        let object = match kind {
            "Service" => Object::Service(Arc::new(serde_json::from_value(object).unwrap())),
            "Node" => Object::Node(Arc::new(
                serde_json::from_value(json!({"metadata": {"name": name}, "spec": spec})).unwrap(),
            )),
            _ => Object::ServiceCidr(Arc::new(serde_json::from_value(json!({"metadata": {"name": name}})).unwrap())),
        };
        Change::Apply(object, Origin::Api)
    }

    #[test]
    fn all_there_is_deletes_the_rest_and_touches_only_what_differs() {
        let mut store = Store::default();
        let at = |address: &str| json!({"clusterIP": address});
        store.apply([
            apply("Service", "same", at("10.0.0.1")),
            apply("Service", "other", at("10.0.0.2")),
            apply("Service", "gone", at("10.0.0.3")),
            slice("same-1", "same", "10.1.0.1"),
            slice("other-1", "unknown", "10.1.0.2"),
            slice("gone-1", "same-too", "10.1.0.3"),
            apply("Node", "me", json!({"podCIDR": "10.1.0.0/24"})),
            apply("ServiceCIDR", "default", json!({})),
        ]);
        let touched = store.replace(vec![
            apply("Service", "same", at("10.0.0.1")),
            apply("Service", "other", at("10.0.0.9")),
            slice("same-1", "same", "10.1.0.1"),
            slice("other-1", "unknown", "10.1.0.9"),
            apply("Node", "me", json!({"podCIDR": "10.1.0.0/24"})),
        ]);
        let names: Vec<&str> = touched.services.iter().map(|name| &*name.name).collect();
        assert_eq!(names, ["gone", "other", "same-too", "unknown"]);
        assert_eq!((touched.nodes.len(), touched.service_cidrs), (0, true));
        assert_eq!(store.objects().count(), 5);
        assert!(store.service(&ServiceName::new("n", "gone")).is_none());
        assert_eq!(store.replace(Vec::new()).services.len(), 3, "and all of it may go");
        assert_eq!(store.objects().count(), 0);
    }
}
