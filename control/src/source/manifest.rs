//! Text to objects, with errors that name document, object and field.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;

use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::object::Object;
use crate::problem::Problem;

/// How deep lists may nest in lists.
const MAX_LIST_DEPTH: usize = 16;

/// What a text holds.
#[derive(Clone, Debug, Default)]
pub struct Manifest {
    /// Objects with the number of their document, in order. Documents count from 1.
    pub objects: Vec<(Object, usize)>,
    /// What is wrong, with the number of the document.
    pub problems: Vec<(Problem, usize)>,
    /// Objects of kinds that Sluice does not use, by `apiVersion/kind`.
    pub skipped: BTreeMap<String, u64>,
    /// The text is white space at most, as of a file that is about to be written.
    pub is_blank: bool,
}

/// Reads YAML, of one or more documents, or JSON. A bad document costs none of the others.
#[must_use]
pub fn parse(text: &str) -> Manifest {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut manifest = Manifest { is_blank: text.trim().is_empty(), ..Manifest::default() };
    if let Some(values) = parse_json(text) {
        for (index, value) in values.into_iter().enumerate() {
            manifest.add_document(value, index + 1);
        }
        return manifest;
    }
    let text = unified_line_ends(text);
    for document in documents(&text) {
        match parse_yaml(document.text) {
            Ok(value) => manifest.add_document(value, document.number),
            Err(_) => {
                let error = located_error(&document);
                manifest.problems.push((Problem::error("", error), document.number));
            }
        }
    }
    manifest
}

/// JSON, one value or several one after the other. Nothing when the text is none, for then it may be YAML.
fn parse_json(text: &str) -> Option<Vec<Value>> {
    if !text.trim_start().starts_with('{') {
        return None;
    }
    serde_json::Deserializer::from_str(text).into_iter().collect::<Result<_, _>>().ok()
}

fn parse_yaml(text: &str) -> Result<Value, serde_saphyr::Error> {
    // Depth and the growth by aliases stay bounded: those are what attacks need and people do not.
    let budget = serde_saphyr::budget! {
        max_depth: 64,
        max_events: usize::MAX,
        max_nodes: usize::MAX,
        max_aliases: usize::MAX,
        max_anchors: usize::MAX,
        max_merge_keys: usize::MAX,
        max_documents: usize::MAX,
        max_total_scalar_bytes: usize::MAX,
        enforce_alias_anchor_ratio: false,
    };
    let options = serde_saphyr::options! {
        budget: budget,
        with_snippet: false,
        // `y`, `on` and `no` are words, as in YAML 1.2.
        strict_booleans: true,
        non_finite_float_policy: serde_saphyr::options::NonFiniteFloatPolicy::PassThrough,
    };
    serde_saphyr::from_str_with_options(text, options)
}

/// The error of a document that does not parse, with lines counted from the start of the text.
fn located_error(document: &Document<'_>) -> String {
    let text = "\n".repeat(document.first_line) + document.text;
    match parse_yaml(&text) {
        Ok(_) => "is no YAML document".to_owned(),
        Err(error) => error.without_snippet().to_string(),
    }
}

/// YAML allows `\r` alone too, but nobody means it.
fn unified_line_ends(text: &str) -> Cow<'_, str> {
    if text.contains('\r') { Cow::Owned(text.replace("\r\n", "\n")) } else { Cow::Borrowed(text) }
}

struct Document<'t> {
    number: usize,
    /// Lines before it in the text.
    first_line: usize,
    text: &'t str,
}

/// Splits at `---` and `...` in the first column, which are never content (YAML 1.2.2, 9.1.2). What holds only comments
/// before the first `---` is no document.
fn documents(text: &str) -> Vec<Document<'_>> {
    let mut documents: Vec<Document<'_>> = Vec::new();
    let mut push = |start: usize, end: usize, first_line: usize| {
        let text = &text[start..end];
        if is_marker(text, "---") || has_content(text) {
            documents.push(Document { number: documents.len() + 1, first_line, text });
        }
    };
    let (mut start, mut first_line, mut offset) = (0, 0, 0);
    for (number, line) in text.split_inclusive('\n').enumerate() {
        if is_marker(line, "---") && offset > start && !is_directives(&text[start..offset]) {
            push(start, offset, first_line);
            (start, first_line) = (offset, number);
        }
        offset += line.len();
        if is_marker(line, "...") {
            push(start, offset - line.len(), first_line);
            (start, first_line) = (offset, number + 1);
        }
    }
    push(start, text.len(), first_line);
    documents
}

fn is_marker(line: &str, marker: &str) -> bool {
    line.strip_prefix(marker).is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '\t', '\n']))
}

fn has_content(text: &str) -> bool {
    text.lines().map(str::trim_start).any(|line| !line.is_empty() && !line.starts_with('#'))
}

/// `%YAML` and the like belong to the document that the next `---` begins.
fn is_directives(text: &str) -> bool {
    let mut lines = text.lines().filter(|line| !line.trim_start().is_empty() && !line.trim_start().starts_with('#'));
    lines.next().is_some_and(|line| line.starts_with('%')) && lines.all(|line| line.starts_with('%'))
}

/// Where in a document an object is, and what its list says about it.
#[derive(Clone, Default)]
struct Place {
    document: usize,
    /// `items[3].`, or nothing.
    prefix: String,
    /// apiVersion and kind of the items of a typed list, which omit them.
    implied: Option<(String, String)>,
    depth: usize,
}

impl Manifest {
    fn add_document(&mut self, value: Value, document: usize) {
        if !value.is_null() {
            self.add(value, Place { document, ..Place::default() });
        }
    }

