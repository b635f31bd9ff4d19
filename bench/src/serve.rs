//! What does a Pod answer: HTTP and UDP servers that say which Pod they are.
//!
//! | request | answer |
//! | --- | --- |
//! | `GET /` (or any other path) | the Pod's name |
//! | `GET /client` | who asks, as `IP:PORT` seen from the Pod |
//! | `GET /slow/MILLIS` | the Pod's name, after that time |
//! | `GET /bytes/N` | N bytes of [`Pattern`] |
//! | `POST /sink` | how many bytes came |
//! | `POST /hash` | their digest ([`Digest`]) |
//! | a datagram | the Pod's name; for `client`, who asks |

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context as _, Result};
use axum::Router;
use axum::body::Body;
use axum::extract::{ConnectInfo, Path, State};
use axum::http::header::CONTENT_LENGTH;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use futures_util::{StreamExt as _, stream};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::netns::{NetNs, has_ipv6};
use crate::pattern::{Digest, Pattern};

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 4096;

/// How a server ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Serving,
    /// No new connections; requests under way are answered.
    Finishing,
    Stopped,
}

/// The servers of one Pod, on a thread inside the Pod's namespace. Dropping it closes everything at once.
#[derive(Debug)]
pub struct PodServer {
    phase: watch::Sender<Phase>,
    thread: Option<JoinHandle<()>>,
}

impl PodServer {
    /// Listens on all addresses of `ns` with HTTP on the TCP ports and the echo on the UDP ports.
    ///
    /// When this returns, all ports are open.
    pub fn start(ns: &NetNs, name: &str, tcp: &[u16], udp: &[u16]) -> Result<Self> {
        let (listeners, sockets) = ns.run(|| {
            let listeners: Result<Vec<_>> = tcp.iter().map(|port| listen_tcp(*port)).collect();
            let sockets: Result<Vec<_>> = udp.iter().map(|port| bind_udp(*port)).collect();
            Ok((listeners?, sockets?))
        })?;
        let (phase, watched) = watch::channel(Phase::Serving);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("cannot start a runtime for a Pod's servers")?;
        let name: Arc<str> = name.into();
        let thread = thread::Builder::new()
            .name(format!("pod {name}"))
            .spawn(move || {
                runtime.block_on(serve_all(name, listeners, sockets, watched));
                runtime.shutdown_background();
            })
            .context("cannot start a thread for a Pod's servers")?;
        Ok(Self { phase, thread: Some(thread) })
    }

    /// Stops listening, lets requests under way finish for at most `grace`, then closes everything.
    pub fn finish(mut self, grace: Duration) {
        self.phase.send_replace(Phase::Finishing);
        let deadline = std::time::Instant::now() + grace;
        let over = |thread: &Option<JoinHandle<()>>| thread.as_ref().is_none_or(JoinHandle::is_finished);
        while !over(&self.thread) && std::time::Instant::now() < deadline {
            thread::sleep(Duration::from_millis(5));
        }
        self.stop();
    }

    fn stop(&mut self) {
        self.phase.send_replace(Phase::Stopped);
        if let Some(thread) = self.thread.take() {
            // A panic in a handler has been printed, and was that request's failure.
            drop(thread.join());
        }
    }
}

impl Drop for PodServer {
    fn drop(&mut self) {
        self.stop();
    }
}

/// A TCP listener on all addresses of the calling thread's namespace.
pub fn listen_tcp(port: u16) -> Result<std::net::TcpListener> {
    let socket = bind(Type::STREAM, Protocol::TCP, port)?;
    socket.listen(BACKLOG).with_context(|| format!("cannot listen on TCP port {port}"))?;
    Ok(socket.into())
}

fn bind_udp(port: u16) -> Result<UdpSocket> {
    Ok(bind(Type::DGRAM, Protocol::UDP, port)?.into())
}

/// One socket for both families, where there are two.
fn bind(kind: Type, protocol: Protocol, port: u16) -> Result<Socket> {
    let (domain, address): (_, SocketAddr) = if has_ipv6() {
        (Domain::IPV6, (Ipv6Addr::UNSPECIFIED, port).into())
    } else {
        (Domain::IPV4, (Ipv4Addr::UNSPECIFIED, port).into())
    };
    let open = || -> std::io::Result<Socket> {
        let socket = Socket::new(domain, kind, Some(protocol))?;
        if domain == Domain::IPV6 {
            socket.set_only_v6(false)?;
        }
        if kind == Type::STREAM {
            socket.set_reuse_address(true)?;
        }
        socket.bind(&address.into())?;
        Ok(socket)
    };
    open().with_context(|| format!("cannot bind port {port}"))
}

