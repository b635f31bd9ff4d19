//! The Kubernetes API as source, with a real API server: as a user with only the role system:node-proxier.
#![allow(clippy::unwrap_used)]

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::Result;
use serde_json::{Value, json};
use sluice_bench::client::{self, Target, ask};
use sluice_tests::cluster::{Cluster, SOON};
use sluice_tests::control_plane::{self, ControlPlane};
use sluice_tests::{can_run_in_namespaces, manifests};

/// Where the API server is, as a Pod of the cluster.
const ADDRESS: &str = "10.244.255.1";

/// A node whose Services come from an API server, with two Pods; the Node and the Service `web` with the first are there.
fn cluster() -> (Cluster, ControlPlane) {
    let mut cluster = Cluster::new().unwrap();
    cluster.add_pod(1).unwrap();
    cluster.add_pod(2).unwrap();
    let pod = cluster.topology.add_pod("control-plane", &[ADDRESS.parse().unwrap()]).unwrap();
    let plane = ControlPlane::start(pod.ns, ADDRESS).unwrap();
    let addresses: Vec<IpAddr> = cluster.topology.config.node.iter().map(ipnet::IpNet::addr).collect();
    plane.create(&manifests::node(&addresses)).unwrap();
    publish(&cluster, &plane, "web", 10);
    cluster.watch_api(plane.kubeconfig("proxy"));
    cluster.arguments(&["--log-level", "info,sluice_control::source::api=debug"]);
    (cluster, plane)
}

/// Creates a Service whose endpoint is the first Pod.
fn publish(cluster: &Cluster, plane: &ControlPlane, name: &str, host: u8) {
    plane.create(&service(name, host)).unwrap();
    for slice in slices(cluster, name, 0..1) {
        plane.create(&slice).unwrap();
    }
}

/// With one port: an API server gives a node port number to one port only.
fn service(name: &str, host: u8) -> Value {
    let mut service = manifests::service(name, host);
    service["spec"]["ports"].as_array_mut().unwrap().truncate(1);
    service
}

fn slices(cluster: &Cluster, name: &str, pods: std::ops::Range<usize>) -> Vec<Value> {
    let pods: Vec<(String, Vec<IpAddr>)> =
        cluster.pods[pods].iter().map(|pod| (pod.pod.name.clone(), pod.pod.addresses.clone())).collect();
    manifests::slices(name, &pods)
}

/// Waits until the endpoints that a new connection to this ClusterIP may get are these.
fn wait_for(cluster: &Cluster, host: u8, outcome: &str, endpoints: &[&str]) {
    let to = format!("10.96.0.{host}:80");
    let trace = ["trace", "--from", "10.244.0.7", "--to", &to, "--admin", "127.0.0.1:10249", "-o", "json"];
    let wanted = json!(endpoints);
    let deadline = Instant::now() + SOON;
    loop {
        let answer: Value = serde_json::from_str(&cluster.sluice(&trace).unwrap()).unwrap();
        if answer["outcome"] == outcome && (answer["endpoints"] == wanted || endpoints.is_empty()) {
            return;
        }
        assert!(Instant::now() < deadline, "{to}: {answer} instead of {outcome} {wanted}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn who_answers(cluster: &Cluster, host: u8) -> Option<String> {
    let target = Target::Http(SocketAddr::from(([10, 96, 0, host], 80)));
    cluster.topology.client.run(|| Ok(ask(target, Duration::from_secs(2)).result.ok())).unwrap()
}

/// A Pod that its kubelet would say is ready.
fn running(name: &str, addresses: &[IpAddr]) -> Value {
    let addresses: Vec<Value> = addresses.iter().map(|address| json!({"ip": address.to_string()})).collect();
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"namespace": "default", "name": name, "labels": {"app": "controlled"}},
        "spec": {"nodeName": manifests::NODE, "containers": [{"name": "it", "image": "it",
            "ports": [{"name": "http", "containerPort": 8080}]}]},
        "status": {"phase": "Running", "podIP": addresses[0]["ip"], "podIPs": addresses,
            "conditions": [{"type": "Ready", "status": "True"}]},
    })
}

