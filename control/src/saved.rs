//! The objects in force, in a file beside the flows: what the next process serves until its source has told it all.
//!
//! A line for each object, its kind before its JSON; a first line with version and owner, a last one with count and checksum,
//! so that nothing cut short or changed is believed. The file's time of change is when its objects were last known to be true.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use jiff::Timestamp;
use serde::Serialize;
use serde::de::DeserializeOwned;
use xxhash_rust::xxh3::Xxh3;

use crate::object::Object;
use crate::problem::Origin;
use crate::source::{Change, Update};

/// Name of the file in the state directory.
const FILE: &str = "objects";
/// Format of the file.
const VERSION: &str = "sluice-objects 1";
/// Most bytes of the file. Larger ones are neither written nor read.
const LIMIT: u64 = 256 << 20;

/// The file, and whose objects are in it.
#[derive(Clone, Debug)]
pub struct Saved {
    path: PathBuf,
    owner: String,
}

/// Objects of an earlier process.
#[derive(Debug)]
pub struct Earlier {
    /// All of them, as a source would tell.
    pub update: Update,
    /// When they were last known to be true.
    pub as_of: Timestamp,
}

/// Objects that are not used, and why.
#[derive(Debug, thiserror::Error)]
#[error("{reason}; kept as {}", aside.display())]
pub struct Unusable {
    reason: String,
    aside: PathBuf,
}

impl Saved {
    /// In this state directory, of this node of this network namespace and boot: whatever tells those apart.
    #[must_use]
    pub fn new(state_dir: &Path, owner: &str) -> Self {
        Self { path: state_dir.join(FILE), owner: owner.replace('\n', " ") }
    }

    /// Writes objects, as a whole or not at all. Returns the bytes written.
    pub fn write(&self, objects: impl Iterator<Item = Object>) -> io::Result<u64> {
        let new = self.path.with_extension("new");
        let written = File::create(&new).and_then(|file| self.write_to(file, objects));
        match written {
            Ok(bytes) => fs::rename(&new, &self.path).map(|()| bytes),
            Err(error) => {
                // The old ones stay, and their age tells.
                let _ = fs::remove_file(&new);
                Err(error)
            }
        }
    }

    fn write_to(&self, file: File, objects: impl Iterator<Item = Object>) -> io::Result<u64> {
        let mut out = Checked { out: BufWriter::new(file), hash: Xxh3::new(), bytes: 0 };
        writeln!(out, "{VERSION}\n{}", self.owner)?;
        let mut count = 0_usize;
        for object in objects {
            match &object {
                Object::Service(object) => line(&mut out, "Service", &**object)?,
                Object::EndpointSlice(object) => line(&mut out, "EndpointSlice", &**object)?,
                Object::Node(object) => line(&mut out, "Node", &**object)?,
                Object::ServiceCidr(object) => line(&mut out, "ServiceCIDR", &**object)?,
                Object::Namespace(object) => line(&mut out, "Namespace", &**object)?,
                Object::Pod(object) => line(&mut out, "Pod", &**object)?,
                // No API source has them.
                Object::Deployment(_) | Object::StatefulSet(_) => continue,
            }
            count += 1;
        }
        let (checksum, bytes) = (out.hash.digest(), out.bytes);
        let mut file = out.out;
        write!(file, "end {count} {checksum:016x}")?;
        file.flush()?;
        Ok(bytes)
    }

    /// Notes that what is in the file is still true.
    pub fn confirm(&self) -> io::Result<()> {
        File::options().write(true).open(&self.path)?.set_modified(SystemTime::now())
    }

    /// What an earlier process wrote; nothing when there was none. A file that cannot be used is put aside.
    pub fn read(&self) -> Result<Option<Earlier>, Unusable> {
        let unusable = |reason: String| {
            let aside = self.path.with_extension("aside");
            let _ = fs::rename(&self.path, &aside);
            Unusable { reason, aside }
        };
        let metadata = match fs::metadata(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            metadata => metadata.map_err(|error| unusable(error.to_string()))?,
        };
        if metadata.len() > LIMIT {
            return Err(unusable(format!("{} bytes are too many", metadata.len())));
        }
        let text = fs::read_to_string(&self.path).map_err(|error| unusable(error.to_string()))?;
        let changes = self.parse(&text).map_err(unusable)?;
        let as_of = metadata.modified().ok().and_then(|time| Timestamp::try_from(time).ok()).unwrap_or_default();
        Ok(Some(Earlier { update: Update { is_whole: true, changes, ..Update::default() }, as_of }))
    }

    fn parse(&self, text: &str) -> Result<Vec<Change>, String> {
        let body = text.strip_prefix(VERSION).and_then(|rest| rest.strip_prefix('\n'));
        let body = body.ok_or_else(|| format!("it does not begin with {VERSION:?}"))?;
        let (objects, end) = text.rsplit_once('\n').ok_or("it has no end")?;
        let objects = &text[..=objects.len()];
        let mut end = end.split(' ');
        let (word, count, checksum) = (end.next(), end.next(), end.next());
        let checksum = checksum.and_then(|text| u64::from_str_radix(text, 16).ok());
        let mut hash = Xxh3::new();
        hash.update(objects.as_bytes());
        if word != Some("end") || checksum != Some(hash.digest()) {
            return Err("it is cut short or was changed".to_owned());
        }
        let mut lines = body.lines();
        let owner = lines.next().unwrap_or_default();
        if owner != self.owner {
            return Err("it is of another node, network namespace or boot".to_owned());
        }
        let count: usize = count.and_then(|text| text.parse().ok()).unwrap_or_default();
        lines.take(count).map(object).collect()
    }
}

