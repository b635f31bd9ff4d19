//! Names for people: a question in words, its answer as text and JSON. Behind `sluice resolve` and the admin API.

use std::fmt;

use hickory_resolver::proto::rr::{Name, RecordType};
use serde::{Deserialize, Serialize};
use sluice_dataplane::dns::{Answer, Owner, Question, Record};

/// An answer as `resolve -o json` prints it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resolved {
    /// `NOERROR`, `NXDOMAIN` and so on.
    pub rcode: String,
    /// Records `name ttl type data`.
    pub answer: Vec<String>,
    /// Records of the authority section.
    pub authority: Vec<String>,
    /// Records of the additional section.
    pub additional: Vec<String>,
}

impl Resolved {
    /// In words.
    #[must_use]
    pub fn new(question: &Question, answer: &Answer) -> Self {
        let words = |records: &[Record]| records.iter().map(|it| Owner(it, question).to_string()).collect();
        Self {
            rcode: code(answer).to_owned(),
            answer: words(&answer.answers),
            authority: words(&answer.authority),
            additional: words(&answer.additional),
        }
    }
}

impl fmt::Display for Resolved {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.rcode)?;
        for (section, records) in
            [("answer", &self.answer), ("authority", &self.authority), ("additional", &self.additional)]
        {
            for record in records {
                write!(f, "\n{section:<11} {record}")?;
            }
        }
        Ok(())
    }
}

/// Name of a response code, as everybody writes it.
#[must_use]
pub fn code(answer: &Answer) -> &'static str {
    use hickory_resolver::proto::op::ResponseCode;
    match answer.code {
        ResponseCode::NoError => "NOERROR",
        ResponseCode::FormErr => "FORMERR",
        ResponseCode::ServFail => "SERVFAIL",
        ResponseCode::NXDomain => "NXDOMAIN",
        ResponseCode::NotImp => "NOTIMP",
        ResponseCode::Refused => "REFUSED",
        ResponseCode::BADVERS => "BADVERS",
        _ => "OTHER",
    }
}

/// Reads a question. `namespace`: the name is one of a Pod there; all that its search path would try come out, in order.
pub fn questions(name: &str, kind: &str, namespace: Option<&str>, zone: &str) -> Result<Vec<Question>, String> {
    let kind: RecordType =
        kind.to_uppercase().parse().map_err(|_| format!("{kind:?} is no type of records: use A, AAAA, SRV, PTR …"))?;
    let parse = |text: &str| {
        let mut name = Name::from_ascii(text).map_err(|error| format!("{text:?} is no name: {error}"))?;
        name.set_fqdn(true);
        Ok::<_, String>(name)
    };
    // As a Pod's resolver does with `ndots:5`.
    let search = match namespace {
        Some(namespace) if !name.ends_with('.') => {
            vec![format!("{namespace}.svc.{zone}"), format!("svc.{zone}"), zone.to_owned()]
        }
        _ => Vec::new(),
    };
    let is_long = name.matches('.').count() >= 5;
    let mut names: Vec<String> = search.into_iter().map(|domain| format!("{name}.{domain}")).collect();
    names.insert(if is_long { 0 } else { names.len() }, name.to_owned());
    names.into_iter().map(|name| Ok(Question { name: parse(&name)?, kind })).collect()
}
