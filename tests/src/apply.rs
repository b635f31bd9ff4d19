//! Manifests brought to a real API server, as `kubectl apply` would on an empty cluster.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use crate::cluster::SOON;
use crate::control_plane::ControlPlane;

/// What became of manifests.
#[derive(Debug, Default)]
pub struct Applied {
    /// Objects as the API server took them.
    pub objects: Vec<Value>,
    /// Objects that it did not take, and why.
    pub refused: Vec<String>,
}

/// The documents of a YAML text.
pub fn documents(text: &str) -> Result<Vec<Value>> {
    let documents: Vec<Value> = serde_saphyr::from_multiple(text)?;
    Ok(documents.into_iter().filter(|document| !document.is_null()).collect())
}

/// Creates objects in their order, in the namespace `default` where they name none. Namespaces that are not there are made.
pub fn apply(plane: &ControlPlane, objects: Vec<Value>) -> Result<Applied> {
    let (mut kinds, mut namespaces) = (Kinds::new(plane), BTreeSet::new());
    let mut applied = Applied::default();
    for mut object in objects {
        let what = format!("{} {}", object["kind"], object["metadata"]["name"]);
        let Some(collection) = kinds.collection(&mut object) else {
            applied.refused.push(format!("{what}: {} is not served", object["apiVersion"]));
            continue;
        };
        let namespace = match object["kind"].as_str() {
            Some("Namespace") => &object["metadata"]["name"],
            _ => &object["metadata"]["namespace"],
        };
        if let Some(namespace) = namespace.as_str().filter(|name| namespaces.insert((*name).to_owned())) {
            make_namespace(plane, namespace)?;
        }
        if object["kind"] == "Namespace" {
            continue;
        }
        match plane.request("POST", &collection, Some(&object)) {
            Ok(answer) => applied.objects.push(serde_json::from_str(&answer)?),
            Err(error) => applied.refused.push(format!("{what}: {error:#}")),
        }
    }
    Ok(applied)
}

/// Gives each Service of type LoadBalancer that has none an address of each of its families, as a cloud would.
pub fn give_load_balancers(plane: &ControlPlane) -> Result<()> {
    let services = plane.get("/api/v1/services")?;
    let waiting = services["items"].as_array().context("a list has items")?.iter().filter(|service| {
        service["spec"]["type"] == "LoadBalancer" && service["status"]["loadBalancer"]["ingress"].is_null()
    });
    for (number, service) in (1..).zip(waiting) {
        let families = service["spec"]["ipFamilies"].as_array().into_iter().flatten();
        let address = |family: &Value| {
            if family == "IPv4" { format!("172.31.0.{number}") } else { format!("fd00:31::{number:x}") }
        };
        let ingress: Vec<Value> = families.map(|family| json!({"ip": address(family), "ipMode": "VIP"})).collect();
        let mut service = service.clone();
        // A list does not say of its items what they are.
        (service["apiVersion"], service["kind"]) = (json!("v1"), json!("Service"));
        plane.patch_status(&service, &json!({"status": {"loadBalancer": {"ingress": ingress}}}))?;
    }
    Ok(())
}

/// Makes a namespace where there is none, and waits for the account without which no Pod is accepted in it.
fn make_namespace(plane: &ControlPlane, name: &str) -> Result<()> {
    if plane.get(&format!("/api/v1/namespaces/{name}")).is_err() {
        plane.create(&json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}))?;
    }
    let deadline = Instant::now() + SOON * 3;
    while plane.get(&format!("/api/v1/namespaces/{name}/serviceaccounts/default")).is_err() {
        ensure!(Instant::now() < deadline, "namespace {name} gets no service account");
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    Ok(())
}

/// Where objects of a kind are, as the API server tells.
struct Kinds<'p> {
    plane: &'p ControlPlane,
    /// Its answers, by API version; `None`: not served.
    known: BTreeMap<String, Option<Value>>,
}

impl<'p> Kinds<'p> {
    fn new(plane: &'p ControlPlane) -> Self {
        Self { plane, known: BTreeMap::new() }
    }

    /// The path to create this object at. An object of a namespace that names none is put into `default`.
    fn collection(&mut self, object: &mut Value) -> Option<String> {
        let version = object["apiVersion"].as_str()?.to_owned();
        let root = if version == "v1" { "/api" } else { "/apis" };
        let plane = self.plane;
        let answer = self.known.entry(version.clone()).or_insert_with(|| plane.get(&format!("{root}/{version}")).ok());
        let resources = answer.as_ref()?["resources"].as_array()?;
        let is_it = |resource: &&Value| {
            resource["kind"] == object["kind"] && !resource["name"].as_str().is_some_and(|name| name.contains('/'))
        };
        let resource = resources.iter().find(is_it)?;
        let name = resource["name"].as_str()?;
        if resource["namespaced"] != true {
            return Some(format!("{root}/{version}/{name}"));
        }
        if object["metadata"]["namespace"].is_null() {
            object["metadata"]["namespace"] = json!("default");
        }
        Some(format!("{root}/{version}/namespaces/{}/{name}", object["metadata"]["namespace"].as_str()?))
    }
}
