//! Packets: a checked view over bytes, the rewriting of addresses and ports, and the answers we make ourselves.

pub mod checksum;
pub mod hop;
pub mod icmp;
pub mod reply;
pub mod rewrite;
pub mod view;
pub mod vnet;

pub use rewrite::Translation;
pub use view::{Malformed, Packet, Transport};

#[cfg(test)]
mod properties;
