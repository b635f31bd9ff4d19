use super::*;

fn names(manifest: &Manifest) -> Vec<(String, usize)> {
    manifest.objects.iter().map(|(object, document)| (object.key().to_string(), *document)).collect()
}

fn good(text: &str) -> Vec<(String, usize)> {
    let manifest = parse(text);
    assert!(manifest.problems.is_empty(), "{text:?}: {:?}", manifest.problems);
    names(&manifest)
}

fn service(name: &str) -> String {
    format!("apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\n")
}

#[test]
fn what_people_write_is_read() {
    let (a, b) = (service("a"), service("b"));
    let a_b = |first, second| vec![("Service default/a".to_owned(), first), ("Service default/b".to_owned(), second)];
    for (text, expected) in [
        (format!("{a}---\n{b}"), a_b(1, 2)),
        (format!("# licence\n\n---\n{a}--- # second\n{b}---\n"), a_b(1, 2)),
        (format!("---\n{a}\n---\n# nothing\n---\n{b}"), a_b(1, 3)),
        (format!("\u{feff}{a}---\n{b}").replace('\n', "\r\n"), a_b(1, 2)),
        (format!("%YAML 1.2\n---\n{a}...\n---\n{b}...\n"), a_b(1, 2)),
        (format!("{a}...\n# end\n{b}"), a_b(1, 2)),
        (format!("{a}---\nnull\n---\n{b}"), a_b(1, 3)),
    ] {
        assert_eq!(good(&text), expected, "{text:?}");
    }
    for text in ["", "\n", "---\n", "# x\n", "---\n---\n", "%YAML 1.2\n---\n"] {
        assert_eq!(good(text), [], "{text:?}");
    }
}

#[test]
fn lists_nest_and_typed_lists_name_the_kind_of_their_items() {
    let text = r#"{"apiVersion":"v1","kind":"List","items":[
        {"apiVersion":"v1","kind":"ServiceList","items":[{"metadata":{"name":"a","namespace":"x"}}]},
        {"apiVersion":"v1","kind":"Node","metadata":{"name":"n","namespace":"x"}},
        {"apiVersion":"v1","kind":"ConfigMapList","items":[{},{}]}]}
        {"apiVersion":"v1","kind":"PodList","items":null}"#;
    let manifest = parse(text);
    assert_eq!(names(&manifest), [("Service x/a".to_owned(), 1), ("Node n".to_owned(), 1)]);
    assert_eq!(manifest.skipped, BTreeMap::from([("v1/ConfigMap".to_owned(), 2)]));
    assert!(manifest.problems.is_empty(), "{:?}", manifest.problems);
}

#[test]
fn other_kinds_and_versions_are_counted() {
    let text = "apiVersion: v1\nkind: ConfigMap\ndata: {x: .nan}\n---\napiVersion: serving.knative.dev/v1\nkind: Service\n---\n\
        apiVersion: discovery.k8s.io/v1beta1\nkind: EndpointSlice\n";
    let manifest = parse(text);
    assert!(manifest.problems.is_empty() && manifest.objects.is_empty(), "{manifest:?}");
    let expected = ["discovery.k8s.io/v1beta1/EndpointSlice", "serving.knative.dev/v1/Service", "v1/ConfigMap"];
    assert_eq!(manifest.skipped.keys().collect::<Vec<_>>(), expected);
}

#[test]
fn anchors_merge_keys_and_named_target_ports() {
    let text = "apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec:\n  selector: &labels {app: a}\n  ports:\n\
        \x20 - &port {name: one, port: 80, targetPort: http}\n  - {<<: *port, name: two, port: 81}\n\
        \x20 externalIPs: [1.2.3.4]\n  clusterIP: None\n";
    let manifest = parse(text);
    assert!(manifest.problems.is_empty(), "{:?}", manifest.problems);
    let Object::Service(service) = &manifest.objects[0].0 else { panic!("a Service") };
    let ports = service.spec.as_ref().unwrap().ports.as_ref().unwrap();
    assert_eq!(ports[1].port, 81);
    assert_eq!(ports[1].target_port, ports[0].target_port);
}

