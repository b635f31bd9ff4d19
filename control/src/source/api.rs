//! The Kubernetes API as source: what kube-proxy watches, listed and watched, as the updates that a folder gives.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Namespace, Node, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::ServiceCIDR;
use sluice_dataplane::dns::PodNames;
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinSet;
use tokio::time::Instant;

pub use self::access::Access;
use self::assembly::{Assembly, Awaits, Event};
use self::follow::{Query, follow};
use super::Update;
use crate::object::{HEADLESS_LABEL, Kind, PROXY_NAME_LABEL};

mod access;
mod assembly;
mod backoff;
mod failure;
mod follow;
pub mod requests;
mod slim;

/// How long the start waits for the own Node, as kube-proxy does.
pub const NODE_PATIENCE: Duration = Duration::from_secs(300);
/// A server sends a bookmark each minute.
pub const SILENCE: Duration = Duration::from_secs(90);
/// Events that may wait, of all resources.
const QUEUE: usize = 1024;

/// What to watch, and where.
#[derive(Clone, Debug)]
pub struct Options {
    /// The API server and who we are to it.
    pub access: Access,
    /// Name of the own Node.
    pub node_name: String,
    /// Watch the Services with this `service.kubernetes.io/service-proxy-name`; empty: those without the label.
    pub service_proxy_name: String,
    /// Names are answered: they need every Service, the headless ones too, and Namespaces; by address, Pods as well.
    pub names: Option<PodNames>,
    /// How long to wait for the own Node once everything else is there.
    pub node_patience: Duration,
    /// After so long without a word of a watch, another connection goes on where it was.
    pub silence: Duration,
}

/// Watches until nobody receives. The first update comes once everything is listed, and holds all there is.
pub async fn watch(options: Options, updates: mpsc::Sender<Update>) {
    let (sender, mut events) = mpsc::channel(QUEUE);
    let mut followers = JoinSet::new();
    let [services, slices, node, cidrs] = queries(&options);
    let (access, reached) = (&options.access, Arc::new(Notify::new()));
    followers.spawn(follow::<Service>(access.clone(), services, sender.clone(), Arc::clone(&reached)));
    followers.spawn(follow::<EndpointSlice>(access.clone(), slices, sender.clone(), Arc::clone(&reached)));
    followers.spawn(follow::<Node>(access.clone(), node, sender.clone(), Arc::clone(&reached)));
    followers.spawn(follow::<ServiceCIDR>(access.clone(), cidrs, sender.clone(), Arc::clone(&reached)));
    let mut assembly = Assembly::default();
    let query = |kind, resource| Query { kind, resource, labels: None, fields: None, silence: options.silence };
    if options.names.is_some() {
        assembly.await_too(Kind::Namespace);
        followers.spawn(follow::<Namespace>(
            access.clone(),
            query(Kind::Namespace, "namespaces"),
            sender.clone(),
            Arc::clone(&reached),
        ));
    }
    if options.names == Some(PodNames::Verified) {
        assembly.await_too(Kind::Pod);
        followers.spawn(follow::<Pod>(access.clone(), query(Kind::Pod, "pods"), sender.clone(), Arc::clone(&reached)));
    }
    drop(sender);
    let mut deadline = None;
    loop {
        let patience = async {
            match deadline {
                Some(deadline) => tokio::time::sleep_until(deadline).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = updates.closed() => return,
            event = events.recv() => match event {
                Some(event) => take_all(&mut assembly, event, &mut events),
                None => return,
            },
            () = patience => {
                tracing::warn!(node = options.node_name, "there is no such Node with an address: the host's own are used");
                assembly.go_without_node();
            }
        }
        deadline = match (assembly.awaits(), deadline) {
            (Awaits::Node, None) => {
                tracing::info!(node = options.node_name, patience = ?options.node_patience, "waiting for the own Node");
                Some(Instant::now() + options.node_patience)
            }
            (Awaits::Node, deadline) => deadline,
            (Awaits::Lists | Awaits::Nothing, _) => None,
        };
        if let Some(update) = assembly.update()
            && updates.send(update).await.is_err()
        {
            return;
        }
    }
}

/// Events that have come meanwhile belong to the same update.
fn take_all(assembly: &mut Assembly, first: Event, events: &mut mpsc::Receiver<Event>) {
    assembly.take(first);
    for _ in 0..QUEUE {
        match events.try_recv() {
            Ok(event) => assembly.take(event),
            Err(_) => return,
        }
    }
}

/// What kube-proxy watches, or all of it where names are answered.
fn queries(options: &Options) -> [Query; 4] {
    let not_headless = format!("!{HEADLESS_LABEL}");
    let ours = match &*options.service_proxy_name {
        "" => format!("!{PROXY_NAME_LABEL}"),
        name => format!("{PROXY_NAME_LABEL}={name}"),
    };
    let services = Some(format!("{not_headless},{ours}")).filter(|_| options.names.is_none());
    let slices = Some(not_headless).filter(|_| options.names.is_none());
    let silence = options.silence;
    let query = |kind, resource, labels, fields| Query { kind, resource, labels, fields, silence };
    [
        query(Kind::Service, "services", services, None),
        query(Kind::EndpointSlice, "endpointslices.discovery.k8s.io", slices, None),
        query(Kind::Node, "nodes", None, Some(format!("metadata.name={}", options.node_name))),
        query(Kind::ServiceCIDR, "servicecidrs.networking.k8s.io", None, None),
    ]
}

#[cfg(test)]
mod tests;
