//! A `KubeProxyConfiguration` document, alone or in a ConfigMap, with errors that name key and line.

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::Value;
use serde_saphyr::Spanned;

use super::{Draft, Wishes, keys};
use crate::config::Config;
use keys::Fate;

const API_VERSION: &str = "kubeproxy.config.k8s.io/v1alpha1";
/// The kind of its configuration.
pub const KIND: &str = "KubeProxyConfiguration";

/// Reads the configuration.
pub fn read(text: &str) -> Result<(Config, Wishes), String> {
    let tree: Tree = serde_saphyr::from_str(text).map_err(|error| error.without_snippet().to_string())?;
    let Tree::Map(entries) = tree else { return Err(format!("is no {KIND}")) };
    let mut draft = Draft::default();
    let mut ignored = Vec::new();
    take(&mut draft, &mut ignored, "", &entries)?;
    ignored.append(&mut draft.ignored);
    let (config, wishes) = draft.into_config();
    Ok((config, wishes.ignoring(&ignored)))
}

/// Reads the configuration that a ConfigMap holds under any key, as kubeadm's does under `config.conf`.
pub fn read_config_map(text: &str) -> Result<(Config, Wishes), String> {
    #[derive(serde::Deserialize)]
    struct ConfigMap {
        #[serde(default)]
        data: std::collections::BTreeMap<String, String>,
    }
    let map: ConfigMap = serde_saphyr::from_str(text).map_err(|error| error.without_snippet().to_string())?;
    let is_it = |text: &str| crate::config::kind(text).as_deref() == Some(KIND);
    let mut found = map.data.iter().filter(|(_, text)| is_it(text));
    match (found.next(), found.next()) {
        (Some((key, text)), None) => read(text).map_err(|reason| format!("data[{key:?}]: {reason}")),
        (None, _) => Err(format!("data: no key holds a {KIND}")),
        (Some((first, _)), Some((second, _))) => Err(format!("data: {first:?} and {second:?} both hold a {KIND}")),
    }
}

fn take(
    draft: &mut Draft,
    ignored: &mut Vec<String>,
    parent: &str,
    entries: &[(Spanned<String>, Tree)],
) -> Result<(), String> {
    for (key, tree) in entries {
        let path = if parent.is_empty() { key.value.clone() } else { format!("{parent}.{}", key.value) };
        let fail = |reason: String| format!("line {}: {path}: {reason}", key.referenced.line());
        if parent.is_empty() && matches!(&*path, "apiVersion" | "kind") {
            let wanted = if path == "kind" { KIND } else { API_VERSION };
            if tree.value() != wanted {
                return Err(fail(format!("{} is not known: use {wanted}", tree.value())));
            }
            continue;
        }
        match (keys::of_path(&path), tree) {
            (Some(key), tree) => match key.fate {
                Fate::Mapped(set) => set(draft, &tree.value()).map_err(fail)?,
                Fate::Ignored if is_nothing(&tree.value()) => {}
                Fate::Ignored => ignored.push(path),
                Fate::Refused => return Err(fail(key.says.to_owned())),
            },
            (None, Tree::Map(below)) if keys::is_section(&path) => take(draft, ignored, &path, below)?,
            (None, Tree::Leaf(Value::Null)) if keys::is_section(&path) => {}
            (None, _) if keys::is_section(&path) => return Err(fail("must be a map".to_owned())),
            (None, _) => return Err(fail(format!("is no key of {KIND}"))),
        }
    }
    Ok(())
}

/// What kube-proxy takes for "not set", or for its zero.
fn is_nothing(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Bool(true) => false,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => matches!(&**text, "" | "0" | "0s"),
        Value::Array(entries) => entries.is_empty(),
        Value::Object(entries) => entries.values().all(is_nothing),
    }
}

/// YAML whose keys know where they are.
enum Tree {
    Map(Vec<(Spanned<String>, Tree)>),
    Leaf(Value),
}

impl Tree {
    fn value(&self) -> Value {
        match self {
            Self::Map(entries) => entries.iter().map(|(key, tree)| (key.value.clone(), tree.value())).collect(),
            Self::Leaf(value) => value.clone(),
        }
    }
}

impl<'de> Deserialize<'de> for Tree {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(TreeVisitor)
    }
}

struct TreeVisitor;

impl<'de> Visitor<'de> for TreeVisitor {
    type Value = Tree;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a value")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Tree, A::Error> {
        let mut entries = Vec::new();
        while let Some(entry) = map.next_entry()? {
            entries.push(entry);
        }
        Ok(Tree::Map(entries))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<Tree, A::Error> {
        let mut entries = Vec::new();
        while let Some(entry) = sequence.next_element()? {
            entries.push(entry);
        }
        Ok(Tree::Leaf(Value::Array(entries)))
    }

    fn visit_str<E>(self, text: &str) -> Result<Tree, E> {
        Ok(Tree::Leaf(text.into()))
    }

    fn visit_bool<E>(self, value: bool) -> Result<Tree, E> {
        Ok(Tree::Leaf(value.into()))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Tree, E> {
        Ok(Tree::Leaf(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Tree, E> {
        Ok(Tree::Leaf(value.into()))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Tree, E> {
        Ok(Tree::Leaf(value.into()))
    }

    fn visit_unit<E>(self) -> Result<Tree, E> {
        Ok(Tree::Leaf(Value::Null))
    }

    fn visit_none<E>(self) -> Result<Tree, E> {
        Ok(Tree::Leaf(Value::Null))
    }
}

#[cfg(test)]
mod tests;
