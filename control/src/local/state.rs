//! Made-up values on disk, so that a restart hands out the same ones even where Services had collided.

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::path::Path;

use serde::{Deserialize, Serialize};
use sluice_dataplane::table::ServiceName;

use super::LocalControllers;
use super::allocator::Holder;

/// Name of the file in the state directory.
const FILE: &str = "allocations.json";

/// `namespace/name` to part to value.
type Values<V> = BTreeMap<String, BTreeMap<String, V>>;

#[derive(Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Saved {
    cluster_ips: Values<IpAddr>,
    node_ports: Values<u16>,
}

impl LocalControllers {
    /// Reads what an earlier run saved in a directory; nothing saved is nothing remembered. Call it before the first changes.
    pub fn load(&mut self, directory: &Path) -> io::Result<()> {
        let saved = match std::fs::read(directory.join(FILE)) {
            Ok(bytes) => serde_json::from_slice::<Saved>(&bytes).map_err(io::Error::from)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Saved::default(),
            Err(error) => return Err(error),
        };
        self.frontends.addresses.remember(holders(saved.cluster_ips));
        self.frontends.ports.remember(holders(saved.node_ports));
        Ok(())
    }

    /// Saves what is made up now, when that may have changed since it was saved last.
    pub fn save(&mut self, directory: &Path) -> io::Result<()> {
        if !self.is_unsaved {
            return Ok(());
        }
        let saved = Saved {
            cluster_ips: values(self.frontends.addresses.held()),
            node_ports: values(self.frontends.ports.held()),
        };
        let bytes = serde_json::to_vec_pretty(&saved).map_err(io::Error::from)?;
        let new = directory.join(format!("{FILE}.new"));
        std::fs::write(&new, bytes)?;
        std::fs::rename(new, directory.join(FILE))?;
        self.is_unsaved = false;
        Ok(())
    }
}

fn values<V: Copy>(held: &BTreeMap<Holder, V>) -> Values<V> {
    let mut values = Values::new();
    for (holder, value) in held {
        values.entry(holder.service.to_string()).or_default().insert(holder.part.clone(), *value);
    }
    values
}

fn holders<V>(values: Values<V>) -> BTreeMap<Holder, V> {
    let mut holders = BTreeMap::new();
    for (service, parts) in values {
        let Some((namespace, name)) = service.split_once('/') else { continue };
        let service = ServiceName::new(namespace, name);
        holders.extend(parts.into_iter().map(|(part, value)| (Holder { service: service.clone(), part }, value)));
    }
    holders
}
