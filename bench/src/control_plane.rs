//! A real control plane, of programs that `scripts/kube/build` has built, in a namespace of its own.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};

use crate::api_client::ApiClient;
use crate::netns::NetNs;

/// Controllers that it runs: those that make Pods of workloads and EndpointSlices of Pods, and what they build on. A CronJob's is
/// none of them: nothing begins by the clock.
const CONTROLLERS: &str = "--controllers=deployment-controller,replicaset-controller,statefulset-controller,\
    daemonset-controller,job-controller,ttl-after-finished-controller,endpointslice-controller,endpointslice-mirroring-controller,namespace-controller,\
    serviceaccount-controller,garbage-collector-controller";
/// How an administrator tells who they are.
const ADMIN: [&str; 2] = ["--oauth2-bearer", "admin-token"];
/// Most that a program of it may take to get ready; two cores are shared with other tests.
const READY: Duration = Duration::from_secs(120);

/// Requests at a time where many objects are created.
const WRITERS: usize = 8;

/// etcd, kube-apiserver and, where wanted, kube-controller-manager. Dropping it ends them.
#[derive(Debug)]
pub struct ControlPlane {
    ns: NetNs,
    address: String,
    folder: tempfile::TempDir,
    etcd: Child,
    api_server: Option<Child>,
    controllers: Option<Child>,
    client: OnceLock<ApiClient>,
}

/// What of these programs and of the tools around them is missing, in words; `None`: nothing.
#[must_use]
pub fn missing(programs: &[&str]) -> Option<String> {
    let has_tool = |tool: &&str| Command::new(tool).arg("--version").output().is_ok();
    let tool = ["etcd", "curl", "openssl"].into_iter().find(|tool| !has_tool(tool));
    let is_built = |program: &&str| folder().join(program).exists();
    let missing = programs.iter().copied().find(|program| !is_built(program)).or(tool);
    missing.map(|program| format!("{program} is missing (scripts/kube/build)"))
}

/// Where the programs are.
#[must_use]
pub fn folder() -> PathBuf {
    let version = std::env::var("SLUICE_KUBE_VERSION").unwrap_or_else(|_| "1.37.2".to_owned());
    let folder = std::env::var("SLUICE_KUBE").map_or_else(
        |_| PathBuf::from(std::env::var("HOME").unwrap_or_default()).join(".cache/sluice-kube"),
        PathBuf::from,
    );
    folder.join(version)
}

/// One of `scripts/kube`.
#[must_use]
pub fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/kube").join(name)
}

impl ControlPlane {
    /// Starts it at this address of this namespace and waits until it is ready.
    pub fn start(ns: NetNs, address: &str) -> Result<Self> {
        let folder = tempfile::tempdir().context("a folder for the control plane")?;
        let etcd = spawn(&ns, folder.path(), address, "etcd", &[])?;
        let address = address.to_owned();
        let client = OnceLock::new();
        let mut plane = Self { ns, address, folder, etcd, api_server: None, controllers: None, client };
        plane.start_api_server()?;
        Ok(plane)
    }

    /// Kills the API server, as a crash would.
    pub fn kill_api_server(&mut self) -> Result<()> {
        let mut api_server = self.api_server.take().context("no API server runs")?;
        api_server.kill()?;
        api_server.wait()?;
        Ok(())
    }

    /// Starts the API server and waits until it is ready.
    pub fn start_api_server(&mut self) -> Result<()> {
        self.api_server = Some(spawn(&self.ns, self.folder.path(), &self.address, "kube-apiserver", &[])?);
        let deadline = Instant::now() + READY;
        while !self.request("GET", "/readyz", None).is_ok_and(|answer| answer.ends_with("ok")) {
            if let Some(status) = self.api_server.as_mut().and_then(|child| child.try_wait().transpose()) {
                bail!("the API server ended: {}\n{}", status?, self.log("kube-apiserver"));
            }
            ensure!(Instant::now() < deadline, "the API server does not get ready\n{}", self.log("kube-apiserver"));
            std::thread::sleep(Duration::from_millis(200));
        }
        Ok(())
    }

