//! What is done to the cluster under load: a rolling update of every workload, then a scale-up.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use anyhow::Result;
use sluice_dataplane::table::ServiceName;

use super::cluster::{Cluster, apply};
use super::daemon::Daemon;
use super::interrupt::Interrupt;
use super::naming::Naming;
use super::pods::Pods;
use super::workloads::{Roll, Workload};
use crate::object::{Key, Kind, Object};

/// How long a Pod that is asked to end still serves, as a preStop hook would make it.
const GRACE: Duration = Duration::from_millis(500);

/// The first revision of every workload.
pub(super) const FIRST: u32 = 1;
const SECOND: u32 = 2;

/// What became of a Pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// There from the start to the end.
    Stayed,
    /// Ended by the rolling update.
    Replaced,
    /// Begun by the rolling update.
    New,
    /// Ended by the rolling update, with a successor of the same name.
    ReplacedInPlace,
    /// Added by the scale-up.
    Added,
}

/// The cluster, its Pods and the daemon that serves it.
#[derive(Debug)]
pub(super) struct Stage<'t> {
    /// Objects.
    pub(super) cluster: Cluster,
    /// Namespaces and servers.
    pub(super) pods: Pods<'t>,
    /// The daemon; `None` before its start.
    pub(super) daemon: Option<Daemon>,
    /// Services that have endpoints, and so a table to change with them.
    pub(super) served: BTreeSet<ServiceName>,
    /// Follows the names of Pods; `None` before the daemon answers.
    pub(super) naming: Option<Naming>,
    /// What became of every Pod, by namespace and name.
    pub(super) fates: BTreeMap<ServiceName, Fate>,
    /// Signals.
    pub(super) interrupt: Interrupt,
}

impl Stage<'_> {
    /// Starts the first Pods of all workloads and publishes them.
    pub(super) fn start_all(&mut self, workloads: &[Workload]) -> Result<()> {
        let wanted = workloads.iter().flat_map(|workload| {
            workload.pod_names(FIRST).into_iter().map(move |name| (workload, name, FIRST, Fate::Stayed))
        });
        self.begin(wanted.collect())
    }

    /// Replaces every Pod: one of each workload at a time, in step. Returns how many were replaced.
    pub(super) fn roll(&mut self, workloads: &[Workload]) -> Result<usize> {
        let waves = workloads.iter().map(|workload| workload.replicas).max().unwrap_or(0);
        let mut replaced = 0;
        for wave in 0..waves {
            let of_kind =
                |roll| workloads.iter().filter(move |workload| workload.roll == roll && workload.replicas > wave);
            let surging: Vec<&Workload> = of_kind(Roll::Surge).collect();
            // A StatefulSet rolls from its last Pod down.
            let replacing: Vec<(&Workload, String)> = of_kind(Roll::Replace)
                .map(|workload| (workload, workload.pod_name(FIRST, workload.replicas - 1 - wave)))
                .collect();
            self.begin(
                surging
                    .iter()
                    .map(|workload| (*workload, workload.pod_name(SECOND, wave), SECOND, Fate::New))
                    .collect(),
            )?;
            let mut ending = Vec::new();
            for workload in &surging {
                ending.push((in_namespace(workload, &workload.pod_name(FIRST, wave)), Fate::Replaced));
            }
            for (workload, name) in &replacing {
                ending.push((in_namespace(workload, name), Fate::ReplacedInPlace));
            }
            replaced += ending.len();
            self.end(ending)?;
            let successors = replacing.into_iter();
            self.begin(successors.map(|(workload, name)| (workload, name, SECOND, Fate::ReplacedInPlace)).collect())?;
        }
        Ok(replaced)
    }

    /// Adds a Pod to every workload that has some. Returns how many were added.
    pub(super) fn scale_up(&mut self, workloads: &[Workload]) -> Result<usize> {
        let growing = workloads.iter().filter(|workload| workload.replicas > 0);
        let added: Vec<_> = growing
            .map(|workload| {
                let revision = if matches!(workload.roll, Roll::Never(_)) { FIRST } else { SECOND };
                (workload, workload.pod_name(revision, workload.replicas), revision, Fate::Added)
            })
            .collect();
        let count = added.len();
        self.begin(added)?;
        Ok(count)
    }

    /// Starts Pods, then publishes them together as ready.
    fn begin(&mut self, wanted: Vec<(&Workload, String, u32, Fate)>) -> Result<()> {
        let mut changes = Vec::new();
        for (workload, name, revision, fate) in wanted {
            self.interrupt.check()?;
            let pod = self.pods.start(workload, &name, revision)?;
            self.fates.insert(in_namespace(workload, &name), fate);
            changes.push(apply(Object::Pod(pod.into())));
        }
        self.publish(changes)
    }

    /// Ends Pods as well-behaved ones end: published as terminating while they serve on, then as not ready, and only then
    /// do their servers finish. New connections leave with the first, UDP conversations with the second.
    fn end(&mut self, ending: Vec<(ServiceName, Fate)>) -> Result<()> {
        if ending.is_empty() {
            return Ok(());
        }
        let changes = ending.iter().filter_map(|(name, _)| self.pods.terminating(name));
        let changes = changes.map(|pod| apply(Object::Pod(pod.into()))).collect();
        self.publish(changes)?;
        self.interrupt.sleep(GRACE)?;
        let changes = ending.iter().filter_map(|(name, _)| self.pods.not_ready(name));
        let changes = changes.map(|pod| apply(Object::Pod(pod.into()))).collect();
        self.publish(changes)?;
        let mut gone = Vec::new();
        for (name, fate) in ending {
            self.pods.remove(&name)?;
            self.fates.insert(name.clone(), fate);
            gone.push(crate::source::Change::Delete(Key::new(Kind::Pod, name)));
        }
        self.change(gone).map(drop)
    }

    /// Changes the cluster, and waits until names show it. Returns the Services whose slices changed.
    fn change(&mut self, changes: Vec<crate::source::Change>) -> Result<Vec<ServiceName>> {
        let begun = Instant::now();
        let touched = self.cluster.update(changes)?;
        if let Some(naming) = &mut self.naming {
            naming.follow(&self.cluster.slices(), &touched, begun, &self.interrupt)?;
        }
        Ok(touched)
    }

    /// Publishes, and waits until new connections go by it.
    fn publish(&mut self, changes: Vec<crate::source::Change>) -> Result<()> {
        if changes.is_empty() {
            return Ok(());
        }
        let generation = self.daemon.as_ref().map(Daemon::generation).transpose()?;
        let touched = self.change(changes)?;
        if let (Some(daemon), Some(generation)) = (&mut self.daemon, generation)
            && touched.iter().any(|service| self.served.contains(service))
        {
            daemon.wait_for_table_after(generation, &self.interrupt)?;
        }
        Ok(())
    }
}

fn in_namespace(workload: &Workload, pod: &str) -> ServiceName {
    ServiceName::new(&workload.name.namespace, pod)
}
