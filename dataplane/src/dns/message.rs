//! Questions off the wire, answers onto it: sizes, truncation, EDNS, and what is refused before it is looked up.

use hickory_proto::op::ResponseCode;
use hickory_proto::rr::{DNSClass, Name, RData, RecordType};
use hickory_proto::serialize::binary::{BinDecodable as _, BinDecoder, BinEncodable as _, BinEncoder};

use super::answer::{Answer, Question, Record};

/// Bytes of a message's header.
pub(super) const HEADER: usize = 12;
/// Size of an answer to who says nothing of sizes (RFC 1035 §4.2.1).
const PLAIN_SIZE: u16 = 512;
/// Longest datagram that is sent: what passes every path in one piece (DNS flag day 2020).
pub const LARGEST_DATAGRAM: u16 = 1232;
/// An OPT record without options.
const OPT: usize = 11;
/// A name that lies at this place of the message, which is added.
pub(super) const POINTER: u16 = 0xc000;
/// Where the name of the question lies in every answer: a compressed name.
pub(super) const QUESTION_NAME: u16 = POINTER + HEADER as u16;

const QR: u16 = 0x8000;
const AA: u16 = 0x0400;
const TC: u16 = 0x0200;
const RD: u16 = 0x0100;
const RA: u16 = 0x0080;
const CD: u16 = 0x0010;
const OPCODE: u16 = 0x7800;

/// How a question came.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Transport {
    /// In a datagram.
    Udp,
    /// Over a connection.
    Tcp,
}

impl Transport {
    /// Name as metric label.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Udp => "udp",
            Self::Tcp => "tcp",
        }
    }
}

/// A question that can be looked up.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    head: Head,
    /// The question section as it came.
    wire: Box<[u8]>,
    /// The question.
    pub question: Question,
}

/// What a message says besides its question.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Head {
    id: u16,
    flags: u16,
    edns: Option<Edns>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Edns {
    size: u16,
    version: u8,
    dnssec_ok: bool,
}

/// What an answer says of itself.
#[derive(Clone, Copy, Debug)]
pub(super) struct Says {
    pub(super) code: ResponseCode,
    pub(super) authoritative: bool,
    pub(super) truncated: bool,
    /// Names outside the zone can be asked for.
    pub(super) recursion: bool,
}

/// A message that is not looked up.
#[derive(Clone, Debug, PartialEq)]
pub enum Refusal {
    /// Nobody is to be answered: it is no question.
    Silence,
    /// Answer with these bytes.
    Answer(Vec<u8>, ResponseCode),
}

/// Whose a record is, in words.
#[derive(Clone, Copy, Debug)]
pub struct Owner<'a>(pub &'a Record, pub &'a Question);

impl std::fmt::Display for Owner<'_> {
    /// `name ttl type data`, as zone files have it.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self(record, question) = self;
        let owner = record.owner.as_ref().unwrap_or(&question.name);
        write!(f, "{owner} {} {} ", record.ttl, record.data.record_type())?;
        match &record.data {
            RData::TXT(text) => {
                let parts = text.txt_data.iter().map(|part| format!("{:?}", String::from_utf8_lossy(part)));
                f.write_str(&parts.collect::<Vec<_>>().join(" "))
            }
            data => write!(f, "{data}"),
        }
    }
}

impl Request {
    /// Whether the client asks for names outside too.
    #[must_use]
    pub fn wants_recursion(&self) -> bool {
        self.head.flags & RD != 0
    }

    /// Whether the client asks for signatures too.
    #[must_use]
    pub fn dnssec_ok(&self) -> bool {
        self.head.dnssec_ok()
    }

    /// Whether the client says what size it takes.
    #[must_use]
    pub fn has_edns(&self) -> bool {
        self.head.edns.is_some()
    }

    /// Largest answer that the client takes.
    #[must_use]
    pub fn limit(&self, transport: Transport) -> u16 {
        self.head.limit(transport)
    }
}

impl Head {
    pub(super) fn dnssec_ok(self) -> bool {
        self.edns.is_some_and(|edns| edns.dnssec_ok)
    }

    fn limit(self, transport: Transport) -> u16 {
        match (transport, self.edns) {
            (Transport::Tcp, _) => u16::MAX,
            (Transport::Udp, None) => PLAIN_SIZE,
            (Transport::Udp, Some(edns)) => edns.size.clamp(PLAIN_SIZE, LARGEST_DATAGRAM),
        }
    }

    /// Bytes that an answer may have before its end is written.
    pub(super) fn room(self, transport: Transport) -> usize {
        usize::from(self.limit(transport)) - self.edns.map_or(0, |_| OPT)
    }

