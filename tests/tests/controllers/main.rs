//! Manifests as people apply them, with real controllers, on a node with Sluice and a stand-in kubelet: every workload is scaled
//! up, rolled, scaled down and deleted under connections through every Service, and Jobs run; at each quiet point what is served
//! is what the API says. DaemonSets are scaled by a second Node.
//!
//! `SLUICE_BIG=1` plays those of others too, from `../shared/manifests` beside the project or the folder that
//! `SLUICE_MANIFESTS` names.
#![allow(clippy::unwrap_used)]

mod clients;
mod truth;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use sluice_bench::load::Tally;
use sluice_bench::topology::Pod;
use sluice_tests::apply::{apply, documents, give_load_balancers};
use sluice_tests::cluster::{Cluster, SOON};
use sluice_tests::control_plane::{self, ControlPlane};
use sluice_tests::kubelet::Kubelet;
use sluice_tests::manifests::NODE;
use sluice_tests::{api_cluster, can_run_in_namespaces};

use clients::Dialled;
use truth::{Truth, name, selects, text};

/// The same that `sluice demo` plays: a Service of each kind.
const EXAMPLE: &str = include_str!("../../../control/src/demo/example.yaml");
const NODES_AND_JOBS: &str = include_str!("nodes-and-jobs.yaml");
/// A Node without a machine: what runs on it is elsewhere to a service proxy.
const SECOND_NODE: &str = "node-2";
/// Bound on what controllers and kubelet do for one change of all workloads; two cores are shared with other tests.
const REST: Duration = Duration::from_secs(120);
/// Time of nothing but connections at each quiet point.
const STEADY: Duration = Duration::from_secs(1);

/// A cluster at work. Fields end in this order.
struct Scene {
    services: Vec<Dialled>,
    kubelet: Kubelet,
    plane: Arc<ControlPlane>,
    cluster: Cluster,
    workloads: Vec<Value>,
    /// Jobs as they are applied.
    jobs: Vec<Value>,
    client: Pod,
    quiet_points: usize,
    /// Longest from a quiet API to a daemon that serves the same.
    slowest: Duration,
}

impl Scene {
    /// Applies the manifests and waits until all runs. Says what the API server did not take.
    fn new(manifests: &str) -> (Self, Vec<String>) {
        let (mut cluster, mut plane) = api_cluster::empty();
        plane.start_controllers().unwrap();
        let plane = Arc::new(plane);
        let kubelet = Kubelet::start(&cluster, &plane).unwrap();
        plane.create(&node(SECOND_NODE)).unwrap();
        make_ready(&plane, NODE);
        let documents = documents(manifests).unwrap();
        let jobs = documents.iter().filter_map(run_again).collect();
        let applied = apply(&plane, documents).unwrap();
        give_load_balancers(&plane).unwrap();
        let is_workload = |object: &Value| matches!(text(&object["kind"]), "Deployment" | "StatefulSet" | "DaemonSet");
        let workloads: Vec<Value> = applied.objects.into_iter().filter(is_workload).collect();
        cluster.start().unwrap();
        let addresses = ["10.244.254.1", "fd00:10:244::fffe"].map(|address| address.parse().unwrap());
        let client = cluster.topology.add_pod("client", &addresses).unwrap();
        let mut scene = Self {
            services: Vec::new(),
            kubelet,
            plane,
            cluster,
            workloads,
            jobs,
            client,
            quiet_points: 0,
            slowest: Duration::ZERO,
        };
        scene.dial_all();
        (scene, applied.refused)
    }

    /// Every Service with a selector and a ClusterIP; those that have endpoints are dialled from now on.
    fn dial_all(&mut self) {
        let node: Vec<IpAddr> = self.cluster.topology.config.node.iter().map(ipnet::IpNet::addr).collect();
        let services = self.plane.get("/api/v1/services").unwrap();
        let wanted = truth::items(&services["items"])
            .filter(|service| service["spec"]["selector"].is_object() && service["spec"]["clusterIP"] != "None");
        let (pod, outside) = (self.client.ns.clone(), self.cluster.topology.client.clone());
        self.services = wanted.map(|service| Dialled::new(service.clone(), &node, &pod, &outside)).collect();
        self.rest("applied");
        for dialled in &mut self.services {
            if self.workloads.iter().any(|workload| serves(workload, &dialled.service)) {
                dialled.start().unwrap();
            }
        }
    }

