//! Who dials a Service, all the time that it has to answer.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use sluice_bench::client::{Failure, Target, ask};
use sluice_bench::load::{Load, Plan, Tally};
use sluice_bench::netns::NetNs;

use crate::truth::{items, name, text};

/// Pause between two connections of a client: few enough that no masquerade port comes twice within a minute.
const PAUSE: Duration = Duration::from_millis(20);
const PATIENCE: Duration = Duration::from_secs(5);

/// A Service with a ClusterIP, and its clients.
pub(crate) struct Dialled {
    /// The object.
    pub(crate) service: Value,
    /// What clients met so far.
    pub(crate) tally: Tally,
    places: Vec<(NetNs, Vec<Target>)>,
    loads: Vec<Load>,
}

impl Dialled {
    /// ClusterIPs are dialled from a Pod, node ports and load balancers from outside.
    pub(crate) fn new(service: Value, node: &[IpAddr], pod: &NetNs, outside: &NetNs) -> Self {
        let (mut inner, mut outer) = (Vec::new(), Vec::new());
        let addresses = |list: &Value, field: Option<&str>| -> Vec<IpAddr> {
            let texts = items(list).map(|item| text(field.map_or(item, |field| &item[field])));
            texts.filter_map(|address| address.parse().ok()).collect()
        };
        let spec = &service["spec"];
        let own = addresses(&spec["clusterIPs"], None);
        let has_family = |address: &&IpAddr| own.iter().any(|ip| ip.is_ipv4() == address.is_ipv4());
        for port in items(&spec["ports"]) {
            let target = |address: &IpAddr, number: &Value| {
                let number = number.as_u64().and_then(|number| number.try_into().ok()).unwrap_or(0);
                let address = SocketAddr::new(*address, number);
                if port["protocol"] == "UDP" { Target::Udp(address) } else { Target::Http(address) }
            };
            inner.extend(own.iter().map(|address| target(address, &port["port"])));
            if !port["nodePort"].is_null() {
                outer.extend(node.iter().filter(has_family).map(|address| target(address, &port["nodePort"])));
            }
            let balancers = addresses(&service["status"]["loadBalancer"]["ingress"], Some("ip"));
            outer.extend(balancers.iter().map(|address| target(address, &port["port"])));
        }
        let places = vec![(pod.clone(), inner), (outside.clone(), outer)];
        Self { service, tally: Tally::default(), places, loads: Vec::new() }
    }

    /// How many addresses and ports there are to dial.
    pub(crate) fn targets(&self) -> usize {
        self.places.iter().map(|(_, targets)| targets.len()).sum()
    }

    /// From now on it is dialled all the time, by a client in each place.
    pub(crate) fn start(&mut self) -> Result<()> {
        for (place, targets) in self.places.iter().filter(|(_, targets)| !targets.is_empty()) {
            let plan = Plan { concurrency: 1, pause: PAUSE, timeout: PATIENCE, ..Plan::new(targets.clone()) };
            self.loads.push(Load::start(place, &plan)?);
        }
        Ok(())
    }

    /// Whether it is.
    pub(crate) fn is_dialled(&self) -> bool {
        !self.loads.is_empty()
    }

    /// No longer. An error tells what failed until now.
    pub(crate) fn stop(&mut self) -> Result<()> {
        for load in self.loads.drain(..) {
            self.tally.merge(&load.stop());
        }
        ensure!(self.tally.failed() == 0, "{}: {:?}", name(&self.service), self.tally.failures);
        Ok(())
    }

    /// Dials each once: an answer is wanted, or where nothing is there to give one, a refusal.
    pub(crate) fn try_each(&self, is_served: bool) -> Result<()> {
        for (place, targets) in &self.places {
            let results =
                place.run(|| Ok(targets.iter().map(|to| (*to, ask(*to, PATIENCE).result)).collect::<Vec<_>>()));
            for (target, result) in results.context("cannot dial")? {
                match result {
                    Ok(_) if is_served => {}
                    Err(Failure::Refused) if !is_served => {}
                    other => anyhow::bail!("{} {target:?}: {other:?}, served: {is_served}", name(&self.service)),
                }
            }
        }
        Ok(())
    }
}
