//! The zone: a snapshot of every name there is, and how the next one is made of it.

use std::net::IpAddr;
use std::sync::Arc;

use ahash::{AHashMap, AHashSet};
use hickory_proto::rr::Name;

use super::labels::{Labels, of_text};
use super::service::Compiled;
use super::spec::{NamedService, PodNames, Stands, ZoneSpec};
use crate::table::ServiceName;

type Map<K, V> = imbl::GenericHashMap<K, V, ahash::RandomState, imbl::shared_ptr::DefaultSharedPtr>;

/// A reverse name of an endpoint: its Service, and its label below that.
type Reverse = (Arc<Compiled>, Arc<str>);

/// Immutable snapshot of all names. Clones share what did not change.
#[derive(Clone, Debug)]
pub struct Zone {
    pub(super) settings: Arc<Settings>,
    /// By `name.namespace`.
    pub(super) services: Map<Box<[u8]>, Arc<Compiled>>,
    pub(super) namespaces: Map<Box<[u8]>, ()>,
    /// Services by ClusterIP, the first in order of names first.
    pub(super) cluster_ips: Map<IpAddr, Arc<[Arc<Compiled>]>>,
    pub(super) endpoints: Map<IpAddr, Arc<[Reverse]>>,
    /// Addresses of Pods with their namespaces.
    pub(super) pods: Map<IpAddr, Arc<[Box<[u8]>]>>,
    pub(super) is_synced: bool,
    pub(super) serial: u32,
}

/// What of the settings answers need, made ready for them.
#[derive(Debug)]
pub(super) struct Settings {
    pub(super) spec: ZoneSpec,
    pub(super) origins: Vec<Box<[Box<[u8]>]>>,
    pub(super) fall_through: Vec<Box<[Box<[u8]>]>>,
    pub(super) namespaces: AHashSet<Box<[u8]>>,
    pub(super) ttl: u32,
    /// The cluster's zone, for reverse names.
    pub(super) primary: Name,
    /// Some zone is a reverse zone: only those of the zones are.
    pub(super) has_reverse: bool,
}

impl Settings {
    fn new(spec: ZoneSpec) -> Self {
        let origins: Vec<_> = spec.zones.iter().map(|zone| of_text(zone)).collect();
        let is_reverse = |origin: &&[Box<[u8]>]| {
            let count = origin.len();
            count >= 2 && &*origin[count - 1] == b"arpa" && matches!(&*origin[count - 2], b"in-addr" | b"ip6")
        };
        let primary = spec.zones.iter().zip(&origins).find(|(_, origin)| !is_reverse(&&***origin));
        let mut primary = primary.and_then(|(zone, _)| Name::from_ascii(zone).ok()).unwrap_or_else(Name::root);
        primary.set_fqdn(true);
        Self {
            has_reverse: origins.iter().any(|origin| is_reverse(&&**origin)),
            fall_through: spec.fall_through.iter().map(|zone| of_text(zone)).collect(),
            namespaces: spec.namespaces.iter().map(|namespace| namespace.as_bytes().into()).collect(),
            ttl: u32::try_from(spec.ttl.as_secs()).unwrap_or(u32::MAX),
            primary,
            origins,
            spec,
        }
    }
}

impl Zone {
    /// The zone with these settings while nothing is known.
    #[must_use]
    pub fn unknown(spec: ZoneSpec) -> Self {
        ZoneBuilder::new(spec).zone
    }

    /// Number of Services that have names.
    #[must_use]
    pub fn len(&self) -> usize {
        self.services.len()
    }

