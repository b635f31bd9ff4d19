//! Updates, and what is told of what is odd in them.

use std::path::Path;

use serde_json::{Value, json};

use super::*;
use crate::object::Object;
use crate::source::Change;

fn service(name: &str, ip: &str, spec: Value) -> Value {
    let mut service = json!({"kind": "Service", "metadata": {"namespace": "ns", "name": name}, "spec": {"clusterIP": ip,
        "ports": [{"port": 80}]}});
    spec.as_object().unwrap().iter().for_each(|(key, value)| service["spec"][key] = value.clone());
    service
}

fn slice(name: &str, of: Value, address: &str, port: u16) -> Value {
    json!({"kind": "EndpointSlice", "metadata": {"namespace": "ns", "name": name, "labels": of}, "addressType": "IPv4",
        "endpoints": [{"addresses": [address]}], "ports": [{"name": "", "port": port}]})
}

fn of(service: &str) -> Value {
    json!({"kubernetes.io/service-name": service})
}

/// Each object is a document of its own, counted from 1.
fn publisher(objects: &[Value]) -> Publisher {
    let config = Config { node_name: Some("me".to_owned()), local_controllers: false, ..Config::default() };
    let mut publisher = Publisher::new(config, vec!["192.168.0.2".parse().unwrap()], Arc::new(Slots::new(1)));
    let change = |(index, value): (usize, &Value)| {
        let object = match value["kind"].as_str().unwrap() {
            "Service" => Object::Service(Arc::new(serde_json::from_value(value.clone()).unwrap())),
            "EndpointSlice" => Object::EndpointSlice(Arc::new(serde_json::from_value(value.clone()).unwrap())),
            "ServiceCIDR" => Object::ServiceCidr(Arc::new(serde_json::from_value(value.clone()).unwrap())),
            other => panic!("{other} is not for here"),
        };
        Change::Apply(object, Origin::File { path: Path::new("web.yaml").into(), document: index + 1 })
    };
    publisher.update(Update { changes: objects.iter().enumerate().map(change).collect(), ..Update::default() });
    publisher
}

#[test]
fn what_is_odd_is_reported_where_it_is_written_and_the_rest_is_served() {
    let node_port = json!({"type": "NodePort", "ports": [{"port": 80, "nodePort": 30080}]});
    let publisher = publisher(&[
        service("a", "10.96.0.1", node_port.clone()),
        service("b", "10.96.0.2", node_port),
        slice("a-1", of("a"), "pod", 80),
        slice("b-1", of("b"), "192.168.0.2", 30080),
        slice("c-1", of("c"), "10.0.0.1", 80),
        slice("d-1", json!({}), "10.0.0.1", 80),
    ]);
    let label = "metadata.labels[kubernetes.io/service-name]";
    let problems: Vec<String> = publisher.problems().iter().map(ToString::to_string).collect();
    for (line, problem) in [
        "web.yaml, document 2: Service ns/b: spec: node port 30080 TCP (IPv4) is already taken by the older Service ns/a",
        "web.yaml, document 3: EndpointSlice ns/a-1: endpoints[0].addresses[0]: \"pod\" is no IP address",
        "web.yaml, document 4: EndpointSlice ns/b-1: endpoints[0].addresses[0]: 192.168.0.2:30080 is a frontend of the same Service: a loop",
        &format!("web.yaml, document 5: EndpointSlice ns/c-1: {label}: there is no Service ns/c"),
        &format!("web.yaml, document 6: EndpointSlice ns/d-1: {label}: is missing: the slice belongs to no Service"),
    ]
    .into_iter()
    .zip(&problems)
    {
        assert_eq!(problem, line);
    }
    assert_eq!(problems.len(), 5, "{problems:#?}");
    assert_eq!(publisher.builder().services().count(), 2);
}

#[test]
fn an_endpoint_on_a_frontend_of_another_service_is_reported() {
    let publisher = publisher(&[
        service("a", "10.96.0.1", json!({"externalIPs": ["198.51.100.1"]})),
        service("b", "10.96.0.2", json!({})),
        slice("b-1", of("b"), "198.51.100.1", 80),
    ]);
    let problems: Vec<String> = publisher.problems().iter().map(ToString::to_string).collect();
    let loop_ = "web.yaml, document 2: Service ns/b: endpoints: 198.51.100.1:80 is a frontend of Service ns/a: a loop, it gets no traffic";
    assert_eq!(problems, [loop_]);
}

#[test]
fn a_service_range_that_comes_later_refuses_endpoints_inside() {
    let mut publisher = publisher(&[service("a", "172.30.0.1", json!({})), slice("a-1", of("a"), "172.31.0.9", 80)]);
    let count = |publisher: &Publisher| publisher.builder().services().next().unwrap().ports[0].cluster.addresses.len();
    assert_eq!((count(&publisher), publisher.problems().len()), (1, 0));
    let range = json!({"metadata": {"name": "more"}, "spec": {"cidrs": ["172.31.0.0/16"]}});
    let object = Object::ServiceCidr(Arc::new(serde_json::from_value(range).unwrap()));
    let change = Change::Apply(object, Origin::LocalController);
    assert!(publisher.update(Update { changes: vec![change], ..Update::default() }).is_some());
    assert_eq!((count(&publisher), publisher.problems().len()), (0, 1));
}
