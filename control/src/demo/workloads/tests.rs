//! Manifests to workloads, case by case.

use super::*;
use serde_json::{Value, json};
use std::sync::Arc;

fn planned(objects: &[Object]) -> Plan {
    plan(objects, &BTreeMap::new())
}

fn deployment(name: &str, replicas: i32, strategy: &str, ports: &Value) -> Object {
    let value = json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"namespace": "n", "name": name},
        "spec": {
            "replicas": replicas, "selector": {}, "strategy": {"type": strategy},
            "template": {
                "metadata": {"labels": {"app": name}},
                "spec": {"hostNetwork": true, "containers": [{"name": "c", "ports": ports}]},
            },
        },
    });
    Object::Deployment(Arc::new(serde_json::from_value(value).unwrap()))
}

fn stateful_set(name: &str, replicas: i32) -> Object {
    let value = json!({
        "apiVersion": "apps/v1", "kind": "StatefulSet", "metadata": {"name": name},
        "spec": {
            "replicas": replicas, "serviceName": "peers", "selector": {},
            "template": {"metadata": {"labels": {"app": name}}, "spec": {"containers": []}},
        },
    });
    Object::StatefulSet(Arc::new(serde_json::from_value(value).unwrap()))
}

fn service(app: &str, ports: &Value) -> Object {
    let value = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"namespace": "n", "name": app},
        "spec": {"selector": {"app": app}, "ports": ports},
    });
    Object::Service(Arc::new(serde_json::from_value(value).unwrap()))
}

#[test]
fn ports_are_the_containers_and_those_that_services_send_to() {
    let ports = json!([{"containerPort": 80}, {"containerPort": 53, "protocol": "UDP"}, {"containerPort": 70_000},
        {"containerPort": 132, "protocol": "SCTP"}]);
    let sends = json!([{"name": "a", "port": 1, "targetPort": 8080}, {"name": "b", "port": 9090},
        {"name": "c", "port": 2, "targetPort": "http"}, {"name": "d", "port": 3, "targetPort": 54, "protocol": "UDP"}]);
    let objects = [
        deployment("web", 1, "RollingUpdate", &ports),
        service("web", &sends),
        service("other", &json!([{"port": 7}])),
    ];
    let plan = planned(&objects);
    let web = &plan.workloads[0];
    assert_eq!(web.tcp, BTreeSet::from([80, 8080, 9090]));
    assert_eq!(web.udp, BTreeSet::from([53, 54]));
    assert_eq!(plan.services.len(), 2);
}

#[test]
fn replicas_are_bounded_and_that_is_said() {
    let none = json!([]);
    let alone = planned(&[deployment("web", 50, "RollingUpdate", &none)]);
    assert_eq!(alone.workloads[0].replicas, MOST_REPLICAS);
    assert_eq!(alone.notes, ["at most 4 replicas of a workload are played: 1 would have more"]);
    let many: Vec<Object> =
        (0..80).map(|number| deployment(&format!("d{number}"), 3, "RollingUpdate", &none)).collect();
    let many = planned(&many);
    assert_eq!(many.workloads.len(), MOST_WORKLOADS);
    assert!(many.workloads.iter().all(|workload| workload.replicas == 1));
    assert!(many.notes[0].contains("first 60 of 80 workloads"), "{:?}", many.notes);
    assert_eq!(planned(&[deployment("web", 0, "RollingUpdate", &none)]).workloads[0].pod_names(1), [""; 0]);
}

#[test]
fn what_else_would_make_pods_is_said() {
    let skipped = BTreeMap::from([("apps/v1/DaemonSet".to_owned(), 2), ("v1/ConfigMap".to_owned(), 9)]);
    let pod = Object::Pod(Arc::new(Pod::default()));
    let notes = plan(&[pod], &skipped).notes;
    assert!(notes.len() == 2 && notes[0].contains("2 DaemonSet") && notes[1].contains("1 Pod"), "{notes:?}");
}

#[test]
fn who_rolls_and_how() {
    for (object, want) in [
        (deployment("web", 1, "RollingUpdate", &json!([])), Some(Roll::Surge)),
        (deployment("web", 2, "Recreate", &json!([])), None),
        (deployment("web", 0, "RollingUpdate", &json!([])), None),
        (stateful_set("db", 3), Some(Roll::Replace)),
        (stateful_set("db", 1), None),
    ] {
        let roll = planned(std::slice::from_ref(&object)).workloads[0].roll;
        match want {
            Some(want) => assert_eq!(roll, want, "{}", object.key()),
            None => assert!(matches!(roll, Roll::Never(_)), "{}: {roll:?}", object.key()),
        }
    }
}

#[test]
fn the_later_of_one_name_counts() {
    let none = json!([]);
    let objects = [deployment("web", 1, "RollingUpdate", &none), deployment("web", 2, "RollingUpdate", &none)];
    let plan = planned(&objects);
    assert_eq!(plan.workloads.len(), 1);
    assert_eq!(plan.workloads[0].replicas, 2);
}

#[test]
fn pods_are_as_a_cluster_makes_them() {
    let plan = planned(&[deployment("web", 2, "RollingUpdate", &json!([])), stateful_set("db", 2)]);
    let [web, db] = &plan.workloads[..] else { panic!("{plan:?}") };
    assert_ne!(web.pod_names(1), web.pod_names(2), "a new revision has new Pods");
    let pod = web.pod(&web.pod_name(1, 0), 1, "node-1");
    let labels = pod.metadata.labels.unwrap();
    assert_eq!(labels["app"], "web");
    assert!(pod.metadata.name.unwrap().contains(&labels["pod-template-hash"]));
    let spec = pod.spec.unwrap();
    assert_eq!((spec.node_name.as_deref(), spec.host_network), (Some("node-1"), None));
    assert_eq!(db.pod_names(1), ["db-0", "db-1"]);
    let spec = db.pod("db-1", 2, "node-1").spec.unwrap();
    assert_eq!((spec.hostname.as_deref(), spec.subdomain.as_deref()), (Some("db-1"), Some("peers")));
    assert_eq!(&*db.name.namespace, "default");
}