    /// Waits until controllers and kubelet have nothing to do, and compares what is served with what the API says.
    fn rest(&mut self, after: &str) {
        let deadline = Instant::now() + REST;
        let truth = loop {
            let truth = Truth::read(&self.plane).unwrap();
            let Some(unrest) = truth.unrest() else { break truth };
            assert_eq!(self.kubelet.failures(), [""; 0], "{after}");
            assert!(Instant::now() < deadline, "{after}: no rest: {unrest}");
            std::thread::sleep(Duration::from_millis(200));
        };
        let (begun, wanted) = (Instant::now(), truth.endpoints());
        loop {
            let served = self.served_endpoints();
            if served == wanted {
                break;
            }
            assert!(begun.elapsed() < SOON, "{after}: {served:?} instead of {wanted:?}\n{}", self.cluster.log());
            std::thread::sleep(Duration::from_millis(20));
        }
        self.slowest = self.slowest.max(begun.elapsed());
        self.quiet_points += 1;
        for dialled in &self.services {
            let is_served = self.workloads.iter().any(|workload| serves(workload, &dialled.service));
            if let Err(error) = dialled.try_each(is_served) {
                panic!("{after}: {error:#}\n{}", self.cluster.log());
            }
        }
        std::thread::sleep(STEADY);
        assert_eq!(self.kubelet.failures(), [""; 0], "{after}");
    }

    /// Endpoints that new connections may get, as the command tells; in the words of [`Truth::endpoints`].
    fn served_endpoints(&self) -> BTreeSet<String> {
        let list: Value =
            serde_json::from_str(&self.cluster.sluice(&["get", "endpoints", "-o", "json"]).unwrap()).unwrap();
        let served = truth::items(&list["items"]).filter(|it| it["cluster"] == true || it["local"] == true);
        let line = |endpoint: &Value| {
            let [namespace, service, port, protocol, address] =
                ["namespace", "service", "portName", "protocol", "address"].map(|field| text(&endpoint[field]));
            format!("{namespace}/{service} {port}/{} {address}", protocol.to_lowercase())
        };
        served.map(line).collect()
    }

    /// Runs all Jobs, and waits until they are complete.
    fn run_jobs(&mut self) -> Vec<Value> {
        let applied = apply(&self.plane, self.jobs.clone()).unwrap();
        assert_eq!(applied.refused, [""; 0]);
        self.rest("Jobs run");
        applied.objects
    }

    /// Changes every workload at once and waits for the end of it.
    fn change(&mut self, what: &str, patch: impl Fn(&Value) -> Value) {
        for workload in &self.workloads {
            self.plane.patch(workload, &patch(workload)).unwrap();
        }
        self.rest(what);
    }

    /// Deletes one workload after the other. Who dials a Service stops before its last one goes.
    fn delete_workloads(&mut self) {
        while let Some(gone) = self.workloads.pop() {
            for dialled in &mut self.services {
                if !self.workloads.iter().any(|workload| serves(workload, &dialled.service)) {
                    dialled.stop().unwrap();
                }
            }
            self.plane.delete(&gone).unwrap();
            self.rest(&format!("{} deleted", name(&gone)));
        }
    }

    /// Deletes the Services, and waits until none is served.
    fn delete_services(&self) {
        for dialled in &self.services {
            let mut service = dialled.service.clone();
            (service["apiVersion"], service["kind"]) = (json!("v1"), json!("Service"));
            self.plane.delete(&service).unwrap();
        }
        let own: BTreeSet<String> = self.services.iter().map(|dialled| name(&dialled.service)).collect();
        let deadline = Instant::now() + SOON;
        loop {
            let list: Value =
                serde_json::from_str(&self.cluster.sluice(&["get", "services", "-o", "json"]).unwrap()).unwrap();
            let of = |item: &Value| format!("{}/{}", text(&item["namespace"]), text(&item["name"]));
            let left: Vec<String> = truth::items(&list["items"]).map(of).filter(|name| own.contains(name)).collect();
            if left.is_empty() {
                return;
            }
            assert!(Instant::now() < deadline, "still served: {left:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Who answered was a Pod that the Service selects, and every workload that it selects did.
    fn check_who_answered(&self, workloads: &[Value]) {
        let pods = self.kubelet.pods_ever();
        for dialled in &self.services {
            let (service, namespace) = (&dialled.service, text(&dialled.service["metadata"]["namespace"]));
            let find = |pod: &String| pods.get(&(namespace.to_owned(), pod.clone()));
            let who = dialled.tally.answered.keys();
            let who: Vec<&Value> = who.map(|pod| find(pod).unwrap_or_else(|| panic!("who is {pod}?"))).collect();
            let strangers = who.iter().filter(|pod| {
                !selects(&service["spec"]["selector"], &pod["metadata"]["labels"])
                    || (truth::stays_on_node(service) && pod["spec"]["nodeName"] != NODE)
            });
            assert_eq!(strangers.count(), 0, "{}: {:?}", name(service), dialled.tally.answered);
            for workload in workloads.iter().filter(|workload| serves(workload, service)) {
                let own = &workload["spec"]["selector"]["matchLabels"];
                let did = who.iter().any(|pod| selects(own, &pod["metadata"]["labels"]));
                assert!(did, "{}: {} never answered: {:?}", name(service), name(workload), dialled.tally.answered);
            }
        }
    }
}

/// Whether a Service selects the Pods of this workload.
fn serves(workload: &Value, service: &Value) -> bool {
    let labels = &workload["spec"]["template"]["metadata"]["labels"];
    workload["metadata"]["namespace"] == service["metadata"]["namespace"]
        && workload["spec"]["replicas"] != 0
        && selects(&service["spec"]["selector"], labels)
}

/// A Node as it joins: the API server taints it until it is ready.
fn node(name: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}})
}

