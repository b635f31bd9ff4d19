//! `healthCheckNodePort`: a small HTTP server for each Service with external policy Local, by which load balancers learn
//! whether this node has endpoints for it. Status, headers and body are kube-proxy's.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use axum::Router;
use axum::http::StatusCode;
use axum::response::IntoResponse;
use sluice_dataplane::net::Family;
use sluice_dataplane::table::ServiceName;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

use crate::admin::health::is_healthy;
use crate::problem::{Problem, Reason};
use crate::state::State;

/// What load balancers ask about one Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HealthCheck {
    /// `spec.healthCheckNodePort`.
    pub port: u16,
    /// Distinct addresses of ready endpoints on this node, IPv4 and IPv6; none for a family that the Service has not.
    pub local_endpoints: [Option<usize>; 2],
}

impl HealthCheck {
    /// What an address of this family is to answer. Load balancers ask at any address of the node, whatever the Service's
    /// families are: about a Service of one family all say the same.
    #[must_use]
    pub fn count(&self, family: Family) -> usize {
        let [own, other] = [family as usize, 1 - family as usize].map(|index| self.local_endpoints[index]);
        own.or(other).unwrap_or_default()
    }
}

struct Server {
    count: Arc<AtomicUsize>,
    task: JoinHandle<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The servers of all Services, one an address.
#[derive(Default)]
pub struct HealthServers {
    servers: BTreeMap<(ServiceName, SocketAddr), Server>,
}

impl HealthServers {
    /// Brings the servers to what is wanted on these addresses. Returns what could not be had; the next call tries again.
    pub async fn apply(
        &mut self,
        wanted: &BTreeMap<ServiceName, HealthCheck>,
        addresses: &[IpAddr],
        state: &Arc<State>,
    ) -> Vec<Problem> {
        let is_wanted = |(service, address): &(ServiceName, SocketAddr)| {
            wanted.get(service).is_some_and(|check| check.port == address.port()) && addresses.contains(&address.ip())
        };
        self.servers.retain(|key, _| is_wanted(key));
        let mut problems = Vec::new();
        for (service, check) in wanted {
            for address in addresses.iter().map(|ip| SocketAddr::new(*ip, check.port)) {
                let count = check.count(Family::of(address.ip()));
                if let Some(server) = self.servers.get(&(service.clone(), address)) {
                    server.count.store(count, Relaxed);
                    continue;
                }
                match serve(service.clone(), address, count, state).await {
                    Ok(server) => {
                        self.servers.insert((service.clone(), address), server);
                    }
                    Err(error) => {
                        let message = format!("cannot listen on {address}: {error}");
                        let problem = Problem::error("spec.healthCheckNodePort", message);
                        let problem = problem.because(Reason::FailedToStartServiceHealthcheck);
                        problems.push(problem.about(format!("Service {service}")));
                    }
                }
            }
        }
        problems
    }
}

async fn serve(service: ServiceName, address: SocketAddr, count: usize, state: &Arc<State>) -> std::io::Result<Server> {
    let listener = TcpListener::bind(address).await?;
    let count = Arc::new(AtomicUsize::new(count));
    let (counted, state) = (Arc::clone(&count), Arc::clone(state));
    let router = Router::new().fallback(async move || answer(&service, counted.load(Relaxed), is_healthy(&state)));
    let task = tokio::spawn(async move {
        if let Err(error) = axum::serve(listener, router).await {
            tracing::warn!(%address, %error, "a health check port ended");
        }
    });
    Ok(Server { count, task })
}

fn answer(service: &ServiceName, local_endpoints: usize, healthy: bool) -> impl IntoResponse + use<> {
    let code = if local_endpoints > 0 && healthy { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let headers = [
        ("Content-Type", "application/json".to_owned()),
        ("X-Content-Type-Options", "nosniff".to_owned()),
        ("X-Load-Balancing-Endpoint-Weight", local_endpoints.to_string()),
    ];
    (code, headers, body(service, local_endpoints, healthy))
}

/// Indented by tabs, without a last line break: load balancers have been seen to compare it as text.
fn body(service: &ServiceName, local_endpoints: usize, healthy: bool) -> String {
    let (namespace, name) = (&service.namespace, &service.name);
    format!(
        "{{\n\t\"service\": {{\n\t\t\"namespace\": \"{namespace}\",\n\t\t\"name\": \"{name}\"\n\t}},\n\t\"localEndpoints\": \
         {local_endpoints},\n\t\"serviceProxyHealthy\": {healthy}\n}}"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_body_is_json_with_kube_proxys_fields() {
        let text = body(&ServiceName::new("ns", "n"), 2, true);
        let json: serde_json::Value = serde_json::from_str(&text).unwrap();
        let want = serde_json::json!({
            "service": {"namespace": "ns", "name": "n"}, "localEndpoints": 2, "serviceProxyHealthy": true,
        });
        assert_eq!(json, want);
        assert!(text.starts_with("{\n\t\"service\": {\n\t\t\"namespace\"") && text.ends_with('}'));
    }
}
