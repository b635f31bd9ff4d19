//! Which Pods do the manifests ask for: Deployments, StatefulSets and Services to workloads of a bounded size. Pure.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::apps::v1::{Deployment, StatefulSet};
use k8s_openapi::api::core::v1::{Container, Pod, PodSpec, PodStatus, PodTemplateSpec, Service};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use sluice_dataplane::table::ServiceName;

use super::names;
use crate::object::{Object, name_of};

/// Most Pods of one workload before the scale-up: the point is made by a few.
const MOST_REPLICAS: usize = 4;
/// Most Pods of all workloads before the scale-up, as far as one Pod for each allows.
const MOST_PODS: usize = 32;
/// Most workloads that are played at all.
const MOST_WORKLOADS: usize = 60;

/// Kinds that make Pods in a cluster, but not here.
const OTHER_WORKLOADS: &[&str] = &["CronJob", "DaemonSet", "Job", "ReplicaSet", "ReplicationController"];

/// What makes Pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WorkloadKind {
    /// `apps/v1` Deployment.
    Deployment,
    /// `apps/v1` StatefulSet.
    StatefulSet,
}

/// How a new revision comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Roll {
    /// A new Pod is ready before an old one goes.
    Surge,
    /// A Pod goes before its successor of the same name comes.
    Replace,
    /// Not at all, and why.
    Never(&'static str),
}

/// A Deployment or StatefulSet to be played.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Workload {
    /// What it is.
    pub(super) kind: WorkloadKind,
    /// Namespace and name.
    pub(super) name: ServiceName,
    /// Replicas in the manifest.
    pub(super) wanted: usize,
    /// Replicas played.
    pub(super) replicas: usize,
    /// TCP ports of its Pods' servers.
    pub(super) tcp: BTreeSet<u16>,
    /// UDP ports of its Pods' servers.
    pub(super) udp: BTreeSet<u16>,
    /// How it rolls.
    pub(super) roll: Roll,
    template: PodTemplateSpec,
    subdomain: Option<String>,
}

/// What is to be played.
#[derive(Clone, Debug, Default)]
pub(super) struct Plan {
    /// In the manifests' order.
    pub(super) workloads: Vec<Workload>,
    /// In the manifests' order.
    pub(super) services: Vec<Service>,
    /// What of the manifests is played otherwise than asked, in words.
    pub(super) notes: Vec<String>,
}

/// Makes the plan of all objects. Later ones of one name count, as with `kubectl apply`. `skipped`: objects of other kinds.
#[must_use]
pub(super) fn plan(objects: &[Object], skipped: &BTreeMap<String, u64>) -> Plan {
    let mut latest = BTreeMap::new();
    for (position, object) in objects.iter().enumerate() {
        latest.insert(object.key(), position);
    }
    let mut positions: Vec<usize> = latest.into_values().collect();
    positions.sort_unstable();
    let mut plan = Plan::default();
    for object in positions.into_iter().map(|position| &objects[position]) {
        match object {
            Object::Deployment(deployment) => plan.workloads.push(of_deployment(deployment)),
            Object::StatefulSet(set) => plan.workloads.push(of_stateful_set(set)),
            Object::Service(service) => {
                let mut service = Service::clone(service);
                service.metadata.namespace = Some(in_namespace(&service.metadata).namespace.to_string());
                plan.services.push(service);
            }
            Object::EndpointSlice(_)
            | Object::Pod(_)
            | Object::Node(_)
            | Object::ServiceCidr(_)
            | Object::Namespace(_) => {}
        }
    }
    if plan.workloads.len() > MOST_WORKLOADS {
        plan.notes.push(format!(
            "the first {MOST_WORKLOADS} of {} workloads are played; Services of the others are to refuse",
            plan.workloads.len()
        ));
        plan.workloads.truncate(MOST_WORKLOADS);
    }
    let pods = objects.iter().filter(|object| matches!(object, Object::Pod(_))).count() as u64;
    let of_others = skipped.iter().filter_map(|(kind, count)| Some((kind.rsplit_once('/')?.1, *count)));
    for (kind, count) in of_others.filter(|(kind, _)| OTHER_WORKLOADS.contains(kind)).chain([("Pod", pods)]) {
        if count > 0 {
            plan.notes.push(format!("{count} {kind} objects are not played: only Deployments and StatefulSets are"));
        }
    }
    let bound = (MOST_PODS / plan.workloads.len().max(1)).clamp(1, MOST_REPLICAS);
    let larger = plan.workloads.iter().filter(|workload| workload.wanted > bound).count();
    if larger > 0 {
        plan.notes.push(format!("at most {bound} replicas of a workload are played: {larger} would have more"));
    }
    for workload in &mut plan.workloads {
        workload.replicas = workload.wanted.min(bound);
        workload.open_ports(&plan.services);
        workload.decide_roll();
        if let Roll::Never(why) = workload.roll {
            plan.notes.push(format!("{:?} {} is not rolled: {why}", workload.kind, workload.name));
        }
    }
    plan
}

