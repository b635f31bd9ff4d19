//! What `scripts/deploy` deploys: accepted by a real API server, the same from Kustomize and Helm, and enough to run with.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::io::Write as _;
use std::net::IpAddr;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use sluice_bench::client::{Target, ask};
use sluice_bench::link::{LinkConfig, configure};
use sluice_bench::netns::NetNs;
use sluice_control::config::Config;
use sluice_tests::apply;
use sluice_tests::cluster::{Cluster, SOON};
use sluice_tests::control_plane::{self, ControlPlane};
use sluice_tests::kube_proxy::has_tool;
use sluice_tests::{can_run_in_namespaces, manifests, sluice_binary};

const OVERLAYS: [&str; 5] = [
    "base",
    "overlays/kube-proxy-replacement",
    "overlays/beside-kube-proxy",
    "overlays/with-dns",
    "overlays/monitoring",
];
/// Of Prometheus Operator: an API server alone does not know them.
const MONITORING: [&str; 2] = ["PodMonitor", "PrometheusRule"];

fn folder(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../scripts/deploy").join(name)
}

fn objects(text: &str) -> Vec<Value> {
    apply::documents(text).unwrap()
}

fn kustomize(name: &str) -> Vec<Value> {
    let output = Command::new("kubectl").arg("kustomize").arg(folder(name)).output().unwrap();
    assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
    objects(std::str::from_utf8(&output.stdout).unwrap())
}

fn find<'o>(objects: &'o [Value], kind: &str) -> &'o Value {
    objects.iter().find(|object| object["kind"] == kind).unwrap()
}

fn has_kubectl(what: &str) -> bool {
    let is_there = Command::new("kubectl").arg("version").arg("--client").output().is_ok();
    if !is_there {
        eprintln!("not tested: {what}: needs kubectl");
    }
    is_there
}

#[test]
fn a_real_api_server_accepts_every_object() {
    const WHAT: &str = "manifests against an API server";
    const ADDRESS: &str = "10.244.255.1";
    if !has_kubectl(WHAT) || !can_run_in_namespaces(WHAT) || !control_plane::can_run(WHAT) {
        return;
    }
    let ns = NetNs::new().unwrap();
    let address: IpAddr = ADDRESS.parse().unwrap();
    let addresses = vec![address.into()];
    configure(&ns, &LinkConfig { name: "lo".to_owned(), addresses, ..LinkConfig::default() }).unwrap();
    let plane = ControlPlane::start(ns.clone(), ADDRESS).unwrap();
    for overlay in OVERLAYS {
        let mut items = kustomize(overlay);
        let all = items.len();
        items.retain(|object| !MONITORING.iter().any(|kind| object["kind"] == *kind));
        assert_eq!(all - items.len(), if overlay == "overlays/monitoring" { 2 } else { 0 });
        let list = serde_json::json!({"apiVersion": "v1", "kind": "List", "items": items}).to_string();
        let mut command = ns.command("kubectl");
        command.arg("--kubeconfig").arg(plane.kubeconfig("admin"));
        command.args(["apply", "--server-side", "--dry-run=server", "--validate=strict", "-f", "-"]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(list.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        let (said, error) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success() && error.is_empty(), "{overlay}: {said}{error}");
        assert_eq!(said.matches("serverside-applied (server dry run)").count(), items.len(), "{overlay}: {said}");
    }
}

#[test]
fn the_program_knows_every_argument_and_key() {
    const WHAT: &str = "arguments and keys of the manifests";
    if !has_kubectl(WHAT) {
        return;
    }
    let empty = tempfile::tempdir().unwrap();
    for overlay in OVERLAYS {
        let objects = kustomize(overlay);
        let container = &find(&objects, "DaemonSet")["spec"]["template"]["spec"]["containers"][0];
        let arguments: Vec<&str> =
            container["args"].as_array().unwrap().iter().map(|argument| argument.as_str().unwrap()).collect();
        let run = Command::new(sluice_binary()).args(arguments).arg("--no-such-flag").output().unwrap();
        let said = String::from_utf8_lossy(&run.stderr);
        assert!(said.contains("unexpected argument '--no-such-flag'"), "{overlay}: {said}");
        let config = find(&objects, "ConfigMap")["data"]["sluice.yaml"].as_str().unwrap();
        let file = empty.path().join("sluice.yaml");
        std::fs::write(&file, config).unwrap();
        let manifests = folder("base");
        let check =
            Command::new(sluice_binary()).arg("check").arg(manifests).arg("--config").arg(&file).output().unwrap();
        assert!(check.status.success(), "{overlay}: {check:?}");
    }
}

#[test]
fn with_dns_names_are_answered() {
    const WHAT: &str = "names in the manifests";
    if !has_kubectl(WHAT) {
        return;
    }
    for overlay in OVERLAYS {
        let objects = kustomize(overlay);
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), find(&objects, "ConfigMap")["data"]["sluice.yaml"].as_str().unwrap()).unwrap();
        let (config, _) = Config::read(file.path()).unwrap();
        let container = &find(&objects, "DaemonSet")["spec"]["template"]["spec"]["containers"][0];
        let says = |list: &Value, word: &str| list.as_array().unwrap().iter().any(|item| item == word);
        let is_with_dns = overlay == "overlays/with-dns";
        assert_eq!(config.dns.is_some(), is_with_dns, "{overlay}");
        // Its --config is kube-proxy's.
        assert_eq!(says(&container["args"], "--dns-config=/etc/sluice/sluice.yaml"), is_with_dns, "{overlay}");
        let capabilities = &container["securityContext"]["capabilities"]["add"];
        assert_eq!(says(capabilities, "NET_BIND_SERVICE"), is_with_dns, "{overlay}");
        if let Some(dns) = config.dns {
            assert_eq!(dns.listen, ["169.254.20.10:53".parse().unwrap()]);
            assert_eq!(dns.service.as_deref(), Some("kube-system/kube-dns"));
            // Names of a namespace that is not there do not exist.
            assert!(objects.iter().any(|object| {
                let rules = object["rules"].as_array().into_iter().flatten();
                object["kind"] == "ClusterRole" && rules.into_iter().any(|rule| says(&rule["resources"], "namespaces"))
            }));
        }
    }
}

