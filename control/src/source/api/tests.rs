//! The source against a stand-in for an API server: it speaks list and watch, and misbehaves as told. `tests/tests/api.rs` has
//! a real one.

use std::collections::{BTreeMap, VecDeque};
use std::io::Write as _;
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Query as UrlQuery, State};
use axum::http::{StatusCode, Uri};
use axum::response::{IntoResponse as _, Response};
use futures_util::{StreamExt as _, stream};
use serde_json::{Value, json};

use super::*;
use crate::source::Change;

const PATIENCE: Duration = Duration::from_secs(20);

/// An answer to one request.
enum Answer {
    /// This status and text.
    Text(u16, String),
    /// These lines and then nothing, with the connection open.
    Open(String),
    /// This text, and the connection breaks before its end.
    Broken(String),
}

/// `services list` or `services watch`.
type Asked = (String, BTreeMap<String, String>);

#[derive(Default)]
struct Script {
    answers: BTreeMap<String, VecDeque<Answer>>,
    asked: Vec<Asked>,
}

/// What is not in the script: empty lists, and watches in which nothing happens. There is no ServiceCIDR.
#[derive(Clone, Default)]
struct StandIn(Arc<Mutex<Script>>);

impl StandIn {
    fn answer(&self, what: &str, answer: Answer) {
        self.0.lock().unwrap().answers.entry(what.to_owned()).or_default().push_back(answer);
    }

    fn asked(&self, what: &str) -> Vec<BTreeMap<String, String>> {
        let script = self.0.lock().unwrap();
        script.asked.iter().filter(|(asked, _)| asked == what).map(|(_, query)| query.clone()).collect()
    }

    /// Starts it, and the source on it.
    async fn watch(&self, silence: Duration) -> (mpsc::Receiver<Update>, tempfile::NamedTempFile) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut kubeconfig = tempfile::NamedTempFile::new().unwrap();
        let server = format!("http://{}", listener.local_addr().unwrap());
        let text = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "it",
            "contexts": [{"name": "it", "context": {"cluster": "it", "user": "it"}}],
            "clusters": [{"name": "it", "cluster": {"server": server}}],
            "users": [{"name": "it", "user": {"token": "t"}}],
        });
        kubeconfig.write_all(text.to_string().as_bytes()).unwrap();
        let app = Router::new().fallback(respond).with_state(self.clone());
        tokio::spawn(async move { axum::serve(listener, app).await });
        let (sender, updates) = mpsc::channel(16);
        let options = Options {
            access: Access::Kubeconfig(kubeconfig.path().to_owned()),
            node_name: "me".to_owned(),
            service_proxy_name: String::new(),
            names: None,
            node_patience: Duration::ZERO,
            silence,
        };
        tokio::spawn(watch(options, sender));
        (updates, kubeconfig)
    }
}

async fn respond(State(stand_in): State<StandIn>, uri: Uri, query: UrlQuery<BTreeMap<String, String>>) -> Response {
    let resource = uri.path().rsplit('/').next().unwrap_or_default();
    let verb = if query.contains_key("watch") { "watch" } else { "list" };
    let what = format!("{resource} {verb}");
    let answer = {
        let mut script = stand_in.0.lock().unwrap();
        script.asked.push((what.clone(), query.0));
        script.answers.get_mut(&what).and_then(VecDeque::pop_front)
    };
    let answer = answer.unwrap_or_else(|| match (resource, verb) {
        ("servicecidrs", _) => Answer::Text(404, "404 page not found".to_owned()),
        (_, "list") => list(&[], "1", ""),
        (_, _) => Answer::Open(String::new()),
    });
    let chunk = |text: String| stream::once(async move { Ok::<_, std::io::Error>(Bytes::from(text)) });
    match answer {
        Answer::Text(code, text) => (StatusCode::from_u16(code).unwrap(), text).into_response(),
        Answer::Open(text) => Body::from_stream(chunk(text).chain(stream::pending())).into_response(),
        Answer::Broken(text) => {
            let broken = stream::once(async {
                // What came before is sent when nothing more is there at once.
                tokio::task::yield_now().await;
                Err(std::io::Error::other("broken"))
            });
            Body::from_stream(chunk(text).chain(broken)).into_response()
        }
    }
}

