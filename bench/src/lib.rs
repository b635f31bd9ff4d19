//! Load generators and topologies: network namespaces that play nodes, Pods and clients, servers that answer with their
//! name, and clients that count who answered. Used by `sluice-bench`, by `sluice demo` and by the whole-program tests.

pub mod client;
pub mod control_plane;
pub mod link;
pub mod load;
pub mod name_client;
pub mod netns;
pub mod pattern;
pub mod plain_server;
pub mod protocol;
pub mod serve;
pub mod topology;
pub mod workload;
