//! Control side of Sluice: objects in, routing tables out; host set-up, admin API and the `sluice` command.
//!
//! [`source`] reads objects, [`store`] keeps the last good ones ([`local`] adds what a cluster's controllers would),
//! [`resolve`] turns one Service into plain data for the table, [`publish`] swaps the table in. This crate never sees a
//! packet.

pub mod address;
pub mod admin;
mod at_links;
pub mod cli;
pub mod config;
pub mod daemon;
pub mod demo;
pub mod dns;
pub mod drains;
pub mod early;
pub mod events;
pub mod first;
pub mod headless;
pub mod health_check;
pub mod host;
pub mod kube_proxy;
pub mod lives;
pub mod local;
pub mod local_names;
pub mod loopback;
pub mod names;
pub mod node;
pub mod object;
pub mod problem;
pub mod programming;
pub mod publish;
pub mod resolve;
pub mod responder;
pub mod saved;
pub mod saving;
mod signals;
pub mod source;
pub mod state;
pub mod store;
pub mod trace;
pub mod upstream;
