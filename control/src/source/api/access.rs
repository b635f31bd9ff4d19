//! The API server to ask, and who we are to it.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};
use axum::http::{HeaderValue, header};
use kube::client::ClientBuilder;
use kube::config::{KubeConfigOptions, Kubeconfig};

use super::requests::Count;

/// Most that a connection may take to be made.
const CONNECT_PATIENCE: Duration = Duration::from_secs(5);

/// Where the API server and our credentials are named.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Access {
    /// In the current context of this file.
    Kubeconfig(PathBuf),
    /// In the environment and the service account of the Pod we are.
    InCluster,
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kubeconfig(path) => write!(f, "API server of {}", path.display()),
            Self::InCluster => f.write_str("API server of the Pod's cluster"),
        }
    }
}

impl Access {
    /// The service account's, when this process runs in a Pod.
    #[must_use]
    pub fn in_cluster() -> Option<Self> {
        let is_set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
        let token = Path::new("/var/run/secrets/kubernetes.io/serviceaccount/token");
        (is_set("KUBERNETES_SERVICE_HOST") && is_set("KUBERNETES_SERVICE_PORT") && token.exists())
            .then_some(Self::InCluster)
    }

    /// A client with what the files say now. Nothing is sent.
    pub async fn client(&self) -> Result<kube::Client> {
        let mut config = match self {
            Self::InCluster => kube::Config::incluster().context("the Pod's service account cannot be used")?,
            Self::Kubeconfig(path) => read(path).await.with_context(|| path.display().to_string())?,
        };
        config.connect_timeout = Some(CONNECT_PATIENCE);
        // Lists and watches have bounds of their own, and retries are for whoever knows what is watched.
        config.read_timeout = None;
        config.default_retry = false;
        let agent = HeaderValue::from_static(concat!("sluice/", env!("CARGO_PKG_VERSION")));
        config.headers.push((header::USER_AGENT, agent));
        let host = config.cluster_url.authority().map(ToString::to_string).unwrap_or_default();
        let client =
            ClientBuilder::try_from(config).context("the API server's address or the credentials cannot be used")?;
        Ok(client.with_layer(&Count { host: host.into() }).build())
    }
}

async fn read(path: &Path) -> Result<kube::Config> {
    let kubeconfig = Kubeconfig::read_from(path)?;
    Ok(kube::Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?)
}