impl Workload {
    /// The Pods of a revision, before one rolls.
    #[must_use]
    pub(super) fn pod_names(&self, revision: u32) -> Vec<String> {
        (0..self.replicas).map(|serial| self.pod_name(revision, serial)).collect()
    }

    /// Name of the `serial`th Pod of a revision.
    #[must_use]
    pub(super) fn pod_name(&self, revision: u32, serial: usize) -> String {
        let serial = u32::try_from(serial).unwrap_or(u32::MAX);
        match self.kind {
            WorkloadKind::Deployment => names::deployment_pod(&self.name.name, &self.template_hash(revision), serial),
            WorkloadKind::StatefulSet => names::stateful_pod(&self.name.name, serial),
        }
    }

    /// The Pod object with this name as a cluster would hold it, without its status.
    #[must_use]
    pub(super) fn pod(&self, pod_name: &str, revision: u32, node: &str) -> Pod {
        let template = self.template.metadata.clone().unwrap_or_default();
        let mut labels = template.labels.unwrap_or_default();
        match self.kind {
            WorkloadKind::Deployment => {
                labels.insert("pod-template-hash".to_owned(), self.template_hash(revision));
            }
            WorkloadKind::StatefulSet => {
                labels.insert("statefulset.kubernetes.io/pod-name".to_owned(), pod_name.to_owned());
            }
        }
        let mut spec = PodSpec {
            node_name: Some(node.to_owned()),
            // Every Pod has a namespace of its own here.
            host_network: None,
            ..self.template.spec.clone().unwrap_or_default()
        };
        if self.kind == WorkloadKind::StatefulSet {
            spec.hostname = Some(pod_name.to_owned());
            spec.subdomain.clone_from(&self.subdomain);
        }
        Pod {
            metadata: ObjectMeta {
                namespace: Some(self.name.namespace.to_string()),
                name: Some(pod_name.to_owned()),
                labels: Some(labels),
                annotations: template.annotations,
                ..ObjectMeta::default()
            },
            spec: Some(spec),
            status: Some(PodStatus::default()),
        }
    }

    fn template_hash(&self, revision: u32) -> String {
        names::template_hash(&self.name.namespace, &self.name.name, revision)
    }

