//! A real nginx as ingress, in front of our ClusterIPs and behind a Service of ours: by path and by host, through a rolling
//! update.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use sluice_bench::client;
use sluice_bench::netns::NetNs;
use sluice_bench::serve::PodServer;
use sluice_tests::cluster::{Cluster, SOON};
use sluice_tests::kube_proxy::has_tool;
use sluice_tests::{can_run_in_namespaces, manifests};

/// Services behind the ingress, with the last part of their ClusterIPs.
const SERVICES: [(&str, u8); 3] = [("shop", 11), ("cart", 12), ("blog", 13)];
/// The Service of the ingress itself.
const INGRESS: (&str, u8) = ("ingress", 10);
/// How long a Pod that terminates goes on serving: longer than its endpoint takes to get no new connections.
const GRACE: Duration = Duration::from_millis(500);
/// Clients at a time.
const CLIENTS: usize = 4;

/// What nginx is to do, as an ingress controller with `service-upstream` writes it: every request on a connection of its own,
/// and no second try.
const CONFIG: &str = "daemon off;\nworker_processes 2;\npid FOLDER/pid;\nerror_log FOLDER/error.log;\nevents { worker_connections 512; }\n\
    http {\n  access_log off;\n  client_body_temp_path FOLDER/body;\n  proxy_temp_path FOLDER/proxy;\n  fastcgi_temp_path FOLDER/fastcgi;\n  \
    uwsgi_temp_path FOLDER/uwsgi;\n  scgi_temp_path FOLDER/scgi;\n  proxy_next_upstream off;\n  proxy_connect_timeout 2s;\n  \
    server {\n    listen 8080 default_server;\n    location /shop { proxy_pass http://10.96.0.11/; }\n    \
    location /cart { proxy_pass http://10.96.0.12/; }\n    location / { return 404; }\n  }\n  \
    server {\n    listen 8080;\n    server_name blog.example;\n    location / { proxy_pass http://10.96.0.13; }\n  }\n}\n";

fn address(number: u8) -> IpAddr {
    IpAddr::V4(Ipv4Addr::new(10, 244, 0, number))
}

/// Pods of the Services: name and number.
struct Pods {
    cluster: Cluster,
    servers: BTreeMap<(&'static str, u8), PodServer>,
}

impl Pods {
    fn add(&mut self, service: &'static str, number: u8) {
        let name = format!("{service}-{number}");
        let pod = self.cluster.topology.add_pod(&name, &[address(number)]).unwrap();
        self.servers.insert((service, number), PodServer::start(&pod.ns, &name, &[8080], &[]).unwrap());
    }

    /// Says which Pods are endpoints; those of `terminating` are on their way out.
    fn publish(&self, service: &'static str, host: u8, pods: &[u8], terminating: &[u8]) {
        let endpoint = |number: &u8| {
            let leaves = terminating.contains(number);
            json!({
                "addresses": [address(*number).to_string()],
                "conditions": {"ready": !leaves, "serving": true, "terminating": leaves},
                "nodeName": manifests::NODE,
                "targetRef": {"kind": "Pod", "namespace": "default", "name": format!("{service}-{number}"), "uid": format!("{number}")},
            })
        };
        let mut slice = manifests::slices(service, &[]).remove(0);
        slice["endpoints"] = Value::Array(pods.iter().chain(terminating).map(endpoint).collect());
        self.cluster.write(&format!("{service}.json"), &[manifests::service(service, host), slice]).unwrap();
    }

    /// The same, and waits until it is served.
    fn follow(&self, service: &'static str, host: u8, pods: &[u8], terminating: &[u8]) {
        let generation = self.cluster.generation().unwrap();
        self.publish(service, host, pods, terminating);
        self.cluster.wait_for_table_after(generation).unwrap();
    }
}

/// nginx that runs. Dropping it ends it, and its workers with it.
struct Nginx {
    child: Child,
    folder: tempfile::TempDir,
}

impl Nginx {
    fn start(ns: &NetNs) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().to_str().unwrap();
        // Workers that run as another user must reach it.
        let config = format!("user root;\n{}", CONFIG.replace("FOLDER", path));
        std::fs::write(folder.path().join("nginx.conf"), config).unwrap();
        let mut command = ns.command("nginx");
        command.env("PATH", format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default()));
        command.arg("-p").arg(path).args(["-e", &format!("{path}/error.log"), "-c", &format!("{path}/nginx.conf")]);
        Self { child: command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap(), folder }
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("error.log")).unwrap_or_default()
    }
}

