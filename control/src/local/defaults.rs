//! Defaults that the API server writes into a Service.

use k8s_openapi::api::core::v1::{ClientIPConfig, Service, ServiceSpec, SessionAffinityConfig};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

/// Three hours.
const AFFINITY_SECONDS: i32 = 10_800;

/// Type of a Service; ClusterIP when it says none.
pub(super) fn type_of(spec: &ServiceSpec) -> &str {
    spec.type_.as_deref().filter(|type_| !type_.is_empty()).unwrap_or("ClusterIP")
}

/// Headless: it has no ClusterIP on purpose.
pub(super) fn is_headless(spec: &ServiceSpec) -> bool {
    let first = spec.cluster_ips.iter().flatten().next();
    spec.cluster_ip.as_ref().filter(|ip| !ip.is_empty()).or(first).is_some_and(|ip| ip == "None")
}

/// Fills in what people leave out.
pub(super) fn set(service: &mut Service) {
    let spec = service.spec.get_or_insert_default();
    let type_ = type_of(spec).to_owned();
    let default = |field: &mut Option<String>, value: &str| {
        if field.as_deref().unwrap_or_default().is_empty() {
            *field = Some(value.to_owned());
        }
    };
    default(&mut spec.type_, "ClusterIP");
    default(&mut spec.session_affinity, "None");
    if spec.session_affinity.as_deref() == Some("ClientIP") {
        let config: &mut SessionAffinityConfig = spec.session_affinity_config.get_or_insert_default();
        let client_ip: &mut ClientIPConfig = config.client_ip.get_or_insert_default();
        client_ip.timeout_seconds.get_or_insert(AFFINITY_SECONDS);
    }
    if type_ != "ExternalName" {
        default(&mut spec.internal_traffic_policy, "Cluster");
    }
    let is_external = matches!(&*type_, "NodePort" | "LoadBalancer");
    if is_external || spec.external_ips.iter().flatten().next().is_some() {
        default(&mut spec.external_traffic_policy, "Cluster");
    }
    if type_ == "LoadBalancer" {
        spec.allocate_load_balancer_node_ports.get_or_insert(true);
    }
    for port in spec.ports.iter_mut().flatten() {
        default(&mut port.protocol, "TCP");
        let is_open = match &port.target_port {
            None | Some(IntOrString::Int(0)) => true,
            Some(IntOrString::Int(_)) => false,
            Some(IntOrString::String(name)) => name.is_empty(),
        };
        if is_open {
            port.target_port = Some(IntOrString::Int(port.port));
        }
    }
    let balancer = service.status.as_mut().and_then(|status| status.load_balancer.as_mut());
    for ingress in balancer.into_iter().filter_map(|balancer| balancer.ingress.as_mut()).flatten() {
        if ingress.ip.is_some() {
            default(&mut ingress.ip_mode, "VIP");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_is_left_out_is_filled_in() {
        for (given, expected) in [
            (
                json!({"ports": [{"port": 80}]}),
                json!({"type": "ClusterIP", "sessionAffinity": "None", "internalTrafficPolicy": "Cluster",
                    "ports": [{"port": 80, "protocol": "TCP", "targetPort": 80}]}),
            ),
            (
                json!({"type": "LoadBalancer", "sessionAffinity": "ClientIP",
                    "ports": [{"port": 80, "protocol": "UDP", "targetPort": "dns"}]}),
                json!({"type": "LoadBalancer", "sessionAffinity": "ClientIP", "internalTrafficPolicy": "Cluster",
                    "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 10800}},
                    "externalTrafficPolicy": "Cluster", "allocateLoadBalancerNodePorts": true,
                    "ports": [{"port": 80, "protocol": "UDP", "targetPort": "dns"}]}),
            ),
            (
                json!({"externalIPs": ["1.2.3.4"], "internalTrafficPolicy": "Local"}),
                json!({"type": "ClusterIP", "sessionAffinity": "None", "internalTrafficPolicy": "Local",
                    "externalTrafficPolicy": "Cluster", "externalIPs": ["1.2.3.4"]}),
            ),
            (
                json!({"type": "ExternalName", "externalName": "x"}),
                json!({"type": "ExternalName", "externalName": "x", "sessionAffinity": "None"}),
            ),
        ] {
            let mut service = Service { spec: serde_json::from_value(given).unwrap(), ..Service::default() };
            set(&mut service);
            assert_eq!(serde_json::to_value(service.spec).unwrap(), expected);
        }
    }

    #[test]
    fn load_balancer_addresses_have_a_mode() {
        let status = json!({"loadBalancer": {"ingress": [{"ip": "1.2.3.4"}, {"hostname": "h"}, {"ip": "::1", "ipMode": "Proxy"}]}});
        let mut service = Service { status: serde_json::from_value(status).unwrap(), ..Service::default() };
        set(&mut service);
        let ingress = service.status.unwrap().load_balancer.unwrap().ingress.unwrap();
        let modes: Vec<_> = ingress.iter().map(|ingress| ingress.ip_mode.as_deref()).collect();
        assert_eq!(modes, [Some("VIP"), None, Some("Proxy")]);
    }
}
