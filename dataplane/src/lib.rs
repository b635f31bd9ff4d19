//! The packet path of Sluice: knows addresses, ports and packets; nothing of Kubernetes, YAML or HTTP.
//!
//! A packet comes in at a TUN queue ([`packet_path`]), is parsed ([`packet`]), found in the flow table ([`flow`]) or
//! decided about ([`decide`], over the [`table`]) and given to an endpoint ([`select`]), rewritten and sent on.

mod bpf;
pub mod decide;
pub mod dns;
pub mod flow;
mod memory;
pub mod net;
pub mod offload;
pub mod packet;
pub mod packet_path;
pub mod select;
pub mod table;
