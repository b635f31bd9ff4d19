//! Names by other resolvers than glibc's, and how soon clients that wait get their first endpoint.
#![allow(clippy::unwrap_used)]

use std::io::Write as _;
use std::net::Ipv4Addr;
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use sluice_bench::client::{self, Target};
use sluice_tests::can_run_in_namespaces;
use sluice_tests::cluster::{Cluster, SOON};

const CONFIG: &str = "localControllers: false\nserviceCIDRs: [10.96.0.0/16, 'fd00:96::/64']\n\
    dns: {listen: ['169.254.20.10:53'], upstreams: []}\n";

/// Prints every address of its argument.
const RESOLVE: &str = r#"
#include <arpa/inet.h>
#include <netdb.h>
#include <stdio.h>
#include <sys/socket.h>
int main(int argc, char **argv) {
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *found, *at;
    int error = getaddrinfo(argv[argc - 1], 0, &hints, &found);
    if (error) {
        printf("%s\n", gai_strerror(error));
        return 1;
    }
    for (at = found; at; at = at->ai_next) {
        char text[INET6_ADDRSTRLEN];
        void *address = at->ai_family == AF_INET ? (void *)&((struct sockaddr_in *)at->ai_addr)->sin_addr
                                                 : (void *)&((struct sockaddr_in6 *)at->ai_addr)->sin6_addr;
        puts(inet_ntop(at->ai_family, address, text, sizeof text));
    }
    return 0;
}
"#;

fn slice(service: &str, labels: Value, addresses: &[Ipv4Addr]) -> Value {
    let mut labels = labels;
    labels["kubernetes.io/service-name"] = json!(service);
    let endpoint = |address: &Ipv4Addr| json!({"addresses": [address.to_string()], "conditions": {"ready": true}});
    json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {"namespace": "default", "name": format!("{service}-1"), "labels": labels},
        "endpoints": addresses.iter().map(endpoint).collect::<Vec<_>>(),
        "ports": [{"name": "http", "protocol": "TCP", "port": 8080}]})
}

/// musl asks for both families from one socket, takes the first answer of each, and stops its search at anything but NXDOMAIN.
#[test]
fn musl_finds_names_through_the_search_path() {
    const WHAT: &str = "names for programs with musl";
    if !can_run_in_namespaces(WHAT) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (source, program) = (folder.path().join("resolve.c"), folder.path().join("resolve"));
    std::fs::write(&source, RESOLVE).unwrap();
    let compiled = Command::new("musl-gcc").args(["-static", "-o"]).arg(&program).arg(&source).status();
    if compiled.is_err() {
        eprintln!("not tested: {WHAT}: needs musl-gcc (Debian: musl-tools)");
        return;
    }
    assert!(compiled.unwrap().success());
    let mut cluster = Cluster::new().unwrap();
    cluster.configure(CONFIG).unwrap();
    cluster.add_pod(1).unwrap();
    let many: Vec<Ipv4Addr> = (0..40).map(|n| Ipv4Addr::new(10, 245, 0, n)).collect();
    let headless = json!({"service.kubernetes.io/headless": ""});
    let service = |name: &str, ip: &str| {
        json!({"apiVersion": "v1", "kind": "Service", "metadata": {"namespace": "default", "name": name},
            "spec": {"clusterIP": ip, "clusterIPs": [ip], "ipFamilies": ["IPv4"], "ports": [{"name": "http", "port": 80}]}})
    };
    let objects = [
        service("web", "10.96.0.20"),
        service("db", "None"),
        slice("db", headless.clone(), &many[..3]),
        service("many", "None"),
        slice("many", headless, &many),
    ];
    cluster.write("names.json", &objects).unwrap();
    cluster.start().unwrap();
    let resolv = folder.path().join("resolv.conf");
    let search = "search default.svc.cluster.local svc.cluster.local cluster.local";
    std::fs::write(&resolv, format!("nameserver 169.254.20.10\n{search}\noptions ndots:5 timeout:2\n")).unwrap();
    let resolve = |name: &str| {
        let mut command = cluster.pods[0].pod.ns.command("unshare");
        command.args(["--mount", "sh", "-c", "mount --bind \"$0\" /etc/resolv.conf && exec \"$@\""]);
        let output = command.arg(&resolv).arg(&program).arg(name).output().unwrap();
        let mut lines: Vec<String> = String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect();
        lines.sort();
        (output.status.success(), lines)
    };
    for name in ["web", "web.default", "web.default.svc", "web.default.svc.cluster.local"] {
        assert_eq!(resolve(name), (true, vec!["10.96.0.20".to_owned()]), "{name}");
    }
    assert_eq!(resolve("db").1.len(), 3);
    // More than fits 512 bytes: newer ones ask again over a connection, older ones take what there is.
    let (found, addresses) = resolve("many");
    assert!(found && (25..=40).contains(&addresses.len()), "{addresses:?}");
    assert!(!resolve("missing").0);
    assert_eq!(cluster.stop(Signal::SIGTERM).unwrap(), Some(0), "{}", cluster.log());
}