/// Without what only one of Helm and Kustomize writes.
fn normal(object: &Value) -> (String, Value) {
    let mut object = object.clone();
    if let Some(metadata) = object["metadata"].as_object_mut() {
        metadata.remove("labels");
        metadata.remove("annotations");
    }
    if object["kind"] == "ConfigMap" && object["data"]["sluice.yaml"].is_string() {
        let config: Value = serde_saphyr::from_str(object["data"]["sluice.yaml"].as_str().unwrap()).unwrap();
        object["data"]["sluice.yaml"] = config;
    }
    for list in ["volumes", "containers"] {
        let sort = |list: &mut Value| {
            let key = |value: &Value| value["name"].to_string();
            list.as_array_mut().unwrap().sort_by_key(key);
        };
        let spec = &mut object["spec"]["template"]["spec"];
        if spec.is_object() {
            sort(&mut spec[list]);
            if list == "containers" {
                sort(&mut spec[list][0]["volumeMounts"]);
                sort(&mut spec[list][0]["env"]);
            }
        }
    }
    (format!("{} {}", object["kind"], object["metadata"]["name"]), object)
}

#[test]
fn what_the_systemd_unit_does_not_allow_is_refused_and_ends_nothing() {
    let unit = std::fs::read_to_string(folder("systemd/sluice.service")).unwrap();
    let value = |key: &str| unit.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
    assert!(value("SystemCallFilter").is_some());
    // Without it systemd ends the daemon for bpf(2), which it tries where it has several packet threads.
    assert_eq!(value("SystemCallErrorNumber"), Some("EPERM"));
    // A node without its data plane for good, after five failures in ten seconds: that is systemd's default.
    assert_eq!(value("StartLimitIntervalSec"), Some("0"));
    // The second for port 53.
    assert_eq!(value("CapabilityBoundingSet"), Some("CAP_NET_ADMIN CAP_NET_BIND_SERVICE"));
}

#[test]
fn helm_and_kustomize_make_the_same_objects() {
    const WHAT: &str = "the Helm chart";
    let helm = std::env::var("HELM").unwrap_or_else(|_| "helm".to_owned());
    if !has_kubectl(WHAT) || !Command::new(&helm).arg("version").output().is_ok_and(|output| output.status.success()) {
        eprintln!("not tested: {WHAT}: needs helm and kubectl; HELM names the program");
        return;
    }
    for (overlay, values) in [
        ("base", &["mode=standalone"][..]),
        ("overlays/kube-proxy-replacement", &[]),
        ("overlays/beside-kube-proxy", &["mode=beside-kube-proxy"]),
        ("overlays/with-dns", &["dns=true"]),
        ("overlays/monitoring", &["monitoring.enabled=true"]),
    ] {
        let mut command = Command::new(&helm);
        command.args(["template", "sluice"]).arg(folder("helm/sluice"));
        command.args(["--namespace", "kube-system", "--kube-version", "1.37.2"]);
        let output = command.args(values.iter().flat_map(|value| ["--set", *value])).output().unwrap();
        assert!(output.status.success(), "{overlay}: {}", String::from_utf8_lossy(&output.stderr));
        let by_name = |objects: &[Value]| objects.iter().map(normal).collect::<BTreeMap<_, _>>();
        let charts = by_name(&objects(std::str::from_utf8(&output.stdout).unwrap()));
        let kustomized = by_name(&kustomize(overlay));
        assert_eq!(Vec::from_iter(charts.keys()), Vec::from_iter(kustomized.keys()), "{overlay}");
        for (name, object) in &charts {
            assert_eq!(object, &kustomized[name], "{overlay}: {name}");
        }
    }
}

