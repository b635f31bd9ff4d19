//! Manifests without a daemon: what the files alone say, whatever host this runs on.

use std::path::Path;
use std::sync::Arc;

use sluice_dataplane::table::Slots;

use crate::config::Config;
use crate::publish::Publisher;
use crate::source::folder::Folder;

/// A publisher with everything that the manifests hold. Without a configured node name it sees them from no node at all.
#[must_use]
pub fn load(mut config: Config, manifests: &Path) -> Publisher {
    config.node_name.get_or_insert_default();
    let prune = config.prune;
    let mut publisher = Publisher::new(config, Vec::new(), Arc::new(Slots::new(1)));
    publisher.update(Folder::new(manifests, prune).scan());
    publisher
}
