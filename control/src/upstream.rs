//! Servers for names that are not ours: asked through a resolver that retries, prefers who answers, and remembers.

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use anyhow::{Context as _, Result};
use hickory_resolver::TokioResolver;
use hickory_resolver::config::{ConnectionConfig, NameServerConfig, ResolveHosts, ResolverConfig};
use hickory_resolver::lookup::Lookup;
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::net::{DnsError, NetError};
use hickory_resolver::proto::op::ResponseCode;
use hickory_resolver::proto::rr::{Name, RData, RecordType};
use sluice_dataplane::dns::{Answer, Failure, Question, Record, Source, Told, Upstream};
use tokio::runtime::Handle;
use tokio::sync::Semaphore;

use crate::config::Dns;

/// How long a server may take.
const PATIENCE: Duration = Duration::from_secs(2);
/// How often a question is asked again, at another server where there is one.
const ATTEMPTS: usize = 2;
/// Answers live no longer, whatever they say.
const LONGEST: Duration = Duration::from_secs(3600);
/// That there is none lives no longer.
const LONGEST_NEGATIVE: Duration = Duration::from_secs(1800);
/// How often it is tried whether a loop is still there.
const PROBE_INTERVAL: Duration = Duration::from_secs(30);

/// The servers, and what is being asked of them.
pub struct Upstreams {
    resolver: TokioResolver,
    runtime: Handle,
    places: Arc<Semaphore>,
    most: usize,
    rejected: AtomicU64,
    /// A name that nobody else asks for: when it comes in, our questions come back to us.
    probe: Name,
    is_loop: AtomicBool,
}

impl Upstreams {
    /// The configured servers, or those of resolv.conf. None: nobody is there to be asked.
    pub fn new(config: &Dns) -> Result<Option<Arc<Self>>> {
        let mut servers: Vec<NameServerConfig> = match &config.upstreams {
            Some(upstreams) => upstreams.iter().map(|upstream| server(upstream.0)).collect(),
            None => {
                let text = std::fs::read("/etc/resolv.conf").unwrap_or_default();
                let read = hickory_resolver::system_conf::parse_resolv_conf(text);
                read.map(|(config, _)| config.name_servers().to_vec()).unwrap_or_default()
            }
        };
        // We are no upstream of ours.
        let is_own = |server: &NameServerConfig| {
            let mut ports = server.connections.iter().map(|connection| connection.port);
            ports.any(|port| config.listen.contains(&SocketAddr::new(server.ip, port)))
        };
        servers.retain(|server| !is_own(server));
        if servers.is_empty() {
            return Ok(None);
        }
        let servers = ResolverConfig::from_parts(None, Vec::new(), servers);
        let mut builder = TokioResolver::builder_with_config(servers, TokioRuntimeProvider::default());
        let options = builder.options_mut();
        options.timeout = PATIENCE;
        // One after the other, who answered best first: two at once would double what upstreams are asked.
        options.num_concurrent_reqs = 1;
        options.attempts = ATTEMPTS;
        options.edns0 = true;
        options.cache_size = config.cache_size;
        options.use_hosts_file = ResolveHosts::Never;
        options.positive_max_ttl = Some(LONGEST);
        options.negative_max_ttl = Some(LONGEST_NEGATIVE);
        options.max_active_requests = config.max_concurrent;
        let resolver = builder.build().context("the resolver of upstreams")?;
        let probe = format!("{:016x}.sluice-loop.", fastrand::u64(..));
        Ok(Some(Arc::new(Self {
            resolver,
            runtime: Handle::current(),
            places: Arc::new(Semaphore::new(config.max_concurrent)),
            most: config.max_concurrent,
            rejected: AtomicU64::new(0),
            probe: Name::from_ascii(probe).context("the name of the probe")?,
            is_loop: AtomicBool::new(false),
        })))
    }

    /// Questions that were refused because too many were open.
    #[must_use]
    pub fn rejected(&self) -> u64 {
        self.rejected.load(Relaxed)
    }

    /// Questions that are open now.
    #[must_use]
    pub fn open(&self) -> usize {
        self.most.saturating_sub(self.places.available_permits())
    }

