//! The zone of the objects: brought up to date with what an update touched, and only with that.

use std::net::IpAddr;
use std::sync::Arc;

use jiff::Timestamp;
use sluice_dataplane::dns::{Zone, ZoneBuilder};
use sluice_dataplane::table::ServiceName;

use crate::config::Dns;
use crate::resolve::names::{names, pod_addresses};
use crate::store::{Store, Touched};

/// The zone in the making.
pub struct Names {
    builder: ZoneBuilder,
    pod_names: bool,
}

impl Names {
    /// Without objects.
    #[must_use]
    pub fn new(config: &Dns) -> Self {
        Self { builder: ZoneBuilder::new(config.zone()), pod_names: config.endpoint_pod_names }
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
    }

    /// The next zone, when there is another.
    pub fn build(&mut self, now: Timestamp) -> Option<Arc<Zone>> {
        self.builder.build(u32::try_from(now.as_second()).unwrap_or_default())
    }
}
