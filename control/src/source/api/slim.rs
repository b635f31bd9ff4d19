//! Objects without what we never read: it is most of their size, and changes most often.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{
    Namespace, Node, NodeStatus, ObjectReference, Pod, PodStatus, Service, ServiceStatus,
};
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointSlice};
use k8s_openapi::api::networking::v1::ServiceCIDR;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::de::DeserializeOwned;

use crate::object::{HEADLESS_LABEL, Object, PROXY_NAME_LABEL, SERVICE_NAME_LABEL};
use crate::programming::TRIGGER_TIME;

/// Prefix of annotations of ours.
const OURS: &str = "sluice.dev/";

/// A kind that is watched.
pub(super) trait Watched:
    kube::Resource<DynamicType = ()> + DeserializeOwned + Clone + Debug + Send + 'static
{
    /// With only what is read.
    fn slim(self) -> Object;
}

impl Watched for Service {
    fn slim(mut self) -> Object {
        // Events name it.
        let uid = self.metadata.uid.take();
        slim(&mut self.metadata);
        self.metadata.uid = uid;
        retain(&mut self.metadata.labels, |name| name == PROXY_NAME_LABEL || name == HEADLESS_LABEL);
        self.spec.iter_mut().filter_map(|spec| spec.ports.as_mut()).for_each(Vec::shrink_to_fit);
        let load_balancer = self.status.take().and_then(|status| status.load_balancer);
        self.status = load_balancer.map(|it| ServiceStatus { load_balancer: Some(it), ..ServiceStatus::default() });
        Object::Service(Arc::new(self))
    }
}

impl Watched for EndpointSlice {
    fn slim(mut self) -> Object {
        // Who its endpoints are that do not say so themselves.
        let uid = self.metadata.uid.take();
        slim(&mut self.metadata);
        self.metadata.uid = uid;
        // The rest are the Service's own, in each of its slices.
        retain(&mut self.metadata.labels, |name| name == SERVICE_NAME_LABEL || name == HEADLESS_LABEL);
        self.endpoints.iter_mut().flatten().for_each(slim_endpoint);
        self.endpoints.iter_mut().for_each(Vec::shrink_to_fit);
        self.ports.iter_mut().for_each(Vec::shrink_to_fit);
        Object::EndpointSlice(Arc::new(self))
    }
}

impl Watched for Node {
    fn slim(mut self) -> Object {
        slim(&mut self.metadata);
        let addresses = self.status.take().and_then(|status| status.addresses);
        self.status = addresses.map(|it| NodeStatus { addresses: Some(it), ..NodeStatus::default() });
        Object::Node(Arc::new(self))
    }
}

impl Watched for ServiceCIDR {
    fn slim(mut self) -> Object {
        slim(&mut self.metadata);
        self.status = None;
        Object::ServiceCidr(Arc::new(self))
    }
}

impl Watched for Namespace {
    fn slim(mut self) -> Object {
        slim(&mut self.metadata);
        (self.spec, self.status) = (None, None);
        Object::Namespace(Arc::new(self))
    }
}

impl Watched for Pod {
    fn slim(mut self) -> Object {
        slim(&mut self.metadata);
        self.metadata.labels = None;
        self.spec = None;
        let status = self.status.take().unwrap_or_default();
        let (phase, pod_ip, pod_ips) = (status.phase, status.pod_ip, status.pod_ips);
        self.status = Some(PodStatus { phase, pod_ip, pod_ips, ..PodStatus::default() });
        Object::Pod(Arc::new(self))
    }
}

/// There are many more endpoints than anything else.
fn slim_endpoint(endpoint: &mut Endpoint) {
    // Hints say which zones count, not the endpoint's own.
    (endpoint.zone, endpoint.deprecated_topology) = (None, None);
    endpoint.addresses.shrink_to_fit();
    if let Some(target) = endpoint.target_ref.take() {
        let (name, uid) = (target.name, target.uid);
        endpoint.target_ref = Some(ObjectReference { name, uid, ..ObjectReference::default() });
    }
}