impl Drop for Nginx {
    fn drop(&mut self) {
        // SIGQUIT and SIGTERM have the master end its workers; killed, it would leave them.
        let id = nix::unistd::Pid::from_raw(i32::try_from(self.child.id()).unwrap_or_default());
        let _ = nix::sys::signal::kill(id, nix::sys::signal::Signal::SIGTERM);
        let _ = self.child.wait();
    }
}

/// What clients saw: who answered each path, and what went wrong.
#[derive(Default)]
struct Seen {
    answered: BTreeMap<String, BTreeMap<String, u64>>,
    failures: Vec<String>,
}

/// Asks for these paths in turn until `stop`.
fn clients(
    ns: &NetNs,
    to: SocketAddr,
    paths: &'static [&'static str],
    stop: &Arc<AtomicBool>,
) -> Vec<JoinHandle<Seen>> {
    let client = |_| {
        let (ns, stop) = (ns.clone(), Arc::clone(stop));
        std::thread::spawn(move || {
            ns.enter().unwrap();
            let mut seen = Seen::default();
            for path in paths.iter().cycle() {
                if stop.load(Relaxed) {
                    break;
                }
                match client::get(to, path, SOON) {
                    Ok(by) => *seen.answered.entry((*path).to_owned()).or_default().entry(by).or_default() += 1,
                    Err(error) => seen.failures.push(format!("{path}: {error}")),
                }
                std::thread::sleep(Duration::from_millis(2));
            }
            seen
        })
    };
    (0..CLIENTS).map(client).collect()
}

#[test]
fn an_ingress_in_front_of_cluster_ips_goes_through_a_rolling_update_without_an_error() {
    const WHAT: &str = "nginx as ingress";
    const PATHS: &[&str] = &["/shop", "/cart", "http://blog.example/"];
    if !can_run_in_namespaces(WHAT) || !has_tool("nginx", WHAT) {
        return;
    }
    let mut pods = Pods { cluster: Cluster::new().unwrap(), servers: BTreeMap::new() };
    let mut number = 10;
    for (service, host) in SERVICES {
        pods.add(service, number);
        pods.add(service, number + 1);
        pods.publish(service, host, &[number, number + 1], &[]);
        number += 2;
    }
    let ingress = pods.cluster.topology.add_pod("ingress", &[address(2)]).unwrap();
    let nginx = Nginx::start(&ingress.ns);
    pods.publish(INGRESS.0, INGRESS.1, &[2], &[]);
    pods.cluster.start().unwrap();
    let to = pods.cluster.web(true)[2];
    let outside = pods.cluster.topology.client.clone();
    let ask = |path: &str| outside.run(|| Ok(client::get(to, path, SOON))).unwrap();
    let deadline = Instant::now() + SOON;
    while ask("/shop").is_err() {
        assert!(Instant::now() < deadline, "nginx does not answer\n{}\n{}", nginx.log(), pods.cluster.log());
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(ask("/nothing").is_err(), "no rule has this path");

    let stop = Arc::new(AtomicBool::new(false));
    let clients = clients(&outside, to, PATHS, &stop);
    // Pod by Pod: a new one is ready, an old one terminates, is gone, and only then ends.
    let mut first = 10;
    for (service, host) in SERVICES {
        let mut now = vec![first, first + 1];
        for old in [first, first + 1] {
            let new = old + 40;
            pods.add(service, new);
            now.push(new);
            pods.follow(service, host, &now, &[]);
            now.retain(|number| *number != old);
            pods.follow(service, host, &now, &[old]);
            std::thread::sleep(GRACE);
            pods.follow(service, host, &now, &[]);
            pods.servers.remove(&(service, old)).unwrap().finish(GRACE);
        }
        first += 2;
    }
    std::thread::sleep(GRACE);
    stop.store(true, Relaxed);
    let mut all = Seen::default();
    for client in clients {
        let seen = client.join().unwrap();
        all.failures.extend(seen.failures);
        for (path, answered) in seen.answered {
            for (by, count) in answered {
                *all.answered.entry(path.clone()).or_default().entry(by).or_default() += count;
            }
        }
    }
    assert!(all.failures.is_empty(), "{:?}\n{}\n{}", all.failures, nginx.log(), pods.cluster.log());
    for (path, (service, _)) in PATHS.iter().zip(SERVICES) {
        let answered = &all.answered[*path];
        let own = answered.keys().all(|pod| pod.starts_with(&format!("{service}-")));
        let pods: BTreeSet<&String> = answered.keys().collect();
        assert!(own && pods.len() == 4, "{path}: both old and both new Pods of {service}, no others: {answered:?}");
    }
    let total: u64 = all.answered.values().flat_map(BTreeMap::values).sum();
    println!("ingress: {total} requests through a rolling update of three Services, 0 failed");
}
