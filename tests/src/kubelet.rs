//! A stand-in kubelet: what a node's agent does with the Pods of a real API server, as far as a service proxy can tell.
//!
//! A Pod gets a network namespace with servers that answer with its name on its containers' ports, and says that it is ready.
//! One that is deleted serves on until no EndpointSlice calls it ready, as a preStop hook that waits for it would have it, and
//! [`GRACE`] more; then it says that it is not ready, ends after another [`GRACE`], and its object goes. One that is not to run for ever, as those of Jobs, says after [`WORK`] that
//! it is not ready, serves on as long, and has succeeded.
//!
//! There is no scheduler: a DaemonSet's Pod is bound to the Node it is made for, every other to the daemon's. Pods of other Nodes
//! run here too; to a service proxy they are elsewhere. Images, volumes, probes, init containers, resources and host networking
//! are not looked at.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::process::{Child, ChildStdout};
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use sluice_bench::serve::PodServer;
use sluice_bench::topology::Topology;

use crate::cluster::{Cluster, SOON};
use crate::control_plane::ControlPlane;
use crate::manifests::NODE;

/// How long a Pod goes on serving when no EndpointSlice calls it ready any more: the time that a service proxy has.
pub const GRACE: Duration = Duration::from_secs(1);
/// How long a Pod works that is not to run for ever: some seconds, since a new endpoint gets few connections at first.
pub const WORK: Duration = Duration::from_secs(6);
/// How long requests under way may take when a Pod ends.
const FINISH: Duration = Duration::from_secs(2);
/// Pause between two looks at the EndpointSlices.
const LOOK: Duration = Duration::from_millis(250);

/// The kubelet of all Nodes. Dropping it ends all Pods; their objects stay.
#[derive(Debug)]
pub struct Kubelet {
    watch: Child,
    watcher: Option<JoinHandle<()>>,
    node: Arc<Node>,
}

/// What all its Pods share.
#[derive(Debug)]
struct Node {
    topology: Arc<Topology>,
    plane: Arc<ControlPlane>,
    addresses_given: AtomicU16,
    /// Every Pod that ever ran, as it was bound, by namespace and name.
    ever: Mutex<BTreeMap<(String, String), Value>>,
    failures: Mutex<Vec<String>>,
    ending: AtomicBool,
}

/// A Pod's thread. The order to end comes by the channel; that the channel is closed means that the object is gone.
struct Running {
    orders: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.orders = None;
        if let Some(thread) = self.thread.take() {
            // A panic in it has been printed.
            drop(thread.join());
        }
    }
}

impl Kubelet {
    /// Runs every Pod that the API server has, from now on.
    pub fn start(cluster: &Cluster, plane: &Arc<ControlPlane>) -> Result<Self> {
        let node = Arc::new(Node {
            topology: Arc::clone(&cluster.topology),
            plane: Arc::clone(plane),
            addresses_given: AtomicU16::new(0),
            ever: Mutex::default(),
            failures: Mutex::default(),
            ending: AtomicBool::new(false),
        });
        let mut watch = plane.watch("/api/v1/pods")?;
        let events = watch.stdout.take().context("the watch has no output")?;
        let mut kubelet = Self { watch, watcher: None, node: Arc::clone(&node) };
        let watcher = thread::Builder::new().name("kubelet".to_owned()).spawn(move || follow(&node, events));
        kubelet.watcher = Some(watcher.context("cannot start the kubelet's thread")?);
        Ok(kubelet)
    }

    /// Every Pod that ever ran, as it was bound, by namespace and name.
    #[must_use]
    pub fn pods_ever(&self) -> BTreeMap<(String, String), Value> {
        lock(&self.node.ever).clone()
    }

    /// What it could not do.
    #[must_use]
    pub fn failures(&self) -> Vec<String> {
        lock(&self.node.failures).clone()
    }
}

impl Drop for Kubelet {
    fn drop(&mut self) {
        self.node.ending.store(true, Ordering::Relaxed);
        // Its end is the watcher's.
        let _ = self.watch.kill();
        let _ = self.watch.wait();
        if let Some(watcher) = self.watcher.take() {
            drop(watcher.join());
        }
    }
}

