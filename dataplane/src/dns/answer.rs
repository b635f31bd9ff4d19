//! What a question is answered with: a pure function of the zone.

use std::net::IpAddr;
use std::sync::Arc;

use fastrand::Rng;
use hickory_proto::op::ResponseCode;
use hickory_proto::rr::rdata::{A, AAAA, CNAME, NS, SOA, SRV, TXT};
use hickory_proto::rr::{Name, RData, RecordType};

use super::find::Found;
use super::labels::Labels;
use super::service::RecordSet;
use super::zone::Zone;

/// Version of the specification that names follow.
const SCHEMA_VERSION: &str = "1.1.0";
/// Its time to live.
const VERSION_TTL: u32 = 28_800;
/// Negative answers live no longer.
pub(super) const NEGATIVE_TTL: u32 = 300;
/// Refresh, retry and expiry of the zone, in seconds: CoreDNS's.
pub(super) const SOA_TIMES: [u32; 3] = [7200, 1800, 86400];
/// Aliases that are followed.
const LONGEST_CHAIN: usize = 10;

/// A question of class IN.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// The name, in the client's letters.
    pub name: Name,
    /// The type.
    pub kind: RecordType,
}

/// A record of an answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    /// Whose it is; nothing: the name that was asked for.
    pub owner: Option<Name>,
    /// Time to live, in seconds.
    pub ttl: u32,
    /// Data.
    pub data: RData,
}

/// An answer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Answer {
    /// How it went.
    pub code: ResponseCode,
    /// The zone is ours.
    pub authoritative: bool,
    /// There is more than this.
    pub truncated: bool,
    /// What was asked for.
    pub answers: Vec<Record>,
    /// Who says so.
    pub authority: Vec<Record>,
    /// What will be asked next.
    pub additional: Vec<Record>,
}

/// What becomes of a question.
#[derive(Clone, Debug, PartialEq)]
pub enum Resolution {
    /// The zone answers.
    Answer(Answer),
    /// The zone does not know: somebody else may.
    Forward,
    /// Aliases lead out of the zone.
    Complete {
        /// The aliases, in order.
        aliases: Vec<Record>,
        /// Where they lead.
        target: Name,
        /// The answer when that cannot be found out.
        otherwise: Answer,
    },
}

impl Zone {
    /// Answers a question. `rng` orders what has no order.
    #[must_use]
    pub fn resolve(&self, question: &Question, rng: &mut Rng) -> Resolution {
        let labels = Labels::new(&question.name);
        let Some((left, origin)) = self.origin(&labels) else {
            return self.outside(question, &labels);
        };
        if matches!(question.kind, RecordType::AXFR | RecordType::IXFR) {
            return Resolution::Answer(Answer { code: ResponseCode::Refused, ..Answer::default() });
        }
        let asked = Asked { zone: self, question, origin: question.name.trim_to(origin.len()) };
        asked.answer(&labels, left, rng)
    }

    /// Names in no zone of ours. Reverse names of our addresses are answered unless other reverse zones are configured.
    fn outside(&self, question: &Question, labels: &Labels) -> Resolution {
        if question.kind != RecordType::PTR || self.settings.has_reverse {
            return Resolution::Forward;
        }
        let answers = labels.reverse_address().map(|address| self.reverse(address)).unwrap_or_default();
        match answers.is_empty() {
            true => Resolution::Forward,
            false => Resolution::Answer(Answer { authoritative: true, answers, ..Answer::default() }),
        }
    }

    pub(super) fn record(&self, data: RData) -> Record {
        Record { owner: None, ttl: self.settings.ttl, data }
    }
}

/// A question in a zone.
struct Asked<'q> {
    zone: &'q Zone,
    question: &'q Question,
    /// The zone's name in the question's letters.
    origin: Name,
}

