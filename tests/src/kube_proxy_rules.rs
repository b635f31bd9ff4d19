//! What kube-proxy in nftables mode has decided: its tables as `nft -j` prints them, and what they do with a new flow.
//!
//! Rules are run one by one as the kernel would, so that nothing of how kube-proxy lays out its chains is assumed but the names
//! of what remembers clients (`affinity-…`): those count as empty, so every endpoint that a client may get is found.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, Result, bail, ensure};
use ipnet::IpNet;
use serde_json::Value;
use sluice_bench::netns::NetNs;

/// What becomes of a new flow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fate {
    /// One of these endpoints gets it, and sees an address of the node instead of the client's, or does not.
    Forward {
        /// Addresses and ports.
        endpoints: BTreeSet<SocketAddr>,
        /// Those of them that see the node instead of the client.
        masqueraded: BTreeSet<SocketAddr>,
    },
    /// The client is told.
    Reject,
    /// It gets no answer.
    Drop,
    /// No rule is about it.
    Pass,
}

/// A new flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Flow {
    /// The client's address.
    pub from: IpAddr,
    /// What it dials.
    pub to: SocketAddr,
    /// `tcp`, `udp` or `sctp`.
    pub protocol: &'static str,
}

/// Rules of both families.
pub struct Rules {
    families: [Family; 2],
    /// Addresses of the node.
    local: Vec<IpAddr>,
}

#[derive(Default)]
struct Family {
    /// Hook, priority and name of each base chain, the first to be run first.
    base: Vec<(String, i64, String)>,
    chains: BTreeMap<String, Vec<Vec<Value>>>,
    /// Elements of sets and maps.
    elements: BTreeMap<String, Vec<Value>>,
}

/// How a chain ended.
enum End {
    Through,
    /// The base chain is over, and so is nobody else's.
    Accept,
    Drop,
    Reject,
}

/// A packet under way.
struct Packet {
    flow: Flow,
    mark: i64,
    to: Option<SocketAddr>,
    masqueraded: bool,
    /// Which of equally likely ways is taken, and how many there were.
    choice: usize,
    choices: usize,
}

impl Rules {
    /// Reads them in the node's namespace.
    pub fn read(ns: &NetNs, local: &[IpAddr]) -> Result<Self> {
        let family = |name: &str| -> Result<Family> {
            let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
            let mut command = ns.command("nft");
            let output = command.args(["-j", "list", "table", name, "kube-proxy"]).env("PATH", path).output()?;
            ensure!(output.status.success(), "nft: {}", String::from_utf8_lossy(&output.stderr));
            Family::parse(&serde_json::from_slice(&output.stdout)?)
        };
        Ok(Self { families: [family("ip")?, family("ip6")?], local: local.to_vec() })
    }

    /// What becomes of a new flow. An error when there is a rule that we cannot read.
    pub fn fate(&self, flow: Flow) -> Result<Fate> {
        let family = &self.families[usize::from(flow.from.is_ipv6())];
        let is_of_node = self.local.contains(&flow.from);
        let (mut endpoints, mut masqueraded) = (BTreeSet::new(), BTreeSet::new());
        let (mut choice, mut choices) = (0, 1);
        while choice < choices {
            let mut packet = Packet { flow, mark: 0, to: None, masqueraded: false, choice, choices: 1 };
            // Where it goes is decided after the rules before that.
            let hooks: &[&str] = if is_of_node { &["output", "postrouting"] } else { &["prerouting"] };
            let mut end = self.hooks(family, hooks, &mut packet)?;
            if matches!(end, End::Through) {
                let to_node = self.local.contains(&packet.to.unwrap_or(flow.to).ip());
                let rest: &[&str] = match (is_of_node, to_node) {
                    (true, false) => &[],
                    (_, true) => &["input"],
                    (false, false) => &["forward", "postrouting"],
                };
                end = self.hooks(family, rest, &mut packet)?;
            }
            match end {
                End::Drop => return Ok(Fate::Drop),
                End::Reject => return Ok(Fate::Reject),
                End::Through | End::Accept => {}
            }
            let Some(to) = packet.to else { return Ok(Fate::Pass) };
            endpoints.insert(to);
            if packet.masqueraded {
                masqueraded.insert(to);
            }
            (choice, choices) = (choice + 1, packet.choices);
        }
        Ok(Fate::Forward { endpoints, masqueraded })
    }

    /// Every frontend: address (`None`: the node's), protocol, port.
    #[must_use]
    pub fn frontends(&self) -> BTreeSet<(Option<IpAddr>, String, u16)> {
        let maps = ["service-ips", "no-endpoint-services", "service-nodeports", "no-endpoint-nodeports"];
        let keys = |family: &Family| {
            let elements = maps.iter().filter_map(|map| family.elements.get(*map)).flatten();
            elements.filter_map(|pair| frontend(&pair[0])).collect::<Vec<_>>()
        };
        self.families.iter().flat_map(keys).collect()
    }

