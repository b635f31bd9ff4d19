//! What a daemon does without its API server, or without all its permissions; what it tells of a cluster's mistakes.
#![allow(clippy::unwrap_used)]

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use sluice_bench::client;
use sluice_tests::api_cluster::{cluster, publish, service, slices, wait_for, who_answers};
use sluice_tests::cluster::{Cluster, SOON};
use sluice_tests::fake_api::{FakeApi, Manner};
use sluice_tests::{can_run_in_namespaces, control_plane, manifests};

/// Waits until what an earlier process leaves for the next holds this text.
fn wait_until_saved(cluster: &Cluster, holds: impl Fn(&str) -> bool) {
    let deadline = Instant::now() + SOON + SOON;
    while !std::fs::read_to_string(cluster.state_dir().join("objects")).is_ok_and(|text| holds(&text)) {
        assert!(Instant::now() < deadline, "objects are not saved\n{}", cluster.log());
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Exit code and answer of `sluice status`.
fn status(cluster: &Cluster) -> (Option<i32>, String) {
    let output = cluster.topology.node.command(sluice_tests::sluice_binary()).arg("status").output().unwrap();
    (output.status.code(), String::from_utf8(output.stdout).unwrap())
}

#[test]
fn a_restart_without_the_api_server_goes_on_with_flows_and_the_last_objects() {
    const FIRST: &str = "10.244.0.1:8080";
    const WHAT: &str = "restarts without an API server";
    if !can_run_in_namespaces(WHAT) || !control_plane::can_run(WHAT) {
        return;
    }
    let (mut cluster, mut plane) = cluster();
    publish(&cluster, &plane, "other", 11);
    cluster.start().unwrap();
    let connect =
        || client::Connection::open(SocketAddr::from(([10, 96, 0, 10], 80)), SOON).map_err(anyhow::Error::msg);
    let mut connection = cluster.topology.client.run(connect).unwrap();
    assert_eq!(connection.get("/").unwrap(), "web-1");
    assert_eq!(status(&cluster).0, Some(0), "{}", status(&cluster).1);
    wait_until_saved(&cluster, |text| text.contains("\"other\""));

    plane.kill_api_server().unwrap();
    cluster.stop(Signal::SIGKILL).unwrap();
    cluster.start().unwrap();
    assert_eq!(connection.get("/").unwrap(), "web-1", "the connection goes on");
    assert_eq!(who_answers(&cluster, 10).as_deref(), Some("web-1"), "new ones are made");
    cluster.wait_for_problems("nobody is there", |problems| problems.contains("cannot list services: ")).unwrap();
    let (code, text) = status(&cluster);
    let source = text.lines().find(|line| line.starts_with("source ")).unwrap();
    assert!(code == Some(1) && source.contains("degraded") && source.contains("not synced"), "{text}");
    assert!(source.contains("cannot list "), "{text}");
    assert_eq!(cluster.metric("sluice_source_synced ").unwrap(), 0.0);
    assert!(cluster.metric("sluice_objects_age_seconds ").unwrap() > 0.0);
    assert!(cluster.metric("sluice_source_errors_total{").unwrap() > 0.0);
    assert!(cluster.admin("/healthz").is_ok(), "as kube-proxy's, it is about what waits, not about the API server");

    // What changed meanwhile is seen when the API server is back, and a change of its own goes through.
    cluster.stop(Signal::SIGKILL).unwrap();
    plane.start_api_server().unwrap();
    plane.delete(&service("other", 11)).unwrap();
    publish(&cluster, &plane, "third", 12);
    cluster.start().unwrap();
    wait_for(&cluster, 12, "forward", &[FIRST]);
    wait_for(&cluster, 11, "drop", &[]);
    assert_eq!(connection.get("/").unwrap(), "web-1");
    assert_eq!(cluster.metric("sluice_source_synced ").unwrap(), 1.0);
    assert_eq!(cluster.metric("sluice_objects_age_seconds ").unwrap(), 0.0);
    let (code, text) = status(&cluster);
    assert!(code == Some(0) && text.lines().count() == 6, "{text}");
    assert!(cluster.metric("rest_client_requests_total{").unwrap() >= 4.0);
    let has = |text: &str, name: &str| text.lines().any(|line| line.starts_with("Service ") && line.contains(name));
    wait_until_saved(&cluster, |text| has(text, "\"third\"") && !has(text, "\"other\""));

    // A take-over has nothing from the API server and lets the old one serve, until that is gone.
    plane.kill_api_server().unwrap();
    let mut second = cluster.run_command("state").stderr(std::process::Stdio::null()).spawn().unwrap();
    std::thread::sleep(Duration::from_secs(1));
    assert!(second.try_wait().unwrap().is_none() && who_answers(&cluster, 12).is_some());
    assert_eq!(cluster.metric("sluice_source_synced ").unwrap(), 1.0, "the old one still answers");
    cluster.stop(Signal::SIGKILL).unwrap();
    let deadline = Instant::now() + SOON;
    while cluster.metric("sluice_source_synced ").is_err() {
        assert!(Instant::now() < deadline, "the second does not serve");
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(cluster.metric("sluice_source_synced ").unwrap(), 0.0, "the second serves");
    assert_eq!(who_answers(&cluster, 12).as_deref(), Some("web-1"));
    assert_eq!(connection.get("/").unwrap(), "web-1");
    second.kill().unwrap();
    second.wait().unwrap();
}

#[test]
fn a_missing_permission_is_named_and_the_rest_works_on() {
    const FIRST: &str = "10.244.0.1:8080";
    const WHAT: &str = "permissions that are missing";
    if !can_run_in_namespaces(WHAT) || !control_plane::can_run(WHAT) {
        return;
    }
    let (mut cluster, plane) = cluster();
    let role = |resources: Value| json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": {"name": "less"}, "rules": resources});
    let watch = |group: &str, resource: &str| json!({"apiGroups": [group], "resources": [resource], "verbs": ["list", "watch"]});
    let (services, slices_) = (watch("", "services"), watch("discovery.k8s.io", "endpointslices"));
    plane.create(&role(json!([services, slices_]))).unwrap();
    let binding = json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding", "metadata": {"name": "less"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "less"},
        "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": "nobody"}]});
    plane.create(&binding).unwrap();

    // An old role, from before the own Node and Service ranges were watched.
    cluster.watch_api(plane.kubeconfig("nobody"));
    cluster.start().unwrap();
    assert_eq!(who_answers(&cluster, 10).as_deref(), Some("web-1"));
    let names = |problems: &str, what: &str| problems.contains(&format!("cannot list {what}: forbidden: "));
    cluster
        .wait_for_problems("both are named", |problems| {
            names(problems, "nodes") && names(problems, "servicecidrs.networking.k8s.io")
        })
        .unwrap();
    let (code, text) = status(&cluster);
    assert!(code == Some(1) && text.contains("followed; cannot list nodes: forbidden"), "{text}");
    publish(&cluster, &plane, "other", 11);
    wait_for(&cluster, 11, "forward", &[FIRST]);

    // One that is taken away while we run.
    plane.patch(&role(json!([])), &json!({"rules": [services]})).unwrap();
    let denied = |problems: &str| problems.contains("cannot watch endpointslices.discovery.k8s.io: forbidden: ");
    wait_until_saved(&cluster, |text| text.contains("\"other\""));
    // The watch that is open goes on until it ends.
    cluster.stop(Signal::SIGKILL).unwrap();
    cluster.start().unwrap();
    let denied_list = |problems: &str| names(problems, "endpointslices.discovery.k8s.io") || denied(problems);
    cluster.wait_for_problems("it is named", denied_list).unwrap();
    assert!(status(&cluster).1.contains("not synced"), "{}", status(&cluster).1);
    assert_eq!(who_answers(&cluster, 11).as_deref(), Some("web-1"), "what is known is served");
    plane.patch(&role(json!([])), &json!({"rules": [services, slices_]})).unwrap();
    cluster.wait_for_problems("it is back", |problems| !problems.contains("endpointslices")).unwrap();
    assert!(status(&cluster).1.contains("followed"), "{}", status(&cluster).1);
}

