//! Bulk data: a thread a stream, every byte checked by its receiver.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use crate::client::Failure;
use crate::protocol::{Checker, HEAD, Request, is_answer, taken, write_blocks};
use crate::workload::meter::{Live, Meter};
use crate::workload::{Plan, Share, Times};

/// How soon a stalled stream notices that the load is over.
const PATIENCE: Duration = Duration::from_millis(100);

pub(super) fn run(plan: &Plan, share: Share, times: Times, live: &Live) -> Meter {
    let mut meter = Meter::default();
    let target = plan.targets[share.index % plan.targets.len()];
    while Instant::now() < times.end {
        let mut stream = Stream { plan, times, live, meter: &mut meter, last: Instant::now() };
        let result = if plan.upload { stream.upload(target) } else { stream.download(target) };
        if let Err(failure) = result {
            meter.failed(failure, live);
            thread::sleep(PATIENCE.min(times.end.saturating_duration_since(Instant::now())));
        }
    }
    meter
}

/// One request on a new connection.
pub(super) fn probe(target: SocketAddr, timeout: Duration) -> Result<(), Failure> {
    let mut stream = connect(target, timeout, Request::Answer { size: HEAD as u32, number: 1 })?;
    let mut answer = [0; HEAD];
    stream.read_exact(&mut answer)?;
    if is_answer(&answer, HEAD as u32, 1) { Ok(()) } else { Err(Failure::Malformed) }
}

fn connect(target: SocketAddr, timeout: Duration, request: Request) -> Result<TcpStream, Failure> {
    let mut stream = TcpStream::connect_timeout(&target, timeout)?;
    stream.set_read_timeout(Some(timeout))?;
    stream.set_write_timeout(Some(timeout))?;
    stream.write_all(&request.encode())?;
    Ok(stream)
}

struct Stream<'a> {
    plan: &'a Plan,
    times: Times,
    live: &'a Live,
    meter: &'a mut Meter,
    /// When bytes last moved.
    last: Instant,
}

impl Stream<'_> {
    fn download(&mut self, target: SocketAddr) -> Result<(), Failure> {
        let mut stream = connect(target, self.plan.timeout, Request::Send)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut checker = Checker::default();
        while self.goes_on()? {
            match checker.read(&mut stream) {
                Ok(0) => return Err(Failure::Closed),
                Ok(count) => self.moved(count),
                Err(Failure::Timeout) => {}
                Err(failure) => return Err(failure),
            }
        }
        checker.finish().map(|_| ())
    }

    fn upload(&mut self, target: SocketAddr) -> Result<(), Failure> {
        let mut stream = connect(target, self.plan.timeout, Request::Take)?;
        let mut answer = [0; HEAD];
        stream.read_exact(&mut answer)?;
        taken(&answer)?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let mut sent = 0;
        while self.goes_on()? {
            match write_blocks(&mut stream, sent) {
                Ok(count) => {
                    sent += count as u64;
                    self.moved(count);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => return Err(error.into()),
            }
        }
        stream.shutdown(Shutdown::Write)?;
        stream.read_exact(&mut answer)?;
        if taken(&answer)? == sent { Ok(()) } else { Err(Failure::Malformed) }
    }

    fn moved(&mut self, count: usize) {
        self.last = Instant::now();
        self.meter.bytes(self.times, count as u64, self.last, self.live);
    }

    /// `false` at the end of the load; an error when nothing has moved for too long.
    fn goes_on(&self) -> Result<bool, Failure> {
        let now = Instant::now();
        if now.saturating_duration_since(self.last) > self.plan.timeout {
            return Err(Failure::Timeout);
        }
        Ok(now < self.times.end)
    }
}
