//! Endpoints that an operator drains: which, until when, and that it is not forgotten by a restart.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sluice_dataplane::table::{Condition, Deadline, EndpointList, PortSpec, ServiceSpec};

const FILE: &str = "drains.json";

/// An address, or one port of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Target {
    /// Address of endpoints.
    pub ip: IpAddr,
    /// Only this port; all of them when there is none.
    pub port: Option<u16>,
}

impl Target {
    /// Whether an endpoint is meant.
    #[must_use]
    pub fn covers(&self, endpoint: SocketAddr) -> bool {
        self.ip == endpoint.ip() && self.port.is_none_or(|port| port == endpoint.port())
    }
}

impl std::str::FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(address) = text.parse::<SocketAddr>() {
            return Ok(Self { ip: address.ip().to_canonical(), port: Some(address.port()) });
        }
        let ip: IpAddr = text.parse().map_err(|_| {
            format!("{text:?} is no endpoint: write 10.0.0.1, fd00::1, 10.0.0.1:8080 or [fd00::1]:8080")
        })?;
        Ok(Self { ip: ip.to_canonical(), port: None })
    }
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.port {
            Some(port) => SocketAddr::new(self.ip, port).fmt(f),
            None => self.ip.fmt(f),
        }
    }
}

/// All drains by hand.
#[derive(Debug, Default)]
pub struct Drains {
    until: BTreeMap<Target, Deadline>,
    file: Option<(PathBuf, String)>,
}

/// What is saved. Deadlines are times of the monotonic clock, which begins anew with each boot.
#[derive(Serialize, Deserialize)]
struct Saved {
    boot: String,
    drains: Vec<(Target, Option<u64>)>,
}

impl Drains {
    /// Reads what an earlier process of this boot saved in a directory, and saves there from now on.
    pub fn load(state_dir: &Path, boot: String) -> io::Result<Self> {
        let path = state_dir.join(FILE);
        let saved = match std::fs::read(&path) {
            Ok(bytes) => Some(serde_json::from_slice::<Saved>(&bytes)?),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        let drains = saved.filter(|saved| saved.boot == boot).map(|saved| saved.drains).unwrap_or_default();
        let until = drains.into_iter().map(|(target, at)| (target, at.map_or(Deadline::Never, Deadline::At))).collect();
        Ok(Self { until, file: Some((path, boot)) })
    }

    /// Drains, until a time of the packet path's clock or `Never`; or no longer, with nothing.
    pub fn set(&mut self, target: Target, until: Option<Deadline>) -> io::Result<()> {
        match until {
            Some(deadline) => self.until.insert(target, deadline),
            None => self.until.remove(&target),
        };
        let Some((path, boot)) = &self.file else { return Ok(()) };
        let at = |deadline: &Deadline| match deadline {
            Deadline::At(at) => Some(*at),
            Deadline::In(_) | Deadline::Never => None,
        };
        let drains = self.until.iter().map(|(target, deadline)| (*target, at(deadline))).collect();
        let bytes = serde_json::to_vec_pretty(&Saved { boot: boot.clone(), drains })?;
        let new = path.with_extension("new");
        std::fs::write(&new, bytes)?;
        std::fs::rename(new, path)
    }

    /// Whether this very target is drained.
    #[must_use]
    pub fn contains(&self, target: &Target) -> bool {
        self.until.contains_key(target)
    }

    /// Takes the drained endpoints out of a Service's lists, and says until when they drain.
    pub fn apply(&self, spec: &mut ServiceSpec) {
        if self.until.is_empty() {
            return;
        }
        for port in &mut spec.ports {
            for endpoint in &mut port.endpoints {
                let mut drains = self.until.iter().filter(|(target, _)| target.covers(endpoint.address));
                endpoint.drain = drains.next().map(|(_, deadline)| *deadline);
            }
            withhold(port);
        }
    }
}

fn withhold(port: &mut PortSpec) {
    let drained: Vec<SocketAddr> =
        port.endpoints.iter().filter(|endpoint| endpoint.drain.is_some()).map(|endpoint| endpoint.address).collect();
    if drained.is_empty() {
        return;
    }
    let take_out = |list: &mut EndpointList| {
        let before = list.addresses.len();
        list.addresses.retain(|address| !drained.contains(address));
        let count = before - list.addresses.len();
        if count > 0 {
            list.why = format!("{}, {count} of them drained by hand", list.why).into();
        }
    };
    take_out(&mut port.cluster);
    take_out(&mut port.local);
    // With nothing left but what is drained, clients are refused at once instead of being left to wait.
    let may_serve = |condition| match condition {
        Condition::Ready | Condition::Terminating { serving: true } => true,
        Condition::NotReady { .. } | Condition::Terminating { serving: false } => false,
    };
    port.has_any_endpoint &=
        port.endpoints.iter().any(|endpoint| endpoint.drain.is_none() && may_serve(endpoint.condition));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_read_or_refused() {
        let endpoint: SocketAddr = "10.0.0.1:80".parse().unwrap();
        for (text, covers) in
            [("10.0.0.1", true), ("10.0.0.1:80", true), ("10.0.0.1:81", false), ("10.0.0.2", false), ("fd00::1", false)]
        {
            let target: Target = text.parse().unwrap();
            assert_eq!(target.covers(endpoint), covers, "{text}");
            assert_eq!(target.to_string(), text);
        }
        for text in ["", "web-1", "10.0.0.1:", "10.0.0.1:99999"] {
            assert!(text.parse::<Target>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn drains_outlive_the_process_but_not_the_boot() {
        let folder = tempfile::tempdir().unwrap();
        let load = |boot: &str| Drains::load(folder.path(), boot.to_owned()).unwrap();
        let (one, two): (Target, Target) = ("10.0.0.1".parse().unwrap(), "10.0.0.2:80".parse().unwrap());
        let mut drains = load("a");
        drains.set(one, Some(Deadline::At(5_000))).unwrap();
        drains.set(two, Some(Deadline::Never)).unwrap();
        assert_eq!(load("a").until, drains.until);
        assert!(load("b").until.is_empty());
        drains.set(one, None).unwrap();
        assert!(!load("a").contains(&one) && load("a").contains(&two));
    }
}
