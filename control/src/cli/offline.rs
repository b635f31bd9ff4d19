//! Manifests without a daemon: what the files alone say, whatever host this runs on.

use std::path::Path;
use std::sync::Arc;

use sluice_dataplane::table::Slots;

use crate::config::Config;
use crate::object::{Key, Kind};
use crate::publish::Publisher;
use crate::source::Change;
use crate::source::folder::Folder;

/// A publisher with everything that the manifests hold. Without a configured node name it sees them from their only Node,
/// or from no node at all.
#[must_use]
pub fn load(mut config: Config, manifests: &Path) -> Publisher {
    let update = Folder::new(manifests, config.prune).scan();
    if config.node_name.is_none() {
        let nodes: Vec<Key> =
            update.changes.iter().filter_map(Change::key).filter(|key| key.kind == Kind::Node).collect();
        let only = <[Key; 1]>::try_from(nodes).map(|[node]| node.name.name.to_string());
        config.node_name = Some(only.unwrap_or_default());
    }
    let mut publisher = Publisher::new(config, Vec::new(), Arc::new(Slots::new(1)));
    publisher.first(update, std::iter::empty());
    publisher
}
