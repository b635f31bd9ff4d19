//! Objects without a daemon: what files or an API server alone say, whatever host this runs on.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use sluice_dataplane::table::Slots;

use crate::config::{Config, ConfigError};
use crate::host::Lacking;
use crate::object::{Key, Kind};
use crate::publish::Publisher;
use crate::source::api::{Access, Options, SILENCE};
use crate::source::folder::Folder;
use crate::source::{Change, Source};

/// How long an API server may take to tell all there is.
const PATIENCE: Duration = Duration::from_secs(60);

/// A publisher with everything that an API server has. Fails, with exit code 3, when that cannot be had in time.
pub fn load_cluster(mut config: Config, access: Access) -> Result<Publisher> {
    config.local_controllers = false;
    // Without a name, from no node at all.
    config.node_name.get_or_insert_default();
    let options = Options {
        access,
        node_name: config.node_name(),
        service_proxy_name: config.service_proxy_name.clone(),
        node_patience: Duration::ZERO,
        silence: SILENCE,
        names: None,
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let update = runtime.block_on(async {
        options
            .access
            .client()
            .await
            .map_err(|error| ConfigError::new("access to the API server", format!("{error:#}")))?;
        let mut feed = Source::Api(options).open()?;
        let mut problems = Vec::new();
        let whole = async {
            loop {
                let update = feed.next().await?;
                if update.is_whole {
                    return anyhow::Ok(update);
                }
                problems = update.problems;
            }
        };
        match tokio::time::timeout(PATIENCE, whole).await {
            Ok(update) => update,
            Err(_) => {
                let problems: Vec<String> = problems.iter().map(ToString::to_string).collect();
                let reasons = if problems.is_empty() { "no answer".to_owned() } else { problems.join("; ") };
                Err(Lacking(format!("the API server does not tell all there is: {reasons}")).into())
            }
        }
    })?;
    let mut publisher = Publisher::new(config, Vec::new(), Arc::new(Slots::new(1)));
    publisher.update(update);
    Ok(publisher)
}

/// The same for commands that answer a question. What is wrong with the manifests is said on standard error, and changes
/// nothing else.
pub(super) fn load_and_say(config: Config, manifests: Option<&Path>) -> Result<Publisher> {
    let manifests = manifests.context("--manifests or --admin is needed")?;
    std::fs::metadata(manifests).with_context(|| format!("cannot read {}", manifests.display()))?;
    let publisher = load(config, manifests);
    for problem in publisher.problems() {
        eprintln!("{problem}");
    }
    Ok(publisher)
}

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
