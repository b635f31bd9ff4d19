//! What the daemon tells load balancers and probes, over real HTTP, and node ports on loopback.
#![allow(clippy::unwrap_used)]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use sluice_bench::client::Failure;
use sluice_tests::cluster::{Cluster, SOON};
use sluice_tests::lab::{ENDPOINT, Lab, cluster_ip, endpoint, node_port, service, slices};
use sluice_tests::probe::{Protocol, ask};
use sluice_tests::{can_run_in_namespaces, http, manifests};

/// `healthCheckNodePort` of the Service under test.
const CHECK: u16 = 32_100;

fn node(cluster: &Cluster, v4: bool) -> IpAddr {
    cluster.topology.node_address(v4).unwrap()
}

fn publish(lab: &Lab, name: &str, endpoints: &[(u8, Value)]) {
    let spec = json!({"externalTrafficPolicy": "Local", "healthCheckNodePort": CHECK});
    let objects = [vec![service(1, name, spec)], slices(name, ENDPOINT, endpoints)].concat();
    lab.cluster.write(&format!("{name}.json"), &objects).unwrap();
}

/// Asks until the answer is this one: a change takes a moment.
fn wait_for(what: &str, want: &http::Answer, ask: impl Fn() -> anyhow::Result<http::Answer>) {
    let deadline = Instant::now() + SOON;
    loop {
        let found = ask().map(|mut found| {
            found.headers.retain(|name, _| want.headers.contains_key(name));
            found
        });
        if found.as_ref().is_ok_and(|found| found == want) {
            return;
        }
        assert!(Instant::now() < deadline, "{what}: {found:?} instead of {want:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The answer about `web` with so many endpoints here.
fn answer(count: usize) -> http::Answer {
    let headers = [
        ("content-type", "application/json".to_owned()),
        ("x-content-type-options", "nosniff".to_owned()),
        ("x-load-balancing-endpoint-weight", count.to_string()),
    ];
    http::Answer {
        status: if count > 0 { 200 } else { 503 },
        headers: headers.map(|(name, value)| (name.to_owned(), value)).into(),
        body: format!(
            "{{\n\t\"service\": {{\n\t\t\"namespace\": \"default\",\n\t\t\"name\": \"web\"\n\t}},\n\t\
             \"localEndpoints\": {count},\n\t\"serviceProxyHealthy\": true\n}}"
        ),
    }
}

#[test]
fn health_check_node_ports_tell_how_many_endpoints_are_here() {
    if !can_run_in_namespaces("healthCheckNodePort") {
        return;
    }
    let mut lab = Lab::new().unwrap();
    let ready = |number| endpoint(number, json!({}));
    let state = |ready: bool, terminating: bool| json!({"conditions": {"ready": ready, "serving": true, "terminating": terminating}});
    publish(&lab, "web", &[ready(1), ready(3)]);
    lab.cluster.start().unwrap();
    // Endpoints here that are ready count, each once, on whatever path they are asked about.
    let rows = [
        (vec![ready(1), ready(3)], 1, "/"),
        (vec![ready(1), ready(2), ready(3), ready(4)], 2, "/healthz"),
        (vec![ready(3), ready(4)], 0, "/any/path?at=all"),
        (vec![endpoint(1, state(false, true)), ready(2)], 1, "/"),
        (vec![endpoint(1, state(false, true))], 0, "/"),
        (vec![endpoint(1, state(false, false)), endpoint(2, state(true, true))], 1, "/"),
        (vec![], 0, "/"),
    ];
    for (endpoints, count, path) in rows {
        publish(&lab, "web", &endpoints);
        for v4 in [true, false] {
            let address = SocketAddr::new(node(&lab.cluster, v4), CHECK);
            for client in ["outside", "node"] {
                let ns = lab.client(client).unwrap();
                wait_for(&format!("{client}: {address}"), &answer(count), || http::get(ns, address, path));
            }
        }
    }
    // A Service of one family, at addresses of both.
    for v4 in [true, false] {
        let (family, ip) = (if v4 { "IPv4" } else { "IPv6" }, cluster_ip(1, v4).to_string());
        let spec = json!({"externalTrafficPolicy": "Local", "healthCheckNodePort": CHECK,
            "ipFamilies": [family], "clusterIP": ip, "clusterIPs": [ip]});
        for (endpoints, count) in [(vec![ready(1), ready(2)], 2), (vec![ready(3)], 0)] {
            let objects = [vec![service(1, "web", spec.clone())], slices("web", ENDPOINT, &endpoints)].concat();
            lab.cluster.write("web.json", &objects).unwrap();
            for v4 in [true, false] {
                let address = SocketAddr::new(node(&lab.cluster, v4), CHECK);
                let ask = || http::get(lab.client("outside")?, address, "/");
                wait_for(&format!("{family} only: {address}"), &answer(count), ask);
            }
        }
    }
    // Without the policy there is no such port.
    let objects =
        [vec![service(1, "web", json!({"healthCheckNodePort": CHECK}))], slices("web", ENDPOINT, &[ready(1)])];
    lab.cluster.write("web.json", &objects.concat()).unwrap();
    let ns = lab.client("outside").unwrap();
    let deadline = Instant::now() + SOON;
    while http::get(ns, SocketAddr::new(node(&lab.cluster, true), CHECK), "/").is_ok() {
        assert!(Instant::now() < deadline, "still served");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_taken_health_check_port_is_reported_and_tried_again() {
    if !can_run_in_namespaces("a healthCheckNodePort that is taken") {
        return;
    }
    let mut lab = Lab::new().unwrap();
    publish(&lab, "web", &[endpoint(1, json!({}))]);
    let address = SocketAddr::new(node(&lab.cluster, true), CHECK);
    let theirs = lab.cluster.topology.node.run(|| Ok(TcpListener::bind(address)?)).unwrap();
    lab.cluster.start().unwrap();
    let is_told = |problems: &str| problems.contains("healthCheckNodePort") && problems.contains(&address.to_string());
    lab.cluster.wait_for_problems("a taken port", is_told).unwrap();
    drop(theirs);
    lab.cluster.wait_for_problems("a free port", |problems| !problems.contains("healthCheckNodePort")).unwrap();
    assert_eq!(http::get(lab.client("outside").unwrap(), address, "/").unwrap().status, 200);
}

#[test]
fn healthz_and_livez_answer_on_both_families() {
    if !can_run_in_namespaces("/healthz and /livez") {
        return;
    }
    let cluster = Cluster::with_web(1).unwrap();
    let addresses = [true, false].map(|v4| node(&cluster, v4));
    let node_object = manifests::node(&addresses);
    let with = |field: [&str; 2], value: Value| {
        let mut object = node_object.clone();
        object[field[0]][field[1]] = value;
        object
    };
    let taint = |key: &str| json!([{"key": key, "value": "1", "effect": "NoSchedule"}]);
    let rows = [
        (node_object.clone(), true),
        (with(["metadata", "deletionTimestamp"], json!("2026-01-01T00:00:00Z")), false),
        (node_object.clone(), true),
        (with(["spec", "taints"], taint("ToBeDeletedByClusterAutoscaler")), false),
        (with(["spec", "taints"], taint("node.kubernetes.io/unreachable")), true),
    ];
    for (object, eligible) in rows {
        cluster.write("node.json", std::slice::from_ref(&object)).unwrap();
        let loopback = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];
        let askers = addresses.map(|ip| (&cluster.topology.client, ip)).into_iter();
        for (ns, ip) in askers.chain(loopback.map(|ip| (&cluster.topology.node, ip))) {
            let address = SocketAddr::new(ip, 10256);
            let deadline = Instant::now() + SOON;
            let status = if eligible { 200 } else { 503 };
            let found = loop {
                let found = http::get(ns, address, "/healthz").unwrap();
                if found.status == status || Instant::now() > deadline {
                    break found;
                }
                std::thread::sleep(Duration::from_millis(20));
            };
            assert_eq!(found.status, status, "{address}: {object}");
            assert_is_health(&found, Some(eligible));
            let live = http::get(ns, address, "/livez").unwrap();
            assert_eq!(live.status, 200, "{address}: a node that goes is alive: {object}");
            assert_is_health(&live, None);
            assert_eq!(http::get(ns, address, "/metrics").unwrap().status, 404, "nothing else is told to everybody");
        }
    }
}

fn assert_is_health(answer: &http::Answer, eligible: Option<bool>) {
    assert_eq!(answer.headers["content-type"], "application/json");
    assert_eq!(answer.headers["x-content-type-options"], "nosniff");
    let mut body: Value = serde_json::from_str(&answer.body).unwrap();
    let now = body["currentTime"].take();
    assert!(now.as_str().is_some_and(|time| time.starts_with("20") && time.ends_with('Z')), "{answer:?}");
    for place in ["/lastUpdated", "/status/IPv4/lastUpdated", "/status/IPv6/lastUpdated"] {
        assert_eq!(body.pointer_mut(place).unwrap().take(), now, "{place}: {answer:?}");
    }
    let family = json!({"lastUpdated": null, "healthy": true});
    let mut want = json!({
        "lastUpdated": null, "currentTime": null, "healthy": true, "status": {"IPv4": family, "IPv6": family},
    });
    if let Some(eligible) = eligible {
        want["nodeEligible"] = eligible.into();
    }
    assert_eq!(body, want);
}

#[test]
fn node_ports_on_loopback_are_for_the_node_itself() {
    if !can_run_in_namespaces("node ports on loopback") {
        return;
    }
    let mut lab = Lab::new().unwrap();
    lab.cluster.configure("localControllers: false\nnodePortAddresses: [localhost]\n").unwrap();
    let objects = [vec![service(1, "web", json!({}))], slices("web", ENDPOINT, &[endpoint(1, json!({}))])].concat();
    lab.cluster.write("web.json", &objects).unwrap();
    lab.cluster.start().unwrap();
    let port = node_port(1);
    let rows: [(&str, IpAddr, Protocol, Result<&str, Failure>); 9] = [
        ("node", Ipv4Addr::LOCALHOST.into(), Protocol::Tcp, Ok("1")),
        ("node", Ipv4Addr::LOCALHOST.into(), Protocol::Udp, Ok("1")),
        ("node", Ipv4Addr::new(127, 1, 2, 3).into(), Protocol::Tcp, Ok("1")),
        ("node", Ipv6Addr::LOCALHOST.into(), Protocol::Tcp, Ok("1")),
        // Only TCP is passed on from ::1, as by kube-proxy.
        ("node", Ipv6Addr::LOCALHOST.into(), Protocol::Udp, Err(Failure::Refused)),
        // Other addresses of the node answer no node port now, and loopback of others is theirs.
        ("node", node(&lab.cluster, true), Protocol::Tcp, Err(Failure::Refused)),
        ("outside", node(&lab.cluster, true), Protocol::Tcp, Err(Failure::Refused)),
        ("outside", node(&lab.cluster, false), Protocol::Tcp, Err(Failure::Refused)),
        ("outside", Ipv4Addr::LOCALHOST.into(), Protocol::Tcp, Err(Failure::Refused)),
    ];
    for (client, ip, protocol, want) in rows {
        let to = SocketAddr::new(ip, port);
        // The listener on ::1 comes a moment after the rest.
        let deadline = Instant::now() + SOON;
        let found = loop {
            let found =
                lab.client(client).unwrap().run(|| Ok(ask(protocol, to, SOON).map(|answer| answer.by))).unwrap();
            if found.as_deref().map_err(|it| *it) == want || Instant::now() > deadline {
                break found;
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        assert_eq!(found.as_deref().map_err(|it| *it), want, "{client} to {to} {protocol}");
    }
}
