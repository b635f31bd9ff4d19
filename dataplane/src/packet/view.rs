//! A checked view over an IP packet: every length is verified once, here; nothing behind it can read out of bounds.

use etherparse::{
    IpNumber, Ipv4HeaderSlice, Ipv6ExtensionSlice, Ipv6ExtensionsSlice, Ipv6HeaderSlice, TcpHeaderSlice, UdpHeaderSlice,
};

use crate::flow::{Address, FlowKey};
use crate::net::{Family, Protocol};

/// Why a packet is no packet. The name is its label in `sluice_drops_total`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Malformed {
    /// Neither IPv4 nor IPv6.
    Version,
    /// The IP header or its extensions do not fit or contradict themselves.
    IpHeader,
    /// The IP length exceeds what arrived.
    IpLength,
    /// The transport header does not fit.
    Transport,
    /// An address that cannot be on a wire (IPv4-mapped IPv6).
    Address,
}

impl Malformed {
    /// Every reason.
    pub const ALL: [Self; 5] = [Self::Version, Self::IpHeader, Self::IpLength, Self::Transport, Self::Address];

    /// Name as metric label.
    pub fn label(self) -> &'static str {
        match self {
            Self::Version => "malformed_version",
            Self::IpHeader => "malformed_ip_header",
            Self::IpLength => "malformed_ip_length",
            Self::Transport => "malformed_transport",
            Self::Address => "malformed_address",
        }
    }
}

/// What a packet carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// TCP.
    Tcp(Tcp),
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
    /// ICMP or ICMPv6, with its type.
    Icmp(u8),
    /// A fragment without transport header, or the first of what can only be translated as a whole.
    Fragment,
    /// Anything else.
    Other,
}

/// What the flow table needs of a TCP header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tcp {
    /// SYN.
    pub syn: bool,
    /// ACK.
    pub ack: bool,
    /// FIN.
    pub fin: bool,
    /// RST.
    pub rst: bool,
    /// Sequence number.
    pub sequence: u32,
    /// Acknowledgement number.
    pub acknowledgement: u32,
    /// Sequence space used: payload bytes, SYN and FIN.
    pub length: u32,
}

/// Which part a fragment is, and of what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fragment {
    /// What its sender calls the whole.
    pub id: u32,
    /// Number of the protocol that the whole carries.
    pub protocol: u8,
    /// It has the transport header.
    pub is_first: bool,
}

/// A parsed packet: facts and offsets, no borrow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet {
    /// Family.
    pub family: Family,
    /// Source address.
    pub source: Address,
    /// Destination address.
    pub destination: Address,
    /// Source port, 0 without ports.
    pub source_port: u16,
    /// Destination port, 0 without ports.
    pub destination_port: u16,
    /// What it carries.
    pub transport: Transport,
    /// When it is a fragment.
    pub fragment: Option<Fragment>,
    /// Offset of the transport header in bytes.
    pub transport_at: usize,
    /// Length by the IP header in bytes.
    pub length: usize,
}

impl Packet {
    /// Parses the IP packet at the start of `bytes`.
    pub fn parse(bytes: &[u8]) -> Result<Self, Malformed> {
        let (mut packet, number) = Self::parse_ip(bytes)?;
        if packet.length > bytes.len() {
            return Err(Malformed::IpLength);
        }
        // A checksum that is no sum (SCTP, RFC 9260) can only be made anew over the whole.
        let is_translatable = |part: &Fragment| part.is_first && matches!(number, IpNumber::TCP | IpNumber::UDP);
        if packet.fragment.as_ref().is_some_and(|part| !is_translatable(part)) {
            return Ok(packet);
        }
        let body = &bytes[packet.transport_at..packet.length];
        match number {
            IpNumber::TCP => {
                let tcp = TcpHeaderSlice::from_slice(body).map_err(|_| Malformed::Transport)?;
                packet.set_ports(tcp.source_port(), tcp.destination_port());
                let payload = body.len() - usize::from(tcp.data_offset()) * 4;
                packet.transport = Transport::Tcp(Tcp {
                    syn: tcp.syn(),
                    ack: tcp.ack(),
                    fin: tcp.fin(),
                    rst: tcp.rst(),
                    sequence: tcp.sequence_number(),
                    acknowledgement: tcp.acknowledgment_number(),
                    length: payload as u32 + u32::from(tcp.syn()) + u32::from(tcp.fin()),
                });
            }
            IpNumber::UDP => {
                let udp = UdpHeaderSlice::from_slice(body).map_err(|_| Malformed::Transport)?;
                packet.set_ports(udp.source_port(), udp.destination_port());
                packet.transport = Transport::Udp;
            }
            IpNumber::SCTP => {
                // RFC 9260 §3.1: a common header of 12 bytes, the ports first.
                let header = body.first_chunk::<12>().ok_or(Malformed::Transport)?;
                packet
                    .set_ports(u16::from_be_bytes([header[0], header[1]]), u16::from_be_bytes([header[2], header[3]]));
                packet.transport = Transport::Sctp;
            }
            IpNumber::ICMP if packet.family == Family::V4 => packet.transport = icmp(body)?,
            IpNumber::IPV6_ICMP if packet.family == Family::V6 => packet.transport = icmp(body)?,
            _ => {}
        }
        Ok(packet)
    }

