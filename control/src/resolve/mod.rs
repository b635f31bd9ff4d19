//! Resolution: one Service and its EndpointSlices, as this node sees them, into plain data for the routing table. Pure:
//! no I/O, no clock, and it cannot fail; what is wrong with an object becomes a [`Problem`].

use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use sluice_dataplane::table::{Balancing, ServiceSpec};

use crate::node::NodeFacts;
use crate::problem::Problem;

/// What of the configuration the rules depend on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rules {
    /// Serve the Services with this `service-proxy-name`; empty: those without the label.
    pub service_proxy_name: String,
    /// Endpoint selection where a Service does not choose.
    pub balancing: Balancing,
}

/// What became of a Service.
#[derive(Clone, Debug, Default)]
pub struct Resolved {
    /// What to serve; nothing when the Service is not for us (headless, ExternalName, another proxy's).
    pub spec: Option<ServiceSpec>,
    /// What is wrong with it or its slices. Objects are named; origins are the caller's to add.
    pub problems: Vec<Problem>,
}

/// Resolves one Service.
#[must_use]
pub fn resolve<'s>(
    _service: &Service,
    _slices: impl IntoIterator<Item = &'s EndpointSlice>,
    _node: &NodeFacts,
    _rules: &Rules,
) -> Resolved {
    Resolved::default()
}
