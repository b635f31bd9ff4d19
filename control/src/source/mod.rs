//! Where objects come from. Every source emits the same [`Update`]s, whatever it reads.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, bail};
use k8s_openapi::api::core::v1::Node;
use tokio::sync::mpsc;

use self::folder::{Folder, Watch};
use crate::object::{Key, Object};
use crate::problem::{Origin, Problem};

pub mod api;
pub mod folder;
pub mod manifest;
mod watch;

/// Updates that may wait.
const QUEUE: usize = 64;

/// Where the daemon's objects come from.
#[derive(Debug)]
pub enum Source {
    /// A file or folder of manifests.
    Folder(Folder),
    /// The Kubernetes API.
    Api(api::Options),
}

/// The updates of a source after the first, until it is dropped.
#[derive(Debug)]
pub struct Feed {
    updates: mpsc::Receiver<Update>,
    _watch: Option<Watch>,
}

impl Source {
    /// The first update, which holds all there is, and those to come. With the API it may take as long as the API server.
    pub async fn open(self) -> Result<(Update, Feed)> {
        let (sender, mut updates) = mpsc::channel(QUEUE);
        match self {
            Self::Folder(mut folder) => {
                if !folder.path().exists() {
                    bail!("{}: no such file or folder", folder.path().display());
                }
                let first = folder.scan();
                let watch = folder::watch(folder, sender)?;
                Ok((first, Feed { updates, _watch: Some(watch) }))
            }
            Self::Api(options) => {
                tokio::spawn(api::watch(options, sender));
                let first = updates.recv().await.context("the watch of the Kubernetes API ended")?;
                Ok((first, Feed { updates, _watch: None }))
            }
        }
    }
}

impl Feed {
    /// The next update.
    pub async fn next(&mut self) -> Result<Update> {
        self.updates.recv().await.context("the source of objects ended")
    }
}

/// One change of one object.
#[derive(Clone, Debug, PartialEq)]
pub enum Change {
    /// The object is new or has changed.
    Apply(Object, Origin),
    /// The object is gone.
    Delete(Key),
}

impl Change {
    /// What the object that is applied is known by.
    #[must_use]
    pub fn key(&self) -> Option<Key> {
        match self {
            Self::Apply(object, _) => Some(object.key()),
            Self::Delete(_) => None,
        }
    }

    /// The Node of this name, when it is what is applied.
    #[must_use]
    pub fn node(&self, name: &str) -> Option<&Node> {
        match self {
            Self::Apply(Object::Node(node), _) if node.metadata.name.as_deref() == Some(name) => Some(node),
            Self::Apply(..) | Self::Delete(_) => None,
        }
    }
}

/// Changes that belong together, and the state of the source after them. One update makes at most one new table.
#[derive(Clone, Debug, Default)]
pub struct Update {
    /// Changes, in order.
    pub changes: Vec<Change>,
    /// Everything that is wrong with what the source reads, now.
    pub problems: Vec<Problem>,
    /// Objects of kinds that Sluice does not use, by `apiVersion/kind`, now.
    pub skipped: BTreeMap<String, u64>,
}