/// Starts and ends Pods as the events say, until there are no more.
fn follow(node: &Arc<Node>, events: ChildStdout) {
    let mut pods: BTreeMap<String, Running> = BTreeMap::new();
    for line in BufReader::new(events).lines() {
        let event: Option<Value> = line.ok().and_then(|line| serde_json::from_str(&line).ok());
        let Some(event) = event else { break };
        let pod = &event["object"];
        let uid = text(&pod["metadata"]["uid"]).to_owned();
        match text(&event["type"]) {
            "ADDED" | "MODIFIED" => {
                let running = pods.entry(uid).or_insert_with(|| start(node, pod.clone()));
                // With a grace of 0 the object goes without us.
                let is_to_end = pod["metadata"]["deletionGracePeriodSeconds"].as_u64().is_some_and(|grace| grace > 0);
                if let (Some(orders), true) = (&running.orders, is_to_end) {
                    // It may have ended already.
                    let _ = orders.send(());
                }
            }
            "DELETED" => drop(pods.remove(&uid)),
            _ => node.fail(&format!("the watch of Pods says {event}")),
        }
    }
    node.fail("the watch of Pods has ended");
}

fn start(node: &Arc<Node>, pod: Value) -> Running {
    let (orders, received) = channel();
    let node = Arc::clone(node);
    let work = move || {
        let name = text(&pod["metadata"]["name"]).to_owned();
        if let Err(error) = node.run(pod, &received) {
            node.fail(&format!("Pod {name}: {error:#}"));
        }
    };
    let thread = thread::Builder::new().name("a Pod's".to_owned()).spawn(work);
    Running { orders: Some(orders), thread: Some(thread.expect("a thread for each Pod can be had")) }
}

impl Node {
    /// The whole life of a Pod.
    fn run(&self, mut pod: Value, orders: &Receiver<()>) -> Result<()> {
        let [namespace, name, uid] = ["namespace", "name", "uid"].map(|field| text(&pod["metadata"][field]).to_owned());
        let path = format!("/api/v1/namespaces/{namespace}/pods/{name}");
        if pod["spec"]["nodeName"].is_null() {
            let target = json!({"apiVersion": "v1", "kind": "Node", "name": made_for(&pod).unwrap_or(NODE)});
            let binding = json!({"apiVersion": "v1", "kind": "Binding", "metadata": {"name": name}, "target": target});
            self.plane.request("POST", &format!("{path}/binding"), Some(&binding))?;
            pod["spec"]["nodeName"] = target["name"].clone();
        }
        let addresses = self.next_addresses();
        let place = self.topology.add_pod(&uid, &addresses)?;
        let [tcp, udp] = ["TCP", "UDP"].map(|protocol| ports(&pod, protocol));
        let server = PodServer::start(&place.ns, &name, &tcp, &udp)?;
        let runs_for_ever = pod["spec"]["restartPolicy"] == "Always";
        lock(&self.ever).insert((namespace.clone(), name), pod);
        let say = |phase: &str, ready: bool| {
            self.plane.request("PATCH", &format!("{path}/status"), Some(&status(&addresses, phase, ready))).map(drop)
        };
        say("Running", true)?;
        let order =
            if runs_for_ever { orders.recv().map_err(RecvTimeoutError::from) } else { orders.recv_timeout(WORK) };
        let mut is_deleted = order.is_ok();
        if order == Err(RecvTimeoutError::Timeout) {
            say("Running", false)?;
        }
        if order == Err(RecvTimeoutError::Disconnected) || !self.serve_on(&namespace, &uid, orders)? {
            return self.topology.remove_pod(&uid).map(drop);
        }
        say("Running", false)?;
        // Datagrams of flows that there are go to it as long as it is said to serve.
        thread::sleep(GRACE);
        server.finish(FINISH);
        self.topology.remove_pod(&uid)?;
        if !is_deleted {
            say("Succeeded", false)?;
            is_deleted = orders.recv().is_ok();
        }
        if is_deleted {
            let at_once = json!({"gracePeriodSeconds": 0, "preconditions": {"uid": uid}});
            self.plane.request("DELETE", &path, Some(&at_once))?;
        }
        Ok(())
    }