impl Asked<'_> {
    fn answer(&self, labels: &Labels, left: usize, rng: &mut Rng) -> Resolution {
        let kind = self.question.kind;
        let apex = left == 0;
        let records = match kind {
            RecordType::SOA if apex => return self.positive(vec![self.soa()]),
            // As CoreDNS does, even for names that are not there.
            RecordType::SOA => return Resolution::Answer(self.negative(ResponseCode::NoError)),
            RecordType::NS if apex => return Resolution::Answer(self.name_servers()),
            RecordType::PTR => labels.reverse_address().map(|address| self.zone.reverse(address)),
            _ => None,
        };
        if let Some(records) = records {
            return if records.is_empty() { self.missing(labels) } else { self.positive(records) };
        }
        match (self.zone.find(labels, left), kind) {
            (Found::Nothing, _) => self.missing(labels),
            (Found::Version, RecordType::TXT) => {
                let data = RData::TXT(TXT::new(vec![SCHEMA_VERSION.to_owned()]));
                self.positive(vec![Record { owner: None, ttl: VERSION_TTL, data }])
            }
            // As CoreDNS does: to it, text is asked for below a Service or Pod only.
            (Found::Empty, RecordType::TXT) if !apex => self.missing(labels),
            (Found::Set(set), RecordType::SRV) => self.services(set, labels, rng),
            (Found::Made(set), RecordType::SRV) => self.services(&set, labels, rng),
            (Found::Alias(target), RecordType::CNAME) => match parse_name(target) {
                Some(target) => self.positive(vec![self.zone.record(RData::CNAME(CNAME(target)))]),
                None => self.missing(labels),
            },
            (Found::Alias(target), RecordType::A | RecordType::AAAA) => self.follow(labels, target, rng),
            (found, RecordType::A | RecordType::AAAA) => {
                let addresses = self.addresses(&found, rng);
                self.positive(addresses.into_iter().map(|data| self.zone.record(data)).collect())
            }
            (
                Found::Empty
                | Found::Set(_)
                | Found::Made(_)
                | Found::Alias(_)
                | Found::Address(_)
                | Found::Own
                | Found::Version,
                _,
            ) => Resolution::Answer(self.negative(ResponseCode::NoError)),
        }
    }

    /// Addresses of the family that was asked for, in random order.
    fn addresses(&self, found: &Found<'_>, rng: &mut Rng) -> Vec<RData> {
        let v4 = self.question.kind == RecordType::A;
        let data = |address: IpAddr| match address {
            IpAddr::V4(address) if v4 => Some(RData::A(A(address))),
            IpAddr::V6(address) if !v4 => Some(RData::AAAA(AAAA(address))),
            IpAddr::V4(_) | IpAddr::V6(_) => None,
        };
        let of_set = |set: &RecordSet| -> Vec<RData> {
            match v4 {
                true => set.v4.iter().map(|address| RData::A(A(*address))).collect(),
                false => set.v6.iter().map(|address| RData::AAAA(AAAA(*address))).collect(),
            }
        };
        let mut addresses = match found {
            Found::Set(set) => of_set(set),
            Found::Made(set) => of_set(set),
            Found::Address(address) => data(*address).into_iter().collect(),
            Found::Own => {
                self.zone.own_names(&self.origin).into_iter().filter_map(|(_, address)| data(address)).collect()
            }
            Found::Nothing | Found::Empty | Found::Alias(_) | Found::Version => Vec::new(),
        };
        rng.shuffle(&mut addresses);
        addresses
    }

    fn services(&self, set: &RecordSet, labels: &Labels, rng: &mut Rng) -> Resolution {
        // The Service's part of a target is as it is stored, the zone's as in the question.
        let left = usize::from(self.question.name.num_labels()) - usize::from(self.origin.num_labels());
        let text = |from_right: usize| labels.get(left - from_right);
        let service = Name::from_labels([text(3), text(2), b"svc"]).and_then(|name| name.append_domain(&self.origin));
        let Ok(service) = service else { return self.missing(labels) };
        let target = |label: &Option<Arc<str>>| match label {
            None => Some(service.clone()),
            Some(label) => service.prepend_label(label.as_bytes()).ok(),
        };
        let mut answers: Vec<Record> = Vec::with_capacity(set.targets.len());
        for (label, port) in &set.targets {
            let Some(target) = target(label) else { continue };
            answers.push(self.zone.record(RData::SRV(SRV::new(0, set.weight, *port, target))));
        }
        if answers.is_empty() {
            return Resolution::Answer(self.negative(ResponseCode::NoError));
        }
        rng.shuffle(&mut answers);
        let additional = set.target_addresses.iter().filter_map(|(label, address)| {
            let data = match address {
                IpAddr::V4(address) => RData::A(A(*address)),
                IpAddr::V6(address) => RData::AAAA(AAAA(*address)),
            };
            Some(Record { owner: Some(target(label)?), ttl: self.zone.settings.ttl, data })
        });
        let additional = additional.collect();
        Resolution::Answer(Answer { authoritative: true, answers, additional, ..Answer::default() })
    }

    /// Follows an alias and those that it leads to. What leads nowhere is no alias: nothing is answered.
    fn follow(&self, labels: &Labels, target: &str, rng: &mut Rng) -> Resolution {
        let nothing = || Resolution::Answer(self.negative(ResponseCode::NoError));
        let mut aliases: Vec<Record> = Vec::new();
        let (mut owner, mut owner_labels): (Option<Name>, Option<Labels>) = (None, None);
        let mut target = target.to_owned();
        loop {
            let Some(name) = parse_name(&target) else { return nothing() };
            let next = Labels::new(&name);
            // A name below the one that was asked for would come back to it.
            let whole: Vec<Box<[u8]>> = {
                let from = owner_labels.as_ref().unwrap_or(labels);
                (0..from.len()).map(|index| from.get(index).into()).collect()
            };
            let is_known = aliases.iter().any(|alias| matches!(&alias.data, RData::CNAME(known) if known.0 == name));
            if next.before(&whole).is_some() || is_known || aliases.len() == LONGEST_CHAIN {
                return nothing();
            }
            let ttl = self.zone.settings.ttl;
            aliases.push(Record { owner: owner.replace(name.clone()), ttl, data: RData::CNAME(CNAME(name.clone())) });
            let Some((left, _)) = self.zone.origin(&next) else {
                let otherwise = self.negative(ResponseCode::NoError);
                return Resolution::Complete { aliases, target: name, otherwise };
            };
            match self.zone.find(&next, left) {
                Found::Alias(further) => target = further.to_owned(),
                found => {
                    let addresses = self.addresses(&found, rng);
                    if addresses.is_empty() {
                        return nothing();
                    }
                    let owned = addresses.into_iter().map(|data| Record { owner: Some(name.clone()), ttl, data });
                    aliases.extend(owned);
                    return self.positive(aliases);
                }
            }
            owner_labels = Some(next);
        }
    }

    fn name_servers(&self) -> Answer {
        let names = self.zone.own_names(&self.origin);
        let mut servers: Vec<&Name> = names.iter().map(|(name, _)| name).collect();
        servers.dedup();
        let answers = servers.into_iter().map(|name| self.zone.record(RData::NS(NS(name.clone())))).collect::<Vec<_>>();
        if answers.is_empty() {
            return self.negative(ResponseCode::NoError);
        }
        let glue = names.into_iter().map(|(name, address)| {
            let data = match address {
                IpAddr::V4(address) => RData::A(A(address)),
                IpAddr::V6(address) => RData::AAAA(AAAA(address)),
            };
            Record { owner: Some(name), ttl: self.zone.settings.ttl, data }
        });
        Answer { authoritative: true, answers, additional: glue.collect(), ..Answer::default() }
    }

    /// Records, or that there are none.
    fn positive(&self, answers: Vec<Record>) -> Resolution {
        if answers.is_empty() {
            return Resolution::Answer(self.negative(ResponseCode::NoError));
        }
        Resolution::Answer(Answer { authoritative: true, answers, ..Answer::default() })
    }

    /// The name does not exist, as far as this zone knows.
    fn missing(&self, labels: &Labels) -> Resolution {
        if self.zone.settings.fall_through.iter().any(|zone| labels.before(zone).is_some()) {
            return Resolution::Forward;
        }
        let code = if self.zone.is_synced { ResponseCode::NXDomain } else { ResponseCode::ServFail };
        Resolution::Answer(self.negative(code))
    }

    fn negative(&self, code: ResponseCode) -> Answer {
        Answer { code, authoritative: true, authority: vec![self.soa()], ..Answer::default() }
    }

    fn soa(&self) -> Record {
        let below = |labels: &[&str]| {
            let name = Name::from_labels(labels.iter().map(|label| label.as_bytes()));
            name.and_then(|name| name.append_domain(&self.origin)).unwrap_or_else(|_| self.origin.clone())
        };
        let (server, mail, ttl) = (below(&["ns", "dns"]), below(&["hostmaster"]), self.zone.settings.ttl);
        let [refresh, retry, expire] = SOA_TIMES;
        let soa = SOA::new(server, mail, self.zone.serial, refresh as i32, retry as i32, expire as i32, ttl);
        Record { owner: Some(self.origin.clone()), ttl: ttl.min(NEGATIVE_TTL), data: RData::SOA(soa) }
    }
}

fn parse_name(text: &str) -> Option<Name> {
    let mut name = Name::from_ascii(text).ok()?;
    name.set_fqdn(true);
    Some(name)
}
