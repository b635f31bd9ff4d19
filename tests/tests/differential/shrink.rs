//! The smallest world in which two answers still differ.

use serde_json::Value;
use sluice_tests::naive::World;

/// Removes whatever can go while `differs` holds.
pub(crate) fn shrink(mut world: World, differs: impl Fn(&World) -> bool) -> World {
    loop {
        let mut document = serde_json::json!({"config": world.config, "objects": world.objects});
        let mut removed = false;
        let mut paths = Vec::new();
        collect(&document, &mut String::new(), &mut paths);
        // Whole objects come first, and the last of a list, so that paths stay true.
        paths.sort_by_key(|path| (path.matches('/').count(), std::cmp::Reverse(path.clone())));
        for path in paths {
            let mut smaller = document.clone();
            let candidate = remove(&mut smaller, &path).then(|| as_world(&smaller));
            if let Some(candidate) = candidate.filter(|candidate| differs(candidate)) {
                (document, world, removed) = (smaller, candidate, true);
            }
        }
        if !removed {
            return world;
        }
    }
}

fn as_world(document: &Value) -> World {
    let objects = document["objects"].as_array().cloned().unwrap_or_default();
    World { config: document["config"].clone(), objects }
}

fn collect(value: &Value, path: &mut String, paths: &mut Vec<String>) {
    let children: Vec<(String, &Value)> = match value {
        Value::Object(fields) => {
            fields.iter().map(|(key, value)| (key.replace('~', "~0").replace('/', "~1"), value)).collect()
        }
        Value::Array(items) => items.iter().enumerate().map(|(index, value)| (index.to_string(), value)).collect(),
        _ => return,
    };
    for (key, child) in children {
        let length = path.len();
        path.push('/');
        path.push_str(&key);
        // Without these an object is none.
        if !matches!(
            key.as_str(),
            "apiVersion" | "kind" | "metadata" | "config" | "objects" | "nodeName" | "localControllers"
        ) {
            paths.push(path.clone());
        }
        collect(child, path, paths);
        path.truncate(length);
    }
}

fn remove(document: &mut Value, path: &str) -> bool {
    let Some((parent, key)) = path.rsplit_once('/') else { return false };
    match document.pointer_mut(parent) {
        Some(Value::Object(fields)) => fields.remove(&key.replace("~1", "/").replace("~0", "~")).is_some(),
        Some(Value::Array(items)) => {
            let index = key.parse().ok().filter(|index| *index < items.len());
            index.map(|index: usize| items.remove(index)).is_some()
        }
        _ => false,
    }
}
