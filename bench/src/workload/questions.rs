//! Which questions a load of names asks: those of a list, or a mix for numbered Services.

use std::path::Path;
use std::str::FromStr;

use anyhow::{Context as _, Result, bail, ensure};
use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::{Name, RecordType};

/// Questions of a mix, drawn once: asked in this order, again and again.
const DRAWN: usize = 1 << 16;
/// Of numbered Services, every so many one is headless.
pub const HEADLESS_EVERY: usize = 5;

/// A question as it is sent, and what is known of its answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// The message; its first two bytes, the id, are the sender's.
    pub wire: Box<[u8]>,
    /// The code that it must be answered with, where that is known.
    pub code: Option<u8>,
}

impl Question {
    /// Of this name and type. `size`: what EDNS says of sizes; none: no EDNS.
    ///
    /// # Errors
    /// When it is no name.
    pub fn new(name: &str, kind: RecordType, size: Option<u16>, code: Option<ResponseCode>) -> Result<Self> {
        let mut message = Message::new(0, MessageType::Query, OpCode::Query);
        message.metadata.recursion_desired = true;
        let mut name = Name::from_ascii(name).with_context(|| format!("{name:?} is no name"))?;
        name.set_fqdn(true);
        message.add_query(Query::query(name, kind));
        if let Some(size) = size {
            let mut edns = Edns::new();
            edns.set_max_payload(size);
            message.set_edns(edns);
        }
        Ok(Self { wire: message.to_vec()?.into(), code: code.map(|code| code.low()) })
    }
}

/// Shares of kinds of questions, in whatever sum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mix {
    /// Address of a Service with a ClusterIP.
    pub a: u32,
    /// Its IPv6 address, which it has not.
    pub aaaa: u32,
    /// Its port `_http._tcp`.
    pub srv: u32,
    /// Addresses of a headless Service.
    pub headless: u32,
    /// A Service that does not exist, as search paths ask for.
    pub nxdomain: u32,
}

impl Default for Mix {
    fn default() -> Self {
        Self { a: 40, aaaa: 20, srv: 5, headless: 15, nxdomain: 20 }
    }
}

impl FromStr for Mix {
    type Err = String;

    /// `a=40,aaaa=20,srv=5,headless=15,nxdomain=20`; what is left out is not asked.
    fn from_str(text: &str) -> Result<Self, String> {
        let mut mix = Self { a: 0, aaaa: 0, srv: 0, headless: 0, nxdomain: 0 };
        for part in text.split(',') {
            let (kind, share) = part.split_once('=').ok_or_else(|| format!("{part:?}: use KIND=SHARE"))?;
            let share = share.parse().ok().filter(|share| *share <= 1_000_000);
            let share = share.ok_or_else(|| format!("{part:?}: the share is a number up to 1000000"))?;
            match kind {
                "a" => mix.a = share,
                "aaaa" => mix.aaaa = share,
                "srv" => mix.srv = share,
                "headless" => mix.headless = share,
                "nxdomain" => mix.nxdomain = share,
                other => return Err(format!("{other:?}: use a, aaaa, srv, headless and nxdomain")),
            }
        }
        if mix.sum() == 0 { Err("ask something".to_owned()) } else { Ok(mix) }
    }
}

impl Mix {
    fn sum(self) -> u32 {
        self.a + self.aaaa + self.srv + self.headless + self.nxdomain
    }
}

/// Whether a numbered Service is headless.
#[must_use]
pub fn is_headless(index: usize) -> bool {
    index % HEADLESS_EVERY == HEADLESS_EVERY - 1
}