    /// Whether nothing has a name.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.services.is_empty()
    }

    /// Serial number: the time of the last change, in seconds since the epoch.
    #[must_use]
    pub fn serial(&self) -> u32 {
        self.serial
    }

    /// Its settings.
    #[must_use]
    pub fn spec(&self) -> &ZoneSpec {
        &self.settings.spec
    }

    /// The Service with this name and namespace.
    pub(super) fn service(&self, name: &[u8], namespace: &[u8]) -> Option<&Arc<Compiled>> {
        let mut key = [0; 255];
        let length = name.len() + 1 + namespace.len();
        let place = key.get_mut(..length)?;
        // A label may hold a dot of its own; no Service does.
        if name.contains(&b'.') {
            return None;
        }
        place[..name.len()].copy_from_slice(name);
        place[name.len()] = b'.';
        place[name.len() + 1..].copy_from_slice(namespace);
        self.services.get(&key[..length])
    }

    /// Whether the namespace is there and has names.
    pub(super) fn exposes(&self, namespace: &[u8]) -> bool {
        self.admits(namespace) && self.namespaces.contains_key(namespace)
    }

    /// Whether the settings give names to the namespace.
    pub(super) fn admits(&self, namespace: &[u8]) -> bool {
        self.settings.namespaces.is_empty() || self.settings.namespaces.contains(namespace)
    }

    /// The zone a name is in, as the number of labels before it and the zone's own.
    pub(super) fn origin(&self, labels: &Labels) -> Option<(usize, &[Box<[u8]>])> {
        let origins = self.settings.origins.iter();
        let inside = origins.filter_map(|origin| Some((labels.before(origin)?, &**origin)));
        inside.min_by_key(|(left, _)| *left)
    }
}

/// Mutable state behind the snapshots. One owner.
pub struct ZoneBuilder {
    zone: Zone,
    /// Namespaces that are objects, or have objects in them.
    namespace_uses: AHashMap<Box<[u8]>, usize>,
    declared: AHashSet<Box<[u8]>>,
    pods: AHashMap<ServiceName, Vec<IpAddr>>,
    is_changed: bool,
}

impl ZoneBuilder {
    /// Of a zone without names.
    #[must_use]
    pub fn new(spec: ZoneSpec) -> Self {
        let zone = Zone {
            settings: Arc::new(Settings::new(spec)),
            services: Map::default(),
            namespaces: Map::default(),
            cluster_ips: Map::default(),
            endpoints: Map::default(),
            pods: Map::default(),
            is_synced: false,
            serial: 0,
        };
        let (namespace_uses, declared, pods) = (AHashMap::new(), AHashSet::new(), AHashMap::new());
        Self { zone, namespace_uses, declared, pods, is_changed: true }
    }

    /// The settings.
    #[must_use]
    pub fn spec(&self) -> &ZoneSpec {
        self.zone.spec()
    }

    /// From now on what is not there does not exist.
    pub fn synced(&mut self) {
        self.is_changed |= !self.zone.is_synced;
        self.zone.is_synced = true;
    }

    /// Puts a Service in place of what it was.
    pub fn set(&mut self, spec: NamedService) {
        let key = key(&spec.name);
        if self.zone.services.get(&key).is_some_and(|service| service.spec == spec) {
            return;
        }
        self.remove(&spec.name.clone());
        self.is_changed = true;
        self.use_namespace(&spec.name.namespace, true);
        let service = Arc::new(Compiled::new(spec));
        if let Stands::Addresses { addresses, .. } = &service.spec.stands {
            for address in addresses {
                let held = self.zone.cluster_ips.get(address).map(|held| held.to_vec());
                let mut held = held.unwrap_or_default();
                held.retain(|other| other.spec.name != service.spec.name);
                held.push(Arc::clone(&service));
                held.sort_by(|a, b| a.spec.name.cmp(&b.spec.name));
                self.zone.cluster_ips.insert(*address, held.into());
            }
        }
        let mut reverse: AHashMap<IpAddr, Vec<Reverse>> = AHashMap::new();
        for endpoint in &service.spec.endpoints {
            let names = reverse.entry(endpoint.address).or_default();
            if names.iter().all(|(_, label)| *label != endpoint.label) {
                names.push((Arc::clone(&service), Arc::clone(&endpoint.label)));
            }
        }
        for (address, names) in reverse {
            let held = self.zone.endpoints.get(&address).map(|held| held.to_vec()).unwrap_or_default();
            self.zone.endpoints.insert(address, held.into_iter().chain(names).collect());
        }
        self.zone.services.insert(key, service);
    }

