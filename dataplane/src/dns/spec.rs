//! What the zone is made of: plain, comparable data without a word of wire format.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use crate::table::ServiceName;

/// Settings of the zone. They hold for its life.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ZoneSpec {
    /// Zones that are answered for, without a dot at the end; the first that is no reverse zone is the cluster's.
    pub zones: Vec<String>,
    /// Time to live of every record but the version's.
    pub ttl: Duration,
    /// Whether Pods have names by address.
    pub pods: PodNames,
    /// Namespaces that have names; empty: all.
    pub namespaces: Vec<String>,
    /// A Service with a ClusterIP and no ready endpoint has no name.
    pub ignore_empty_service: bool,
    /// Zones below which a name that does not exist is asked for elsewhere; `.` is every zone.
    pub fall_through: Vec<String>,
    /// Addresses of the responder itself.
    pub listen: Vec<IpAddr>,
}

/// Whether Pods have names by address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PodNames {
    /// No.
    Disabled,
    /// Every address has, in every namespace there is.
    #[default]
    Insecure,
    /// Addresses of Pods have.
    Verified,
}

/// A Service as names go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedService {
    /// Namespace and name.
    pub name: ServiceName,
    /// What the name stands for.
    pub stands: Stands,
    /// Ready endpoints, one entry for each mention in a slice.
    pub endpoints: Vec<NamedEndpoint>,
}

/// What the name of a Service stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stands {
    /// Addresses of the Service's own.
    Addresses {
        /// ClusterIPs.
        addresses: Vec<IpAddr>,
        /// Service ports; never empty: one without a number where the Service has none.
        ports: Vec<NamedPort>,
    },
    /// The endpoints.
    Endpoints {
        /// Addresses of ours that the plain name answers instead, each connection to which is balanced.
        instead: Vec<IpAddr>,
    },
    /// Another name.
    Name(String),
    /// Nothing: there are slices, but no such Service. Its endpoints have reverse names.
    Nothing,
}

/// An endpoint as names go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedEndpoint {
    /// Its label below the Service's name.
    pub label: Arc<str>,
    /// Address.
    pub address: IpAddr,
    /// Ports of its slice; never empty: one without a number where the slice has none.
    pub ports: Arc<[NamedPort]>,
}

/// A port as names go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedPort {
    /// Name, lower case, empty when unnamed.
    pub name: Box<str>,
    /// Protocol, lower case.
    pub protocol: Box<str>,
    /// Number; none: it has no service record.
    pub number: Option<u16>,
}

impl NamedPort {
    /// What stands for the ports of what has none.
    #[must_use]
    pub fn none() -> Self {
        Self { name: "".into(), protocol: "".into(), number: None }
    }
}
