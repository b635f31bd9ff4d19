//! `sluice-bench` around the real daemon: what each load reports, and that nothing fails.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::process::{Command, Output};

use serde_json::{Value, json};
use sluice_tests::cluster::Cluster;
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
        let plan = ["drain", "--pods", "2", "--kept", "8", "--opening", "2", "--pre-stop", "500ms"];
        let report = report(&[&plan[..], more].concat());
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

#[test]
fn questions_are_asked_and_their_codes_checked() {
    if !can_run_in_namespaces("sluice-bench dns") {
        return;
    }
    let mut cluster = Cluster::new().unwrap();
    cluster.configure("localControllers: false\nserviceCIDRs: [10.96.0.0/16]\ndns: {upstreams: []}\n").unwrap();
    let object = |index: usize| {
        let ip = if index % 5 == 4 { "None".to_owned() } else { format!("10.96.1.{index}") };
        let labels =
            json!({"kubernetes.io/service-name": format!("other-{index}"), "service.kubernetes.io/headless": ""});
        let service = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"namespace": "default", "name": format!("other-{index}")},
            "spec": {"clusterIP": ip, "clusterIPs": [ip], "ipFamilies": ["IPv4"], "ports": [{"name": "http", "port": 80, "protocol": "TCP"}]}});
        let slice = json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"namespace": "default", "name": format!("other-{index}-1"), "labels": labels},
            "endpoints": [{"addresses": [format!("10.244.1.{index}")]}], "ports": [{"name": "http", "port": 80, "protocol": "TCP"}]});
        [service, slice]
    };
    cluster.write("others.json", &(0..10).flat_map(object).collect::<Vec<_>>()).unwrap();
    cluster.start().unwrap();
    let dns = |more: &[&str]| {
        let program = sluice_binary().with_file_name("sluice-bench");
        let mut command = cluster.topology.client.command(program);
        command.args(["dns", "--target", "169.254.20.10:53", "--duration", "300ms", "--warmup", "50ms", "--json"]);
        let output = command.args(more).output().unwrap();
        let report: Value = serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&output.stderr)));
        (output.status.code(), report)
    };
    for more in [&["--services", "10"][..], &["--services", "10", "--rate", "500", "--threads", "1", "--edns", "1232"]]
    {
        let (code, report) = dns(more);
        assert_eq!(code, Some(0), "{report}");
        assert!(number(&report, "/codes/NOERROR") > number(&report, "/codes/NXDOMAIN"), "{report}");
        assert!(number(&report, "/result/rate") > 100.0 && report["unexpectedCodes"] == 0, "{report}");
    }
    let list = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(list.path(), "other-1.default.svc.cluster.local A NXDOMAIN\n").unwrap();
    let (code, report) = dns(&["--names", list.path().to_str().unwrap()]);
    assert_eq!(code, Some(1), "a wrong code is an error");
    assert_eq!(report["unexpectedCodes"], report["codes"]["NOERROR"]);
}

#[test]
fn name_servers_are_compared_on_the_objects_of_an_api_server() {
    const WHAT: &str = "sluice-bench dns-compare";
    if !can_run_in_namespaces(WHAT) || !control_plane::can_run(WHAT) {
        return;
    }
    let short = ["--services", "20", "--endpoints", "60", "--rounds", "2", "--seconds", "300ms"];
    let report = report(&[&["dns-compare"][..], &short, &["--changes", "2", "--cached-changes", "0"]].concat());
    let sluice = &report["peers"][0];
    assert_eq!(
        (&sluice["name"], &sluice["wrongAnswers"], &sluice["unseenChanges"]),
        (&json!("sluice"), &json!(0), &json!(0))
    );
    assert!(number(sluice, "/questionsPerSecond/median") > 100.0 && number(sluice, "/changeMicroseconds/count") == 2.0);
    assert!(number(sluice, "/paced/0/latencyMicroseconds/p99") > 0.0, "{sluice}");
}
