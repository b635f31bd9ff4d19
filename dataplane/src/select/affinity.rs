//! ClientIP affinity: a client's new flows to a Service port go where its last one went, while that endpoint is allowed.
//!
//! Asked once a flow, so a lock is no matter. The timeout slides with each new flow, not with packets, as in kube-proxy.

use std::net::SocketAddr;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use ahash::AHashMap;

use crate::flow::Address;
use crate::table::{Endpoint, PortSlot};

/// Most clients remembered; one more pushes out those that are stale, and is forgotten when there are none.
const CAPACITY: usize = 1 << 20;

struct Memory {
    endpoint: SocketAddr,
    used_ms: u64,
    timeout_ms: u64,
}

impl Memory {
    fn is_stale(&self, now_ms: u64) -> bool {
        now_ms.saturating_sub(self.used_ms) > self.timeout_ms
    }
}

/// What is remembered of clients.
#[derive(Default)]
pub struct Affinity {
    clients: Mutex<AHashMap<(PortSlot, Address), Memory>>,
}

impl Affinity {
    /// The position in `list` of the endpoint that the client had, if it is remembered and still in it.
    pub fn recall(&self, port: PortSlot, client: Address, list: &[Endpoint], now_ms: u64) -> Option<usize> {
        let clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        let memory = clients.get(&(port, client)).filter(|memory| !memory.is_stale(now_ms))?;
        list.iter().position(|endpoint| endpoint.address == memory.endpoint)
    }

    /// Remembers where a flow of the client was opened.
    pub fn remember(&self, port: PortSlot, client: Address, endpoint: SocketAddr, timeout: Duration, now_ms: u64) {
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        if clients.len() >= CAPACITY {
            clients.retain(|_, memory| !memory.is_stale(now_ms));
        }
        if clients.len() < CAPACITY {
            let timeout_ms = timeout.as_millis() as u64;
            clients.insert((port, client), Memory { endpoint, used_ms: now_ms, timeout_ms });
        }
    }

    /// Forgets what is stale.
    pub fn sweep(&self, now_ms: u64) {
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        clients.retain(|_, memory| !memory.is_stale(now_ms));
    }
}