#[test]
fn errors_name_document_object_and_field() {
    let a = service("a");
    let list = "apiVersion: v1\nkind: List\nitems:\n- apiVersion: v1\n  kind: Service\n  metadata: {name: x, namespace: y}\n  \
        spec: {ports: [{port: 80}, {port: '81'}]}\n";
    for (text, document, object, field, word) in [
        (format!("{a}---\n{a}spec: {{ports: [{{port: x}}]}}\n"), 2, "Service default/a", "spec.ports[0].port", "\"x\""),
        (list.to_owned(), 1, "Service y/x", "items[0].spec.ports[1].port", "81"),
        (format!("{a}---\nfoo: [1\n---\n{a}"), 2, "", "", "line"),
        ("foo: bar\n".to_owned(), 1, "", "kind", "missing"),
        ("kind: Service\nmetadata: {name: a}\n".to_owned(), 1, "Service default/a", "apiVersion", "missing"),
        ("apiVersion: v1\nkind: Service\n".to_owned(), 1, "Service", "metadata.name", "missing"),
        ("apiVersion: v1\nkind: Pod\nmetadata: {name: 5}\n".to_owned(), 1, "Pod", "metadata.name", "5"),
        ("just words\n".to_owned(), 1, "", "", "text"),
        ("- a\n".to_owned(), 1, "", "", "a list"),
        ("apiVersion: v1\nkind: List\nitems: [1]\n".to_owned(), 1, "", "items[0]", "a number"),
        ("apiVersion: v1\nkind: List\nitems: {}\n".to_owned(), 1, "", "items", "an object"),
        (
            "apiVersion: v1\nkind: Service\nspec: []\nmetadata: {name: n}\n".to_owned(),
            1,
            "Service default/n",
            "spec",
            "sequence",
        ),
    ] {
        let manifest = parse(&text);
        assert_eq!(manifest.problems.len(), 1, "{text:?}: {:?}", manifest.problems);
        let (problem, in_document) = &manifest.problems[0];
        let is = (problem.object.as_deref().unwrap_or_default(), &*problem.field, *in_document);
        assert_eq!(is, (object, field, document), "{text:?}: {problem}");
        assert!(problem.message.contains(word), "{text:?}: {problem}");
    }
}

#[test]
fn a_bad_document_costs_none_of_the_others_and_is_located_in_the_file() {
    let text = format!("{}---\n\tbroken: [\n---\n{}", service("a"), service("b"));
    let manifest = parse(&text);
    assert_eq!(names(&manifest).len(), 2);
    let problem = &manifest.problems[0].0;
    assert!(problem.message.contains("line 5"), "{problem}");
}

#[test]
fn deep_nesting_and_alias_bombs_are_errors() {
    let mut bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n".to_owned();
    for level in 1..12 {
        let below = level - 1;
        bomb += &format!("a{level}: &a{level} [{}]\n", vec![format!("*a{below}"); 9].join(", "));
    }
    for text in ["[".repeat(100_000), "{a: ".repeat(100_000), "{\"a\":".repeat(100_000), bomb] {
        assert_eq!(parse(&text).problems.len(), 1);
    }
}

#[test]
fn large_files_are_no_reason_to_refuse() {
    let text: String = (0..3_000).map(|number| format!("---\n{}", service(&format!("s{number}")))).collect();
    assert_eq!(good(&text).len(), 3_000);
    let items: String = (0..40_000).map(|n| format!("- {{a: {n}, b: x, c: [1, 2, 3]}}\n")).collect();
    let manifest = parse(&format!("apiVersion: x/v1\nkind: Large\nitems:\n{items}"));
    assert!(manifest.problems.is_empty(), "{:?}", manifest.problems);
}
