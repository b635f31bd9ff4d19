//! Connections that connection tracking carries to Service addresses: those of a service proxy that was here before us.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, Result, bail};
use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_packet_netfilter::conntrack::{
    ConntrackAttribute, ConntrackMessage, IPTuple, ProtoInfo, ProtoInfoTCP, ProtoTuple, Protocol as Number, Status,
    Tuple,
};
use netlink_packet_netfilter::{NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily};
use netlink_sys::{Socket, protocols::NETLINK_NETFILTER};
use sluice_dataplane::net::Protocol;

/// States of TCP from which on nothing more is expected: `TIME_WAIT`, `CLOSE`.
const OVER: std::ops::RangeInclusive<u8> = 7..=8;
/// The kernel fills less in one message.
const RECEIVE: usize = 64 << 10;

/// What packets of one direction of a connection look like when they come in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Direction {
    pub(super) protocol: Protocol,
    pub(super) from: SocketAddr,
    pub(super) to: SocketAddr,
}

/// Both directions of the connections whose destination was rewritten and `is_ours`. A datagram's next may go anywhere, so
/// only connections count.
pub(super) fn carried(is_ours: impl Fn(&Direction) -> bool) -> Result<BTreeSet<Direction>> {
    let mut found = BTreeSet::new();
    dump(|attributes| {
        if let Some((original, reply)) = parse(attributes)
            && is_ours(&original)
        {
            found.extend([original, reply]);
        }
    })?;
    Ok(found)
}

/// Calls `each` with every entry of this network namespace.
fn dump(mut each: impl FnMut(&[ConntrackAttribute])) -> Result<()> {
    let mut socket = Socket::new(NETLINK_NETFILTER).context("cannot ask connection tracking")?;
    socket.bind_auto().context("cannot ask connection tracking")?;
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | NLM_F_DUMP;
    let get = ConntrackMessage::Get(Vec::new());
    let get = NetfilterMessage::new(NetfilterHeader::new(NetfilterProtoFamily::Unspec, 0, 0), get);
    let mut message = NetlinkMessage::new(header, NetlinkPayload::from(get));
    message.finalize();
    let mut request = vec![0; message.buffer_len()];
    message.serialize(&mut request);
    socket.send(&request, 0).context("cannot ask connection tracking")?;
    let mut buffer = vec![0; RECEIVE];
    loop {
        let length = socket.recv(&mut &mut buffer[..], 0).context("connection tracking does not answer")?;
        let mut rest = &buffer[..length];
        while !rest.is_empty() {
            let message =
                <NetlinkMessage<NetfilterMessage>>::deserialize(rest).context("connection tracking's answer")?;
            let taken = (message.header.length as usize).next_multiple_of(4);
            rest = rest.get(taken..).unwrap_or_default();
            match message.payload {
                NetlinkPayload::InnerMessage(message) => {
                    if let NetfilterMessageInner::Conntrack(ConntrackMessage::New(attributes)) = message.inner {
                        each(&attributes);
                    }
                }
                NetlinkPayload::Done(_) => return Ok(()),
                NetlinkPayload::Error(error) => bail!("connection tracking refuses: {}", error.to_io()),
                _ => {}
            }
        }
    }
}

/// Both directions of a live connection whose destination was rewritten.
fn parse(attributes: &[ConntrackAttribute]) -> Option<(Direction, Direction)> {
    let (mut original, mut reply, mut is_rewritten, mut is_over) = (None, None, false, false);
    for attribute in attributes {
        match attribute {
            ConntrackAttribute::CtaTupleOrig(tuple) => original = direction(tuple),
            ConntrackAttribute::CtaTupleReply(tuple) => reply = direction(tuple),
            ConntrackAttribute::CtaStatus(status) => is_rewritten = status.contains(Status::DstNat),
            ConntrackAttribute::CtaProtoInfo(infos) => {
                let states = infos.iter().filter_map(|info| match info {
                    ProtoInfo::TCP(tcp) => Some(tcp),
                    _ => None,
                });
                is_over =
                    states.flatten().any(|state| matches!(state, ProtoInfoTCP::State(state) if OVER.contains(state)));
            }
            _ => {}
        }
    }
    if is_rewritten && !is_over { Some((original?, reply?)) } else { None }
}

fn direction(tuple: &[Tuple]) -> Option<Direction> {
    let (mut from, mut to): (Option<IpAddr>, Option<IpAddr>) = (None, None);
    let (mut protocol, mut from_port, mut to_port) = (None, None, None);
    for part in tuple {
        match part {
            Tuple::Ip(parts) => {
                for part in parts {
                    match part {
                        IPTuple::SourceAddress(address) => from = Some(*address),
                        IPTuple::DestinationAddress(address) => to = Some(*address),
                        _ => {}
                    }
                }
            }
            Tuple::Proto(parts) => {
                for part in parts {
                    match part {
                        ProtoTuple::Protocol(Number::Tcp) => protocol = Some(Protocol::Tcp),
                        ProtoTuple::Protocol(Number::Sctp) => protocol = Some(Protocol::Sctp),
                        ProtoTuple::SourcePort(port) => from_port = Some(*port),
                        ProtoTuple::DestinationPort(port) => to_port = Some(*port),
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    Some(Direction {
        protocol: protocol?,
        from: SocketAddr::new(from?, from_port?),
        to: SocketAddr::new(to?, to_port?),
    })
}