#[test]
fn mistakes_in_a_cluster_are_checked_without_a_daemon_and_told_as_events() {
    const WHAT: &str = "sluice check of a cluster";
    if !can_run_in_namespaces(WHAT) || !control_plane::can_run(WHAT) {
        return;
    }
    let (mut cluster, plane) = cluster();
    plane.create(&service("nothing", 11)).unwrap();
    publish(&cluster, &plane, "hinted", 12);
    let mut hinted = slices(&cluster, "hinted", 0..1);
    hinted[0]["endpoints"][0]["hints"] = json!({"forZones": [{"name": "zone-b"}]});
    plane.patch(&hinted[0], &json!({"endpoints": hinted[0]["endpoints"]})).unwrap();
    let mut taken = service("taken", 13);
    taken["spec"]["externalIPs"] = json!(["198.51.100.1"]);
    plane.create(&taken).unwrap();
    taken = service("too", 14);
    taken["spec"]["externalIPs"] = json!(["198.51.100.1"]);
    plane.create(&taken).unwrap();

    let check = |arguments: &[&str]| {
        let mut command = cluster.topology.node.command(sluice_tests::sluice_binary());
        command.arg("check").arg("--kubeconfig").arg(plane.kubeconfig("proxy")).args(["--node-name", manifests::NODE]);
        let output = command.args(arguments).output().unwrap();
        (output.status.code(), String::from_utf8(output.stdout).unwrap() + &String::from_utf8_lossy(&output.stderr))
    };
    let (code, text) = check(&[]);
    assert_eq!(code, Some(1), "{text}");
    for words in [
        "default/web",
        "Service default/nothing: spec.selector: is missing, and no EndpointSlice of it has an endpoint",
        "Service default/hinted: endpoints: port \"http\" (TCP): hints of IPv4 endpoints do not count: none is for zone zone-a",
        "is already taken by the older Service default/taken",
    ] {
        assert!(text.contains(words), "{words}\n{text}");
    }
    let json: Value = serde_json::from_str(&check(&["-o", "json"]).1).unwrap();
    assert!(json["warnings"].as_u64() >= Some(2) && json["errors"].as_u64() >= Some(1), "{json}");

    // The daemon tells the same where `kubectl describe` shows it, once.
    cluster.watch_api(plane.kubeconfig("proxy"));
    cluster.start().unwrap();
    let deadline = Instant::now() + SOON;
    let event = loop {
        let events = plane.get("/apis/events.k8s.io/v1/namespaces/default/events").unwrap();
        let mut ours = events["items"].as_array().unwrap().iter();
        if let Some(event) = ours.find(|event| event["reason"] == "AddressConflict") {
            break event.clone();
        }
        assert!(Instant::now() < deadline, "no Event: {events}\n{}", cluster.log());
        std::thread::sleep(Duration::from_millis(50));
    };
    let too = plane.get("/api/v1/namespaces/default/services/too").unwrap();
    assert_eq!(event["regarding"]["uid"], too["metadata"]["uid"], "{event}");
    assert_eq!((&event["type"], &event["reportingController"]), (&json!("Warning"), &json!("sluice")));
    assert!(event["note"].as_str().unwrap().contains("already taken by the older Service default/taken"), "{event}");
    // Both have said all they had to when the second says that it began.
    cluster.stop(Signal::SIGKILL).unwrap();
    cluster.start().unwrap();
    let begun = |events: &Value| {
        let items = events["items"].as_array().unwrap().iter();
        items.filter(|event| event["reason"] == "Starting" && event["regarding"]["kind"] == "Node").count()
    };
    while begun(&plane.get("/apis/events.k8s.io/v1/namespaces/default/events").unwrap()) < 2 {
        assert!(Instant::now() < deadline + SOON, "{}", cluster.log());
        std::thread::sleep(Duration::from_millis(50));
    }
    let events = plane.get("/apis/events.k8s.io/v1/namespaces/default/events").unwrap();
    let conflicts = events["items"].as_array().unwrap().iter().filter(|event| event["reason"] == "AddressConflict");
    assert_eq!(conflicts.count(), 1, "said twice, it is still one: {events}");
}