fn line(out: &mut impl Write, kind: &str, object: &impl Serialize) -> io::Result<()> {
    write!(out, "{kind} ")?;
    serde_json::to_writer(&mut *out, object)?;
    out.write_all(b"\n")
}

fn object(line: &str) -> Result<Change, String> {
    fn read<T: DeserializeOwned>(json: &str) -> Result<Arc<T>, String> {
        serde_json::from_str(json).map(Arc::new).map_err(|error| error.to_string())
    }
    let (kind, json) = line.split_once(' ').unwrap_or((line, ""));
    let object = match kind {
        "Service" => Object::Service(read(json)?),
        "EndpointSlice" => Object::EndpointSlice(read(json)?),
        "Node" => Object::Node(read(json)?),
        "ServiceCIDR" => Object::ServiceCidr(read(json)?),
        "Namespace" => Object::Namespace(read(json)?),
        "Pod" => Object::Pod(read(json)?),
        other => return Err(format!("it has an object of kind {other:?}")),
    };
    Ok(Change::Apply(object, Origin::Api))
}

/// Counts and hashes what goes through.
struct Checked {
    out: BufWriter<File>,
    hash: Xxh3,
    bytes: u64,
}

impl Write for Checked {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.bytes += bytes.len() as u64;
        if self.bytes > LIMIT {
            return Err(io::Error::other(format!("more than {LIMIT} bytes of objects")));
        }
        self.hash.update(bytes);
        self.out.write_all(bytes)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn objects() -> Vec<Object> {
        let metadata =
            |name: &str| json!({"namespace": "n", "name": name, "creationTimestamp": "2026-01-01T00:00:00Z"});
        let service = json!({"metadata": metadata("a"), "spec": {"ports": [{"port": 80, "targetPort": "http"}]}});
        let slice = json!({"metadata": metadata("a-1"), "addressType": "IPv6", "endpoints": [{"addresses": ["fd00::1"],
            "conditions": {"serving": true}, "hints": {"forZones": [{"name": "z\n"}]}}]});
        let node = json!({"metadata": {"name": "me"}, "spec": {"podCIDRs": ["10.0.0.0/24"]}});
        vec![
            Object::Service(Arc::new(serde_json::from_value(service).unwrap())),
            Object::EndpointSlice(Arc::new(serde_json::from_value(slice).unwrap())),
            Object::Node(Arc::new(serde_json::from_value(node).unwrap())),
            Object::ServiceCidr(Arc::new(serde_json::from_value(json!({"metadata": {"name": "d"}})).unwrap())),
        ]
    }

    #[test]
    fn what_is_written_is_read_again() {
        let folder = tempfile::tempdir().unwrap();
        let saved = Saved::new(folder.path(), "boot 1 me");
        assert!(saved.read().unwrap().is_none());
        saved.write(std::iter::empty()).unwrap();
        assert!(saved.read().unwrap().is_some_and(|earlier| earlier.update.changes.is_empty()));
        let bytes = saved.write(objects().into_iter()).unwrap();
        assert!(bytes < fs::metadata(folder.path().join(FILE)).unwrap().len());
        let past = SystemTime::now() - std::time::Duration::from_secs(3600);
        File::options().write(true).open(folder.path().join(FILE)).unwrap().set_modified(past).unwrap();
        let earlier = saved.read().unwrap().unwrap();
        let changes: Vec<Change> = objects().into_iter().map(|object| Change::Apply(object, Origin::Api)).collect();
        assert_eq!(earlier.update.changes, changes);
        let age = |earlier: &Earlier| Timestamp::now().duration_since(earlier.as_of).as_secs();
        assert!((3600..3700).contains(&age(&earlier)));
        saved.confirm().unwrap();
        assert!(age(&saved.read().unwrap().unwrap()) < 100);
    }

    #[test]
    fn what_is_not_whole_or_not_ours_is_put_aside() {
        let folder = tempfile::tempdir().unwrap();
        let (saved, path) = (Saved::new(folder.path(), "boot 1 me"), folder.path().join(FILE));
        saved.write(objects().into_iter()).unwrap();
        let whole = fs::read_to_string(&path).unwrap();
        let half = &whole[..whole.len() / 2];
        for (text, owner, words) in [
            (half, "boot 1 me", "cut short"),
            (&whole[..whole.len() - 1], "boot 1 me", "cut short"),
            (&whole.replace("fd00::1", "fd00::2"), "boot 1 me", "changed"),
            (&whole.replacen("objects 1", "objects 2", 1), "boot 1 me", "begin"),
            (&whole, "boot 2 me", "another node"),
            ("", "boot 1 me", "begin"),
        ] {
            fs::write(&path, text).unwrap();
            let error = Saved::new(folder.path(), owner).read().unwrap_err();
            assert!(error.to_string().contains(words), "{text:.40}: {error}");
            assert_eq!(fs::read_to_string(folder.path().join("objects.aside")).unwrap(), *text);
            assert!(saved.read().unwrap().is_none());
        }
    }
}
