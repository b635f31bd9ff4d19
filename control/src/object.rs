//! The Kubernetes objects that Sluice knows, and what they are called.

use std::fmt;
use std::sync::Arc;

use k8s_openapi::api::apps::v1::{Deployment, StatefulSet};
use k8s_openapi::api::core::v1::{Namespace, Node, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::ServiceCIDR;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::Serialize;
use sluice_dataplane::table::ServiceName;

/// Label that names the Service of an EndpointSlice.
pub const SERVICE_NAME_LABEL: &str = "kubernetes.io/service-name";
/// Label that gives a Service to another proxy (KEP-2447).
pub const PROXY_NAME_LABEL: &str = "service.kubernetes.io/service-proxy-name";
/// Label of headless Services, and of their EndpointSlices.
pub const HEADLESS_LABEL: &str = "service.kubernetes.io/headless";
/// Label of a Node's zone.
pub const ZONE_LABEL: &str = "topology.kubernetes.io/zone";

/// A kind of object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub enum Kind {
    /// `v1` Service.
    Service,
    /// `discovery.k8s.io/v1` EndpointSlice.
    EndpointSlice,
    /// `v1` Pod.
    Pod,
    /// `v1` Node.
    Node,
    /// `networking.k8s.io/v1` ServiceCIDR.
    ServiceCIDR,
    /// `v1` Namespace; only names need it.
    Namespace,
    /// `apps/v1` Deployment; only `demo` uses it.
    Deployment,
    /// `apps/v1` StatefulSet; only `demo` uses it.
    StatefulSet,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// Kind, namespace and name: what an object is known by. The namespace is empty where objects are in none.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    /// Kind.
    pub kind: Kind,
    /// Namespace and name.
    pub name: ServiceName,
    /// Of an EndpointSlice: the Service that its label names. Files may hold slices of one name for several Services.
    pub service: Option<Arc<str>>,
}

impl Key {
    /// Of an object that is no EndpointSlice, or of a slice whose label names no Service.
    #[must_use]
    pub fn new(kind: Kind, name: ServiceName) -> Self {
        Self { kind, name, service: None }
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.name.namespace.is_empty() {
            write!(f, "{} {}", self.kind, self.name.name)
        } else {
            write!(f, "{} {}", self.kind, self.name)
        }
    }
}

/// An object, typed.
#[derive(Clone, Debug, PartialEq)]
pub enum Object {
    /// `v1` Service.
    Service(Arc<Service>),
    /// `discovery.k8s.io/v1` EndpointSlice.
    EndpointSlice(Arc<EndpointSlice>),
    /// `v1` Pod.
    Pod(Arc<Pod>),
    /// `v1` Node.
    Node(Arc<Node>),
    /// `networking.k8s.io/v1` ServiceCIDR.
    ServiceCidr(Arc<ServiceCIDR>),
    /// `v1` Namespace.
    Namespace(Arc<Namespace>),
    /// `apps/v1` Deployment.
    Deployment(Arc<Deployment>),
    /// `apps/v1` StatefulSet.
    StatefulSet(Arc<StatefulSet>),
}

impl Object {
    /// What it is known by.
    #[must_use]
    pub fn key(&self) -> Key {
        let (kind, metadata) = match self {
            Self::Service(object) => (Kind::Service, &object.metadata),
            Self::EndpointSlice(object) => {
                let service = service_of(object).map(|service| service.name);
                return Key { kind: Kind::EndpointSlice, name: name_of(&object.metadata), service };
            }
            Self::Pod(object) => (Kind::Pod, &object.metadata),
            Self::Node(object) => (Kind::Node, &object.metadata),
            Self::ServiceCidr(object) => (Kind::ServiceCIDR, &object.metadata),
            Self::Namespace(object) => (Kind::Namespace, &object.metadata),
            Self::Deployment(object) => (Kind::Deployment, &object.metadata),
            Self::StatefulSet(object) => (Kind::StatefulSet, &object.metadata),
        };
        Key::new(kind, name_of(metadata))
    }
}

/// Namespace and name of an object.
#[must_use]
pub fn name_of(metadata: &ObjectMeta) -> ServiceName {
    let text = |text: &Option<String>| text.as_deref().unwrap_or_default().to_owned();
    ServiceName::new(&text(&metadata.namespace), &text(&metadata.name))
}

/// A label's value.
#[must_use]
pub fn label<'m>(metadata: &'m ObjectMeta, name: &str) -> Option<&'m str> {
    metadata.labels.as_ref()?.get(name).map(String::as_str)
}

/// The Service that an EndpointSlice belongs to, when its label names one.
#[must_use]
pub fn service_of(slice: &EndpointSlice) -> Option<ServiceName> {
    let name = label(&slice.metadata, SERVICE_NAME_LABEL).filter(|name| !name.is_empty())?;
    Some(ServiceName::new(slice.metadata.namespace.as_deref().unwrap_or_default(), name))
}
