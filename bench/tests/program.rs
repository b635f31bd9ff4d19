//! `sluice-bench` from outside: its loads against its server, its exit codes, and a short comparison.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::net::{Ipv4Addr, TcpListener};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use sluice_bench::netns::is_privileged;
use sluice_bench::workload;

const PROGRAM: &str = env!("CARGO_BIN_EXE_sluice-bench");

fn bench(arguments: &[&str]) -> Output {
    Command::new(PROGRAM).args(arguments).output().expect("sluice-bench can be started")
}

struct Server(Child, u16);

impl Server {
    fn start() -> Self {
        let port = free_port();
        let mut command = Command::new(PROGRAM);
        command.args(["serve", "--port", &port.to_string()]).stderr(Stdio::null());
        let server = Self(command.spawn().unwrap(), port);
        let deadline = Instant::now() + Duration::from_secs(10);
        let address = (Ipv4Addr::LOCALHOST, port).into();
        while workload::probe(None, address, Duration::from_secs(1)).unwrap().is_err() {
            assert!(Instant::now() < deadline, "the server does not serve");
            std::thread::sleep(Duration::from_millis(10));
        }
        server
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

fn free_port() -> u16 {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port()
}

#[test]
fn loads_report_as_json_and_end_with_0() {
    let server = Server::start();
    let target = format!("localhost:{}", server.1);
    let folder = tempfile::tempdir().unwrap();
    let html = folder.path().join("r.html");
    for (workload, unit) in [("cps", "connections/s"), ("rr", "requests/s"), ("bulk", "Gbit/s")] {
        let short = [workload, "--target", &target, "--duration", "200ms", "--warmup", "0s", "--json"];
        let output = bench(&[&short[..], &["--html", html.to_str().unwrap()]].concat());
        assert!(output.status.success(), "{workload}: {}", String::from_utf8_lossy(&output.stderr));
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(report["unit"], unit);
        assert!(report["result"]["rate"].as_f64().unwrap() > 0.0, "{report}");
        assert_eq!(report["result"]["failures"], serde_json::json!({}));
        let page = std::fs::read_to_string(&html).unwrap();
        let charts = if workload == "bulk" { 1 } else { 3 };
        assert_eq!(page.matches("<svg").count(), charts, "{workload}");
    }
}

#[test]
fn idle_connections_to_any_target_are_asked_twice() {
    let server = Server::start();
    let (target, pid) = (format!("127.0.0.1:{}", server.1), server.0.id().to_string());
    let arguments = ["idle", "--connections", "50", "--duration", "100ms", "--json", "--pid", &pid, "--target"];
    let output = bench(&[&arguments[..], &[&target]].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&report["connections"], &report["failures"]), (&50.into(), &serde_json::json!({})));
    assert!(report["program"]["residentBytes"].as_u64().unwrap() > 100_000, "{report}");
    drop(server);
    let output = bench(&["idle", "--connections", "2", "--duration", "0s", "--target", &target]);
    assert_eq!(output.status.code(), Some(1));
}

#[test]
fn errors_end_with_1_and_wrong_use_with_2() {
    let closed = format!("127.0.0.1:{}", free_port());
    let output = bench(&["cps", "--target", &closed, "--duration", "100ms", "--warmup", "0s"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stdout).contains("refused"));
    for wrong in [&["rr"][..], &["rr", "--target", "nowhere"], &["rr", "--target", &closed, "--rate", "-1"]] {
        assert_eq!(bench(wrong).status.code(), Some(2), "{wrong:?}");
    }
}

#[test]
fn a_comparison_names_who_is_left_out() {
    if !is_privileged() {
        eprintln!("not tested: needs CAP_SYS_ADMIN to make network namespaces");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (json, html) = (folder.path().join("r.json"), folder.path().join("r.html"));
    let output = bench(&[
        "compare",
        "--peers=nft,sluice-1",
        "--sluice=/nowhere/sluice",
        "--rounds=2",
        "--seconds=100ms",
        "--warmup=20ms",
        "--connections=4",
        &format!("--json={}", json.display()),
        &format!("--html={}", html.display()),
    ]);
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.contains("sluice-1 is left out: /nowhere/sluice is not built"), "{text}");
    let report: Value = serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap();
    let workloads = report["modes"][0]["workloads"].as_array().unwrap();
    assert_eq!(workloads.len(), 5);
    for workload in workloads {
        let peers: Vec<&str> =
            workload["rows"].as_array().unwrap().iter().filter_map(|row| row["peer"].as_str()).collect();
        assert_eq!(peers, ["direct", "nft"]);
        for row in workload["rows"].as_array().unwrap() {
            assert_eq!(row["value"]["rounds"].as_array().unwrap().len(), 2);
            assert!(row["ratio"]["median"].as_f64().unwrap() > 0.0, "{row}");
        }
    }
    let page = std::fs::read_to_string(html).unwrap();
    assert!(page.contains("<svg") && page.contains("nft") && !page.contains("http"), "a page of its own");
}
