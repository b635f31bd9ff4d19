//! Where objects come from. Every source emits the same [`Update`]s, whatever it reads.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Node;

use crate::object::{Key, Object};
use crate::problem::{Origin, Problem};

pub mod folder;
pub mod manifest;
mod watch;

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
