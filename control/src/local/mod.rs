//! The controllers' part without a cluster: ClusterIPs, node ports and EndpointSlices where the objects leave them open.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use ahash::{AHashMap, AHashSet};
use k8s_openapi::api::core::v1::{Node, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use sluice_dataplane::table::ServiceName;

use self::frontends::Frontends;
use crate::config::Config;
use crate::object::{Key, Kind, Object, ZONE_LABEL, label, service_of};
use crate::problem::{Origin, Problem};
use crate::source::Change;

pub(crate) mod allocator;
mod defaults;
pub(crate) mod frontends;
mod selection;
mod slices;
mod state;

use selection::Selection;

/// Completes a stream of changes: what comes out is what a cluster's API would serve.
#[derive(Debug)]
pub struct LocalControllers {
    services: AHashMap<ServiceName, Served>,
    frontends: Frontends,
    selection: Selection,
    /// Slices of the source that name a Service.
    given_slices: AHashSet<Key>,
    /// How many slices of the source a Service has.
    given_counts: AHashMap<ServiceName, usize>,
    zones: AHashMap<String, String>,
    /// Services that a pool had nothing left for.
    starved: BTreeSet<ServiceName>,
    /// Made-up values have changed since they were saved.
    is_unsaved: bool,
}

/// A Service and what has been made of it.
#[derive(Debug)]
struct Served {
    given: Arc<Service>,
    origin: Origin,
    complete: Arc<Service>,
    made_up: Vec<&'static str>,
    slices: BTreeMap<String, Arc<EndpointSlice>>,
    frontend_problems: Vec<Problem>,
    endpoint_problems: Vec<Problem>,
}

/// What a batch of changes makes necessary.
#[derive(Default)]
struct Work {
    services: BTreeSet<ServiceName>,
    endpoints: BTreeSet<ServiceName>,
    /// Services that the source has said something about.
    announce: BTreeSet<ServiceName>,
    out: Vec<Change>,
}

impl LocalControllers {
    /// Controllers that allocate from the ranges of `config`.
    #[must_use]
    pub fn new(config: &Config) -> Self {
        Self {
            services: AHashMap::new(),
            frontends: Frontends::new(config),
            selection: Selection::default(),
            given_slices: AHashSet::new(),
            given_counts: AHashMap::new(),
            zones: AHashMap::new(),
            starved: BTreeSet::new(),
            is_unsaved: false,
        }
    }

    /// Completes changes; more may come out than went in. The order of changes of one batch does not matter to what is made
    /// up, and work is in proportion to the objects touched.
    pub fn complete(&mut self, changes: Vec<Change>) -> Vec<Change> {
        let mut work = Work::default();
        for change in changes {
            match change {
                Change::Apply(object, origin) => self.apply(object, origin, &mut work),
                Change::Delete(key) => self.delete(key, &mut work),
            }
        }
        self.make_frontends(&mut work);
        self.make_endpoints(&mut work);
        work.out
    }

    /// What could not be made up.
    #[must_use]
    pub fn problems(&self) -> Vec<Problem> {
        let services = self.services.values();
        services
            .flat_map(|service| service.frontend_problems.iter().chain(&service.endpoint_problems))
            .cloned()
            .collect()
    }

    /// What of a Service was made up: `clusterIP`, `nodePort`, `healthCheckNodePort`, `endpoints`.
    #[must_use]
    pub fn made_up(&self, name: &ServiceName) -> &[&'static str] {
        self.services.get(name).map(|service| &*service.made_up).unwrap_or_default()
    }

    fn apply(&mut self, object: Object, origin: Origin, work: &mut Work) {
        match &object {
            Object::Service(given) => {
                let name = object.key().name;
                self.selection.set_service(&name, slices::selector(given));
                let (given, complete) = (Arc::clone(given), Arc::clone(given));
                work.services.insert(name.clone());
                work.announce.insert(name.clone());
                let known = self.services.entry(name).or_insert_with(|| Served {
                    given: Arc::clone(&given),
                    origin: origin.clone(),
                    complete,
                    made_up: Vec::new(),
                    slices: BTreeMap::new(),
                    frontend_problems: Vec::new(),
                    endpoint_problems: Vec::new(),
                });
                (known.given, known.origin) = (given, origin);
                return;
            }
            Object::EndpointSlice(slice) => {
                if let Some(service) = service_of(slice)
                    && self.given_slices.insert(object.key())
                {
                    *self.given_counts.entry(service.clone()).or_default() += 1;
                    work.endpoints.insert(service);
                }
            }
            Object::Pod(pod) => self.set_pod(&object.key().name, Some((Arc::clone(pod), origin.clone())), work),
            Object::Node(node) => self.set_zone(&object.key().name.name, Some(node), work),
            Object::ServiceCidr(_) | Object::Namespace(_) | Object::Deployment(_) | Object::StatefulSet(_) => {}
        }
        work.out.push(Change::Apply(object, origin));
    }

    fn delete(&mut self, key: Key, work: &mut Work) {
        let name = &key.name;
        match key.kind {
            Kind::Service => {
                self.selection.set_service(name, None);
                if let Some(service) = self.services.remove(name) {
                    let made_up = service.slices.keys().map(|slice| slice_key(name, slice));
                    work.out.extend(made_up.map(Change::Delete));
                }
                work.services.insert(name.clone());
            }
            Kind::EndpointSlice => self.drop_slice(&key, work),
            Kind::Pod => self.set_pod(name, None, work),
            Kind::Node => self.set_zone(&name.name, None, work),
            Kind::ServiceCIDR | Kind::Namespace | Kind::Deployment | Kind::StatefulSet => {}
        }
        work.out.push(Change::Delete(key));
    }

    fn drop_slice(&mut self, slice: &Key, work: &mut Work) {
        let Some(service) = slice.service.as_deref().filter(|_| self.given_slices.remove(slice)) else { return };
        let service = ServiceName::new(&slice.name.namespace, service);
        if let Some(count) = self.given_counts.get_mut(&service) {
            *count -= 1;
            if *count == 0 {
                self.given_counts.remove(&service);
            }
        }
        work.endpoints.insert(service);
    }

    fn set_pod(&mut self, name: &ServiceName, pod: Option<(Arc<Pod>, Origin)>, work: &mut Work) {
        work.endpoints.extend(self.selection.services_of(name));
        self.selection.set_pod(name, pod);
        work.endpoints.extend(self.selection.services_of(name));
    }

    fn set_zone(&mut self, node: &str, object: Option<&Arc<Node>>, work: &mut Work) {
        let zone = object.and_then(|node| label(&node.metadata, ZONE_LABEL)).filter(|zone| !zone.is_empty());
        if zone == self.zones.get(node).map(String::as_str) {
            return;
        }
        match zone {
            Some(zone) => self.zones.insert(node.to_owned(), zone.to_owned()),
            None => self.zones.remove(node),
        };
        work.endpoints.extend(self.selection.services_on(node));
    }

    /// Explicit values first, then what an earlier run had, then new ones, each in order of names.
    fn make_frontends(&mut self, work: &mut Work) {
        if work.services.is_empty() {
            return;
        }
        work.services.append(&mut self.starved);
        let mut losers = BTreeSet::new();
        for name in &work.services {
            let given = self.services.get(name).map(|service| &*service.given);
            losers.extend(self.frontends.claim(name, given));
        }
        work.services.append(&mut losers);
        for name in &work.services {
            if let Some(service) = self.services.get(name) {
                self.frontends.restore(name, &service.given);
            }
        }
        for name in &work.services {
            let Some(service) = self.services.get_mut(name) else { continue };
            let mut complete = (*service.given).clone();
            defaults::set(&mut complete);
            let (made_up, problems) = self.frontends.fill(name, &mut complete);
            if !problems.is_empty() {
                self.starved.insert(name.clone());
            }
            let about = |problem: Problem| problem.about(format!("Service {name}")).from(&service.origin);
            service.frontend_problems = problems.into_iter().map(about).collect();
            service.made_up = made_up;
            if *service.complete != complete || work.announce.contains(name) {
                service.complete = Arc::new(complete);
                let object = Object::Service(Arc::clone(&service.complete));
                work.out.push(Change::Apply(object, service.origin.clone()));
            }
            work.endpoints.insert(name.clone());
        }
        self.is_unsaved = true;
    }

    fn make_endpoints(&mut self, work: &mut Work) {
        for name in &work.endpoints {
            let Some(service) = self.services.get_mut(name) else { continue };
            service.endpoint_problems.clear();
            service.made_up.retain(|part| *part != ENDPOINTS);
            let mut slices = BTreeMap::new();
            if !self.given_counts.contains_key(name)
                && let Some(selector) = slices::selector(&service.given)
            {
                let pods: Vec<_> = self.selection.pods_of(name, selector).collect();
                let zone = |node: &str| self.zones.get(node).cloned();
                slices = slices::build(name, &service.complete, pods.iter().map(|(_, pod, _)| *pod), zone);
                service.made_up.push(ENDPOINTS);
                service.endpoint_problems =
                    pods.iter().filter_map(|(name, pod, origin)| unready(name, pod, origin)).collect();
            }
            let previous = std::mem::take(&mut service.slices);
            for (slice, object) in slices {
                let object = match previous.get(&slice) {
                    Some(known) if **known == object => Arc::clone(known),
                    _ => {
                        let object = Arc::new(object);
                        let change = Object::EndpointSlice(Arc::clone(&object));
                        work.out.push(Change::Apply(change, Origin::LocalController));
                        object
                    }
                };
                service.slices.insert(slice, object);
            }
            let given = &self.given_slices;
            let gone = previous.keys().filter(|slice| !service.slices.contains_key(*slice));
            // One of the source that has the same name has already replaced it.
            let gone = gone.map(|slice| slice_key(name, slice)).filter(|key| !given.contains(key));
            work.out.extend(gone.map(Change::Delete));
        }
    }
}

const ENDPOINTS: &str = "endpoints";

fn slice_key(service: &ServiceName, slice: &str) -> Key {
    let name = ServiceName::new(&service.namespace, slice);
    Key { kind: Kind::EndpointSlice, name, service: Some(Arc::clone(&service.name)) }
}

/// A Pod as people write it by hand for a test: without conditions a controller takes it for not ready.
fn unready(name: &ServiceName, pod: &Pod, origin: &Origin) -> Option<Problem> {
    let has_conditions = pod.status.as_ref().is_some_and(|status| status.conditions.is_some());
    (!has_conditions && slices::is_reachable(pod)).then(|| {
        let message = "is missing, so the Pod is not ready: add {type: Ready, status: \"True\"}";
        Problem::warning("status.conditions", message).about(format!("Pod {name}")).from(origin)
    })
}

#[cfg(test)]
mod tests;