/// What a dry run prints in a Pod: with a service account's files, and a mount namespace to have them in.
fn in_cluster(cluster: &Cluster, plane: &ControlPlane) -> String {
    const SCRIPT: &str = "mount -t tmpfs tmpfs /run && cd /run && mkdir -p secrets/kubernetes.io/serviceaccount && \
        cd secrets/kubernetes.io/serviceaccount && cp \"$0\" ca.crt && printf default >namespace && \
        printf proxy-token >token && exec \"$@\"";
    let mut command = cluster.topology.node.command("unshare");
    command.args(["--mount", "sh", "-c", SCRIPT]).arg(plane.certificate());
    command.arg(sluice_tests::sluice_binary()).args(["run", "--dry-run"]).args(cluster.common_arguments("dry"));
    command.env("KUBERNETES_SERVICE_HOST", ADDRESS).env("KUBERNETES_SERVICE_PORT", "6443");
    let output = command.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

fn cut(cluster: &Cluster, action: &str) -> Result<String> {
    cluster.output("ip", &["rule", action, "pref", "1", "to", ADDRESS, "unreachable"])
}

#[test]
fn a_source_must_be_named_and_only_one() {
    let folder = tempfile::tempdir().unwrap();
    let broken = folder.path().join("broken");
    std::fs::write(&broken, "kind: [").unwrap();
    let (broken, missing) = (broken.to_str().unwrap(), "/does/not/exist");
    for (arguments, words) in [
        (&[][..], &["--manifests", "--kubeconfig"][..]),
        (&["--manifests", missing, "--kubeconfig", missing], &["cannot be used with"]),
        (&["--kubeconfig", missing], &[missing]),
        (&["--kubeconfig", broken], &[broken]),
    ] {
        let mut command = std::process::Command::new(sluice_tests::sluice_binary());
        let output = command.arg("run").args(arguments).env_remove("KUBERNETES_SERVICE_HOST").output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {error}");
        assert!(words.iter().all(|word| error.contains(word)), "{arguments:?}: {error}");
    }
}

#[test]
fn services_follow_a_real_api_server_through_restarts_cuts_and_compaction() {
    const FIRST: &str = "10.244.0.1:8080";
    const SECOND: &str = "10.244.0.2:8080";
    const WHAT: &str = "the Kubernetes API as source";
    if !can_run_in_namespaces(WHAT) || !control_plane::can_run(WHAT) {
        return;
    }
    let (mut cluster, mut plane) = cluster();

    // What would be served is printed, and nothing is touched.
    let before = cluster.host_state().unwrap();
    let dry = cluster.run_command("dry").arg("--dry-run").output().unwrap();
    let text = String::from_utf8_lossy(&dry.stdout);
    assert!(dry.status.success() && text.contains("default/web") && text.contains("10.96.0.10:80"), "{dry:?}");
    assert_eq!(cluster.host_state().unwrap(), before);
    assert_eq!(in_cluster(&cluster, &plane), text, "with a service account the same");

    // Created, changed and deleted.
    cluster.start().unwrap();
    assert_eq!(who_answers(&cluster, 10).as_deref(), Some("web-1"));
    let connect =
        || client::Connection::open(SocketAddr::from(([10, 96, 0, 10], 80)), SOON).map_err(anyhow::Error::msg);
    let mut connection = cluster.topology.client.run(connect).unwrap();
    assert_eq!(connection.get("/").unwrap(), "web-1");
    assert!(!cluster.problems().unwrap().contains("cannot"), "the role system:node-proxier is enough");
    publish(&cluster, &plane, "other", 11);
    wait_for(&cluster, 11, "forward", &[FIRST]);
    for slice in slices(&cluster, "web", 0..2) {
        plane.patch(&slice, &json!({"endpoints": slice["endpoints"]})).unwrap();
    }
    wait_for(&cluster, 10, "forward", &[FIRST, SECOND]);
    // A Service of another proxy, and one that becomes so.
    let label = json!({"metadata": {"labels": {"service.kubernetes.io/service-proxy-name": "another"}}});
    plane.patch(&service("other", 11), &label).unwrap();
    wait_for(&cluster, 11, "drop", &[]);
    let label = json!({"metadata": {"labels": {"service.kubernetes.io/service-proxy-name": null}}});
    plane.patch(&service("other", 11), &label).unwrap();
    wait_for(&cluster, 11, "forward", &[FIRST]);
    plane.delete(&service("other", 11)).unwrap();
    wait_for(&cluster, 11, "drop", &[]);

    // Without the API server everything stays as it is, and is said.
    plane.kill_api_server().unwrap();
    cluster.wait_for_problems("the API server is gone", |problems| problems.contains("services: ")).unwrap();
    assert!(who_answers(&cluster, 10).is_some());
    assert_eq!(connection.get("/").unwrap(), "web-1");
    plane.start_api_server().unwrap();
    publish(&cluster, &plane, "third", 12);
    wait_for(&cluster, 12, "forward", &[FIRST]);
    cluster.wait_for_problems("the API server is back", |problems| !problems.contains("cannot")).unwrap();

    // Cut off while much changes, and then the server has forgotten what: what vanished goes, what stayed is not touched.
    cut(&cluster, "add").unwrap();
    plane.kill_api_server().unwrap();
    plane.start_api_server().unwrap();
    plane.delete(&service("third", 12)).unwrap();
    publish(&cluster, &plane, "fourth", 13);
    plane.compact().unwrap();
    plane.kill_api_server().unwrap();
    plane.start_api_server().unwrap();
    assert!(who_answers(&cluster, 12).is_some(), "nothing is known of it yet");
    cut(&cluster, "del").unwrap();
    wait_for(&cluster, 13, "forward", &[FIRST]);
    wait_for(&cluster, 12, "drop", &[]);
    wait_for(&cluster, 10, "forward", &[FIRST, SECOND]);
    assert!(cluster.log().contains("our version has expired"), "this was about 410\n{}", cluster.log());
    assert_eq!(connection.get("/").unwrap(), "web-1", "the connection went on through it all");

    // Slices that the real controllers make of Pods.
    plane.start_controllers().unwrap();
    let mut service = service("controlled", 14);
    service["spec"]["selector"] = json!({"app": "controlled"});
    plane.create(&service).unwrap();
    let pods = cluster.pods.iter().map(|pod| running(&pod.pod.name, &pod.pod.addresses));
    let pods: Vec<Value> = pods.collect();
    pods.iter().for_each(|pod| plane.create(pod).unwrap());
    wait_for(&cluster, 14, "forward", &[FIRST, SECOND]);
    let unready = json!({"status": {"conditions": [{"type": "Ready", "status": "False"}]}});
    plane.patch_status(&pods[1], &unready).unwrap();
    wait_for(&cluster, 14, "forward", &[FIRST]);
    assert_eq!(who_answers(&cluster, 14).as_deref(), Some("web-1"));

    // What is not allowed is named.
    cluster.watch_api(plane.kubeconfig("nobody"));
    let log = tempfile::NamedTempFile::new().unwrap();
    let mut command = cluster.run_command("nobody");
    let mut nobody = command.arg("--dry-run").stderr(log.reopen().unwrap()).spawn().unwrap();
    let deadline = Instant::now() + SOON;
    let wanted = ["cannot list services: forbidden: ", "cannot list endpointslices.discovery.k8s.io: forbidden: "];
    let said = loop {
        let text = std::fs::read_to_string(log.path()).unwrap();
        if wanted.iter().all(|words| text.contains(words)) || Instant::now() > deadline {
            break text;
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    nobody.kill().unwrap();
    nobody.wait().unwrap();
    assert!(wanted.iter().all(|words| said.contains(words)), "{said}");
}

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
    cluster.stop(nix::sys::signal::Signal::SIGKILL).unwrap();
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
    cluster.stop(nix::sys::signal::Signal::SIGKILL).unwrap();
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
    cluster.stop(nix::sys::signal::Signal::SIGKILL).unwrap();
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
    cluster.stop(nix::sys::signal::Signal::SIGKILL).unwrap();
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
fn a_cluster_is_checked_without_a_daemon() {
    const WHAT: &str = "sluice check of a cluster";
    if !can_run_in_namespaces(WHAT) || !control_plane::can_run(WHAT) {
        return;
    }
    let (cluster, plane) = cluster();
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
}
