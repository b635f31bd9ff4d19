//! What clients of kube-proxy ask it: metrics, mode, configuration, status; and whether load balancers may still send here.
#![allow(clippy::unwrap_used)]

use std::net::{IpAddr, SocketAddr};
use std::time::Instant;

use serde_json::{Value, json};
use sluice_tests::cluster::{ADMIN, Cluster, SOON};
use sluice_tests::{can_run_in_namespaces, http, manifests};

/// Waits until `/healthz` answers with this code.
fn wait_for_health(cluster: &Cluster, code: u16) -> Value {
    let health = SocketAddr::new(cluster.topology.node_address(true).unwrap(), 10256);
    let deadline = Instant::now() + SOON;
    loop {
        let answer = http::get(&cluster.topology.client, health, "/healthz").unwrap();
        if answer.status == code {
            return serde_json::from_str(&answer.body).unwrap();
        }
        assert!(Instant::now() < deadline, "{answer:?} instead of {code}");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}

#[test]
fn what_asks_kube_proxy_gets_an_answer() {
    if !can_run_in_namespaces("pages and metrics of kube-proxy") {
        return;
    }
    let mut cluster = Cluster::new().unwrap();
    cluster.configure("localControllers: false\nprune: true\nslowStart: 5s\n").unwrap();
    cluster.add_pod(1).unwrap();
    cluster.add_pod(2).unwrap();
    cluster.publish_web(0..1).unwrap();
    cluster.start().unwrap();
    assert!(wait_for_health(&cluster, 200)["lastUpdated"].is_string());

    assert_eq!(cluster.admin("/proxyMode").unwrap(), "sluice");
    let config: Value = serde_json::from_str(&cluster.admin("/configz").unwrap()).unwrap();
    assert_eq!(config["sluice.dev"]["slowStart"], "5s");
    assert_eq!(config["sluice.dev"]["nodeName"], manifests::NODE);
    assert!(cluster.admin("/flagz").unwrap().contains(&format!("\nnode-name={}\n", manifests::NODE)));
    assert!(cluster.admin("/statusz").unwrap().contains("\nStarted: "));

    // A change that was triggered a moment ago, and one that was triggered before the daemon began.
    let generation = cluster.generation().unwrap();
    let pods = |range: std::ops::Range<usize>| -> Vec<(String, Vec<IpAddr>)> {
        cluster.pods[range].iter().map(|pod| (pod.pod.name.clone(), pod.pod.addresses.clone())).collect()
    };
    let mut slices = manifests::slices("web", &pods(0..2));
    let second = std::process::Command::new("date").args(["-u", "+%FT%T.%NZ"]).output().unwrap();
    let triggers = [String::from_utf8(second.stdout).unwrap().trim().to_owned(), "2020-01-01T00:00:00Z".to_owned()];
    for (slice, trigger) in slices.iter_mut().zip(triggers) {
        for endpoint in slice["endpoints"].as_array_mut().unwrap() {
            endpoint["nodeName"] = json!("node-2");
        }
        slice["metadata"]["annotations"] = json!({"endpoints.kubernetes.io/last-change-trigger-time": trigger});
    }
    let mut web = manifests::service("web", 10);
    web["spec"]["externalTrafficPolicy"] = json!("Local");
    cluster.write("web.json", &[vec![web], slices].concat()).unwrap();
    cluster.wait_for_table_after(generation).unwrap();

    let deadline = Instant::now() + SOON;
    while cluster.metric("kubeproxy_network_programming_duration_seconds_count{").unwrap() < 1.0 {
        assert!(Instant::now() < deadline);
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    for (name, least, most) in [
        ("kubeproxy_network_programming_duration_seconds_count{ip_family=\"IPv4\"}", 1.0, 1.0),
        ("kubeproxy_network_programming_duration_seconds_count{ip_family=\"IPv6\"}", 0.0, 0.0),
        ("kubeproxy_network_programming_duration_seconds_bucket{ip_family=\"IPv4\",le=\"59\"}", 1.0, 1.0),
        ("kubeproxy_sync_proxy_rules_duration_seconds_count{ip_family=\"IPv6\"}", 2.0, f64::MAX),
        ("kubeproxy_sync_proxy_rules_duration_seconds_bucket{ip_family=\"IPv4\",le=\"16.384\"}", 2.0, f64::MAX),
        ("kubeproxy_sync_full_proxy_rules_duration_seconds_count{ip_family=\"IPv4\"}", 1.0, 1.0),
        ("kubeproxy_sync_partial_proxy_rules_duration_seconds_count{ip_family=\"IPv4\"}", 1.0, f64::MAX),
        ("kubeproxy_sync_proxy_rules_last_timestamp_seconds{ip_family=\"IPv4\"}", 1.7e9, f64::MAX),
        ("kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds{ip_family=\"IPv6\"}", 1.7e9, f64::MAX),
        ("kubeproxy_sync_proxy_rules_service_changes_total", 1.0, f64::MAX),
        ("kubeproxy_sync_proxy_rules_endpoint_changes_total", 4.0, f64::MAX),
        ("kubeproxy_sync_proxy_rules_endpoint_changes_pending", 0.0, 0.0),
        // Node port and load-balancer address of two ports; the endpoints are on another node.
        (
            "kubeproxy_sync_proxy_rules_no_local_endpoints_total{ip_family=\"IPv4\",traffic_policy=\"external\"}",
            2.0,
            2.0,
        ),
        (
            "kubeproxy_sync_proxy_rules_no_local_endpoints_total{ip_family=\"IPv4\",traffic_policy=\"internal\"}",
            0.0,
            0.0,
        ),
        ("kubeproxy_proxy_healthz_total{code=\"200\"}", 1.0, f64::MAX),
        ("process_resident_memory_bytes", 1e6, 1e10),
        ("process_cpu_seconds_total", 1e-3, 1e4),
        ("process_start_time_seconds", 1.7e9, f64::MAX),
    ] {
        let value = cluster.metric(name).unwrap();
        assert!((least..=most).contains(&value), "{name}: {value}\n{}", cluster.admin("/metrics").unwrap());
    }

    // A Node that is deleted gets no more from load balancers, while those who are here are served.
    std::fs::remove_file(cluster.manifests().join("node.json")).unwrap();
    let health = wait_for_health(&cluster, 503);
    assert_eq!((&health["nodeEligible"], &health["healthy"]), (&json!(false), &json!(true)));
    assert_eq!(http::get(&cluster.topology.node, ADMIN, "/livez").unwrap().status, 200);
    assert!(cluster.metric("kubeproxy_proxy_healthz_total{code=\"503\"}").unwrap() >= 1.0);

    // One line a subsystem says the same to people.
    cluster.write_text("broken.yaml", "kind: [").unwrap();
    let status = |ns: &sluice_bench::netns::NetNs| {
        let output = ns.command(sluice_tests::sluice_binary()).arg("status").output().unwrap();
        (output.status.code(), String::from_utf8(output.stdout).unwrap())
    };
    let deadline = Instant::now() + SOON;
    loop {
        let (code, text) = status(&cluster.topology.node);
        let is_degraded = |name: &str| text.lines().any(|line| line.starts_with(name) && line.contains(" degraded "));
        if code == Some(1) && is_degraded("source ") && is_degraded("health ") && !is_degraded("table ") {
            break;
        }
        assert!(Instant::now() < deadline, "{code:?}\n{text}");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    assert_eq!(status(&cluster.topology.client).0, Some(3), "no daemon is there");
}
