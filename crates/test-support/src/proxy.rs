//! A TCP proxy whose connections can be delayed, stalled, cut and led elsewhere.

use std::{
    collections::HashSet,
    io,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU16, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::watch,
    task::JoinSet,
};
use tokio_util::task::AbortOnDropHandle;

/// What the proxy does with bytes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Wire {
    /// Forwards them.
    Open,
    /// Forwards them after this time.
    Delayed(Duration),
    /// Holds them; neither side notices.
    Stalled,
    /// Closes every connection, also new ones.
    Cut,
}

/// A proxy in front of one server, for one client. It ends when dropped.
#[derive(Debug)]
pub struct Proxy {
    port: u16,
    server: Arc<AtomicU16>,
    wire: watch::Sender<Wire>,
    /// Counts how often all connections were closed.
    cuts: watch::Sender<usize>,
    /// Local ports of the connections to the server: the server sees them as the ports of its client.
    ports: Arc<Mutex<HashSet<u16>>>,
    _task: AbortOnDropHandle<()>,
}

impl Proxy {
    /// A proxy in front of the server on this port of 127.0.0.1.
    pub async fn start(server: u16) -> Self {
        let server = Arc::new(AtomicU16::new(server));
        let leads_to = server.clone();
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let (wire, watched) = watch::channel(Wire::Open);
        let (cuts, cut) = watch::channel(0);
        let ports = Arc::<Mutex<HashSet<u16>>>::default();
        let open = ports.clone();
        let task = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                let (watched, open, mut cut) = (watched.clone(), open.clone(), cut.clone());
                cut.mark_unchanged();
                let server = leads_to.load(Ordering::Relaxed);
                connections.spawn(async move {
                    // Errors are expected.
                    tokio::select! {
                        _ = pass(client, server, watched, &open) => {}
                        _ = cut.changed() => {}
                    }
                });
                while connections.try_join_next().is_some() {}
            }
        });
        Self { port, server, wire, cuts, ports, _task: AbortOnDropHandle::new(task) }
    }

    /// A URL of the server, through this proxy.
    pub fn url(&self, url: &str) -> String {
        let (rest, tail) = url.rsplit_once(':').expect("a port");
        let path = tail.split_once('/').map_or(String::new(), |(_, path)| format!("/{path}"));
        format!("{rest}:{}{path}", self.port)
    }

    /// Leads new connections to the server on this port; the others stay where they are.
    pub fn lead_to(&self, server: u16) {
        self.server.store(server, Ordering::Relaxed);
    }

    /// Closes all connections; new ones are accepted.
    pub fn cut_once(&self) {
        self.cuts.send_modify(|cuts| *cuts += 1);
    }

    /// Sets what the proxy does with bytes from now on.
    pub fn set(&self, wire: Wire) {
        self.wire.send_replace(wire);
    }

    /// Whether a connection that the server sees from this port is one of this proxy's.
    pub fn owns(&self, port: u16) -> bool {
        self.ports.lock().unwrap_or_else(PoisonError::into_inner).contains(&port)
    }
}

async fn pass(
    client: TcpStream,
    server: u16,
    mut wire: watch::Receiver<Wire>,
    ports: &Mutex<HashSet<u16>>,
) -> io::Result<()> {
    if *wire.borrow_and_update() == Wire::Cut {
        return Ok(());
    }
    let upstream = TcpStream::connect(("127.0.0.1", server)).await?;
    client.set_nodelay(true)?;
    upstream.set_nodelay(true)?;
    let port = upstream.local_addr()?.port();
    ports.lock().unwrap_or_else(PoisonError::into_inner).insert(port);
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = upstream.into_split();
    let ended = tokio::select! {
        ended = forward(from_client, to_server, wire.clone()) => ended,
        ended = forward(from_server, to_client, wire) => ended,
    };
    ports.lock().unwrap_or_else(PoisonError::into_inner).remove(&port);
    ended
}

/// Forwards one direction, until an end closes or the wire is cut.
async fn forward(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut wire: watch::Receiver<Wire>) -> io::Result<()> {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let read = tokio::select! {
            read = from.read(&mut buffer) => read?,
            cut = wire.wait_for(|wire| *wire == Wire::Cut) => {
                drop(cut);
                return Ok(());
            }
        };
        if read == 0 {
            return Ok(());
        }
        let now = *wire.borrow();
        if let Wire::Delayed(delay) = now {
            tokio::time::sleep(delay).await;
        }
        let Ok(now) = wire.wait_for(|wire| *wire != Wire::Stalled).await.map(|wire| *wire) else { return Ok(()) };
        if now == Wire::Cut {
            return Ok(());
        }
        to.write_all(&buffer[..read]).await?;
    }
}