#[test]
fn whatever_the_api_server_answers_the_last_objects_are_served() {
    const WHAT: &str = "a misbehaving API server";
    if !can_run_in_namespaces(WHAT) || !control_plane::can_run(WHAT) {
        return;
    }
    let (mut cluster, mut plane) = cluster();
    cluster.arguments(&["--log-level", "info"]);
    cluster.start().unwrap();
    wait_until_saved(&cluster, |text| text.contains("\"web\""));
    let connect =
        || client::Connection::open(SocketAddr::from(([10, 96, 0, 10], 80)), SOON).map_err(anyhow::Error::msg);
    let mut connection = cluster.topology.client.run(connect).unwrap();
    plane.kill_api_server().unwrap();
    cluster.stop(Signal::SIGKILL).unwrap();
    let address = SocketAddr::from(([127, 0, 0, 1], 8081));
    let fake = FakeApi::start(&cluster.topology.node, address, Manner::Closed).unwrap();
    cluster.watch_api(fake.kubeconfig());
    let begun = Instant::now();
    cluster.start().unwrap();
    for (manner, error) in [
        (Manner::Closed, "code=\"none\""),
        (Manner::Half, "code=\"none\""),
        (Manner::Status(500), "code=\"500\""),
        (Manner::Status(429), "code=\"429\""),
        (Manner::Status(401), "code=\"401\""),
        (Manner::Status(403), "code=\"403\""),
        // Last: nobody waits here until patience with these ends.
        (Manner::Slow, ""),
        (Manner::Silent, ""),
    ] {
        fake.behave(manner);
        let asked = fake.asked();
        let deadline = Instant::now() + Duration::from_secs(60);
        let is_counted = || {
            let text = cluster.admin("/metrics").unwrap();
            text.lines().any(|line| line.starts_with("sluice_source_errors_total{") && line.contains(error))
        };
        while fake.asked() == asked || !(error.is_empty() || is_counted()) {
            assert!(Instant::now() < deadline, "{manner:?}\n{}", cluster.log());
            std::thread::sleep(Duration::from_millis(50));
        }
        let (code, text) = status(&cluster);
        assert!(code == Some(1) && text.contains("not synced"), "{manner:?}: {text}");
        assert_eq!(connection.get("/").unwrap(), "web-1", "{manner:?}");
        assert_eq!(who_answers(&cluster, 10).as_deref(), Some("web-1"), "{manner:?}");
        assert!(cluster.admin("/healthz").is_ok(), "{manner:?}");
    }
    // Each resource may say so once in 30 seconds.
    let warnings = cluster.log().lines().filter(|line| line.contains(" WARN cannot ")).count();
    let most = 4 * (1 + begun.elapsed().as_secs() as usize / 30);
    assert!((1..=most).contains(&warnings), "{warnings} warnings\n{}", cluster.log());
}
