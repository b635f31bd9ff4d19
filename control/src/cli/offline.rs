//! Objects into tables from files alone: nothing of the host is asked.

use std::path::Path;
use std::sync::Arc;

use sluice_dataplane::table::Slots;

use crate::config::Config;
use crate::publish::Publisher;
use crate::source::folder::Folder;

/// Everything that a file or folder of manifests holds. What is wrong with it is among the publisher's problems.
#[must_use]
pub fn load(config: Config, manifests: &Path) -> Publisher {
    let mut folder = Folder::new(manifests, config.prune);
    let mut publisher = Publisher::new(config, Vec::new(), Arc::new(Slots::new(1)));
    publisher.update(folder.scan());
    publisher
}