fn service(name: &str, version: &str, port: u16) -> Value {
    json!({"metadata": {"namespace": "n", "name": name, "resourceVersion": version}, "spec": {"ports": [{"port": port}]}})
}

fn list(items: &[Value], version: &str, more: &str) -> Answer {
    let metadata = json!({"resourceVersion": version, "continue": more});
    Answer::Text(200, json!({"apiVersion": "v1", "kind": "L", "metadata": metadata, "items": items}).to_string())
}

fn event(kind: &str, object: Value) -> String {
    json!({"type": kind, "object": object}).to_string() + "\n"
}

fn bookmark(version: &str) -> String {
    event("BOOKMARK", json!({"apiVersion": "v1", "kind": "Service", "metadata": {"resourceVersion": version}}))
}

fn status(code: u16, reason: &str, message: &str) -> String {
    json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason, "message": message})
        .to_string()
}

async fn next(updates: &mut mpsc::Receiver<Update>) -> Update {
    tokio::time::timeout(PATIENCE, updates.recv()).await.expect("an update in time").expect("the source goes on")
}

/// Changes as `+name` and `-name`, and problems.
async fn words(updates: &mut mpsc::Receiver<Update>) -> (String, String) {
    let update = next(updates).await;
    let word = |change: &Change| match change {
        Change::Apply(object, _) => format!("+{}", object.key().name.name),
        Change::Delete(key) => format!("-{}", key.name.name),
    };
    let mut changes: Vec<String> = update.changes.iter().map(word).collect();
    changes.sort();
    let problems: Vec<String> = update.problems.iter().map(ToString::to_string).collect();
    (changes.join(" "), problems.join("\n"))
}

fn said(changes: &str, problems: &str) -> (String, String) {
    (changes.to_owned(), problems.to_owned())
}

async fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "{what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn lists_come_in_pages_and_the_watch_goes_on_from_there() {
    let server = StandIn::default();
    server.answer("services list", list(&[service("a", "3", 1)], "7", "token"));
    server.answer("services list", list(&[service("b", "4", 1)], "7", ""));
    server.answer("services watch", Answer::Open(event("ADDED", service("c", "8", 1))));
    let (mut updates, _kubeconfig) = server.watch(PATIENCE).await;
    // How much of the watch is in the first update is up to chance.
    let mut seen = words(&mut updates).await.0;
    while !seen.contains("+c") {
        seen = format!("{seen} {}", words(&mut updates).await.0);
    }
    assert_eq!(seen, "+a +b +c");
    let lists = server.asked("services list");
    assert_eq!(
        lists.iter().map(|list| list.get("continue").map(String::as_str)).collect::<Vec<_>>(),
        [None, Some("token")]
    );
    assert!(lists.iter().all(|list| list["limit"] == "500" && !list.contains_key("resourceVersion")), "{lists:?}");
    let watches = server.asked("services watch");
    assert_eq!((&*watches[0]["resourceVersion"], &*watches[0]["allowWatchBookmarks"]), ("7", "true"));
    let ours = "!service.kubernetes.io/headless,!service.kubernetes.io/service-proxy-name";
    for (what, selector, value) in [
        ("services watch", "labelSelector", ours),
        ("endpointslices watch", "labelSelector", "!service.kubernetes.io/headless"),
        ("nodes watch", "fieldSelector", "metadata.name=me"),
    ] {
        wait_until(what, || server.asked(what).first().is_some_and(|query| query[selector] == value)).await;
    }
    assert!(server.asked("servicecidrs watch").is_empty());
}

