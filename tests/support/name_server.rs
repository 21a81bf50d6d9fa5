//! A name server that never answers for some names.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use tokio::net::UdpSocket;
use tokio_util::task::AbortOnDropHandle;

/// A name server on loopback. It answers 127.0.0.1 for names that begin with `fine`, and nothing for others.
pub(crate) struct NameServer {
    /// For `DNS_SERVERS`.
    pub(crate) address: String,
    unanswered: Arc<AtomicUsize>,
    _task: AbortOnDropHandle<()>,
}

impl NameServer {
    pub(crate) async fn start() -> Self {
        let socket = UdpSocket::bind("127.0.0.1:0").await.expect("a port");
        let address = socket.local_addr().expect("an address").to_string();
        let unanswered = Arc::new(AtomicUsize::new(0));
        let task = tokio::spawn(serve(socket, unanswered.clone()));
        Self { address, unanswered, _task: AbortOnDropHandle::new(task) }
    }

    /// The number of queries without an answer.
    pub(crate) fn unanswered(&self) -> usize {
        self.unanswered.load(Ordering::Relaxed)
    }
}

async fn serve(socket: UdpSocket, unanswered: Arc<AtomicUsize>) {
    let mut buffer = [0; 512];
    while let Ok((length, from)) = socket.recv_from(&mut buffer).await {
        let question = &buffer[..length];
        // After the head of 12 bytes and the length of the first label.
        if !question[13..].starts_with(b"fine") {
            unanswered.fetch_add(1, Ordering::Relaxed);
            continue;
        }
        let end = 12 + question[12..].iter().position(|byte| *byte == 0).expect("the end of the name") + 5;
        let is_v4 = question[end - 3] == 1;
        let head = [question[0], question[1], 0x81, 0x80, 0, 1, 0, u8::from(is_v4), 0, 0, 0, 0];
        let record: &[u8] = &[0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 0, 0, 4, 127, 0, 0, 1];
        let answer = [head.as_slice(), &question[12..end], if is_v4 { record } else { &[] }].concat();
        let _ = socket.send_to(&answer, from).await;
    }
}
