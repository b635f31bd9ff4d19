//! Which Pods a Service selects, and which Services select a Pod, without looking at all of them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use ahash::AHashMap;
use k8s_openapi::api::core::v1::Pod;
use sluice_dataplane::table::ServiceName;

use super::slices::selects;
use crate::problem::Origin;

/// A namespace and one label.
type Labelled = (Arc<str>, String, String);

/// Pods by label, and selectors by one of their labels.
#[derive(Debug, Default)]
pub(super) struct Selection {
    pods: AHashMap<ServiceName, (Arc<Pod>, Origin)>,
    pods_by_label: AHashMap<Labelled, BTreeSet<ServiceName>>,
    selectors: AHashMap<ServiceName, BTreeMap<String, String>>,
    services_by_label: AHashMap<Labelled, BTreeSet<ServiceName>>,
}

impl Selection {
    /// Takes in the selector of a Service.
    pub(super) fn set_service(&mut self, name: &ServiceName, selector: Option<&BTreeMap<String, String>>) {
        if let Some(selector) = self.selectors.remove(name) {
            remove(&mut self.services_by_label, first_label(name, &selector), name);
        }
        if let Some(selector) = selector {
            self.selectors.insert(name.clone(), selector.clone());
            if let Some(label) = first_label(name, selector) {
                self.services_by_label.entry(label).or_default().insert(name.clone());
            }
        }
    }

    /// Takes in a Pod, or that it is gone.
    pub(super) fn set_pod(&mut self, name: &ServiceName, pod: Option<(Arc<Pod>, Origin)>) {
        if let Some((pod, _)) = self.pods.remove(name) {
            for label in labels(name, &pod) {
                remove(&mut self.pods_by_label, Some(label), name);
            }
        }
        if let Some((pod, origin)) = pod {
            for label in labels(name, &pod) {
                self.pods_by_label.entry(label).or_default().insert(name.clone());
            }
            self.pods.insert(name.clone(), (pod, origin));
        }
    }

    /// Services that select a Pod.
    pub(super) fn services_of(&self, pod: &ServiceName) -> Vec<ServiceName> {
        let Some((object, _)) = self.pods.get(pod) else { return Vec::new() };
        let services = labels(pod, object).filter_map(|label| self.services_by_label.get(&label)).flatten();
        let selecting =
            services.filter(|service| self.selectors.get(*service).is_some_and(|selector| selects(selector, object)));
        selecting.cloned().collect()
    }

    /// Services that select a Pod on a Node. Looks at every Pod: zones hardly ever change.
    pub(super) fn services_on(&self, node: &str) -> BTreeSet<ServiceName> {
        let is_on = |pod: &Pod| pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()) == Some(node);
        let pods = self.pods.iter().filter(|(_, (pod, _))| is_on(pod));
        pods.flat_map(|(name, _)| self.services_of(name)).collect()
    }

    /// Pods that a Service selects, in order of names.
    pub(super) fn pods_of<'s>(
        &'s self,
        service: &ServiceName,
        selector: &'s BTreeMap<String, String>,
    ) -> impl Iterator<Item = (&'s ServiceName, &'s Pod, &'s Origin)> {
        let labelled = first_label(service, selector).and_then(|label| self.pods_by_label.get(&label));
        let pods = labelled.into_iter().flatten().filter_map(|name| Some((name, self.pods.get(name)?)));
        pods.map(|(name, (pod, origin))| (name, &**pod, origin)).filter(|(_, pod, _)| selects(selector, pod))
    }
}

fn first_label(name: &ServiceName, selector: &BTreeMap<String, String>) -> Option<Labelled> {
    selector.iter().next().map(|(key, value)| (Arc::clone(&name.namespace), key.clone(), value.clone()))
}

fn labels<'p>(name: &'p ServiceName, pod: &'p Pod) -> impl Iterator<Item = Labelled> + 'p {
    let labels = pod.metadata.labels.iter().flatten();
    labels.map(|(key, value)| (Arc::clone(&name.namespace), key.clone(), value.clone()))
}

fn remove(index: &mut AHashMap<Labelled, BTreeSet<ServiceName>>, label: Option<Labelled>, name: &ServiceName) {
    let Some(label) = label else { return };
    if let Some(names) = index.get_mut(&label) {
        names.remove(name);
        if names.is_empty() {
            index.remove(&label);
        }
    }
}
