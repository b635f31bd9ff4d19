//! `sluice trace` as people and scripts use it: words, JSON, exit codes, the daemon's answer.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::TcpListener;
use std::process::{Command, Output};

use serde_json::json;
use sluice_tests::sluice_binary;
use tempfile::TempDir;

/// A Service with an endpoint here, one elsewhere and one that is not ready, and a document that is no object.
fn manifests() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let service = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"namespace": "shop", "name": "web"},
        "spec": {"type": "NodePort", "clusterIP": "10.96.0.1", "ports": [{"name": "http", "port": 80, "nodePort": 30080}]}});
    let endpoint = |address: &str, node: &str, ready: bool| json!({"addresses": [address], "nodeName": node, "conditions": {"ready": ready}});
    let endpoints = [("10.244.0.12", "me", true), ("10.244.1.3", "other", true), ("10.244.1.4", "other", false)];
    let slice = json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {"namespace": "shop", "name": "web-1", "labels": {"kubernetes.io/service-name": "web"}},
        "endpoints": endpoints.map(|(address, node, ready)| endpoint(address, node, ready)), "ports": [{"name": "http", "port": 8080}]});
    let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "me"}, "spec": {"podCIDRs": ["10.244.0.0/24"]},
        "status": {"addresses": [{"type": "InternalIP", "address": "192.168.0.2"}]}});
    let list = json!({"apiVersion": "v1", "kind": "List", "items": [service, slice, node]});
    fs::write(folder.path().join("web.json"), list.to_string()).unwrap();
    fs::write(folder.path().join("broken.yaml"), "kind: [").unwrap();
    folder
}

fn trace(arguments: &[&str]) -> Output {
    Command::new(sluice_binary()).arg("trace").args(arguments).output().unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

#[test]
fn the_answer_is_said_in_words_and_in_one_line_of_json() {
    let folder = manifests();
    let path = folder.path().to_str().unwrap();
    let asked = ["--manifests", path, "--node-name", "me", "--from", "10.244.0.5:4000", "--to", "10.96.0.1:80"];
    let output = trace(&asked);
    let words = "outcome    forward: to one of the endpoints below\n\
        service    shop/web, port http, by clusterip\n\
        rule       internalTrafficPolicy Cluster: 2 of 3 endpoints are ready\n\
        source     the client's own\n\
        endpoints  10.244.0.12:8080\n           10.244.1.3:8080\n";
    assert_eq!((text(&output.stdout), output.status.code()), (words, Some(0)));
    let problems = text(&output.stderr);
    assert!(problems.contains("broken.yaml"), "problems are said beside the answer: {problems}");
    let output = trace(&[&asked[..], &["-o", "json"]].concat());
    let line = "{\"outcome\":\"forward\",\"service\":\"shop/web\",\"port\":\"http\",\"frontend\":\"clusterip\",\
        \"endpoints\":[\"10.244.0.12:8080\",\"10.244.1.3:8080\"],\"masquerade\":false,\
        \"reason\":\"internalTrafficPolicy Cluster: 2 of 3 endpoints are ready\"}\n";
    assert_eq!(text(&output.stdout), line);
}

#[test]
fn whatever_happens_to_the_connection_the_command_succeeds_and_bad_usage_is_told_apart() {
    let folder = manifests();
    let path = folder.path().to_str().unwrap();
    let from_files = |from, to| vec!["--manifests", path, "--node-name", "me", "--from", from, "--to", to];
    for (arguments, code, words) in [
        (from_files("192.168.0.9", "192.168.0.2:30080"), 0, ""),
        (from_files("192.168.0.9", "192.168.0.2:30081"), 0, ""),
        (from_files("10.244.0.5", "10.96.0.1:81"), 0, ""),
        (from_files("10.244.0.5", "10.96.9.9:80"), 0, ""),
        (from_files("10.244.0.5", "[fd00::1]:80"), 2, "IPv6"),
        (from_files("pod", "10.96.0.1:80"), 2, "no client"),
        (from_files("10.244.0.5", "10.96.0.1"), 2, "no destination"),
        (vec!["--from", "10.0.0.1", "--to", "10.96.0.1:80"], 2, "--manifests"),
        (vec!["--manifests", path], 2, "--from"),
        (vec!["--manifests", "/nowhere", "--from", "10.0.0.1", "--to", "10.96.0.1:80"], 1, "/nowhere"),
        (vec!["--admin", "127.0.0.1:1", "--from", "10.0.0.1", "--to", "10.96.0.1:80"], 3, "127.0.0.1:1"),
    ] {
        let output = trace(&arguments);
        let error = text(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {error}");
        assert!(error.contains(words), "{arguments:?}: {error}");
    }
}

#[test]
fn a_daemon_is_asked_for_what_packets_meet() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let admin = listener.local_addr().unwrap().to_string();
    let answer = json!({"outcome": "reject", "service": "ns/web", "port": "", "frontend": "clusterip", "endpoints": [],
        "masquerade": false, "reason": "because"});
    let body = answer.to_string();
    let daemon = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut request = String::new();
        BufReader::new(stream.try_clone().unwrap()).read_line(&mut request).unwrap();
        let length = body.len();
        write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}").unwrap();
        request
    });
    let output = trace(&["--admin", &admin, "--from", "fd00::1", "--to", "[fd00::2]:80", "--proto", "udp"]);
    let words = "outcome    reject: the client is refused at once\nservice    ns/web, its unnamed port, by clusterip\nrule       because\n";
    assert_eq!(text(&output.stdout), words, "{}", text(&output.stderr));
    let request = daemon.join().unwrap();
    assert_eq!(request, "GET /api/v1/trace?from=fd00::1&to=[fd00::2]:80&proto=UDP HTTP/1.1\r\n");
}