/// None is left where there would be no entry: an empty map means the same.
fn retain(entries: &mut Option<BTreeMap<String, String>>, is_read: impl Fn(&str) -> bool) {
    entries.iter_mut().for_each(|entries| entries.retain(|name, _| is_read(name)));
    entries.take_if(|entries| entries.is_empty());
}

fn slim(metadata: &mut ObjectMeta) {
    let mut whole = std::mem::take(metadata);
    retain(&mut whole.annotations, |name| name.starts_with(OURS) || name == TRIGGER_TIME);
    *metadata = ObjectMeta {
        namespace: whole.namespace,
        name: whole.name,
        labels: whole.labels,
        annotations: whole.annotations,
        creation_timestamp: whole.creation_timestamp,
        deletion_timestamp: whole.deletion_timestamp,
        ..ObjectMeta::default()
    };
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn what_is_read_stays_and_the_rest_goes() {
        let metadata = |annotations: Value| {
            json!({"name": "a", "namespace": "n", "labels": {"l": "1", HEADLESS_LABEL: ""},
                "creationTimestamp": "2026-01-01T00:00:00Z", "deletionTimestamp": "2026-01-02T00:00:00Z", "resourceVersion": "7", "generation": 3, "uid": "u",
                "finalizers": ["f"], "ownerReferences": [{"apiVersion": "v1", "kind": "K", "name": "o", "uid": "o"}],
                "managedFields": [{"manager": "m"}], "annotations": annotations})
        };
        let slimmed = json!({"name": "a", "namespace": "n", "labels": {HEADLESS_LABEL: ""},
            "creationTimestamp": "2026-01-01T00:00:00Z", "deletionTimestamp": "2026-01-02T00:00:00Z", "uid": "u",
            "annotations": {"sluice.dev/retry": "off", TRIGGER_TIME: "2026-01-01T00:00:00Z"}});
        let annotations =
            json!({"sluice.dev/retry": "off", TRIGGER_TIME: "2026-01-01T00:00:00Z", "kubectl/last": "{}"});
        let slice = json!({"metadata": metadata(annotations), "addressType": "IPv4", "endpoints": [
            {"addresses": ["10.0.0.1"], "conditions": {"ready": true}, "hints": {"forZones": [{"name": "z"}]}, "hostname": "h",
                "nodeName": "me", "zone": "z", "targetRef": {"kind": "Pod", "namespace": "n", "name": "p", "uid": "u"}}]});
        let slice: EndpointSlice = serde_json::from_value(slice).unwrap();
        let Object::EndpointSlice(slice) = slice.slim() else { panic!("another kind") };
        assert_eq!(serde_json::to_value(&slice.metadata).unwrap(), slimmed);
        let slimmed = json!([{"addresses": ["10.0.0.1"], "conditions": {"ready": true},
            "hints": {"forZones": [{"name": "z"}]}, "hostname": "h", "nodeName": "me", "targetRef": {"name": "p", "uid": "u"}}]);
        assert_eq!(serde_json::to_value(&slice.endpoints).unwrap(), slimmed);

        let node = json!({"metadata": metadata(json!({"other": "x"})), "spec": {"podCIDRs": ["10.0.0.0/24"]}, "status": {
            "addresses": [{"type": "InternalIP", "address": "10.0.0.1"}], "images": [{"names": ["i"]}],
            "conditions": [{"type": "Ready", "status": "True"}]}});
        let node: Node = serde_json::from_value(node).unwrap();
        let Object::Node(node) = node.slim() else { panic!("another kind") };
        assert_eq!(node.metadata.annotations, None);
        let rest = json!({"addresses": [{"type": "InternalIP", "address": "10.0.0.1"}]});
        assert_eq!(serde_json::to_value(&node.status).unwrap(), rest);
        assert_eq!(serde_json::to_value(&node.spec).unwrap(), json!({"podCIDRs": ["10.0.0.0/24"]}));
    }
}
