//! Flows in the daemon's table that need no sockets: connections of which both ends are gone without a word.

use std::net::{IpAddr, SocketAddr, TcpListener};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use nix::sys::socket::{setsockopt, sockopt::TcpRepair};
use sluice_bench::serve::listen_tcp;
use sluice_bench::workload::cores;
use socket2::{Domain, Protocol, Socket, Type};

use crate::daemon;
use crate::lab::{Lab, Mode};
use crate::manifests::{SILENT_IP, SILENT_POD_PORT, SILENT_PORTS};

/// Where the client's ports begin.
const FIRST_PORT: usize = 10_000;
/// So many connections to one port.
const EACH: usize = 50_000;
/// Most flows.
pub(super) const MOST: usize = EACH * SILENT_PORTS as usize;
/// Bound on each connection.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Opens so many connections from the client in a Pod, and forgets them: no end says goodbye, so they are established for
/// the daemon as long as it waits for a silent one, a day.
pub(super) fn fill(lab: &Lab, count: usize) -> Result<()> {
    let before = daemon::metric(lab, "sluice_flow_table_entries")?;
    let listeners: Vec<TcpListener> =
        lab.pods.iter().map(|pod| pod.ns.run(|| listen_tcp(SILENT_POD_PORT))).collect::<Result<_>>()?;
    let (client, over) = (lab.client_address(), AtomicBool::new(false));
    let threads = cores();
    let part = |index: usize| -> Result<()> {
        lab.client(Mode::Preserve).enter()?;
        (index..count).step_by(threads).try_for_each(|number| open(client, number))
    };
    thread::scope(|scope| -> Result<()> {
        for listener in &listeners {
            scope.spawn(|| forget_all(listener, &over));
        }
        let opening: Vec<_> = (0..threads).map(|index| scope.spawn(move || part(index))).collect();
        let opened = opening
            .into_iter()
            .try_for_each(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        over.store(true, Relaxed);
        opened
    })?;
    let held = daemon::metric(lab, "sluice_flow_table_entries")? - before;
    // A connection that a Pod had to retry may have failed; most must be there.
    ensure!(held >= 0.99 * count as f64, "of {count} flows only {held} are in the table");
    Ok(())
}

fn open(client: IpAddr, number: usize) -> Result<()> {
    let from = SocketAddr::new(client, u16::try_from(FIRST_PORT + number % EACH)?);
    let to = SocketAddr::new(SILENT_IP, u16::try_from(1 + number / EACH)?);
    let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))?;
    socket.bind(&from.into()).with_context(|| format!("cannot dial from {from}"))?;
    socket.connect_timeout(&to.into(), TIMEOUT).with_context(|| format!("cannot open a flow to {to}"))?;
    forget(&socket)
}

/// Closes a socket without a packet: only one in repair does that.
fn forget(socket: &impl std::os::fd::AsFd) -> Result<()> {
    setsockopt(socket, TcpRepair, &1).context("cannot forget a connection: needs CAP_NET_ADMIN")
}

fn forget_all(listener: &TcpListener, over: &AtomicBool) {
    if let Err(error) = listener.set_nonblocking(true) {
        eprintln!("server: {error}");
        return;
    }
    while !over.load(Relaxed) {
        match listener.accept() {
            Ok((stream, _)) => {
                if let Err(error) = forget(&stream) {
                    eprintln!("server: {error:#}");
                }
            }
            // Nobody waits, or a client is gone.
            Err(_) => thread::sleep(Duration::from_millis(1)),
        }
    }
}