#[tokio::test]
async fn half_an_answer_is_asked_for_again_and_a_watch_goes_on_from_the_last_version() {
    let server = StandIn::default();
    server.answer("services list", Answer::Broken(r#"{"metadata":{"resourceVersion":"5"},"items":[{"#.to_owned()));
    server.answer("services list", list(&[service("a", "3", 1)], "7", ""));
    let whole = event("MODIFIED", service("a", "8", 2)) + &bookmark("9");
    server.answer("services watch", Answer::Broken(whole + r#"{"type":"DELETED","object":{"metadata":{"na"#));
    server.answer("services watch", Answer::Open(event("DELETED", service("a", "10", 2))));
    let (mut updates, _kubeconfig) = server.watch(PATIENCE).await;
    let first = next(&mut updates).await;
    assert!(first.is_behind && !first.is_whole && first.changes.is_empty(), "{first:?}");
    while !words(&mut updates).await.0.contains("+a") {}
    while words(&mut updates).await.0 != "-a" {}
    let watches = server.asked("services watch");
    assert_eq!(watches.iter().map(|watch| &*watch["resourceVersion"]).collect::<Vec<_>>(), ["7", "9"]);
    assert_eq!(server.asked("services list").len(), 2);
}

#[tokio::test]
async fn a_watch_that_is_cut_off_again_and_again_is_soon_begun_again() {
    let server = StandIn::default();
    // As long as for refusals would be more than what is waited here.
    for _ in 0..8 {
        server.answer("services watch", Answer::Text(200, String::new()));
    }
    server.answer("services watch", Answer::Open(event("ADDED", service("a", "2", 1))));
    let (mut updates, _kubeconfig) = server.watch(PATIENCE).await;
    while !words(&mut updates).await.0.contains("+a") {}
    assert_eq!(server.asked("services watch").len(), 9);
}

#[tokio::test]
async fn an_expired_version_is_listed_again_and_only_differences_are_told() {
    let server = StandIn::default();
    server.answer("services list", list(&[service("a", "3", 1), service("b", "3", 1)], "7", ""));
    let (mut updates, _kubeconfig) = {
        let expired = event("ERROR", serde_json::from_str(&status(410, "Expired", "too old")).unwrap());
        server.answer("services watch", Answer::Open(expired));
        server.answer("services list", list(&[service("a", "20", 1), service("c", "21", 1)], "22", ""));
        server.watch(PATIENCE).await
    };
    assert_eq!(words(&mut updates).await, said("+a +b", ""));
    assert_eq!(words(&mut updates).await, said("+c -b", ""), "and it is no problem");
    wait_until("the next watch", || server.asked("services watch").len() == 2).await;
    assert_eq!(server.asked("services watch")[1]["resourceVersion"], "22");
}

#[tokio::test]
async fn a_refusal_names_verb_and_resource_and_the_rest_works_on() {
    let server = StandIn::default();
    server.answer("services list", list(&[service("a", "3", 1)], "7", ""));
    server.answer("services watch", Answer::Open(bookmark("8")));
    for (code, reason) in [(403, "Forbidden"), (429, "TooManyRequests"), (500, "InternalError"), (401, "Unauthorized")]
    {
        server.answer("endpointslices watch", Answer::Text(code, status(code, reason, "no, not you")));
    }
    let slice = json!({"metadata": {"namespace": "n", "name": "s", "resourceVersion": "9"}, "addressType": "IPv4",
        "endpoints": []});
    server.answer("endpointslices watch", Answer::Open(event("ADDED", slice)));
    let (mut updates, _kubeconfig) = server.watch(PATIENCE).await;
    let mut problems = Vec::new();
    loop {
        let (changes, problem) = words(&mut updates).await;
        problems.push(problem);
        if changes.contains("+s") {
            break;
        }
    }
    problems.retain(|problem| !problem.is_empty());
    problems.dedup();
    let words = ["forbidden", "too many requests", "InternalError", "unauthorized"];
    let cannot = "the Kubernetes API: cannot watch endpointslices.discovery.k8s.io:";
    assert_eq!(problems, words.map(|word| format!("{cannot} {word}: no, not you")));
    assert_eq!(server.asked("endpointslices list").len(), 1, "none of them is about what we know");
    assert_eq!(server.asked("services watch").len(), 1);
}

#[tokio::test]
async fn a_silent_watch_is_given_up_and_another_goes_on() {
    let server = StandIn::default();
    server.answer("services list", list(&[service("a", "3", 1)], "7", ""));
    server.answer("services watch", Answer::Open(bookmark("8")));
    server.answer("services watch", Answer::Open(event("DELETED", service("a", "9", 1))));
    let (mut updates, _kubeconfig) = server.watch(Duration::from_millis(300)).await;
    assert_eq!(words(&mut updates).await, said("+a", ""));
    assert_eq!(words(&mut updates).await, said("-a", ""));
    assert_eq!(server.asked("services watch")[1]["resourceVersion"], "8");
}
