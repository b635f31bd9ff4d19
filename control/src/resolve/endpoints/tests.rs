//! Rules of merging as tables.

use serde_json::{Value, json};

use sluice_dataplane::table::{Condition, Uid};

use crate::resolve::Rules;
use crate::resolve::testing::{endpoint, fields, port, resolved, resolved_by, rules, service, slice, slice_of, text};

fn cluster(slices: &[Value]) -> Vec<String> {
    text(&port(&service(json!({})), slices).cluster.addresses)
}

fn with(slice: &Value, pointer: &str, value: Value) -> Value {
    let mut slice = slice.clone();
    *slice.pointer_mut(pointer).unwrap() = value;
    slice
}

#[test]
fn slices_join_by_port_name_and_protocol_with_their_own_numbers() {
    let slice = slice_of(&["10.0.0.1"]);
    let joined = &["10.0.0.1:8080"][..];
    for (ports, addresses, problems) in [
        (json!([{"name": "http", "port": 8080}]), joined, 0),
        (json!([{"name": "http", "port": 8080, "protocol": "TCP"}]), joined, 0),
        (json!([{"name": "http", "port": 8080, "protocol": "UDP"}]), &[], 0),
        (json!([{"name": "other", "port": 80}]), &[], 0),
        (json!([{"name": "", "port": 80}]), &[], 0),
        (json!([{"port": 80}]), &[], 1),
        (json!([{"name": "http"}]), &[], 1),
        (json!([{"name": "http", "port": 0}]), &[], 1),
        (json!([{"name": "http", "port": 70000}]), &[], 1),
        (json!([{"name": "http", "port": 80, "protocol": "QUIC"}]), &[], 1),
        (
            json!([{"name": "http", "port": 8080}, {"name": "http", "port": 8081}]),
            &["10.0.0.1:8080", "10.0.0.1:8081"],
            0,
        ),
        (json!(null), &[], 0),
    ] {
        let slices = [with(&slice, "/ports", ports.clone())];
        assert_eq!(cluster(&slices), text(addresses), "{ports}");
        assert_eq!(resolved(&service(json!({})), &slices).problems.len(), problems, "{ports}");
    }
    // targetPort is the EndpointSlice controller's matter.
    let web = service(json!({"ports": [{"name": "http", "port": 80, "targetPort": 9999}]}));
    assert_eq!(text(&port(&web, &[slice]).cluster.addresses), joined);
}

#[test]
fn a_nameless_port_of_a_slice_is_unnamed_where_defaults_are_filled_in() {
    let web = service(json!({"ports": [{"port": 80}]}));
    let slices = [with(&slice_of(&["10.0.0.1"]), "/ports", json!([{"port": 8080}]))];
    let count = |rules: &Rules| resolved_by(&web, &slices, rules).spec.unwrap().ports[0].cluster.addresses.len();
    assert_eq!(count(&rules()), 0);
    assert_eq!(count(&Rules { fill_in_defaults: true, ..rules() }), 1);
}

#[test]
fn an_endpoint_is_known_by_the_uid_of_its_pod_or_else_of_its_slice() {
    for (pod, slice, known) in [
        (Some("p"), Some("s"), Uid::of("p")),
        (Some("p"), None, Uid::of("p")),
        (None, Some("s"), Uid::of_slice("s")),
        (None, None, Uid::default()),
    ] {
        let mut object = slice_of(&["10.0.0.1"]);
        object["endpoints"][0]["targetRef"] = json!({"kind": "Pod", "name": "web-1", "uid": pod});
        object["metadata"]["uid"] = json!(slice);
        // That the slice changes, or other endpoints in it, is nothing to this one.
        for generation in 1..3 {
            object["metadata"]["generation"] = json!(generation);
            let spec = port(&service(json!({})), std::slice::from_ref(&object)).endpoints[0];
            assert_eq!(spec.uid, known, "{pod:?} {slice:?}");
        }
    }
}

#[test]
fn some_slices_do_not_count() {
    let slice = slice_of(&["10.0.0.1"]);
    let mut headless = slice.clone();
    headless["metadata"]["labels"]["service.kubernetes.io/headless"] = json!("");
    for (slice, problems) in [
        (headless, 0),
        (with(&slice, "/addressType", json!("IPv6")), 0),
        (with(&slice, "/addressType", json!("FQDN")), 1),
        (with(&slice, "/addressType", json!("IPX")), 1),
        (with(&slice, "/endpoints", json!(null)), 0),
    ] {
        let found = resolved(&service(json!({})), std::slice::from_ref(&slice));
        assert_eq!((cluster(&[slice]).len(), found.problems.len()), (0, problems), "{:?}", found.problems);
    }
}