#[test]
fn alerts_and_boards_ask_for_metrics_that_exist() {
    let source = std::fs::read_dir(PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../control/src/admin")).unwrap();
    let source: String = source.map(|file| std::fs::read_to_string(file.unwrap().path()).unwrap_or_default()).collect();
    let mut asked = 0;
    for file in ["rules.yaml", "sluice.json"] {
        let text = std::fs::read_to_string(folder("components/monitoring").join(file)).unwrap();
        let expressions = text.lines().filter(|line| line.contains("sluice_"));
        for word in expressions.flat_map(|line| line.split(|c: char| !c.is_ascii_alphanumeric() && c != '_')) {
            if word.starts_with("sluice_") {
                let name = word.trim_end_matches("_bucket");
                assert!(source.contains(&format!("\"{name}\"")), "{file}: {word}");
                asked += 1;
            }
        }
    }
    assert!(asked > 20);
}

/// A root like a container's: read-only, `/proc/sys` too; what the DaemonSet mounts is mounted.
const CONTAINER: &str = r#"set -e
root=$1 sluice=$2 manifests=$3 caps=$4; shift 4
mount --make-rprivate /
mount -t tmpfs tmpfs "$root"
for part in bin sbin usr lib lib64 etc; do
    [ -e "/$part" ] || continue
    mkdir "$root/$part"
    mount --rbind -o ro "/$part" "$root/$part"
done
mkdir -p "$root"/proc "$root"/dev/net "$root"/run/sluice "$root"/host/proc/sys/net "$root"/manifests
touch "$root"/dev/net/tun "$root"/dev/null "$root"/sluice
mount --bind /dev/net/tun "$root/dev/net/tun"
mount --bind /dev/null "$root/dev/null"
mount --rbind /proc "$root/proc"
mount --bind /proc/sys/net "$root/host/proc/sys/net"
mount --bind /proc/sys "$root/proc/sys"
mount -o remount,bind,ro "$root/proc/sys"
mount -t tmpfs tmpfs "$root/run/sluice"
mount --bind "$manifests" "$root/manifests"
mount --bind "$sluice" "$root/sluice"
mount -o remount,bind,ro "$root"
exec chroot "$root" setpriv --no-new-privs --bounding-set "-all$caps" --inh-caps=-all /sluice "$@"
"#;

#[test]
fn one_capability_is_enough_in_a_read_only_container() {
    const WHAT: &str = "a container's privileges";
    if !can_run_in_namespaces(WHAT) || !has_tool("setpriv", WHAT) {
        return;
    }
    let mut cluster = Cluster::new().unwrap();
    cluster.add_pod(1).unwrap();
    cluster.publish_web(0..1).unwrap();
    let before = cluster.host_state().unwrap();
    let root = tempfile::tempdir().unwrap();
    let log = tempfile::NamedTempFile::new().unwrap();
    let start = |caps: &str| {
        let mut command = cluster.topology.node.command("unshare");
        command.args(["--mount", "sh", "-c", CONTAINER, "sh"]).arg(root.path()).arg(sluice_binary());
        command.arg(cluster.manifests()).arg(caps);
        command.args(["run", "--manifests", "/manifests", "--node-name", manifests::NODE, "--log-format=json"]);
        command.stdout(Stdio::null()).stderr(log.reopen().unwrap()).spawn().unwrap()
    };
    let said = || std::fs::read_to_string(log.path()).unwrap();

    let mut powerless = start("");
    assert_eq!(powerless.wait().unwrap().code(), Some(3), "{}", said());
    assert_eq!(cluster.host_state().unwrap(), before);

    let mut daemon = start(",+net_admin");
    let deadline = Instant::now() + SOON;
    while cluster.generation().is_err() {
        assert!(daemon.try_wait().unwrap().is_none() && Instant::now() < deadline, "{}", said());
        std::thread::sleep(Duration::from_millis(20));
    }
    for (client, ns) in cluster.clients() {
        for v4 in [true, false] {
            for address in cluster.web(v4) {
                let answer = ns.run(|| Ok(ask(Target::Http(address), SOON).result)).unwrap();
                assert_eq!(answer.as_deref(), Ok("web-1"), "{client} to {address}: {}", said());
            }
        }
    }
    let status = std::fs::read_to_string(format!("/proc/{}/status", daemon.id())).unwrap();
    // CAP_NET_ADMIN is the 12th.
    assert!(status.contains("CapEff:\t0000000000001000\n") && status.contains("NoNewPrivs:\t1"), "{status}");
    kill(Pid::from_raw(daemon.id().try_into().unwrap()), Signal::SIGTERM).unwrap();
    assert_eq!(daemon.wait().unwrap().code(), Some(0), "{}", said());
    assert_eq!(cluster.host_state().unwrap(), before, "nothing is left");
}