    /// Starts the controllers that make Pods of workloads and EndpointSlices of Pods.
    pub fn start_controllers(&mut self) -> Result<()> {
        let flags = [CONTROLLERS, "--allocate-node-cidrs=false", "--kube-api-qps=200", "--kube-api-burst=400"];
        let program = "kube-controller-manager";
        self.controllers = Some(spawn(&self.ns, self.folder.path(), &self.address, program, &flags)?);
        // Without its service account no Pod is accepted.
        let deadline = Instant::now() + READY;
        while self.request("GET", "/api/v1/namespaces/default/serviceaccounts/default", None).is_err() {
            ensure!(Instant::now() < deadline, "the controllers do not start\n{}", self.log(program));
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    }

    /// The kubeconfig of `admin`, `proxy` (only the role system:node-proxier) or `nobody` (no role).
    #[must_use]
    pub fn kubeconfig(&self, user: &str) -> PathBuf {
        self.folder.path().join(format!("{user}.kubeconfig"))
    }

    /// The kubeconfig of a user with the API server at another address, which passes on to it.
    pub fn kubeconfig_through(&self, user: &str, relay: SocketAddr) -> Result<PathBuf> {
        let text = std::fs::read_to_string(self.kubeconfig(user))?;
        let (own, other) = (format!("https://{}:6443", self.address), format!("https://{relay}"));
        let name = format!("\"{other}\", tls-server-name: \"{}\"", self.address);
        let path = self.folder.path().join(format!("{user}-{}.kubeconfig", relay.port()));
        std::fs::write(&path, text.replace(&format!("\"{own}\""), &name))?;
        Ok(path)
    }

    /// The certificate that tells the API server.
    #[must_use]
    pub fn certificate(&self) -> PathBuf {
        self.folder.path().join("certificates/apiserver.crt")
    }

    /// Creates an object; its status too, where it has one.
    pub fn create(&self, object: &Value) -> Result<()> {
        self.request("POST", &collection(object)?, Some(object))?;
        if object.get("status").is_some() {
            let patch = json!({"status": object["status"]});
            self.patch_status(object, &patch)?;
        }
        Ok(())
    }

    /// Creates many objects without status, several at a time.
    pub fn create_all(&self, objects: impl IntoIterator<Item = Value, IntoIter: Send>) -> Result<()> {
        let client = self.client()?;
        let objects = Mutex::new(objects.into_iter());
        let next = || objects.lock().unwrap_or_else(PoisonError::into_inner).next();
        let work = || -> Result<()> {
            client.namespace().enter()?;
            while let Some(object) = next() {
                client.request_here("POST", &collection(&object)?, Some(&object))?;
            }
            Ok(())
        };
        thread::scope(|scope| {
            let writers: Vec<_> = (0..WRITERS).map(|_| scope.spawn(work)).collect();
            writers.into_iter().try_for_each(|it| it.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
        })
    }

    /// What the API server has at this path.
    pub fn get(&self, path: &str) -> Result<Value> {
        Ok(serde_json::from_str(&self.request("GET", path, None)?)?)
    }

    /// Puts an object in the place of what there is.
    pub fn replace(&self, object: &Value) -> Result<()> {
        self.request("PUT", &path(object)?, Some(object)).map(drop)
    }

    /// Changes an object by a merge patch.
    pub fn patch(&self, object: &Value, patch: &Value) -> Result<()> {
        self.request("PATCH", &path(object)?, Some(patch)).map(drop)
    }

    /// Changes an object's status by a merge patch.
    pub fn patch_status(&self, object: &Value, patch: &Value) -> Result<()> {
        self.request("PATCH", &format!("{}/status", path(object)?), Some(patch)).map(drop)
    }

    /// Deletes an object.
    pub fn delete(&self, object: &Value) -> Result<()> {
        self.request("DELETE", &path(object)?, None).map(drop)
    }

    /// Has etcd forget all but the newest version of everything.
    pub fn compact(&self) -> Result<()> {
        let ask = |path: &str, body: Value| -> Result<Value> {
            let url = format!("http://127.0.0.1:2379{path}");
            let answer = self.ns.run(|| Ok(ureq::post(&url).send(body.to_string())?.body_mut().read_to_string()?))?;
            serde_json::from_str(&answer).context(answer)
        };
        let revision = ask("/v3/kv/range", json!({"key": "YQ=="}))?["header"]["revision"].clone();
        ask("/v3/kv/compaction", json!({"revision": revision, "physical": true})).map(drop)
    }

    /// A watch of what is at this path: what there is as events `ADDED`, then all that happens, one JSON object a line on
    /// the standard output of a process that ends with the watch.
    pub fn watch(&self, path: &str) -> Result<Child> {
        let url = self.url(&format!("{path}?watch=1"));
        let mut command = self.ns.command("curl");
        command.args(["-sS", "--no-buffer", "--fail", "--cacert"]).arg(self.certificate()).args(ADMIN).arg(url);
        command.stdout(Stdio::piped()).spawn().with_context(|| format!("cannot watch {path}"))
    }

    /// A request by an administrator; the answer.
    pub fn request(&self, method: &str, path: &str, body: Option<&Value>) -> Result<String> {
        self.client()?.request(method, path, body)
    }

    /// An administrator's way to the API server.
    pub fn client(&self) -> Result<&ApiClient> {
        if let Some(client) = self.client.get() {
            return Ok(client);
        }
        // The API server makes its certificate when it starts first.
        let client = ApiClient::new(self.ns.clone(), &self.address, &self.certificate())?;
        Ok(self.client.get_or_init(|| client))
    }

    fn url(&self, path: &str) -> String {
        format!("https://{}:6443{path}", self.address)
    }

    /// The end of what a program has written to its log.
    fn log(&self, program: &str) -> String {
        let text = std::fs::read_to_string(self.folder.path().join(format!("{program}.log"))).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }
}

impl Drop for ControlPlane {
    fn drop(&mut self) {
        for child in self.controllers.iter_mut().chain(&mut self.api_server).chain([&mut self.etcd]) {
            // Killed: nothing of it is kept.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn spawn(ns: &NetNs, folder: &Path, address: &str, program: &str, flags: &[&str]) -> Result<Child> {
    let log = std::fs::File::options().create(true).append(true).open(folder.join(format!("{program}.log")))?;
    let mut command = ns.command(script("start"));
    command.arg(folder).args([address, program]).args(flags).stdout(Stdio::null()).stderr(log);
    command.spawn().with_context(|| format!("cannot start {program}"))
}

/// Where objects of its kind are.
pub fn collection(object: &Value) -> Result<String> {
    let version = object["apiVersion"].as_str().context("apiVersion")?;
    let root = if version == "v1" { "/api" } else { "/apis" };
    let kind = object["kind"].as_str().context("kind")?.to_lowercase();
    Ok(match object["metadata"]["namespace"].as_str() {
        Some(namespace) => format!("{root}/{version}/namespaces/{namespace}/{kind}s"),
        None => format!("{root}/{version}/{kind}s"),
    })
}

/// Where an object is.
pub fn path(object: &Value) -> Result<String> {
    Ok(format!("{}/{}", collection(object)?, object["metadata"]["name"].as_str().context("metadata.name")?))
}
