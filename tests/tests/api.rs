//! The Kubernetes API as source, with a real API server: as a user with only the role system:node-proxier.
#![allow(clippy::unwrap_used)]

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::Result;
use serde_json::{Value, json};
use sluice_bench::client;
use sluice_tests::api_cluster::{ADDRESS, cluster, publish, service, slices, wait_for, who_answers};
use sluice_tests::cluster::{Cluster, SOON};
use sluice_tests::control_plane::{self, ControlPlane};
use sluice_tests::{can_run_in_namespaces, manifests};

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