    /// The header of an answer, its counts zero, and the question section.
    pub(super) fn begin(self, question: &[u8], says: Says, out: &mut Vec<u8>) {
        let mut flags = QR | (self.flags & (RD | CD)) | (u16::from(says.code) & 0xf);
        flags |= if says.authoritative { AA } else { 0 };
        flags |= if says.truncated { TC } else { 0 };
        flags |= if says.recursion { RA } else { 0 };
        out.clear();
        for part in [self.id, flags, 1, 0, 0, 0] {
            out.extend_from_slice(&part.to_be_bytes());
        }
        out.extend_from_slice(question);
    }

    /// What stands behind the records, and their counts.
    pub(super) fn end(self, out: &mut Vec<u8>, counts: [usize; 3], code: ResponseCode) {
        let mut counts = counts;
        if let Some(edns) = self.edns {
            counts[2] += 1;
            let flags = if edns.dnssec_ok { 0x8000 } else { 0 };
            // An owner of one zero byte, the type, our size, the upper part of the code, version 0, no options.
            out.push(0);
            for part in [u16::from(RecordType::OPT), LARGEST_DATAGRAM, u16::from(code) >> 4 << 8, flags, 0] {
                out.extend_from_slice(&part.to_be_bytes());
            }
        }
        for (index, count) in counts.iter().enumerate() {
            let at = 6 + 2 * index;
            out[at..at + 2].copy_from_slice(&(*count as u16).to_be_bytes());
        }
    }
}

/// A plain question's head, where its name ends, and its type; nothing when there is anything about the message that
/// [`read`] has to look at.
pub(super) fn glance(bytes: &[u8]) -> Option<(Head, usize, RecordType)> {
    let word = |index: usize| u16::from_be_bytes([bytes[index], bytes[index + 1]]);
    if bytes.len() < HEADER || word(2) & (QR | OPCODE) != 0 || word(4) != 1 || word(6) != 0 || word(8) != 0 {
        return None;
    }
    let end = end_of_name(bytes)?;
    let fixed = bytes.get(end..end + 4)?;
    if fixed[2..] != u16::from(DNSClass::IN).to_be_bytes() {
        return None;
    }
    let edns = read_edns(bytes, end + 4, 0, usize::from(word(10)))?;
    if edns.is_some_and(|edns| edns.version > 0) {
        return None;
    }
    let kind = RecordType::from(u16::from_be_bytes([fixed[0], fixed[1]]));
    Some((Head { id: word(0), flags: word(2), edns }, end, kind))
}

/// Where the name of the question ends. It is written out: there is nothing before it to point at.
fn end_of_name(bytes: &[u8]) -> Option<usize> {
    let mut at = HEADER;
    loop {
        match *bytes.get(at)? {
            0 => return Some(at + 1),
            length @ 1..=63 => at += 1 + usize::from(length),
            _ => return None,
        }
    }
}

/// Reads a message.
///
/// # Errors
/// What to do with one that holds no question for us.
pub fn read(bytes: &[u8]) -> Result<Request, Refusal> {
    let word = |index: usize| u16::from_be_bytes([bytes[index], bytes[index + 1]]);
    if bytes.len() < HEADER || word(2) & QR != 0 {
        return Err(Refusal::Silence);
    }
    let (id, flags) = (word(0), word(2));
    let refuse = |code: ResponseCode| {
        let mut out = Vec::with_capacity(HEADER);
        let flags = QR | (flags & (OPCODE | RD | CD)) | (u16::from(code) & 0xf);
        for part in [id, flags, 0, 0, 0, 0] {
            out.extend_from_slice(&part.to_be_bytes());
        }
        Err(Refusal::Answer(out, code))
    };
    match (flags & OPCODE, word(4)) {
        (0, 1) => {}
        (0, 0) => return refuse(ResponseCode::ServFail),
        (0, _) => return refuse(ResponseCode::FormErr),
        _ => return refuse(ResponseCode::NotImp),
    }
    let Some((question, class, end)) = read_question(bytes) else { return refuse(ResponseCode::FormErr) };
    let others = usize::from(word(6)) + usize::from(word(8));
    let Some(edns) = read_edns(bytes, end, others, usize::from(word(10))) else {
        return refuse(ResponseCode::FormErr);
    };
    let request = Request { head: Head { id, flags, edns }, wire: bytes[HEADER..end].into(), question };
    let code = match edns {
        Some(edns) if edns.version > 0 => ResponseCode::BADVERS,
        _ if class != DNSClass::IN => ResponseCode::Refused,
        _ => return Ok(request),
    };
    let mut out = Vec::new();
    encode(&request, &Answer { code, ..Answer::default() }, Transport::Udp, false, &mut out);
    Err(Refusal::Answer(out, code))
}

/// The question and where it ends.
fn read_question(bytes: &[u8]) -> Option<(Question, DNSClass, usize)> {
    let end = end_of_name(bytes)? + 4;
    let mut decoder = BinDecoder::new(bytes.get(HEADER..end)?);
    let name = Name::read(&mut decoder).ok()?;
    let kind = RecordType::read(&mut decoder).ok()?;
    let class = DNSClass::read(&mut decoder).ok()?;
    Some((Question { name, kind }, class, end))
}

