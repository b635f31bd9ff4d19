//! What happens to a new flow, said in words and JSON: `sluice trace` and the admin API.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};
use sluice_dataplane::decide::{NewFlow, Outcome, Verdict};
use sluice_dataplane::net::Protocol;
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
    let usable: Vec<SocketAddr> = list
        .iter()
        .map(|endpoint| endpoint.address)
        .filter(|endpoint| !table.leads_back(*endpoint, flow.protocol))
        .collect();
    // An endpoint that reaches itself must not see its own address, or it would answer itself.
    let is_itself = !usable.is_empty() && usable.iter().all(|endpoint| endpoint.ip() == flow.client);
    let mut endpoints: Vec<String> = usable.iter().map(SocketAddr::to_string).collect();
    endpoints.sort_unstable();
    let (mut outcome, mut reason) = (decision.verdict.outcome(), decision.reason.to_string());
    if usable.len() < list.len() {
        reason += &format!("; {} of them refused, being frontends themselves", list.len() - usable.len());
        if usable.is_empty() {
            outcome = Outcome::Drop;
        }
    }
    Traced {
        outcome,
        service: port.map(|port| port.service.to_string()),
        port: port.map(|port| port.name.to_string()),
        frontend: decision.frontend.map(|frontend| frontend.kind.name().to_owned()),
        endpoints,
        masquerade: outcome == Outcome::Forward && (masquerade || is_itself),
        reason,
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

/// A new flow as people write it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Question {
    /// Client: an address, with or without port; the port decides nothing.
    pub from: String,
    /// What the client dials: an address and a port, such as `10.96.0.1:80` or `[fd00::1]:80`.
    pub to: String,
    /// `tcp`, `udp` or `sctp`.
    #[serde(default = "tcp")]
    pub proto: String,
}

fn tcp() -> String {
    "tcp".to_owned()
}

impl Question {
    /// The flow that is meant.
    ///
    /// # Errors
    /// When a part cannot be read, or the families differ; the text says how to write it.
    pub fn flow(&self) -> Result<NewFlow, String> {
        let protocol: Protocol = self.proto.parse()?;
        let client = self.from.parse().or_else(|_| self.from.parse::<SocketAddr>().map(|address| address.ip()));
        let client: IpAddr = client.map_err(|_| {
            format!(
                "{:?} is no client: write 10.0.0.1 or fd00::1, with a port 10.0.0.1:4000 or [fd00::1]:4000",
                self.from
            )
        })?;
        let to: SocketAddr = self
            .to
            .parse()
            .map_err(|_| format!("{:?} is no destination: write 10.96.0.1:80 or [fd00::1]:80", self.to))?;
        if to.port() == 0 {
            return Err(format!("{:?}: nobody can dial port 0", self.to));
        }
        // IPv4 in IPv6 is IPv4.
        let (client, destination) = (client.to_canonical(), SocketAddr::new(to.ip().to_canonical(), to.port()));
        if client.is_ipv4() != destination.is_ipv4() {
            return Err(format!("{client} cannot dial {destination}: one is IPv4, the other IPv6"));
        }
        Ok(NewFlow { client, destination, protocol })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn questions_are_read_or_refused_with_the_way_out() {
        for (from, to, proto, flow) in [
            ("10.0.0.1", "10.96.0.1:80", "tcp", Ok(("10.0.0.1", "10.96.0.1:80", Protocol::Tcp))),
            ("10.0.0.1:4000", "10.96.0.1:53", "UDP", Ok(("10.0.0.1", "10.96.0.1:53", Protocol::Udp))),
            ("fd00::1", "[fd00::2]:80", "sctp", Ok(("fd00::1", "[fd00::2]:80", Protocol::Sctp))),
            ("[fd00::1]:4000", "[fd00::2]:80", "tcp", Ok(("fd00::1", "[fd00::2]:80", Protocol::Tcp))),
            ("::ffff:10.0.0.1", "10.96.0.1:80", "tcp", Ok(("10.0.0.1", "10.96.0.1:80", Protocol::Tcp))),
            ("10.0.0.1", "[fd00::2]:80", "tcp", Err("IPv6")),
            ("10.0.0.1", "10.96.0.1", "tcp", Err("10.96.0.1:80")),
            ("10.0.0.1", "fd00::2:80", "tcp", Err("[fd00::1]:80")),
            ("10.0.0.1", "10.96.0.1:0", "tcp", Err("port 0")),
            ("10.0.0.1", "10.96.0.1:65536", "tcp", Err("no destination")),
            ("pod-1", "10.96.0.1:80", "tcp", Err("no client")),
            ("10.0.0.1", "10.96.0.1:80", "icmp", Err("sctp")),
        ] {
            let question = Question { from: from.to_owned(), to: to.to_owned(), proto: proto.to_owned() };
            match (question.flow(), flow) {
                (Ok(found), Ok((client, destination, protocol))) => {
                    let wanted = NewFlow {
                        client: client.parse().unwrap(),
                        destination: destination.parse().unwrap(),
                        protocol,
                    };
                    assert_eq!(found, wanted);
                }
                (Err(message), Err(words)) => assert!(message.contains(words), "{message}"),
                (found, wanted) => panic!("{question:?}: {found:?}, not {wanted:?}"),
            }
        }
    }
}