    /// Whether our questions come back to us: then none is asked.
    #[must_use]
    pub fn is_loop(&self) -> bool {
        self.is_loop.load(Relaxed)
    }

    /// Looks for a loop, now and then until dropped.
    pub async fn watch_for_loops(self: Arc<Self>) {
        let mut told = false;
        loop {
            self.is_loop.store(false, Relaxed);
            // Whatever comes of it: only whether it comes back counts.
            drop(self.resolver.lookup(self.probe.clone(), RecordType::TXT).await);
            match (self.is_loop(), told) {
                (true, false) => {
                    tracing::error!("upstreams ask us again what we ask them: none is asked; set dns.upstreams")
                }
                (false, true) => tracing::info!("upstreams do not ask us any more"),
                (true, true) | (false, false) => {}
            }
            told = self.is_loop();
            tokio::time::sleep(PROBE_INTERVAL).await;
            self.resolver.clear_lookup_cache(self.probe.clone(), RecordType::TXT);
        }
    }
}

fn server(address: SocketAddr) -> NameServerConfig {
    let connection = |mut connection: ConnectionConfig| {
        connection.port = address.port();
        connection
    };
    let connections = vec![connection(ConnectionConfig::udp()), connection(ConnectionConfig::tcp())];
    NameServerConfig::new(address.ip(), true, connections)
}

impl Upstream for Upstreams {
    fn ask(&self, question: &Question, then: Box<dyn FnOnce(Result<Told, Failure>) + Send>) {
        if question.name == self.probe {
            self.is_loop.store(true, Relaxed);
        }
        if self.is_loop() {
            return then(Err(Failure::Refused));
        }
        let Ok(place) = Arc::clone(&self.places).try_acquire_owned() else {
            self.rejected.fetch_add(1, Relaxed);
            return then(Err(Failure::Refused));
        };
        let (resolver, name, kind) = (self.resolver.clone(), question.name.clone(), question.kind);
        let mut asking = Box::pin(async move { resolver.lookup(name, kind).await });
        let asked = question.name.clone();
        // What is remembered is there at once, and needs no other thread.
        let entered = self.runtime.enter();
        if let Poll::Ready(result) = poll_once(asking.as_mut()) {
            drop(entered);
            let source =
                if matches!(result, Err(ref error) if !is_answer(error)) { Source::Upstream } else { Source::Cache };
            return then(told(&asked, result, source));
        }
        self.runtime.spawn(async move {
            let result = asking.await;
            drop(place);
            then(told(&asked, result, Source::Upstream));
        });
    }
}

fn poll_once<F: Future>(future: Pin<&mut F>) -> Poll<F::Output> {
    future.poll(&mut Context::from_waker(Waker::noop()))
}

fn is_answer(error: &NetError) -> bool {
    matches!(error, NetError::Dns(_))
}

fn told(asked: &Name, result: Result<Lookup, NetError>, source: Source) -> Result<Told, Failure> {
    let record = |record: &hickory_resolver::proto::rr::Record| Record {
        // The client's letters.
        owner: (record.name != *asked).then(|| record.name.clone()),
        ttl: record.ttl,
        data: record.data.clone(),
    };
    let answer = match result {
        Ok(lookup) => Answer {
            code: lookup.message().response_code,
            answers: lookup.answers().iter().map(record).collect(),
            ..Answer::default()
        },
        Err(NetError::Dns(DnsError::NoRecordsFound(none))) => {
            let ttl = none.negative_ttl;
            let soa = none.soa.map(|soa| Record {
                owner: Some(soa.name.clone()),
                ttl: ttl.unwrap_or(soa.ttl),
                data: RData::SOA(soa.data),
            });
            Answer { code: none.response_code, authority: soa.into_iter().collect(), ..Answer::default() }
        }
        Err(NetError::Dns(DnsError::ResponseCode(code))) => Answer { code, ..Answer::default() },
        Err(error) => {
            tracing::debug!(name = %asked, %error, "no upstream answers");
            return Err(Failure::Silent);
        }
    };
    // A truncated answer was asked for again over a connection: what is here is whole.
    let failed = matches!(answer.code, ResponseCode::ServFail | ResponseCode::Refused);
    if failed { Err(Failure::Silent) } else { Ok(Told { answer, source }) }
}
