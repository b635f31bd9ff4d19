//! `sluice-bench` around the real daemon: what each load reports, and that nothing fails.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::process::{Command, Output};

use serde_json::Value;
use sluice_tests::{can_run_in_namespaces, control_plane, kube_proxy, sluice_binary};

fn bench(arguments: &[&str]) -> Output {
    let program = sluice_binary().with_file_name("sluice-bench");
    assert!(program.exists(), "{} is not built: run scripts/test", program.display());
    Command::new(program).args(arguments).output().unwrap()
}

/// The report of a load that ends without errors.
fn report(arguments: &[&str]) -> Value {
    let output = bench(&[arguments, &["--json"]].concat());
    let (text, error) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{arguments:?}: {text}{error}");
    serde_json::from_slice(&output.stdout).unwrap()
}

fn number(report: &Value, pointer: &str) -> f64 {
    report.pointer(pointer).and_then(Value::as_f64).unwrap_or_else(|| panic!("{pointer} is no number in {report}"))
}

#[test]
fn idle_connections_cost_memory_and_still_work() {
    if !can_run_in_namespaces("sluice-bench idle") {
        return;
    }
    let report = report(&["idle", "--connections", "300", "--duration", "200ms"]);
    assert_eq!(report["connections"], 300);
    assert!(number(&report, "/program/residentBytes") > f64::from(1 << 20), "{report}");
}

#[test]
fn changes_under_load_break_nothing() {
    if !can_run_in_namespaces("sluice-bench churn") {
        return;
    }
    let short = ["--rounds", "1", "--seconds", "1", "--services", "50", "--connections", "4"];
    for more in [&["--workload", "cps"][..], &["--workload", "rr", "--preserve"]] {
        let report = report(&[&["churn"], &short[..], more].concat());
        assert!(number(&report, "/tables") > 1.0 && number(&report, "/changes") > 10.0, "{report}");
        assert!(number(&report, "/with/rate") > 0.0, "{report}");
    }
}

#[test]
fn a_rolling_update_moves_every_kept_connection_and_resets_none() {
    if !can_run_in_namespaces("sluice-bench drain") {
        return;
    }
    for more in [&[][..], &["--preserve"]] {
        let report = report(&[&["drain", "--pods", "2", "--kept", "8", "--opening", "2"], more].concat());
        // Every Pod of the beginning is replaced, so each connection moves once at least.
        assert!(number(&report, "/kept/moved") >= 8.0, "{report}");
        assert_eq!(report["kept"]["resets"], 0);
        assert!(number(&report, "/opens/duringMicroseconds/count") > 0.0, "{report}");
    }
}

#[test]
fn packets_follow_changes_at_every_size() {
    if !can_run_in_namespaces("sluice-bench scale") {
        return;
    }
    let report = report(&["scale", "--sizes", "1/2,300/1500", "--changes", "4", "--dials", "50"]);
    let sizes = report["sizes"].as_array().unwrap();
    assert_eq!(sizes.len(), 2);
    for size in sizes {
        assert_eq!(number(size, "/changeMicroseconds/count"), 4.0, "{size}");
        assert_eq!(number(size, "/connectMicroseconds/service/count"), 50.0, "{size}");
    }
}

#[test]
fn packets_follow_what_an_api_server_has_accepted() {
    let what = "sluice-bench scale --api";
    if !can_run_in_namespaces(what) || !control_plane::can_run(what) || kube_proxy::program(what).is_none() {
        return;
    }
    let report = report(&["scale", "--api", "--sizes", "30/150", "--changes", "2"]);
    let results = report["results"].as_array().unwrap();
    assert_eq!(results.len(), 2);
    for (result, peer) in results.iter().zip(["Sluice", "kube-proxy"]) {
        assert_eq!((&result["peer"], &result["changeMicroseconds"]["count"]), (&peer.into(), &2.into()), "{result}");
        let (synced, after) = (number(result, "/syncSeconds"), number(result, "/syncAfterListsSeconds"));
        assert!(0.0 <= after && after < synced && number(result, "/residentBytes") > f64::from(1 << 20), "{result}");
    }
}

#[test]
fn many_services_and_flows_are_compared_with_few() {
    if !can_run_in_namespaces("sluice-bench compare --services --flows") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let json = folder.path().join("report.json");
    let short = [
        "compare",
        "--rounds",
        "2",
        "--seconds",
        "100ms",
        "--warmup",
        "20ms",
        "--workloads",
        "rr",
        "--connections",
        "4",
    ];
    let file = ["--json", json.to_str().unwrap()];
    let output = bench(&[&short[..], &["--peers", "sluice-1", "--services", "50", "--flows", "500"], &file].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let read = || -> Value { serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap() };
    let rows = |report: &Value| report["modes"][0]["workloads"][0]["rows"].as_array().unwrap().clone();
    for (row, name) in rows(&read()).iter().zip(["direct", "sluice-1", "sluice-1 50 Services", "sluice-1 500 flows"]) {
        assert_eq!(row["peer"], name);
        assert_eq!(row["toPlain"]["median"].is_number(), name.contains(' '), "{row}");
    }
    let what = "sluice-bench compare with kube-proxy";
    if control_plane::can_run(what) && kube_proxy::program(what).is_some() {
        let output = bench(&[&short[..], &["--peers", "kube-proxy"], &file].concat());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(rows(&read())[1]["peer"], "kube-proxy");
    }
}