/// The OPT record, when there is one. Nothing when records do not end where the message does not, or there are two.
#[expect(clippy::option_option, reason = "no record and no message are two things")]
fn read_edns(bytes: &[u8], mut at: usize, others: usize, additional: usize) -> Option<Option<Edns>> {
    let mut found = None;
    for index in 0..others + additional {
        loop {
            match *bytes.get(at)? {
                0 => break at += 1,
                length @ 1..=63 => at += 1 + usize::from(length),
                192.. => break at += 2,
                _ => return None,
            }
        }
        let fixed = bytes.get(at..at + 10)?;
        let word = |index: usize| u16::from_be_bytes([fixed[index], fixed[index + 1]]);
        at += 10 + usize::from(word(8));
        if at > bytes.len() {
            return None;
        }
        if index >= others && word(0) == u16::from(RecordType::OPT) {
            let edns = Edns { size: word(2), version: fixed[5], dnssec_ok: word(6) & 0x8000 != 0 };
            if found.replace(edns).is_some() {
                return None;
            }
        }
    }
    Some(found)
}

/// Writes an answer. What does not fit is left out: where that is part of the answer itself, it says so. `recursion`: names
/// outside the zone can be asked for.
pub fn encode(request: &Request, answer: &Answer, transport: Transport, recursion: bool, out: &mut Vec<u8>) {
    let Answer { code, authoritative, truncated, .. } = *answer;
    request.head.begin(&request.wire, Says { code, authoritative, truncated, recursion }, out);
    let room = request.head.room(transport);
    let only_addresses = answer.authority.is_empty()
        && answer.additional.is_empty()
        && answer.answers.iter().all(|it| it.owner.is_none() && matches!(it.data, RData::A(_) | RData::AAAA(_)));
    let counts = match only_addresses {
        true => [write_addresses(&answer.answers, room, out), 0, 0],
        false => write_records(request, answer, room, out),
    };
    if counts[0] < answer.answers.len() || counts[1] < answer.authority.len() {
        out[2] |= (TC >> 8) as u8;
    }
    request.head.end(out, counts, answer.code);
}

/// Addresses of the question's name, without a look at names. Returns how many fit.
fn write_addresses(records: &[Record], room: usize, out: &mut Vec<u8>) -> usize {
    for (index, record) in records.iter().enumerate() {
        let data: &[u8] = match &record.data {
            RData::A(address) => &address.0.octets(),
            RData::AAAA(address) => &address.0.octets(),
            _ => return index,
        };
        if out.len() + 12 + data.len() > room {
            return index;
        }
        for part in [QUESTION_NAME, u16::from(record.data.record_type()), u16::from(DNSClass::IN)] {
            out.extend_from_slice(&part.to_be_bytes());
        }
        out.extend_from_slice(&record.ttl.to_be_bytes());
        out.extend_from_slice(&(data.len() as u16).to_be_bytes());
        out.extend_from_slice(data);
    }
    records.len()
}

/// Records of any kind, names compressed. Returns how many of each section fit.
fn write_records(request: &Request, answer: &Answer, room: usize, out: &mut Vec<u8>) -> [usize; 3] {
    let mut counts = [0; 3];
    let end = out.len();
    out.truncate(HEADER);
    let header: Vec<u8> = std::mem::take(out);
    let mut encoder = BinEncoder::new(out);
    encoder.set_max_size(room as u16);
    let mut begin = || {
        header.iter().try_for_each(|byte| encoder.emit(*byte))?;
        // Written once more, so that it is known as something to point at.
        request.question.name.emit(&mut encoder)?;
        encoder.emit_u16(u16::from(request.question.kind))?;
        encoder.emit_u16(u16::from(DNSClass::IN))
    };
    if begin().is_err() || encoder.offset() != end {
        // The question was read from a message of this size, and is written the same.
        return counts;
    }
    'sections: for (section, records) in [&answer.answers, &answer.authority, &answer.additional].iter().enumerate() {
        for record in *records {
            let before = encoder.offset();
            if write_record(record, &mut encoder).is_err() {
                encoder.set_offset(before);
                encoder.trim();
                break 'sections;
            }
            counts[section] += 1;
        }
    }
    counts
}

fn write_record(record: &Record, encoder: &mut BinEncoder<'_>) -> Result<(), hickory_proto::ProtoError> {
    match &record.owner {
        None => encoder.emit_u16(QUESTION_NAME)?,
        Some(owner) => owner.emit(encoder)?,
    }
    record.data.record_type().emit(encoder)?;
    DNSClass::IN.emit(encoder)?;
    encoder.emit_u32(record.ttl)?;
    let length = encoder.place::<u16>()?;
    record.data.emit(encoder)?;
    let written = encoder.len_since_place(&length) as u16;
    length.replace(encoder, written)
}
