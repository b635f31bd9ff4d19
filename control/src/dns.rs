//! Names for people: a question in words, its answer as text and JSON. Behind `sluice resolve` and the admin API.

use std::fmt;

use hickory_resolver::proto::rr::{Name, RecordType};
use serde::{Deserialize, Serialize};
use sluice_dataplane::dns::{Answer, Answerer, Owner, Question, Record};
use tokio::sync::oneshot;

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

/// A question to the admin API.
#[derive(Clone, Debug, Deserialize)]
pub struct Asked {
    /// The name.
    pub name: String,
    /// Type of records.
    #[serde(rename = "type")]
    pub kind: String,
    /// Namespace of the Pod whose search path is walked.
    pub from: Option<String>,
}

/// Asks a responder as its clients do. Of a search path, the first answer that is one counts, or else the first of all.
pub async fn ask(names: &Answerer, asked: &Asked) -> Result<Resolved, String> {
    let zone = names.zone();
    let primary = zone.spec().zones.first().map_or("", String::as_str);
    let mut first = None;
    for question in questions(&asked.name, &asked.kind, asked.from.as_deref(), primary)? {
        let (sender, receiver) = oneshot::channel();
        // Who asked may be gone.
        let then = Box::new(move |answer| drop(sender.send(answer)));
        names.resolve(&question, &mut fastrand::Rng::new(), then);
        let answer: Answer = receiver.await.map_err(|_| "the question was lost".to_owned())?;
        let resolved = Resolved::new(&question, &answer);
        if !answer.answers.is_empty() {
            return Ok(resolved);
        }
        first.get_or_insert(resolved);
    }
    first.ok_or_else(|| "there is no question".to_owned())
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
