//! Names while the first objects are awaited: those of the cluster are not known yet, all others are asked for as ever.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use sluice_dataplane::dns::Answerer;
use sluice_dataplane::packet_path::Tun;

use crate::config::Dns;
use crate::host::Host;
use crate::responder::{self, Responder};
use crate::upstream::Upstreams;

/// A source that has told all by then needs nothing of this: nobody is told meanwhile that a name is not known.
const MOMENT: Duration = Duration::from_millis(500);

/// What answers early.
pub struct Early {
    /// The link, which goes with this process until it is made persistent: nothing else of the host is changed yet.
    pub tun: Tun,
    /// The sockets.
    pub responder: Responder,
}

/// What it takes to answer early.
pub struct Means<'a> {
    /// Configuration of names.
    pub dns: &'a Dns,
    /// Who answers.
    pub names: &'a Arc<Answerer>,
    /// Who is asked for other names.
    pub upstreams: Option<&'a Arc<Upstreams>>,
    /// Where names are answered.
    pub host: &'a Host,
    /// Queues of the link.
    pub queues: usize,
}

/// Waits for `first`. When that takes longer than a moment, names are answered from then on.
///
/// # Errors
/// That of `first`; or when names cannot be answered.
pub async fn wait<T>(first: impl Future<Output = Result<T>>, means: Option<Means<'_>>) -> Result<(T, Option<Early>)> {
    let mut first = pin!(first);
    let Some(means) = means else { return Ok((first.await?, None)) };
    tokio::select! {
        biased;
        first = &mut first => return Ok((first?, None)),
        () = tokio::time::sleep(MOMENT) => {}
    }
    let tun = means.host.open_link(means.queues).await?;
    let addresses: BTreeSet<_> = means.dns.listen.iter().map(SocketAddr::ip).collect();
    means.host.set_up_names(&addresses).await?;
    let responder = responder::start(means.dns, means.names, means.upstreams)?;
    tracing::info!("the source has not told all yet: until then names of the cluster are answered with SERVFAIL");
    Ok((first.await?, Some(Early { tun, responder })))
}
