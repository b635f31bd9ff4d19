//! Which objects names are asked of: Services, of which each fifth is headless, and their slices.

use std::net::{IpAddr, Ipv4Addr};

use anyhow::Result;
use hickory_proto::rr::RecordType;
use serde_json::{Value, json};
use sluice_bench::workload::questions::{Question, is_headless};

use crate::manifests;

/// The headless Service whose slice is changed.
pub(super) const CHANGED: usize = 4;

/// Services `other-N` and slices, so many endpoints in all.
pub(super) fn all(services: usize, endpoints: usize) -> impl Iterator<Item = Value> {
    let at = move |index: usize| index * endpoints / services;
    let of_service = move |index| [service(index), slice(index, (at(index)..at(index + 1)).map(address))];
    (0..services).flat_map(of_service)
}

/// A question for the addresses of a Service.
pub(super) fn question(index: usize) -> Result<Question> {
    Question::new(&format!("{}.default.svc.cluster.local", name(index)), RecordType::A, Some(1232), None)
}

fn name(index: usize) -> String {
    format!("other-{index}")
}

fn service(index: usize) -> Value {
    let mut service = manifests::service(&name(index), manifests::cluster_ip(index), None);
    if is_headless(index) {
        (service["spec"]["clusterIP"], service["spec"]["clusterIPs"]) = (json!("None"), json!(["None"]));
    }
    service
}

/// The slice of a Service with these endpoints.
pub(super) fn slice(index: usize, addresses: impl IntoIterator<Item = IpAddr>) -> Value {
    let mut slice = manifests::slice(&name(index), &manifests::ready(addresses));
    if is_headless(index) {
        slice["metadata"]["labels"]["service.kubernetes.io/headless"] = json!("");
        let endpoints = slice["endpoints"].as_array_mut().into_iter().flatten();
        endpoints.enumerate().for_each(|(number, endpoint)| endpoint["hostname"] = json!(format!("pod-{number}")));
    }
    slice
}

/// Address of an endpoint, by its number.
fn address(number: usize) -> IpAddr {
    Ipv4Addr::from(u32::from_be_bytes([10, 128, 0, 0]) + number as u32).into()
}

/// An address that no endpoint has had.
pub(super) fn fresh(change: u32) -> IpAddr {
    Ipv4Addr::from(u32::from_be_bytes([10, 200, 0, 1]) + change).into()
}
