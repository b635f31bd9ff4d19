//! The zone of the objects: brought up to date with what an update touched, and only with that.

use std::net::IpAddr;
use std::sync::Arc;

use ahash::AHashMap;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Service;
use sluice_dataplane::dns::{Zone, ZoneBuilder};
use sluice_dataplane::table::ServiceName;

use crate::config::Dns;
use crate::programming::trigger;
use crate::resolve::names::{is_headless, names, pod_addresses};
use crate::store::{Store, Touched};

/// The zone in the making.
pub struct Names {
    builder: ZoneBuilder,
    pod_names: bool,
    is_synced: bool,
    /// When the last change of a Service's endpoints was triggered.
    seen: AHashMap<ServiceName, Timestamp>,
    /// Changes since they were last asked for.
    triggers: Vec<(&'static str, Timestamp)>,
}

impl Names {
    /// Without objects.
    #[must_use]
    pub fn new(config: &Dns) -> Self {
        Self {
            builder: ZoneBuilder::new(config.zone()),
            pod_names: config.endpoint_pod_names,
            is_synced: false,
            seen: AHashMap::new(),
            triggers: Vec::new(),
        }
    }

    /// Takes in what an update touched. `instead`: addresses that a headless Service's name answers in place of its
    /// endpoints.
    pub fn update(&mut self, store: &Store, touched: &Touched, instead: impl Fn(&ServiceName) -> Vec<IpAddr>) {
        for namespace in &touched.namespaces {
            self.builder.set_namespace(namespace, store.namespace(namespace).is_some());
        }
        for name in &touched.pods {
            let addresses = store.pod(name).map(|pod| pod_addresses(&pod.object)).unwrap_or_default();
            self.builder.set_pod(name, addresses);
        }
        for name in &touched.services {
            let service = store.service(name).map(|service| &*service.object);
            self.note_trigger(store, name, service);
            let slices = store.slices(name).map(|slice| &*slice.object);
            match names(name, service, slices, instead(name), self.pod_names) {
                Some(names) => self.builder.set(names),
                None => self.builder.remove(name),
            }
        }
    }

    /// Everything there is has been taken in.
    pub fn synced(&mut self) {
        self.builder.synced();
        self.is_synced = true;
    }

    /// Kinds of Services whose endpoints have changed since this was last asked, and when that was triggered.
    pub fn take_triggers(&mut self) -> Vec<(&'static str, Timestamp)> {
        std::mem::take(&mut self.triggers)
    }

    fn note_trigger(&mut self, store: &Store, name: &ServiceName, service: Option<&Service>) {
        let Some(spec) = service.and_then(|service| service.spec.as_ref()) else {
            self.seen.remove(name);
            return;
        };
        let Some(last) = store.slices(name).filter_map(|slice| trigger(&slice.object)).max() else { return };
        let before = self.seen.insert(name.clone(), last);
        // What was there at the start tells nothing of us.
        if self.is_synced && before.is_none_or(|before| before < last) {
            let has_selector = spec.selector.as_ref().is_some_and(|selector| !selector.is_empty());
            let kind = match (is_headless(spec), has_selector) {
                (false, _) => "cluster_ip",
                (true, true) => "headless_with_selector",
                (true, false) => "headless_without_selector",
            };
            self.triggers.push((kind, last));
        }
    }

    /// The next zone, when there is another.
    pub fn build(&mut self, now: Timestamp) -> Option<Arc<Zone>> {
        self.builder.build(u32::try_from(now.as_second()).unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::object::Object;
    use crate::problem::Origin;
    use crate::programming::TRIGGER_TIME;
    use crate::source::Change;

    #[test]
    fn a_change_of_endpoints_is_timed_once_and_not_at_the_start() {
        let mut names = Names::new(&Dns::default());
        let mut store = Store::default();
        let service = json!({"metadata": {"namespace": "ns", "name": "db"},
            "spec": {"clusterIP": "None", "selector": {"app": "db"}}});
        let slice = |time: &str| {
            let metadata = json!({"namespace": "ns", "name": "db-1", "labels": {"kubernetes.io/service-name": "db"},
                "annotations": {TRIGGER_TIME: time}});
            let slice = json!({"metadata": metadata, "addressType": "IPv4", "endpoints": []});
            Object::EndpointSlice(Arc::new(serde_json::from_value(slice).unwrap()))
        };
        let mut apply = |names: &mut Names, object: Object| {
            let touched = store.apply([Change::Apply(object, Origin::Api)]);
            names.update(&store, &touched, |_| Vec::new());
            names.take_triggers()
        };
        assert_eq!(apply(&mut names, Object::Service(Arc::new(serde_json::from_value(service).unwrap()))), []);
        assert_eq!(apply(&mut names, slice("2026-01-01T00:00:00Z")), []);
        names.synced();
        let later = "2026-01-01T00:00:05Z";
        let trigger = ("headless_with_selector", later.parse().unwrap());
        assert_eq!(apply(&mut names, slice(later)), [trigger]);
        assert_eq!(apply(&mut names, slice(later)), [], "the same change");
    }
}
