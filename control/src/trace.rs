//! What happens to a new flow, said in words and JSON: `sluice trace` and the admin API.

use std::fmt;
use std::net::SocketAddr;

use serde::{Deserialize, Serialize};
use sluice_dataplane::decide::{NewFlow, Outcome, Verdict};
use sluice_dataplane::table::RoutingTable;

/// What happens to a new flow. Field by field the stable JSON of `sluice trace -o json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Traced {
    /// What is done.
    pub outcome: Outcome,
    /// The Service as `namespace/name`, when the destination is a frontend.
    pub service: Option<String>,
    /// Name of the Service port; empty when unnamed.
    pub port: Option<String>,
    /// Kind of frontend: `clusterip`, `nodeport`, `loadbalancer` or `externalip`.
    pub frontend: Option<String>,
    /// Every endpoint that the flow may be sent to, sorted as text.
    pub endpoints: Vec<String>,
    /// Whether the endpoint sees a node address instead of the client's, whichever endpoint it is.
    pub masquerade: bool,
    /// The rule that decided.
    pub reason: String,
}

/// Asks the table, as the packet path does.
#[must_use]
pub fn trace(table: &RoutingTable, flow: &NewFlow) -> Traced {
    let decision = table.decide(flow);
    let port = decision.frontend.map(|frontend| &frontend.port);
    let (list, masquerade) = match decision.verdict {
        Verdict::Forward { endpoints, masquerade } => (endpoints, masquerade),
        Verdict::Reject | Verdict::Drop | Verdict::Pass => (&[][..], false),
    };
    // An endpoint that reaches itself must not see its own address, or it would answer itself.
    let is_itself = !list.is_empty() && list.iter().all(|endpoint| endpoint.address.ip() == flow.client);
    let mut endpoints: Vec<String> = list.iter().map(|endpoint| endpoint.address.to_string()).collect();
    endpoints.sort_unstable();
    Traced {
        outcome: decision.verdict.outcome(),
        service: port.map(|port| port.service.to_string()),
        port: port.map(|port| port.name.to_string()),
        frontend: decision.frontend.map(|frontend| frontend.kind.name().to_owned()),
        endpoints,
        masquerade: masquerade || is_itself,
        reason: decision.reason.to_string(),
    }
}

impl fmt::Display for Traced {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let outcome = match self.outcome {
            Outcome::Forward => "forward: to one of the endpoints below",
            Outcome::Reject => "reject: the client is refused at once",
            Outcome::Drop => "drop: the client gets no answer",
            Outcome::Pass => "pass: not ours, the packet goes on as it is",
        };
        writeln!(f, "outcome    {outcome}")?;
        if let (Some(service), Some(port), Some(frontend)) = (&self.service, &self.port, &self.frontend) {
            let port = if port.is_empty() { "its unnamed port".to_owned() } else { format!("port {port}") };
            writeln!(f, "service    {service}, {port}, by {frontend}")?;
        }
        write!(f, "rule       {}", self.reason)?;
        if self.outcome == Outcome::Forward {
            let source = if self.masquerade { "becomes a node address" } else { "the client's own" };
            write!(f, "\nsource     {source}\nendpoints  {}", self.endpoints.join("\n           "))?;
        }
        Ok(())
    }
}

/// A destination as people write it: `10.96.0.1:80`, `[fd00::1]:80`. The address is canonical: IPv4 in IPv6 is IPv4.
///
/// # Errors
/// When it is neither; the text says how to write it.
pub fn parse_destination(text: &str) -> Result<SocketAddr, String> {
    let address: SocketAddr =
        text.parse().map_err(|_| format!("{text:?} is no destination: write 10.96.0.1:80 or [fd00::1]:80"))?;
    if address.port() == 0 {
        return Err(format!("{text:?}: port 0 cannot be dialled"));
    }
    Ok(SocketAddr::new(address.ip().to_canonical(), address.port()))
}

/// A client as people write it, with or without port: the port decides nothing.
///
/// # Errors
/// When it is no address; the text says how to write it.
pub fn parse_client(text: &str) -> Result<std::net::IpAddr, String> {
    let address = text.parse().or_else(|_| text.parse::<SocketAddr>().map(|address| address.ip()));
    let address =
        address.map_err(|_| format!("{text:?} is no client: write 10.0.0.1, fd00::1, or either with a port"))?;
    Ok(address.to_canonical())
}
