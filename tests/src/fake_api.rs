//! A fake API server: it knows nothing, and misbehaves as told, over plain HTTP.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result};
use sluice_bench::netns::NetNs;

/// How every request is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manner {
    /// With this status.
    Status(u16),
    /// With the first half of a list.
    Half,
    /// Not at all, and the connection stays open.
    Silent,
    /// By a byte now and then.
    Slow,
    /// The connection is closed at once.
    Closed,
}

/// The server. It ends with the namespace's processes.
pub struct FakeApi {
    manner: Arc<Mutex<Manner>>,
    asked: Arc<AtomicU32>,
    folder: tempfile::TempDir,
}

impl FakeApi {
    /// Starts it at this address of this namespace.
    pub fn start(ns: &NetNs, address: SocketAddr, manner: Manner) -> Result<Self> {
        let listener = ns.run(|| TcpListener::bind(address).context("the fake API server"))?;
        let (manner, asked) = (Arc::new(Mutex::new(manner)), Arc::new(AtomicU32::new(0)));
        let folder = tempfile::tempdir()?;
        let kubeconfig = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: it\ncontexts: [{{name: it, context: {{cluster: it, user: it}}}}]\n\
             clusters: [{{name: it, cluster: {{server: \"http://{address}\"}}}}]\nusers: [{{name: it, user: {{token: it}}}}]\n"
        );
        std::fs::write(folder.path().join("kubeconfig"), kubeconfig)?;
        let (told, count) = (Arc::clone(&manner), Arc::clone(&asked));
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (told, count) = (Arc::clone(&told), Arc::clone(&count));
                std::thread::spawn(move || answer(stream, &told, &count));
            }
        });
        Ok(Self { manner, asked, folder })
    }

    /// From now on requests are answered so.
    pub fn behave(&self, manner: Manner) {
        *self.manner.lock().unwrap_or_else(PoisonError::into_inner) = manner;
    }

    /// Requests so far.
    #[must_use]
    pub fn asked(&self) -> u32 {
        self.asked.load(Relaxed)
    }

    /// A kubeconfig that names it.
    #[must_use]
    pub fn kubeconfig(&self) -> PathBuf {
        self.folder.path().join("kubeconfig")
    }
}

/// One request of a connection; clients open another for the next.
fn answer(mut stream: TcpStream, manner: &Mutex<Manner>, asked: &AtomicU32) {
    let mut request = [0; 8192];
    if !stream.read(&mut request).is_ok_and(|length| length > 0) {
        return;
    }
    asked.fetch_add(1, Relaxed);
    let manner = *manner.lock().unwrap_or_else(PoisonError::into_inner);
    // A client that has gone has what it deserves.
    let _ = match manner {
        Manner::Status(code) => {
            let body =
                format!(r#"{{"kind":"Status","apiVersion":"v1","status":"Failure","code":{code},"message":"fake"}}"#);
            let length = body.len();
            write!(stream, "HTTP/1.1 {code} fake\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}")
        }
        Manner::Half => {
            write!(
                stream,
                "HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{{\"kind\":\"List\",\"metadata\":{{}},\"items\":[{{\"metadata\":"
            )
        }
        Manner::Silent => {
            std::thread::sleep(Duration::from_secs(300));
            Ok(())
        }
        Manner::Slow => "HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{\"items\":[".bytes().try_for_each(|byte| {
            std::thread::sleep(Duration::from_millis(200));
            stream.write_all(&[byte])
        }),
        Manner::Closed => Ok(()),
    };
}
