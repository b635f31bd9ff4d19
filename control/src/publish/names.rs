//! Updates into names, and what names change of the table: virtual headless Services, and the one the responder stands behind.

use std::sync::Arc;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Service;
use sluice_dataplane::dns::Zone;
use sluice_dataplane::table::ServiceName;

use super::Publisher;
use crate::headless::{as_ordinary, serve_names, serve_target_ports};
use crate::names::Names;
use crate::resolve::{Resolved, resolve};
use crate::store::Touched;

impl Publisher {
    /// The zone, when it has changed since it was last asked for. `now` becomes its serial number.
    pub fn zone(&mut self, now: Timestamp) -> Option<Arc<Zone>> {
        self.names.as_mut()?.build(now)
    }

    /// Kinds of Services whose endpoints have changed since this was last asked, and when that was triggered.
    pub fn take_triggers(&mut self) -> Vec<(&'static str, Timestamp)> {
        self.names.as_mut().map(Names::take_triggers).unwrap_or_default()
    }

    pub(super) fn update_names(&mut self, touched: &Touched) {
        let (Some(names), Some(virtuals)) = (&mut self.names, &mut self.virtuals) else { return };
        touched.services.iter().for_each(|name| virtuals.update(name, &self.store));
        names.update(&self.store, touched, |name| virtuals.of(name).to_vec());
    }

    /// Resolves a Service of the store.
    pub(super) fn resolved(&self, name: &ServiceName, service: &Service) -> Resolved {
        let slices = self.store.slices(name).map(|slice| &*slice.object);
        let instead = self.virtuals.as_ref().map(|virtuals| virtuals.of(name)).unwrap_or_default();
        let mut resolved = if instead.is_empty() {
            resolve(service, slices, &self.node, &self.rules)
        } else {
            let slices: Vec<_> = self.store.slices(name).map(|slice| Arc::clone(&slice.object)).collect();
            let (service, slices) = as_ordinary(service, &slices, instead);
            let mut resolved = resolve(&service, &slices, &self.node, &self.rules);
            resolved.spec.iter_mut().for_each(serve_target_ports);
            resolved
        };
        if let (Some(dns), Some(spec)) = (&self.config.dns, &mut resolved.spec)
            && dns.service.as_deref() == Some(&*name.to_string())
        {
            serve_names(spec, &dns.listen);
        }
        resolved
    }
}
