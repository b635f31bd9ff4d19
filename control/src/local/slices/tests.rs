use serde_json::{Value, json};

use super::*;

fn pod(name: &str, ip: &str, more: Value) -> Pod {
    let mut pod = json!({
        "metadata": {"name": name, "namespace": "default", "uid": format!("uid-{name}")},
        "spec": {"nodeName": "n1", "containers": [
            {"name": "c", "ports": [{"name": "http", "containerPort": 8080}, {"name": "dns", "containerPort": 53, "protocol": "UDP"}]},
        ]},
        "status": {"podIP": ip, "podIPs": [{"ip": ip}], "conditions": [{"type": "Ready", "status": "True"}]},
    });
    merge(&mut pod, more);
    serde_json::from_value(pod).unwrap()
}

fn merge(into: &mut Value, more: Value) {
    match (into, more) {
        (Value::Object(into), Value::Object(more)) => {
            for (key, value) in more {
                merge(into.entry(key).or_insert(Value::Null), value);
            }
        }
        (into, more) => *into = more,
    }
}

fn slices(spec: Value, pods: &[Pod]) -> Vec<EndpointSlice> {
    let mut full = json!({"ipFamilies": ["IPv4"], "ports": [{"port": 80, "targetPort": "http"}]});
    merge(&mut full, spec);
    let service = Service { spec: serde_json::from_value(full).unwrap(), ..Service::default() };
    let zone = |node: &str| (node == "n1").then(|| "z1".to_owned());
    build(&ServiceName::new("default", "web"), &service, pods, zone).into_values().collect()
}

fn endpoints(spec: Value, pods: &[Pod]) -> Vec<Value> {
    let slices = slices(spec, pods);
    let endpoints = slices.iter().flat_map(|slice| slice.endpoints.iter().flatten());
    endpoints.map(|endpoint| serde_json::to_value(endpoint).unwrap()).collect()
}

#[test]
fn an_endpoint_says_all_that_a_controller_would() {
    let pods = [pod("a", "10.0.0.1", json!({"spec": {"hostname": "h", "subdomain": "web"}}))];
    assert_eq!(
        endpoints(json!({"trafficDistribution": "PreferSameNode"}), &pods),
        [json!({
            "addresses": ["10.0.0.1"],
            "conditions": {"ready": true, "serving": true, "terminating": false},
            "hints": {"forNodes": [{"name": "n1"}], "forZones": [{"name": "z1"}]},
            "hostname": "h",
            "nodeName": "n1",
            "targetRef": {"kind": "Pod", "namespace": "default", "name": "a", "uid": "uid-a"},
            "zone": "z1",
        })]
    );
    let labels = slices(json!({"clusterIP": "None"}), &pods)[0].metadata.labels.clone().unwrap();
    assert_eq!(labels[SERVICE_NAME_LABEL], "web");
    assert_eq!(labels[HEADLESS_LABEL], "");
}

#[test]
fn conditions_come_from_readiness_and_deletion() {
    let unready = json!({"status": {"conditions": [{"type": "Ready", "status": "False"}]}});
    let terminating = json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}});
    let bare = json!({"status": {"conditions": null}});
    for (more, publish, expected) in [
        (json!({}), false, [true, true, false]),
        (unready.clone(), false, [false, false, false]),
        (unready, true, [true, false, false]),
        (terminating.clone(), false, [false, true, true]),
        (terminating, true, [true, true, true]),
        (bare, false, [false, false, false]),
    ] {
        let spec = json!({"publishNotReadyAddresses": publish, "trafficDistribution": "PreferSameZone"});
        let endpoints = endpoints(spec, &[pod("a", "10.0.0.1", more.clone())]);
        let conditions = &endpoints[0]["conditions"];
        let is = ["ready", "serving", "terminating"].map(|name| conditions[name] == true);
        assert_eq!(is, expected, "{more} {publish}");
        assert_eq!(endpoints[0]["hints"].is_null(), !expected[0], "only what is ready gets hints");
    }
}

#[test]
fn pods_that_cannot_be_reached_are_left_out() {
    let pods = [
        pod("done", "10.0.0.1", json!({"status": {"phase": "Succeeded"}})),
        pod("failed", "10.0.0.2", json!({"status": {"phase": "Failed"}})),
        pod("new", "10.0.0.3", json!({"status": {"podIP": null, "podIPs": null}})),
        pod("other", "fd00::1", json!({})),
    ];
    let slices = slices(json!({}), &pods);
    assert_eq!(slices.len(), 1, "one without endpoints");
    assert_eq!(slices[0].endpoints, Some(Vec::new()));
}

#[test]
fn a_family_each() {
    let both = json!({"status": {"podIPs": [{"ip": "10.0.0.1"}, {"ip": "fd00::1"}]}});
    let slices = slices(json!({"ipFamilies": ["IPv6", "IPv4"]}), &[pod("a", "10.0.0.1", both)]);
    let is: Vec<_> = slices
        .iter()
        .map(|slice| (&*slice.address_type, &*slice.endpoints.as_ref().unwrap()[0].addresses[0]))
        .collect();
    assert_eq!(is, [("IPv4", "10.0.0.1"), ("IPv6", "fd00::1")]);
}

#[test]
fn ports_are_those_of_each_pod() {
    let other = json!({"spec": {"containers": [{"name": "c", "ports": [{"name": "http", "containerPort": 9090}]}]}});
    let sidecar = json!({"spec": {"containers": [{"name": "c"}], "initContainers": [
        {"name": "once", "ports": [{"name": "http", "containerPort": 1}]},
        {"name": "s", "restartPolicy": "Always", "ports": [{"name": "http", "containerPort": 7070}]},
    ]}});
    let pods = [
        pod("a", "10.0.0.1", json!({})),
        pod("b", "10.0.0.2", other),
        pod("c", "10.0.0.3", sidecar),
        pod("d", "10.0.0.4", json!({"spec": {"containers": []}})),
        pod("e", "10.0.0.5", json!({})),
    ];
    let ports = json!([{"name": "n", "port": 80, "targetPort": 81}, {"name": "h", "port": 82, "targetPort": "http"},
        {"name": "u", "port": 53, "targetPort": "dns", "protocol": "UDP"}]);
    let mut is: Vec<_> = slices(json!({"ports": ports}), &pods)
        .iter()
        .map(|slice| {
            let ports: Vec<_> =
                slice.ports.iter().flatten().map(|port| (port.name.clone().unwrap(), port.port.unwrap())).collect();
            (slice.endpoints.as_ref().unwrap().len(), ports)
        })
        .collect();
    is.sort();
    let port = |name: &str, number: i32| (name.to_owned(), number);
    assert_eq!(
        is,
        [
            (1, vec![port("n", 81)]),
            (1, vec![port("n", 81), port("h", 7070)]),
            (1, vec![port("n", 81), port("h", 9090)]),
            (2, vec![port("n", 81), port("h", 8080), port("u", 53)]),
        ]
    );
}

#[test]
fn a_slice_holds_at_most_a_hundred() {
    let pods: Vec<Pod> =
        (0..250).map(|n| pod(&format!("p{n:03}"), &format!("10.0.{}.{}", n / 200, n % 200 + 1), json!({}))).collect();
    let sizes =
        slices(json!({}), &pods).iter().map(|slice| slice.endpoints.as_ref().unwrap().len()).collect::<Vec<_>>();
    assert_eq!(sizes, [100, 100, 50]);
}