/// Labels a Node and takes its taints away, as its kubelet and a controller do.
fn make_ready(plane: &ControlPlane, name: &str) {
    let ready = json!({"metadata": {"labels": {"kubernetes.io/os": "linux"}}, "spec": {"taints": null}});
    plane.patch(&node(name), &ready).unwrap();
}

/// A Job once more, or a CronJob's as if it were time, under a name that is free.
fn run_again(document: &Value) -> Option<Value> {
    let spec = match text(&document["kind"]) {
        "Job" => &document["spec"],
        "CronJob" => &document["spec"]["jobTemplate"]["spec"],
        _ => return None,
    };
    let metadata = &document["metadata"];
    let metadata = json!({"name": format!("{}-again", text(&metadata["name"])), "namespace": metadata["namespace"]});
    Some(json!({"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": spec}))
}

/// The whole story for these manifests.
fn play(what: &str, manifests: &str) {
    let begun = Instant::now();
    let (mut scene, refused) = Scene::new(manifests);
    let mut workloads = scene.workloads.clone();
    assert!(!workloads.is_empty() && !scene.services.is_empty(), "{what}: nothing to play: {refused:?}");
    let scaled = |workload: &Value, more: u64| match workload["spec"]["replicas"].as_u64() {
        Some(replicas) => json!({"spec": {"replicas": replicas + more}}),
        None => json!({}),
    };
    make_ready(&scene.plane, SECOND_NODE);
    scene.change("scaled up", |workload| scaled(workload, 1));
    let jobs = scene.run_jobs();
    let rolled = json!({"spec": {"template": {"metadata": {"annotations": {"tests.sluice.dev/revision": "2"}}}}});
    scene.change("rolled", |_| rolled.clone());
    let leaves = json!({"spec": {"taints": [{"key": "tests.sluice.dev/leaves", "effect": "NoExecute"}]}});
    scene.plane.patch(&node(SECOND_NODE), &leaves).unwrap();
    scene.change("scaled down", |workload| scaled(workload, 0));
    let unserved = scene.services.iter().filter(|dialled| !dialled.is_dialled()).count();
    scene.delete_workloads();
    scene.delete_services();
    let jobs_run = jobs.len();
    workloads.extend(jobs);
    scene.check_who_answered(&workloads);
    let mut all = Tally::default();
    scene.services.iter().for_each(|dialled| all.merge(&dialled.tally));
    assert!(all.answers() > 100, "{what}: {:?}", all.answered);
    println!(
        "{what}: {} workloads, {jobs_run} Jobs, {} Services ({unserved} without Pods), {} frontends, {} Pods in all; {} connections, {} failed, p50 {} µs, p99 {} µs, slowest {} µs; {} quiet points, served as the API says {} ms after at most; {} s; not taken: {refused:?}",
        workloads.len() - jobs_run,
        scene.services.len(),
        scene.services.iter().map(Dialled::targets).sum::<usize>(),
        scene.kubelet.pods_ever().len(),
        all.answers(),
        all.failed(),
        all.latency.value_at_quantile(0.5),
        all.latency.value_at_quantile(0.99),
        all.latency.max(),
        scene.quiet_points,
        scene.slowest.as_millis(),
        begun.elapsed().as_secs(),
    );
}

fn can_run(what: &str) -> bool {
    can_run_in_namespaces(what) && control_plane::can_run(what)
}

#[test]
fn the_example_lives_through_all_that_controllers_do() {
    if can_run("the example with real controllers") {
        play("example", &format!("{EXAMPLE}---\n{NODES_AND_JOBS}"));
    }
}

#[test]
fn manifests_of_others_live_through_all_that_controllers_do() {
    const WHAT: &str = "manifests of others with real controllers";
    const BESIDE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../shared/manifests");
    let folder = std::env::var_os("SLUICE_MANIFESTS").map_or_else(|| PathBuf::from(BESIDE), PathBuf::from);
    if std::env::var_os("SLUICE_BIG").is_none() || !folder.exists() {
        eprintln!("not tested: {WHAT}: needs SLUICE_BIG=1 and {}", folder.display());
        return;
    }
    if !can_run(WHAT) {
        return;
    }
    let entries = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path());
    let mut files: Vec<PathBuf> = entries.filter(|path| path.extension().is_some_and(|it| it == "yaml")).collect();
    files.sort_unstable();
    assert!(!files.is_empty(), "{} has no manifests", folder.display());
    for file in files {
        let name = file.file_stem().unwrap().to_string_lossy();
        play(&name, &std::fs::read_to_string(&file).unwrap());
    }
}