    /// Waits as long as a Pod that ends should go on serving. `false`: its object is gone before.
    fn serve_on(&self, namespace: &str, uid: &str, orders: &Receiver<()>) -> Result<bool> {
        // publishNotReadyAddresses has it called ready to the end.
        let deadline = Instant::now() + SOON;
        while self.is_called_ready(namespace, uid)? && Instant::now() < deadline {
            if !stays(orders, LOOK) {
                return Ok(false);
            }
        }
        Ok(stays(orders, GRACE))
    }

    /// Whether new connections by way of a Service may come to this Pod.
    fn is_called_ready(&self, namespace: &str, uid: &str) -> Result<bool> {
        let path = format!("/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices");
        let slices = self.plane.get(&path)?;
        let balanced = |slice: &&Value| slice["metadata"]["labels"]["service.kubernetes.io/headless"].is_null();
        let slices = slices["items"].as_array().context("a list has items")?.iter().filter(balanced);
        let mut endpoints = slices.flat_map(|slice| slice["endpoints"].as_array().into_iter().flatten());
        Ok(endpoints.any(|endpoint| endpoint["targetRef"]["uid"] == uid && endpoint["conditions"]["ready"] == true))
    }

    /// Addresses that no Pod has had.
    fn next_addresses(&self) -> [IpAddr; 2] {
        let number = self.addresses_given.fetch_add(1, Ordering::Relaxed) + 1;
        let [high, low] = number.to_be_bytes();
        [Ipv4Addr::new(10, 244, high, low).into(), Ipv6Addr::new(0xfd00, 0x10, 0x244, 0, 0, 0, 0, number).into()]
    }

    /// Keeps what went wrong; what does while all ends is not.
    fn fail(&self, what: &str) {
        if !self.ending.load(Ordering::Relaxed) {
            lock(&self.failures).push(what.to_owned());
        }
    }
}

/// Waits. `false`: the Pod's object is gone.
fn stays(orders: &Receiver<()>, time: Duration) -> bool {
    let until = Instant::now() + time;
    loop {
        match orders.recv_timeout(until.saturating_duration_since(Instant::now())) {
            Ok(()) => {}
            Err(RecvTimeoutError::Timeout) => return true,
            Err(RecvTimeoutError::Disconnected) => return false,
        }
    }
}

/// Ports of a Pod's containers.
fn ports(pod: &Value, protocol: &str) -> Vec<u16> {
    let containers = pod["spec"]["containers"].as_array().into_iter().flatten();
    let ports = containers.flat_map(|container| container["ports"].as_array().into_iter().flatten());
    let of_protocol = ports.filter(|port| port["protocol"].as_str().unwrap_or("TCP") == protocol);
    of_protocol.filter_map(|port| port["containerPort"].as_u64()?.try_into().ok()).collect()
}

/// The Node that the DaemonSet controller has made a Pod for.
fn made_for(pod: &Value) -> Option<&str> {
    let affinity = &pod["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"];
    let fields = affinity["nodeSelectorTerms"][0]["matchFields"].as_array()?;
    fields.iter().find(|field| field["key"] == "metadata.name")?["values"][0].as_str()
}

fn status(addresses: &[IpAddr], phase: &str, ready: bool) -> Value {
    let is_ready = if ready { "True" } else { "False" };
    let conditions =
        [("PodScheduled", "True"), ("Initialized", "True"), ("ContainersReady", is_ready), ("Ready", is_ready)];
    json!({"status": {
        "phase": phase,
        "podIP": addresses[0].to_string(),
        "podIPs": addresses.iter().map(|ip| json!({"ip": ip.to_string()})).collect::<Vec<_>>(),
        "conditions": conditions.map(|(kind, status)| json!({"type": kind, "status": status})),
    }})
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