    fn add(&mut self, mut value: Value, place: Place) {
        let Some(fields) = value.as_object_mut() else {
            return self.reject(&place, None, "", format!("is no object but {}", type_of(&value)));
        };
        let implied = place.implied.as_ref();
        let mut read = |field: &str, implied: Option<&String>| match (fields.get(field), implied) {
            (Some(Value::String(text)), _) if !text.is_empty() => Some(text.clone()),
            (None, Some(implied)) => {
                fields.insert(field.to_owned(), Value::String(implied.clone()));
                Some(implied.clone())
            }
            _ => None,
        };
        let api_version = read("apiVersion", implied.map(|implied| &implied.0));
        let kind = read("kind", implied.map(|implied| &implied.1));
        let Some(kind) = kind else { return self.reject(&place, None, "kind", "is missing or no text") };
        let Some(api_version) = api_version else {
            return self.reject(&place, Some(described(&kind, fields)), "apiVersion", "is missing or no text");
        };
        if let Some(item_kind) = kind.strip_suffix("List")
            && fields.contains_key("items")
        {
            let implied = (!item_kind.is_empty()).then(|| (api_version, item_kind.to_owned()));
            let items = fields.get_mut("items").map(Value::take).unwrap_or_default();
            return self.add_items(items, &place, implied);
        }
        let described = described(&kind, fields);
        let read = match (&*api_version, &*kind) {
            ("v1", "Service") => typed(value, Object::Service),
            ("v1", "Pod") => typed(value, Object::Pod),
            ("v1", "Node") => typed(value, Object::Node),
            ("v1", "Namespace") => typed(value, Object::Namespace),
            ("discovery.k8s.io/v1", "EndpointSlice") => typed(value, Object::EndpointSlice),
            ("networking.k8s.io/v1", "ServiceCIDR") => typed(value, Object::ServiceCidr),
            ("apps/v1", "Deployment") => typed(value, Object::Deployment),
            ("apps/v1", "StatefulSet") => typed(value, Object::StatefulSet),
            _ => {
                *self.skipped.entry(format!("{api_version}/{kind}")).or_default() += 1;
                return;
            }
        };
        match read {
            Err((field, message)) => self.reject(&place, Some(described), &field, message),
            Ok(object) if object.key().name.name.is_empty() => {
                self.reject(&place, Some(kind), "metadata.name", "is missing");
            }
            Ok(object) => self.objects.push((object, place.document)),
        }
    }

    fn add_items(&mut self, items: Value, place: &Place, implied: Option<(String, String)>) {
        let items = match items {
            Value::Array(items) => items,
            Value::Null => return,
            other => return self.reject(place, None, "items", format!("is no list but {}", type_of(&other))),
        };
        if place.depth == MAX_LIST_DEPTH {
            return self.reject(place, None, "items", format!("lists nest deeper than {MAX_LIST_DEPTH}"));
        }
        for (index, item) in items.into_iter().enumerate() {
            let prefix = format!("{}items[{index}].", place.prefix);
            let implied = implied.clone();
            self.add(item, Place { document: place.document, prefix, implied, depth: place.depth + 1 });
        }
    }

    fn reject(&mut self, place: &Place, object: Option<String>, field: &str, message: impl Into<String>) {
        let path = format!("{}{field}", place.prefix);
        let mut problem = Problem::error(path.trim_end_matches('.'), message);
        problem.object = object;
        self.problems.push((problem, place.document));
    }
}

/// `Kind namespace/name`, as far as an object that may be invalid says it.
fn described(kind: &str, fields: &serde_json::Map<String, Value>) -> String {
    let text = |field: &str| fields.get("metadata").and_then(|metadata| metadata.get(field)).and_then(Value::as_str);
    match (text("namespace"), text("name")) {
        (_, None) => kind.to_owned(),
        (None, Some(name)) if matches!(kind, "Node" | "Namespace" | "ServiceCIDR") => format!("{kind} {name}"),
        (namespace, Some(name)) => format!("{kind} {}/{name}", namespace.unwrap_or("default")),
    }
}

fn type_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// The typed object in its namespace, or the field that is wrong and why.
fn typed<T: DeserializeOwned + Namespaced>(
    value: Value,
    wrap: fn(Arc<T>) -> Object,
) -> Result<Object, (String, String)> {
    let mut object: T = serde_path_to_error::deserialize(value).map_err(|error| {
        let field = match error.path().to_string() {
            root if root == "." => String::new(),
            field => field,
        };
        (field, error.inner().to_string())
    })?;
    object.settle();
    Ok(wrap(Arc::new(object)))
}

/// Puts an object where the API would.
trait Namespaced {
    fn settle(&mut self);
}

macro_rules! namespaced {
    ($($scope:ident: $($kind:ty),+;)+) => {$($(
        impl Namespaced for $kind {
            fn settle(&mut self) {
                namespaced!(@ $scope self.metadata.namespace);
            }
        }
    )+)+};
    (@ namespace $field:expr) => {
        if $field.as_deref().unwrap_or_default().is_empty() {
            $field = Some("default".to_owned());
        }
    };
    (@ cluster $field:expr) => { $field = None };
}

namespaced! {
    namespace: k8s_openapi::api::core::v1::Service, k8s_openapi::api::core::v1::Pod,
        k8s_openapi::api::discovery::v1::EndpointSlice, k8s_openapi::api::apps::v1::Deployment,
        k8s_openapi::api::apps::v1::StatefulSet;
    cluster: k8s_openapi::api::core::v1::Node, k8s_openapi::api::core::v1::Namespace,
        k8s_openapi::api::networking::v1::ServiceCIDR;
}

#[cfg(test)]
mod tests;