#[test]
fn only_the_first_address_counts_and_must_be_one() {
    let two = json!({"addresses": ["10.0.0.1", "10.0.0.2"]});
    assert_eq!(cluster(&[slice("web-1", &[two])]), ["10.0.0.1:8080"]);
    for bad in [
        "pod",
        "",
        "fd00::1",
        "0.0.0.0",
        "127.0.0.1",
        "169.254.1.1",
        "224.0.0.1",
        "255.255.255.255",
        // Its own ClusterIP, and another address of a Service range.
        "10.96.0.1",
        "10.96.7.7",
    ] {
        let slices = [slice("web-1", &[endpoint("10.0.0.9"), json!({"addresses": [bad]})])];
        assert_eq!(cluster(&slices), ["10.0.0.9:8080"], "{bad}");
        let found = fields(&resolved(&service(json!({})), &slices));
        assert_eq!(found, ["EndpointSlice ns/web-1: endpoints[1].addresses[0]"], "{bad}");
    }
    let found = resolved(&service(json!({})), &[slice("web-1", &[json!({"addresses": []})])]);
    assert_eq!(fields(&found), ["EndpointSlice ns/web-1: endpoints[0].addresses"]);
    assert_eq!(cluster(&[slice_of(&["010.00.0.001"])]), ["10.0.0.1:8080"]);
}

#[test]
fn an_endpoint_on_a_frontend_of_its_own_service_is_a_loop() {
    let spec = json!({
        "type": "NodePort", "ports": [{"name": "http", "port": 80, "nodePort": 30080}, {"name": "x", "port": 8080, "nodePort": 30081}],
        "externalIPs": ["198.51.100.1"],
    });
    for (address, number, served) in [
        ("192.168.0.2", 8080, true),
        ("192.168.0.2", 30080, false),
        ("192.168.0.3", 30081, false),
        ("192.168.0.4", 30080, true),
        ("198.51.100.1", 8080, false),
        ("198.51.100.1", 80, false),
        ("198.51.100.1", 81, true),
    ] {
        let slices = [with(&slice_of(&[address]), "/ports", json!([{"name": "http", "port": number}]))];
        let found = resolved(&service(spec.clone()), &slices);
        let count = found.spec.as_ref().unwrap().ports[0].cluster.addresses.len();
        assert_eq!((count == 1, found.problems.is_empty()), (served, served), "{address}:{number}");
    }
}

#[test]
fn of_duplicates_the_one_that_lives_counts_then_the_older() {
    let gone = "10.0.0.1 unready unserving terminating";
    let (a, b) = (slice_of(&[gone]), slice("web-2", &[endpoint("10.0.0.1")]));
    assert_eq!(cluster(&[a.clone(), b.clone()]), ["10.0.0.1:8080"]);
    assert_eq!(cluster(&[b, a]), ["10.0.0.1:8080"]);
    let aged = |slice: &Value, created: &str| {
        let mut slice = slice.clone();
        slice["metadata"]["creationTimestamp"] = json!(created);
        slice
    };
    let (ready, unready) = (slice_of(&["10.0.0.1"]), slice("web-2", &[endpoint("10.0.0.1 unready")]));
    let (old, young) = ("2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z");
    for (slices, count) in [
        ([aged(&ready, old), aged(&unready, young)], 1),
        ([aged(&ready, young), aged(&unready, old)], 0),
        ([ready.clone(), aged(&unready, young)], 0),
        ([ready.clone(), unready.clone()], 1),
    ] {
        assert_eq!(cluster(&slices).len(), count);
        assert_eq!(resolved(&service(json!({})), &slices).problems.len(), 1, "the other is reported");
    }
    let same = [slice_of(&["10.0.0.1", "10.0.0.1"]), slice("web-2", &[endpoint("10.0.0.1")])];
    assert_eq!((cluster(&same).len(), resolved(&service(json!({})), &same).problems.len()), (1, 0));
}

#[test]
fn every_endpoint_is_known_whatever_list_it_is_in() {
    let slices =
        [slice_of(&["10.0.0.1", "10.0.0.2 unready", "10.0.0.3 unready unserving", "10.0.0.4 terminating unready"])];
    let endpoints = port(&service(json!({})), &slices).endpoints;
    let addresses: Vec<_> = endpoints.iter().map(|endpoint| endpoint.address).collect();
    assert_eq!(text(&addresses), ["10.0.0.1:8080", "10.0.0.2:8080", "10.0.0.3:8080", "10.0.0.4:8080"]);
    let conditions: Vec<_> = endpoints.iter().map(|endpoint| endpoint.condition).collect();
    let want = [
        Condition::Ready,
        Condition::NotReady { serving: true },
        Condition::NotReady { serving: false },
        Condition::Terminating { serving: true },
    ];
    assert_eq!(conditions, want);
}

#[test]
fn five_thousand_endpoints_in_fifty_slices_are_merged() {
    let address = |number: usize| format!("10.1.{}.{}", number / 250, number % 250 + 1);
    let slices: Vec<Value> = (0..50)
        .map(|index| {
            let endpoints: Vec<Value> = (0..100).map(|of| endpoint(&address(index * 100 + of))).collect();
            slice(&format!("web-{index}"), &endpoints)
        })
        .collect();
    let port = port(&service(json!({})), &slices);
    assert_eq!((port.cluster.addresses.len(), &*port.cluster.why), (5000, "5000 of 5000 endpoints are ready"));
}
