//! Where objects come from. Every source emits the same [`Update`]s, whatever it reads.

use std::collections::BTreeMap;
use std::fmt;

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

/// The updates of a source, until it is dropped.
#[derive(Debug)]
pub struct Feed {
    first: Option<Update>,
    updates: mpsc::Receiver<Update>,
    _watch: Option<Watch>,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Folder(folder) => write!(f, "manifests {}", folder.path().display()),
            Self::Api(options) => options.access.fmt(f),
        }
    }
}

impl Source {
    /// The API server, where it is one: it may be out of reach.
    #[must_use]
    pub fn access(&self) -> Option<&api::Access> {
        match self {
            Self::Api(options) => Some(&options.access),
            Self::Folder(_) => None,
        }
    }

    /// The updates. The first that [is whole](Update::is_whole) is the first with objects; with the API it may take as long
    /// as the API server.
    pub fn open(self) -> Result<Feed> {
        let (sender, updates) = mpsc::channel(QUEUE);
        match self {
            Self::Folder(mut folder) => {
                if !folder.path().exists() {
                    bail!("{}: no such file or folder", folder.path().display());
                }
                let first = Update { is_whole: true, ..folder.scan() };
                Ok(Feed { first: Some(first), updates, _watch: Some(folder::watch(folder, sender)?) })
            }
            Self::Api(options) => {
                tokio::spawn(api::watch(options, sender));
                Ok(Feed { first: None, updates, _watch: None })
            }
        }
    }
}

impl Feed {
    /// The next update.
    pub async fn next(&mut self) -> Result<Update> {
        match self.first.take() {
            Some(first) => Ok(first),
            None => self.updates.recv().await.context("the source of objects ended"),
        }
    }

    /// The next update that holds all there is.
    pub async fn next_whole(&mut self) -> Result<Update> {
        loop {
            let update = self.next().await?;
            if update.is_whole {
                return Ok(update);
            }
        }
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
    /// The changes apply all there is: what they do not name is gone.
    pub is_whole: bool,
    /// Changes of Services or EndpointSlices do not come in: what is held of them may be of the past.
    pub is_behind: bool,
    /// Changes, in order.
    pub changes: Vec<Change>,
    /// Everything that is wrong with what the source reads, now.
    pub problems: Vec<Problem>,
    /// Objects of kinds that Sluice does not use, by `apiVersion/kind`, now.
    pub skipped: BTreeMap<String, u64>,
}
