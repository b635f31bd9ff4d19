//! How soon names follow: after each change the names of Pods that it concerns are asked for until they are right.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use hdrhistogram::Histogram;
use hickory_resolver::proto::rr::RecordType;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use sluice_bench::name_client::NameClient;
use sluice_bench::netns::NetNs;
use sluice_bench::workload::questions::Question;
use sluice_dataplane::table::ServiceName;

use super::interrupt::Interrupt;
use super::report::quantile;
use super::traffic::histogram;
use crate::object::service_of;

/// Where the daemon answers names.
pub(super) const LISTEN: &str = "169.254.20.10:53";
/// Bound on a name to follow.
const SOON: Duration = Duration::from_secs(10);
/// Between two questions.
const PAUSE: Duration = Duration::from_millis(1);
/// What names are to need at most, in microseconds.
const GOAL: u64 = 100_000;

/// Addresses by name.
type Addresses = BTreeMap<String, BTreeSet<IpAddr>>;

/// Asks for the names of Pods.
#[derive(Debug)]
pub(super) struct Naming {
    client: NameClient,
    known: BTreeMap<ServiceName, Addresses>,
    /// From before a change was written to the answer that shows it, in microseconds.
    took: Histogram<u64>,
}

impl Naming {
    /// Asks from this namespace.
    pub(super) fn new(ns: &NetNs, slices: &[&EndpointSlice]) -> Result<Self> {
        let server: SocketAddr = LISTEN.parse()?;
        let client = ns.run(|| NameClient::new(server))?;
        let mut known: BTreeMap<ServiceName, Addresses> = BTreeMap::new();
        for service in slices.iter().filter_map(|slice| service_of(slice)) {
            known.entry(service.clone()).or_insert_with(|| names(&service, slices));
        }
        Ok(Self { client, known, took: histogram() })
    }

    /// Waits until the names of Pods in these Services are as the slices say, which were written at `begun`.
    pub(super) fn follow(
        &mut self,
        slices: &[&EndpointSlice],
        touched: &[ServiceName],
        begun: Instant,
        interrupt: &Interrupt,
    ) -> Result<()> {
        for service in touched {
            let now = names(service, slices);
            let before = self.known.insert(service.clone(), now.clone()).unwrap_or_default();
            let nothing = BTreeSet::new();
            for name in before.keys().chain(now.keys()).collect::<BTreeSet<_>>() {
                let (was, is) = (before.get(name).unwrap_or(&nothing), now.get(name).unwrap_or(&nothing));
                if was != is {
                    self.wait(name, is, begun, interrupt)?;
                }
            }
        }
        Ok(())
    }

    fn wait(&mut self, name: &str, addresses: &BTreeSet<IpAddr>, begun: Instant, interrupt: &Interrupt) -> Result<()> {
        let questions = [(RecordType::A, true), (RecordType::AAAA, false)];
        for (kind, is_v4) in questions {
            let question = Question::new(name, kind, None, None)?;
            let wanted: BTreeSet<IpAddr> = addresses.iter().filter(|it| it.is_ipv4() == is_v4).copied().collect();
            loop {
                let answered = self.client.addresses(&question)?;
                if answered.is_some_and(|answered| answered.into_iter().collect::<BTreeSet<_>>() == wanted) {
                    break;
                }
                ensure!(begun.elapsed() < SOON, "{name} does not answer {wanted:?} within {SOON:?}");
                interrupt.check()?;
                std::thread::sleep(PAUSE);
            }
        }
        self.took.saturating_record(begun.elapsed().as_micros().try_into().unwrap_or(u64::MAX));
        Ok(())
    }

    /// How it went, for people; nothing when no Pod has a name.
    pub(super) fn summary(&self) -> Option<String> {
        if self.took.is_empty() {
            return None;
        }
        let late = self.took.len() - self.took.count_between(0, GOAL);
        let late = if late == 0 { String::new() } else { format!("; {late} took more than {} ms", GOAL / 1000) };
        Some(format!(
            "{} changes of Pods' names answered after p50 {}, slowest {}{late}",
            self.took.len(),
            quantile(&self.took, 0.5),
            quantile(&self.took, 1.0)
        ))
    }
}

/// Names of a Service's Pods that have host names, with the addresses of those that are ready.
fn names(service: &ServiceName, slices: &[&EndpointSlice]) -> Addresses {
    let mut names = Addresses::new();
    for slice in slices.iter().filter(|slice| service_of(slice).as_ref() == Some(service)) {
        for endpoint in slice.endpoints.iter().flatten() {
            let is_ready = endpoint.conditions.as_ref().and_then(|conditions| conditions.ready).unwrap_or(true);
            let Some(hostname) = endpoint.hostname.as_ref().filter(|_| is_ready) else { continue };
            let name = format!("{hostname}.{}.{}.svc.cluster.local", service.name, service.namespace);
            names.entry(name).or_default().extend(endpoint.addresses.iter().filter_map(|it| it.parse::<IpAddr>().ok()));
        }
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_ready_pods_with_host_names_have_names() {
        let slice: EndpointSlice = serde_json::from_value(serde_json::json!({
            "metadata": {"namespace": "shop", "name": "store-1", "labels": {"kubernetes.io/service-name": "store"}},
            "addressType": "IPv4",
            "endpoints": [
                {"addresses": ["10.244.0.1"], "hostname": "store-0"},
                {"addresses": ["10.244.0.2"], "hostname": "store-1", "conditions": {"ready": false}},
                {"addresses": ["10.244.0.3"]},
            ],
        }))
        .unwrap();
        let names = names(&ServiceName::new("shop", "store"), &[&slice]);
        assert_eq!(names.into_keys().collect::<Vec<_>>(), ["store-0.store.shop.svc.cluster.local"]);
    }
}