async fn serve_all(
    name: Arc<str>,
    listeners: Vec<std::net::TcpListener>,
    sockets: Vec<UdpSocket>,
    mut phase: watch::Receiver<Phase>,
) {
    let router = router(Arc::clone(&name));
    let mut tcp = JoinSet::new();
    for listener in listeners {
        let (router, mut phase) = (router.clone(), phase.clone());
        tcp.spawn(async move {
            listener.set_nonblocking(true)?;
            let listener = tokio::net::TcpListener::from_std(listener)?;
            axum::serve(listener, router.into_make_service_with_connect_info::<SocketAddr>())
                .with_graceful_shutdown(async move { until(&mut phase, |now| now != Phase::Serving).await })
                .await
        });
    }
    let mut udp = JoinSet::new();
    for socket in sockets {
        udp.spawn(answer_datagrams(socket, Arc::clone(&name)));
    }
    let mut also_phase = phase.clone();
    let finished = async {
        while let Some(ended) = tcp.join_next().await {
            report(&name, ended);
        }
        until(&mut also_phase, |now| now != Phase::Serving).await;
    };
    tokio::select! {
        () = finished => {}
        () = until(&mut phase, |now| now == Phase::Stopped) => {}
        Some(ended) = udp.join_next() => report(&name, ended),
    }
}

/// Waits for a phase, or for the end of the [`PodServer`] that sets it.
async fn until(phase: &mut watch::Receiver<Phase>, reached: impl Fn(Phase) -> bool) {
    // An error means that the sender is gone, which ends us as well.
    drop(phase.wait_for(|now| reached(*now)).await);
}

fn report(name: &str, ended: Result<std::io::Result<()>, tokio::task::JoinError>) {
    match ended {
        Ok(Ok(())) => {}
        Ok(Err(error)) => eprintln!("server of {name}: {error}"),
        Err(error) => eprintln!("server of {name}: {error}"),
    }
}

async fn answer_datagrams(socket: UdpSocket, name: Arc<str>) -> std::io::Result<()> {
    socket.set_nonblocking(true)?;
    let socket = tokio::net::UdpSocket::from_std(socket)?;
    let mut datagram = [0; 2048];
    loop {
        // Errors here are of single datagrams: an ICMP error for an earlier answer, or a client out of reach.
        let Ok((length, from)) = socket.recv_from(&mut datagram).await else {
            continue;
        };
        let answer = if &datagram[..length] == b"client" {
            socket.send_to(canonical(from).to_string().as_bytes(), from).await
        } else {
            socket.send_to(name.as_bytes(), from).await
        };
        drop(answer);
    }
}

fn router(name: Arc<str>) -> Router {
    Router::new()
        .route("/client", get(client))
        .route("/slow/{millis}", get(slow))
        .route("/bytes/{count}", get(bytes))
        .route("/sink", post(sink))
        .route("/hash", post(hash))
        .fallback(who)
        .with_state(name)
}

async fn who(State(name): State<Arc<str>>) -> String {
    name.to_string()
}

async fn client(ConnectInfo(from): ConnectInfo<SocketAddr>) -> String {
    canonical(from).to_string()
}

async fn slow(State(name): State<Arc<str>>, Path(millis): Path<u64>) -> String {
    tokio::time::sleep(Duration::from_millis(millis)).await;
    name.to_string()
}

async fn bytes(Path(count): Path<u64>) -> Response {
    let body = Body::from_stream(stream::iter(Pattern::new(count).map(Ok::<_, std::io::Error>)));
    ([(CONTENT_LENGTH, count)], body).into_response()
}

async fn sink(body: Body) -> Result<String, String> {
    Ok(digest(body).await?.bytes().to_string())
}

async fn hash(body: Body) -> Result<String, String> {
    Ok(digest(body).await?.to_string())
}

async fn digest(body: Body) -> Result<Digest, String> {
    let mut digest = Digest::default();
    let mut chunks = body.into_data_stream();
    while let Some(chunk) = chunks.next().await {
        digest.update(&chunk.map_err(|error| format!("the body ended early: {error}"))?);
    }
    Ok(digest)
}

/// An IPv4 client of a socket for both families, written as IPv4.
fn canonical(from: SocketAddr) -> SocketAddr {
    SocketAddr::new(from.ip().to_canonical(), from.port())
}
