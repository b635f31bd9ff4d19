//! DNS from outside: cases with their questions, and a client that asks one question by datagram or over a connection.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::time::Duration;
use std::{fs, io};

use anyhow::{Context as _, Result, ensure};
use hickory_proto::op::{Edns, Message, OpCode, Query};
use hickory_proto::rr::{Name, RData, Record, RecordType};
use serde_json::Value;

/// A case with the file it is from.
pub struct Case {
    /// Name of the file.
    pub file: String,
    /// The case.
    pub case: Value,
}

impl Case {
    /// Its name, for people.
    #[must_use]
    pub fn name(&self) -> String {
        format!("{}: {}", self.file, self.case["name"].as_str().unwrap_or("a case without a name"))
    }

    /// Its questions.
    pub fn queries(&self) -> impl Iterator<Item = &Value> {
        self.case["queries"].as_array().into_iter().flatten()
    }

    /// Writes its objects to a folder, a file each.
    pub fn write_objects(&self, folder: &Path) -> io::Result<()> {
        for (index, object) in self.case["objects"].as_array().into_iter().flatten().enumerate() {
            fs::write(folder.join(format!("{index:04}.json")), object.to_string())?;
        }
        Ok(())
    }
}

/// Cases of all files `dns*.json`: our own, those beside the project, and those of the folder in `SLUICE_CASES`.
///
/// # Panics
/// When a file is no file of cases.
#[must_use]
pub fn cases() -> Vec<Case> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let named = std::env::var_os("SLUICE_CASES").map(PathBuf::from);
    let folders = [Some(here.join("tests/cases")), Some(here.join("../../shared/cases")), named];
    let mut files = Vec::new();
    for folder in folders.into_iter().flatten().filter(|folder| folder.is_dir()) {
        let entries = fs::read_dir(&folder).expect("a folder can be listed").flatten().map(|entry| entry.path());
        files.extend(entries.filter(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            name.starts_with("dns") && name.ends_with(".json")
        }));
    }
    files.sort();
    files.dedup();
    let read = |path: &PathBuf| {
        let text = fs::read_to_string(path).expect("a file of cases can be read");
        let file: Value = serde_json::from_str(&text).expect("a file of cases is JSON");
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let cases = file["cases"].as_array().cloned().expect("a file of cases has cases");
        cases.into_iter().map(move |case| Case { file: name.clone(), case })
    };
    files.iter().flat_map(read).collect()
}

/// What is different from what a case expects of an answer, which is as `sluice resolve -o json` prints it.
#[must_use]
pub fn difference(query: &Value, answer: &Value) -> Option<String> {
    let expect = &query["expect"];
    let question = format!("{} {}", query["qname"], query["qtype"]);
    if expect["rcode"] != answer["rcode"] {
        return Some(format!("{question}: expected {}, got {}", expect["rcode"], answer["rcode"]));
    }
    for section in ["answer", "authority", "additional"] {
        let texts = |value: &Value| -> Vec<String> {
            value[section].as_array().into_iter().flatten().filter_map(|it| it.as_str().map(str::to_owned)).collect()
        };
        let (wanted, mut got) = (texts(expect), texts(answer));
        let in_order = got.iter().position(|it| it.contains(" CNAME ")).unwrap_or(0) == 0;
        for record in &wanted {
            match got.iter().position(|other| matches_record(record, other)) {
                Some(place) => drop(got.swap_remove(place)),
                None => return Some(format!("{question}: {section} lacks {record}: {answer}")),
            }
        }
        if !got.is_empty() || !in_order {
            return Some(format!("{question}: {section} has more, or another order: {got:?}; expected {wanted:?}"));
        }
    }
    None
}

/// Field by field; `*` is anything. The last field of an SOA may be `None`, which is anything too.
fn matches_record(wanted: &str, got: &str) -> bool {
    let (wanted, got): (Vec<&str>, Vec<&str>) = (wanted.split(' ').collect(), got.split(' ').collect());
    wanted.len() == got.len() && wanted.iter().zip(&got).all(|(w, g)| *w == "*" || *w == "None" || w == g)
}

/// How a question is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    /// By datagram, again over a connection when the answer does not fit.
    Datagram,
    /// Over a connection.
    Connection,
}

/// A question, encoded. `size`: what EDNS says of sizes; none: no EDNS.
pub fn question(id: u16, name: &str, kind: &str, size: Option<u16>) -> Result<Vec<u8>> {
    let mut message = Message::new(id, hickory_proto::op::MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    let kind: RecordType = kind.parse().map_err(|error| anyhow::anyhow!("{kind}: {error}"))?;
    message.add_query(Query::query(Name::from_ascii(name)?, kind));
    if let Some(size) = size {
        let mut edns = Edns::new();
        edns.set_max_payload(size);
        message.set_edns(edns);
    }
    Ok(message.to_vec()?)
}

/// Asks and returns the answer as it came, from the calling thread's namespace.
pub fn ask_bytes(server: SocketAddr, by: By, question: &[u8], wait: Duration) -> Result<Vec<u8>> {
    match by {
        By::Datagram => {
            let any: SocketAddr = if server.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }.parse()?;
            let socket = UdpSocket::bind(any)?;
            socket.connect(server)?;
            socket.set_read_timeout(Some(wait))?;
            socket.send(question)?;
            let mut buffer = vec![0; 65535];
            let length = loop {
                match socket.recv(&mut buffer) {
                    // This process was stopped for a while.
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    result => break result.context("no answer")?,
                }
            };
            buffer.truncate(length);
            Ok(buffer)
        }
        By::Connection => {
            let mut stream = TcpStream::connect_timeout(&server, wait)?;
            stream.set_read_timeout(Some(wait))?;
            let length = u16::try_from(question.len())?.to_be_bytes();
            stream.write_all(&[&length[..], question].concat())?;
            let mut length = [0; 2];
            stream.read_exact(&mut length).context("no answer")?;
            let mut buffer = vec![0; usize::from(u16::from_be_bytes(length))];
            stream.read_exact(&mut buffer)?;
            Ok(buffer)
        }
    }
}

/// Asks as a resolver does.
pub fn ask(server: SocketAddr, by: By, name: &str, kind: &str, size: Option<u16>, wait: Duration) -> Result<Message> {
    let question = question(fastrand::u16(..), name, kind, size)?;
    let answer = Message::from_vec(&ask_bytes(server, by, &question, wait)?)?;
    ensure!(answer.id.to_be_bytes() == question[..2], "the answer is another question's");
    if by == By::Datagram && answer.truncation {
        return ask(server, By::Connection, name, kind, size, wait);
    }
    Ok(answer)
}

/// The answer as `sluice resolve -o json` prints it.
#[must_use]
pub fn as_json(answer: &Message) -> Value {
    let words = |records: &[Record]| -> Vec<String> {
        let data = |record: &Record| match &record.data {
            RData::TXT(text) => {
                let parts = text.txt_data.iter().map(|part| format!("{:?}", String::from_utf8_lossy(part)));
                parts.collect::<Vec<_>>().join(" ")
            }
            data => data.to_string(),
        };
        let line = |it: &Record| format!("{} {} {} {}", it.name, it.ttl, it.record_type(), data(it));
        records.iter().map(line).collect()
    };
    let code = format!("{:?}", answer.response_code).to_uppercase();
    serde_json::json!({"rcode": code, "answer": words(&answer.answers), "authority": words(&answer.authorities),
        "additional": words(&answer.additionals)})
}