#[test]
fn who_waits_is_let_go_as_soon_as_there_is_an_endpoint() {
    const ROUNDS: usize = 15;
    if !can_run_in_namespaces("how soon held connections go on") {
        return;
    }
    let mut cluster = Cluster::new().unwrap();
    cluster.configure(CONFIG).unwrap();
    cluster.add_pod(1).unwrap();
    let lazy = json!({"apiVersion": "v1", "kind": "Service",
        "metadata": {"namespace": "default", "name": "lazy", "annotations": {"sluice.dev/hold": "9s"}},
        "spec": {"clusterIP": "10.96.0.77", "clusterIPs": ["10.96.0.77"], "ipFamilies": ["IPv4"],
            "ports": [{"name": "http", "protocol": "TCP", "port": 80, "targetPort": 8080}]}});
    let ready = slice("lazy", json!({}), &[Ipv4Addr::new(10, 244, 0, 1)]);
    cluster.write("lazy.json", std::slice::from_ref(&lazy)).unwrap();
    cluster.start().unwrap();
    let target = Target::Http("10.96.0.77:80".parse().unwrap());
    let (client, mut took) = (cluster.topology.client.clone(), Vec::new());
    for round in 0..ROUNDS {
        std::thread::scope(|scope| {
            let client = &client;
            let dial = move || client.run(|| Ok((client::ask(target, SOON).result, Instant::now()))).unwrap();
            let waiting = scope.spawn(dial);
            let deadline = Instant::now() + SOON;
            while cluster.metric("sluice_held_clients{").unwrap() < 1.0 {
                assert!(Instant::now() < deadline, "nobody waits in round {round}\n{}", cluster.log());
                std::thread::sleep(Duration::from_millis(5));
            }
            // At no certain time after the SYN, and before the client's next one.
            std::thread::sleep(Duration::from_millis(fastrand::u64(0..200)));
            let begun = Instant::now();
            cluster.write("lazy.json", &[lazy.clone(), ready.clone()]).unwrap();
            let (result, answered) = waiting.join().unwrap();
            assert_eq!(result.unwrap(), "web-1");
            took.push(answered - begun);
        });
        let generation = cluster.generation().unwrap();
        cluster.write("lazy.json", std::slice::from_ref(&lazy)).unwrap();
        cluster.wait_for_table_after(generation).unwrap();
    }
    took.sort();
    let at = |part: usize| took[(ROUNDS - 1) * part / 100];
    let (p50, p90, most) = (at(50), at(90), at(100));
    writeln!(
        std::io::stdout(),
        "from a written slice to the held client's answer: p50 {p50:?} p90 {p90:?} max {most:?}"
    )
    .unwrap();
    // Well before the client's own next SYN, which comes a second after its first.
    assert!(p50 < Duration::from_millis(400), "{took:?}");
}
