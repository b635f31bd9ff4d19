//! The commonest answers straight onto the wire: addresses of what the zone knows, and that there are none. Nothing is
//! allocated, and the question's name is copied once. All else is for [`Zone::resolve`], which answers these the same.

use fastrand::Rng;
use hickory_proto::op::ResponseCode;
use hickory_proto::rr::{DNSClass, RecordType};

use super::answer::{NEGATIVE_TTL, SOA_TIMES};
use super::find::Found;
use super::labels::Labels;
use super::message::{HEADER, POINTER, QUESTION_NAME, Says, Transport, glance};
use super::zone::Zone;

/// An answer that was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Quick {
    pub(super) kind: RecordType,
    pub(super) code: ResponseCode,
    pub(super) dnssec_ok: bool,
}

/// The names of an SOA record before the zone's: `ns.dns` and `hostmaster`.
const SERVER: &[u8] = b"\x02ns\x03dns";
const MAIL: &[u8] = b"\x0ahostmaster";
/// Bytes of a record before its data, its owner a pointer.
const RECORD: usize = 12;

impl Zone {
    /// Answers a message, if it is so plain. `recursion`: names outside the zone can be asked for.
    pub(super) fn quick(
        &self,
        message: &[u8],
        by: Transport,
        recursion: bool,
        rng: &mut Rng,
        out: &mut Vec<u8>,
    ) -> Option<Quick> {
        let (head, end, kind) = glance(message)?;
        if !matches!(kind, RecordType::A | RecordType::AAAA) {
            return None;
        }
        let labels = Labels::of_wire(&message[HEADER..end])?;
        let (left, _) = self.origin(&labels)?;
        let found = self.find(&labels, left);
        let set = match &found {
            Found::Set(set) => Some(*set),
            Found::Made(set) => Some(set),
            Found::Nothing | Found::Empty => None,
            Found::Alias(_) | Found::Address(_) | Found::Own | Found::Version => return None,
        };
        let code = match found {
            Found::Nothing if self.settings.fall_through.iter().any(|zone| labels.before(zone).is_some()) => {
                return None;
            }
            Found::Nothing if self.is_synced => ResponseCode::NXDomain,
            Found::Nothing => ResponseCode::ServFail,
            _ => ResponseCode::NoError,
        };
        let question = &message[HEADER..end + 4];
        head.begin(question, Says { code, authoritative: true, truncated: false, recursion }, out);
        let addresses = match (set, kind) {
            (Some(set), RecordType::A) => write_all(out, kind, self.settings.ttl, set.v4.iter().map(|it| it.octets())),
            (Some(set), _) => write_all(out, kind, self.settings.ttl, set.v6.iter().map(|it| it.octets())),
            (None, _) => 0,
        };
        if addresses == 0 {
            self.write_soa(out, HEADER + labels.offset(left));
        } else {
            shuffle(&mut out[HEADER + question.len()..], addresses, rng);
        }
        if out.len() > head.room(by) {
            return None;
        }
        head.end(out, if addresses == 0 { [0, 1, 0] } else { [addresses, 0, 0] }, code);
        Some(Quick { kind, code, dnssec_ok: head.dnssec_ok() })
    }

    /// The zone's SOA record; its name, in the question's letters, lies at `origin`.
    fn write_soa(&self, out: &mut Vec<u8>, origin: usize) {
        let (ttl, pointer) = (self.settings.ttl, (POINTER + origin as u16).to_be_bytes());
        out.extend_from_slice(&pointer);
        let length = SERVER.len() + MAIL.len() + 2 * pointer.len() + 20;
        write_head(out, RecordType::SOA, ttl.min(NEGATIVE_TTL), length);
        for part in [SERVER, &pointer, MAIL, &pointer] {
            out.extend_from_slice(part);
        }
        let [refresh, retry, expire] = SOA_TIMES;
        for number in [self.serial, refresh, retry, expire, ttl] {
            out.extend_from_slice(&number.to_be_bytes());
        }
    }
}

/// A record after its owner, up to its data.
fn write_head(out: &mut Vec<u8>, kind: RecordType, ttl: u32, length: usize) {
    for part in [u16::from(kind), u16::from(DNSClass::IN)] {
        out.extend_from_slice(&part.to_be_bytes());
    }
    out.extend_from_slice(&ttl.to_be_bytes());
    out.extend_from_slice(&(length as u16).to_be_bytes());
}

/// A record of the question's name for each; how many.
fn write_all<const N: usize>(
    out: &mut Vec<u8>,
    kind: RecordType,
    ttl: u32,
    addresses: impl ExactSizeIterator<Item = [u8; N]>,
) -> usize {
    let count = addresses.len();
    out.reserve(count * (RECORD + N));
    for address in addresses {
        out.extend_from_slice(&QUESTION_NAME.to_be_bytes());
        write_head(out, kind, ttl, N);
        out.extend_from_slice(&address);
    }
    count
}

/// Puts records of one size into random order, each order as likely as any other.
fn shuffle(records: &mut [u8], count: usize, rng: &mut Rng) {
    let size = records.len() / count;
    for last in (1..count).rev() {
        let other = rng.usize(..=last);
        if other != last {
            let (left, right) = records.split_at_mut(last * size);
            left[other * size..][..size].swap_with_slice(&mut right[..size]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_order_is_as_likely() {
        let mut rng = Rng::with_seed(3);
        let mut first = [[0_u32; 4]; 4];
        for _ in 0..40_000 {
            let mut records = *b"aabbccdd";
            shuffle(&mut records, 4, &mut rng);
            for (place, record) in records.chunks(2).enumerate() {
                assert_eq!(record[0], record[1]);
                first[place][usize::from(record[0] - b'a')] += 1;
            }
        }
        assert!(first.iter().flatten().all(|count| count.abs_diff(10_000) < 500), "{first:?}");
    }
}