    fn hooks(&self, family: &Family, hooks: &[&str], packet: &mut Packet) -> Result<End> {
        for hook in hooks {
            for (_, _, chain) in family.base.iter().filter(|(at, ..)| at == hook) {
                match self.chain(family, chain, packet)? {
                    End::Through | End::Accept => {}
                    end => return Ok(end),
                }
            }
        }
        Ok(End::Through)
    }

    /// Runs a chain to its end.
    fn chain(&self, family: &Family, name: &str, packet: &mut Packet) -> Result<End> {
        for rule in family.chains.get(name).with_context(|| format!("no chain {name}"))? {
            match self.rule(family, rule, packet)? {
                // A `goto` ends this chain as if it had ended itself.
                Some(Next::Goto(chain)) => return self.chain(family, &chain, packet),
                Some(Next::Jump(chain)) => match self.chain(family, &chain, packet)? {
                    End::Through => {}
                    end => return Ok(end),
                },
                Some(Next::Return) => return Ok(End::Through),
                Some(Next::End(end)) => return Ok(end),
                None => {}
            }
        }
        Ok(End::Through)
    }

    /// Runs one rule: what is next, when it is not the next rule.
    fn rule(&self, family: &Family, rule: &[Value], packet: &mut Packet) -> Result<Option<Next>> {
        for statement in rule {
            let (name, body) = only(statement)?;
            match name {
                "match" => {
                    if !self.matches(family, body, packet)? {
                        return Ok(None);
                    }
                }
                "counter" | "comment" => {}
                "mangle" => packet.mark = number(&self.value(&body["value"], packet)?)?,
                // What remembers a client.
                "set" => ensure!(body["op"] == "update", "{body}"),
                "masquerade" => {
                    packet.masqueraded = true;
                    return Ok(Some(Next::End(End::Accept)));
                }
                "dnat" => {
                    packet.to = Some(self.destination(body, packet)?);
                    return Ok(Some(Next::End(End::Accept)));
                }
                "vmap" => {
                    let key = self.value(&body["key"], packet)?;
                    let found = self.look_up(family, &key, &body["data"])?;
                    return found.map(|verdict| next(&verdict)).transpose();
                }
                _ => return next(statement).map(Some),
            }
        }
        Ok(None)
    }

    fn matches(&self, family: &Family, body: &Value, packet: &mut Packet) -> Result<bool> {
        let left = self.value(&body["left"], packet)?;
        let right = &body["right"];
        let found = match right {
            Value::String(text) if text.starts_with('@') => {
                let name = &text[1..];
                let is_memory = name.starts_with("affinity-");
                let set = family.elements.get(name).with_context(|| format!("no set {name}"))?;
                !is_memory && set.iter().any(|element| equals(element, &left))
            }
            Value::Object(object) if object.contains_key("set") => {
                object["set"].as_array().context("a set")?.iter().any(|element| equals(element, &left))
            }
            other => equals(other, &left),
        };
        match body["op"].as_str() {
            Some("==" | "in") => Ok(found),
            Some("!=") => Ok(!found),
            other => bail!("an operator that we do not know: {other:?}"),
        }
    }

    /// The value of an expression for a packet.
    fn value(&self, expression: &Value, packet: &mut Packet) -> Result<Value> {
        let Value::Object(object) = expression else { return Ok(expression.clone()) };
        let (name, body) = object.iter().next().context("an expression")?;
        let local = |ip: IpAddr| Value::from(if self.local.contains(&ip) { "local" } else { "unicast" });
        let to = packet.to.unwrap_or(packet.flow.to);
        Ok(match &**name {
            "payload" => match body["field"].as_str() {
                Some("saddr") => packet.flow.from.to_string().into(),
                Some("daddr") => to.ip().to_string().into(),
                Some("dport") => to.port().into(),
                other => bail!("a field that we do not know: {other:?}"),
            },
            "meta" => match body["key"].as_str() {
                Some("l4proto") => packet.flow.protocol.into(),
                Some("mark") => packet.mark.into(),
                other => bail!("a key that we do not know: {other:?}"),
            },
            "ct" => match body["key"].as_str() {
                Some("state") => "new".into(),
                Some("status") => (if packet.to.is_some() { "dnat" } else { "none" }).into(),
                other => bail!("a key that we do not know: {other:?}"),
            },
            "fib" => {
                let about = body["flags"].to_string();
                local(if about.contains("saddr") { packet.flow.from } else { to.ip() })
            }
            "concat" => {
                let parts = body.as_array().context("parts")?;
                parts.iter().map(|part| self.value(part, packet)).collect::<Result<Vec<_>>>()?.into()
            }
            "numgen" => {
                packet.choices = usize::try_from(number(&body["mod"])?)?;
                packet.choice.into()
            }
            operator @ ("&" | "|" | "^") => {
                let (a, b) = (number(&self.value(&body[0], packet)?)?, number(&self.value(&body[1], packet)?)?);
                match operator {
                    "&" => a & b,
                    "|" => a | b,
                    _ => a ^ b,
                }
                .into()
            }
            other => bail!("an expression that we do not know: {other}"),
        })
    }