/// Questions for Services `other-0` to `other-N` of `default` in `zone`, of which each fifth is headless.
///
/// # Errors
/// When there are too few Services for the mix, or the zone is no name.
pub fn generated(services: usize, zone: &str, mix: Mix, size: Option<u16>, seed: u64) -> Result<Vec<Question>> {
    ensure!(services >= HEADLESS_EVERY, "--services: use at least {HEADLESS_EVERY}");
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut questions = Vec::with_capacity(DRAWN);
    for _ in 0..DRAWN {
        let group = rng.usize(..services / HEADLESS_EVERY) * HEADLESS_EVERY;
        let index = group + rng.usize(..HEADLESS_EVERY - 1);
        let mut left = rng.u32(..mix.sum());
        let mut is = |share: u32| {
            let chosen = left < share;
            left = left.wrapping_sub(share);
            chosen
        };
        let of = |name: String| format!("{name}.default.svc.{zone}");
        let (name, kind, code) = if is(mix.a) {
            (of(format!("other-{index}")), RecordType::A, ResponseCode::NoError)
        } else if is(mix.aaaa) {
            (of(format!("other-{index}")), RecordType::AAAA, ResponseCode::NoError)
        } else if is(mix.srv) {
            (of(format!("_http._tcp.other-{index}")), RecordType::SRV, ResponseCode::NoError)
        } else if is(mix.headless) {
            (of(format!("other-{}", group + HEADLESS_EVERY - 1)), RecordType::A, ResponseCode::NoError)
        } else {
            (of(format!("missing-{index}")), RecordType::A, ResponseCode::NXDomain)
        };
        questions.push(Question::new(&name, kind, size, Some(code))?);
    }
    Ok(questions)
}

/// Questions of a file, as dnsperf reads it: a name and a type a line. A third word is the code of the answer.
///
/// # Errors
/// The file and the line of what is no question.
pub fn listed(path: &Path, size: Option<u16>) -> Result<Vec<Question>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut questions = Vec::new();
    for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let at = || format!("{}:{}", path.display(), number + 1);
        let words: Vec<&str> = line.split_whitespace().collect();
        let (name, kind, code) = match words[..] {
            [name, kind] => (name, kind, None),
            [name, kind, code] => (name, kind, Some(parse_code(code).with_context(at)?)),
            _ => bail!("{}: use NAME TYPE [CODE]", at()),
        };
        let kind = kind.parse().map_err(|_| anyhow::anyhow!("{}: {kind:?} is no type", at()))?;
        questions.push(Question::new(name, kind, size, code).with_context(at)?);
    }
    ensure!(!questions.is_empty(), "{} holds no question", path.display());
    Ok(questions)
}

fn parse_code(text: &str) -> Result<ResponseCode> {
    (0..=10).map(|low| ResponseCode::from(0, low)).find(|code| name_of(code.low()) == text).with_context(|| {
        format!("{text:?} is no code: use NOERROR, NXDOMAIN, SERVFAIL, REFUSED or another in capitals")
    })
}

/// A code as tools write it.
#[must_use]
pub fn name_of(code: u8) -> String {
    format!("{:?}", ResponseCode::from(0, code)).to_uppercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mix_is_asked_in_its_shares() {
        let mix: Mix = "a=1,nxdomain=3".parse().unwrap();
        let questions = generated(100, "cluster.local", mix, None, 1).unwrap();
        let missing = questions.iter().filter(|question| question.code == Some(3)).count();
        assert!((DRAWN * 7 / 10..DRAWN * 8 / 10).contains(&missing), "{missing} of {DRAWN}");
        for text in ["", "a", "a=x", "b=1", "a=0"] {
            assert!(text.parse::<Mix>().is_err(), "{text}");
        }
        assert!(generated(4, "cluster.local", mix, None, 1).is_err());
    }

    #[test]
    fn a_list_is_that_of_dnsperf_and_more() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let read = |text: &str| {
            std::fs::write(file.path(), text).unwrap();
            listed(file.path(), Some(1232))
        };
        let questions = read("example.org A\n\n_http._tcp.web.default.svc.cluster.local. SRV NXDOMAIN\n").unwrap();
        assert_eq!(questions.iter().map(|question| question.code).collect::<Vec<_>>(), [None, Some(3)]);
        let message = Message::from_vec(&questions[0].wire).unwrap();
        assert_eq!(message.queries[0].to_string(), "example.org. IN A");
        for (text, error) in [("", "no question"), ("a\n", ":1"), ("a A\nb NOTYPE\n", ":2"), ("a A NOCODE\n", ":1")] {
            let said = format!("{:#}", read(text).unwrap_err());
            assert!(said.contains(error), "{text:?}: {said}");
        }
    }
}