    /// Takes a Service and its slices away.
    pub fn remove(&mut self, name: &ServiceName) {
        let Some(service) = self.zone.services.remove(&key(name)) else { return };
        self.is_changed = true;
        self.use_namespace(&name.namespace, false);
        if let Stands::Addresses { addresses, .. } = &service.spec.stands {
            for address in addresses {
                let held = self.zone.cluster_ips.get(address).map(|held| held.to_vec()).unwrap_or_default();
                let left: Arc<[_]> = held.into_iter().filter(|other| other.spec.name != *name).collect();
                put_or_remove(&mut self.zone.cluster_ips, *address, left);
            }
        }
        let addresses: AHashSet<IpAddr> = service.spec.endpoints.iter().map(|endpoint| endpoint.address).collect();
        for address in addresses {
            let held = self.zone.endpoints.get(&address).map(|held| held.to_vec()).unwrap_or_default();
            let left: Arc<[_]> = held.into_iter().filter(|(other, _)| other.spec.name != *name).collect();
            put_or_remove(&mut self.zone.endpoints, address, left);
        }
    }

    /// Says whether there is a namespace. One with a Service or a Pod in it is there anyway.
    pub fn set_namespace(&mut self, namespace: &str, exists: bool) {
        let changed = match exists {
            true => self.declared.insert(namespace.as_bytes().into()),
            false => self.declared.remove(namespace.as_bytes()),
        };
        if changed {
            self.use_namespace(namespace, exists);
        }
    }

    /// Addresses that a Pod has now; none when it has ended or is about to.
    pub fn set_pod(&mut self, name: &ServiceName, addresses: Vec<IpAddr>) {
        if self.spec().pods != PodNames::Verified {
            return;
        }
        let old = match addresses.is_empty() {
            true => self.pods.remove(name),
            false => self.pods.insert(name.clone(), addresses.clone()),
        };
        let old = old.unwrap_or_default();
        if old == addresses {
            return;
        }
        self.is_changed = true;
        let namespace: Box<[u8]> = name.namespace.as_bytes().into();
        for address in old {
            let mut held = self.zone.pods.get(&address).map(|held| held.to_vec()).unwrap_or_default();
            if let Some(place) = held.iter().position(|other| *other == namespace) {
                held.remove(place);
            }
            put_or_remove(&mut self.zone.pods, address, held.into());
            self.use_namespace(&name.namespace, false);
        }
        for address in addresses {
            let mut held = self.zone.pods.get(&address).map(|held| held.to_vec()).unwrap_or_default();
            held.push(namespace.clone());
            self.zone.pods.insert(address, held.into());
            self.use_namespace(&name.namespace, true);
        }
    }

    /// The next zone, when it differs from the last one. `now`: seconds since the epoch.
    pub fn build(&mut self, now: u32) -> Option<Arc<Zone>> {
        if !std::mem::take(&mut self.is_changed) {
            return None;
        }
        self.zone.serial = now;
        Some(Arc::new(self.zone.clone()))
    }

    fn use_namespace(&mut self, namespace: &str, more: bool) {
        let key: Box<[u8]> = namespace.to_ascii_lowercase().into_bytes().into();
        let uses = self.namespace_uses.entry(key.clone()).or_default();
        *uses = if more { *uses + 1 } else { uses.saturating_sub(1) };
        let is_there = *uses > 0;
        if !is_there {
            self.namespace_uses.remove(&key);
        }
        if is_there != self.zone.namespaces.contains_key(&key) {
            self.is_changed = true;
            match is_there {
                true => drop(self.zone.namespaces.insert(key, ())),
                false => drop(self.zone.namespaces.remove(&key)),
            }
        }
    }
}

fn key(name: &ServiceName) -> Box<[u8]> {
    format!("{}.{}", name.name, name.namespace).to_ascii_lowercase().into_bytes().into()
}

fn put_or_remove<V>(map: &mut Map<IpAddr, Arc<[V]>>, address: IpAddr, left: Arc<[V]>) {
    match left.is_empty() {
        true => drop(map.remove(&address)),
        false => drop(map.insert(address, left)),
    }
}