    /// What a map has for a key; the map is named or written out.
    fn look_up(&self, family: &Family, key: &Value, data: &Value) -> Result<Option<Value>> {
        let elements = match data {
            Value::String(name) => family.elements.get(name.trim_start_matches('@')).context("no such map")?,
            written => written["set"].as_array().context("a map")?,
        };
        let found = elements.iter().find(|pair| equals(&pair[0], key));
        Ok(found.map(|pair| pair[1].clone()))
    }

    fn destination(&self, body: &Value, packet: &mut Packet) -> Result<SocketAddr> {
        let (address, port) = match body["addr"].get("map") {
            Some(map) => {
                let key = self.value(&map["key"], packet)?;
                let elements = map["data"]["set"].as_array().context("a map")?;
                let found = elements.iter().find(|pair| equals(&pair[0], &key)).context("no such endpoint")?;
                (found[1]["concat"][0].clone(), found[1]["concat"][1].clone())
            }
            None => (body["addr"].clone(), body["port"].clone()),
        };
        let address: IpAddr = address.as_str().context("an address")?.parse()?;
        Ok(SocketAddr::new(address, number(&port)?.try_into()?))
    }
}

enum Next {
    Goto(String),
    Jump(String),
    Return,
    End(End),
}

fn next(statement: &Value) -> Result<Next> {
    let (name, body) = only(statement)?;
    let target = || body["target"].as_str().map(str::to_owned).context("a chain");
    Ok(match name {
        "goto" => Next::Goto(target()?),
        "jump" => Next::Jump(target()?),
        "return" => Next::Return,
        "accept" => Next::End(End::Accept),
        "drop" => Next::End(End::Drop),
        "reject" => Next::End(End::Reject),
        other => bail!("a statement that we do not know: {other}"),
    })
}

impl Family {
    fn parse(listed: &Value) -> Result<Self> {
        let mut family = Self::default();
        for item in listed["nftables"].as_array().context("a list")? {
            let (kind, body) = only(item)?;
            let text = |field: &str| body[field].as_str().map(str::to_owned).context("a name");
            match kind {
                "chain" => {
                    family.chains.entry(text("name")?).or_default();
                    if let (Some(hook), Some(priority)) = (body["hook"].as_str(), body["prio"].as_i64()) {
                        family.base.push((hook.to_owned(), priority, text("name")?));
                    }
                }
                "rule" => {
                    let statements = body["expr"].as_array().context("statements")?.clone();
                    family.chains.entry(text("chain")?).or_default().push(statements);
                }
                "set" | "map" => {
                    let elements = body["elem"].as_array().cloned().unwrap_or_default();
                    family.elements.insert(text("name")?, elements);
                }
                _ => {}
            }
        }
        family.base.sort_by_key(|(_, priority, _)| *priority);
        Ok(family)
    }
}

fn frontend(key: &Value) -> Option<(Option<IpAddr>, String, u16)> {
    let key = key.pointer("/elem/val").unwrap_or(key)["concat"].as_array()?;
    let text = |at: usize| key[at].as_str().map(str::to_owned);
    let port = |at: usize| key[at].as_u64()?.try_into().ok();
    match key.len() {
        3 => Some((Some(text(0)?.parse().ok()?), text(1)?, port(2)?)),
        _ => Some((None, text(0)?, port(1)?)),
    }
}

fn only(value: &Value) -> Result<(&str, &Value)> {
    let object = value.as_object().with_context(|| format!("{value} is no statement"))?;
    object.iter().next().map(|(name, body)| (&**name, body)).context("an empty statement")
}

fn number(value: &Value) -> Result<i64> {
    value.as_i64().with_context(|| format!("{value} is no number"))
}

/// Whether an element as `nft` writes it is this value.
fn equals(element: &Value, value: &Value) -> bool {
    match element {
        // With a comment or a timeout.
        Value::Object(object) if object.contains_key("elem") => equals(&object["elem"]["val"], value),
        Value::Object(object) if object.contains_key("concat") => equals(&object["concat"], value),
        Value::Object(object) if object.contains_key("prefix") => {
            let prefix = &object["prefix"];
            let network = format!("{}/{}", prefix["addr"].as_str().unwrap_or_default(), prefix["len"]);
            let address = value.as_str().and_then(|text| text.parse::<IpAddr>().ok());
            address.zip(network.parse::<IpNet>().ok()).is_some_and(|(address, network)| network.contains(&address))
        }
        // Adjacent ranges are merged by it.
        Value::Object(object) if object.contains_key("range") => {
            let end = |at: usize| object["range"][at].as_str().and_then(|text| text.parse::<IpAddr>().ok());
            let address = value.as_str().and_then(|text| text.parse::<IpAddr>().ok());
            matches!((address, end(0), end(1)), (Some(address), Some(low), Some(high)) if low <= address && address <= high)
        }
        Value::Array(parts) => value
            .as_array()
            .is_some_and(|values| parts.len() == values.len() && parts.iter().zip(values).all(|(a, b)| equals(a, b))),
        plain => plain == value,
    }
}
