//! The packet path: TUN queues, one plain thread for each, and the step that turns one packet into another.

mod drops;
mod fragments;
mod held;
mod keeper;
mod names;
mod namespace;
mod opening;
mod opens;
mod shared;
mod steer;
mod thread;
mod tun;
mod ways;
mod wire;
mod worker;

pub use drops::Drops;
pub use held::HeldTotals;
pub use keeper::Keeper;
pub use names::Names;
pub use namespace::namespace_cookie;
pub use shared::{Settings, Shared};
pub use thread::{PacketPath, now_ms};
pub use tun::Tun;
pub use ways::{ETHERNET, Way, Ways};
pub use worker::{Action, Worker};

#[cfg(test)]
mod tests;