    /// Ports of its containers, and the numbers that Services of its Pods send to, declared or not.
    fn open_ports(&mut self, services: &[Service]) {
        let mut open = |protocol: Option<&str>, port: i32| {
            let Ok(port @ 1..) = u16::try_from(port) else { return };
            match protocol {
                None | Some("TCP") => _ = self.tcp.insert(port),
                Some("UDP") => _ = self.udp.insert(port),
                Some(_) => {}
            }
        };
        let spec = self.template.spec.as_ref();
        for port in spec.into_iter().flat_map(containers).flat_map(|container| container.ports.iter().flatten()) {
            open(port.protocol.as_deref(), port.container_port);
        }
        let labels = self.template.metadata.as_ref().and_then(|metadata| metadata.labels.as_ref());
        for service in services.iter().filter(|service| *name_of(&service.metadata).namespace == *self.name.namespace) {
            let Some(spec) = service.spec.as_ref().filter(|spec| selects(spec.selector.as_ref(), labels)) else {
                continue;
            };
            for port in spec.ports.iter().flatten() {
                match &port.target_port {
                    Some(IntOrString::Int(target)) if *target != 0 => open(port.protocol.as_deref(), *target),
                    Some(IntOrString::String(_)) => {}
                    Some(IntOrString::Int(_)) | None => open(port.protocol.as_deref(), port.port),
                }
            }
        }
    }

    fn decide_roll(&mut self) {
        if self.replicas == 0 {
            self.roll = Roll::Never("it has no Pods");
        } else if self.roll == Roll::Replace && self.replicas == 1 {
            self.roll = Roll::Never("its only Pod would go before the next one comes");
        }
    }
}

/// Whether a Service with this selector is for Pods with these labels. Without a selector it is for none.
fn selects(selector: Option<&BTreeMap<String, String>>, labels: Option<&BTreeMap<String, String>>) -> bool {
    let matches = |selector: &BTreeMap<String, String>| {
        selector.iter().all(|(name, value)| labels.and_then(|labels| labels.get(name)) == Some(value))
    };
    selector.is_some_and(|selector| !selector.is_empty() && matches(selector))
}

/// Containers whose ports are open while the Pod runs: those that restart always among the init containers too (KEP-753).
fn containers(spec: &PodSpec) -> impl Iterator<Item = &Container> {
    let sidecars = spec.init_containers.iter().flatten();
    let sidecars = sidecars.filter(|container| container.restart_policy.as_deref() == Some("Always"));
    spec.containers.iter().chain(sidecars)
}

fn of_deployment(deployment: &Deployment) -> Workload {
    let spec = &deployment.spec;
    let strategy = spec.strategy.as_ref().and_then(|strategy| strategy.type_.as_deref());
    let roll = match strategy {
        Some("Recreate") => Roll::Never("its strategy Recreate stops all Pods first"),
        _ => Roll::Surge,
    };
    let kind = WorkloadKind::Deployment;
    workload(kind, &deployment.metadata, spec.replicas, roll, &spec.template, None)
}

fn of_stateful_set(set: &StatefulSet) -> Workload {
    let spec = &set.spec;
    let strategy = spec.update_strategy.as_ref().and_then(|strategy| strategy.type_.as_deref());
    let roll = match strategy {
        Some("OnDelete") => Roll::Never("its update strategy is OnDelete"),
        _ => Roll::Replace,
    };
    let subdomain = spec.service_name.clone().filter(|name| !name.is_empty());
    workload(WorkloadKind::StatefulSet, &set.metadata, spec.replicas, roll, &spec.template, subdomain)
}

fn workload(
    kind: WorkloadKind,
    metadata: &ObjectMeta,
    replicas: Option<i32>,
    roll: Roll,
    template: &PodTemplateSpec,
    subdomain: Option<String>,
) -> Workload {
    Workload {
        kind,
        name: in_namespace(metadata),
        wanted: usize::try_from(replicas.unwrap_or(1)).unwrap_or(0),
        replicas: 0,
        tcp: BTreeSet::new(),
        udp: BTreeSet::new(),
        roll,
        template: template.clone(),
        subdomain,
    }
}

fn in_namespace(metadata: &ObjectMeta) -> ServiceName {
    let name = name_of(metadata);
    if name.namespace.is_empty() { ServiceName::new("default", &name.name) } else { name }
}

#[cfg(test)]
mod tests;