    /// Parses a packet quoted by an ICMP error: cut short, but at least with its ports.
    pub fn parse_quoted(bytes: &[u8]) -> Result<Self, Malformed> {
        let (mut packet, number) = Self::parse_ip(bytes)?;
        let Some(ports) = bytes.get(packet.transport_at..packet.transport_at + 8) else {
            return Err(Malformed::Transport);
        };
        packet.set_ports(u16::from_be_bytes([ports[0], ports[1]]), u16::from_be_bytes([ports[2], ports[3]]));
        packet.transport = match (packet.transport, number) {
            _ if packet.fragment.is_some_and(|part| !part.is_first) => Transport::Fragment,
            (_, IpNumber::TCP) => Transport::Tcp(Tcp {
                syn: false,
                ack: false,
                fin: false,
                rst: false,
                sequence: u32::from_be_bytes([ports[4], ports[5], ports[6], ports[7]]),
                acknowledgement: 0,
                length: 0,
            }),
            (_, IpNumber::UDP) => Transport::Udp,
            (_, IpNumber::SCTP) => Transport::Sctp,
            _ => Transport::Other,
        };
        packet.length = packet.length.min(bytes.len());
        Ok(packet)
    }

    fn parse_ip(bytes: &[u8]) -> Result<(Self, IpNumber), Malformed> {
        match bytes.first().map(|first| first >> 4) {
            Some(4) => {
                let ip = Ipv4HeaderSlice::from_slice(bytes).map_err(|_| Malformed::IpHeader)?;
                let (at, length) = (ip.slice().len(), usize::from(ip.total_len()));
                if length < at {
                    return Err(Malformed::IpLength);
                }
                let [source, destination] = [Address::from_v4(ip.source()), Address::from_v4(ip.destination())];
                let fragment = ip.is_fragmenting_payload().then(|| Fragment {
                    id: ip.identification().into(),
                    protocol: ip.protocol().0,
                    is_first: ip.fragments_offset().value() == 0,
                });
                Ok((Self::new(Family::V4, source, destination, at, length, fragment), ip.protocol()))
            }
            Some(6) => {
                let ip = Ipv6HeaderSlice::from_slice(bytes).map_err(|_| Malformed::IpHeader)?;
                let length = 40 + usize::from(ip.payload_length());
                let rest = &bytes[40..length.min(bytes.len())];
                let (extensions, number, rest_after) =
                    Ipv6ExtensionsSlice::from_slice(ip.next_header(), rest).map_err(|_| Malformed::IpHeader)?;
                let at = 40 + rest.len() - rest_after.len();
                let [source, destination] = [Address::from_v6(ip.source()), Address::from_v6(ip.destination())];
                if source.is_v4() || destination.is_v4() {
                    return Err(Malformed::Address);
                }
                let header = extensions.into_iter().find_map(|extension| match extension {
                    Ipv6ExtensionSlice::Fragment(header) if header.is_fragmenting_payload() => Some(header),
                    _ => None,
                });
                let fragment = header.map(|header| Fragment {
                    id: header.identification(),
                    protocol: number.0,
                    is_first: header.fragment_offset().value() == 0,
                });
                Ok((Self::new(Family::V6, source, destination, at, length, fragment), number))
            }
            _ => Err(Malformed::Version),
        }
    }

    fn new(
        family: Family,
        source: Address,
        destination: Address,
        transport_at: usize,
        length: usize,
        fragment: Option<Fragment>,
    ) -> Self {
        let transport = if fragment.is_some() { Transport::Fragment } else { Transport::Other };
        let (source_port, destination_port) = (0, 0);
        Self { family, source, destination, source_port, destination_port, transport, fragment, transport_at, length }
    }

    fn set_ports(&mut self, source: u16, destination: u16) {
        (self.source_port, self.destination_port) = (source, destination);
    }

    /// The protocol that Services know, when it is one.
    pub fn protocol(&self) -> Option<Protocol> {
        match self.transport {
            Transport::Tcp(_) => Some(Protocol::Tcp),
            Transport::Udp => Some(Protocol::Udp),
            Transport::Sctp => Some(Protocol::Sctp),
            Transport::Icmp(_) | Transport::Fragment | Transport::Other => None,
        }
    }

    /// What the flow table finds this packet by.
    pub fn key(&self, protocol: Protocol) -> FlowKey {
        FlowKey {
            source: self.source,
            destination: self.destination,
            source_port: self.source_port,
            destination_port: self.destination_port,
            protocol,
        }
    }
}

fn icmp(body: &[u8]) -> Result<Transport, Malformed> {
    // RFC 792 and RFC 4443: eight bytes at least, the type first.
    body.first_chunk::<8>().map(|header| Transport::Icmp(header[0])).ok_or(Malformed::Transport)
}
