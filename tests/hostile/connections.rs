//! Attacks on connections: requests that never end, answers that are not read, too many connections, heads beyond the
//! limits.

use std::{io::ErrorKind, time::Duration};

use futures::future::join_all;
use serde_json::json;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
    time::sleep,
};

use super::{Attack, Attacker};
use crate::support::UPDATE;

pub(super) const ATTACKS: &[Attack] = &[
    Attack { name: "heads that never end", refusals: &["cut"], run: |a| Box::pin(endless_heads(a)) },
    Attack { name: "bodies that never end", refusals: &["408 body_timeout"], run: |a| Box::pin(endless_bodies(a)) },
    Attack { name: "idle connections", refusals: &["cut"], run: |a| Box::pin(idle_connections(a)) },
    Attack { name: "answers that are not read", refusals: &["cut"], run: |a| Box::pin(unread_answers(a)) },
    Attack { name: "too many connections", refusals: &["cut"], run: |a| Box::pin(too_many_connections(a)) },
    Attack { name: "heads beyond the limits", refusals: &["431"], run: |a| Box::pin(oversized_heads(a)) },
];

impl Attacker<'_> {
    pub(super) fn url(&self, path: &str) -> String {
        format!("{}{path}", self.tenant.api.url)
    }

    /// The head of a request, without its end.
    pub(super) fn head(&self, line: &str) -> String {
        format!("{line} HTTP/1.1\r\nhost: gateway\r\nauthorization: Bearer {}\r\n", self.tenant.api.key)
    }
}

/// A connection from the attacker's address.
pub(super) async fn connect(a: &Attacker<'_>) -> TcpStream {
    let address = a.tenant.api.url.strip_prefix("http://").expect("http").parse().expect("an address");
    let socket = TcpSocket::new_v4().expect("a socket");
    socket.bind(([127, 0, 0, a.host], 0).into()).expect("a loopback address");
    socket.connect(address).await.expect("a connection")
}

/// Reads to the end. Returns the status and the code of the response, or `cut` if there is none.
pub(super) async fn read_answer(connection: &mut (impl AsyncRead + Unpin)) -> String {
    let mut answer = Vec::new();
    let _ = connection.read_to_end(&mut answer).await;
    let text = String::from_utf8_lossy(&answer);
    let Some(status) = text.strip_prefix("HTTP/1.1 ").and_then(|text| text.get(..3)) else { return "cut".to_owned() };
    let code = text.split_once("\"code\":\"").and_then(|(_, code)| code.split_once('"'));
    code.map_or(status.to_owned(), |(code, _)| format!("{status} {code}"))
}

/// Keeps 24 connections that each send `first` and then a byte every 50 ms, and replaces closed ones.
async fn drip(a: &Attacker<'_>, first: &str) {
    let client = async || loop {
        let mut connection = connect(a).await;
        let _ = connection.write_all(first.as_bytes()).await;
        let (mut reader, mut writer) = connection.split();
        let dripping = async {
            while writer.write_all(b"x").await.is_ok() {
                sleep(Duration::from_millis(50)).await;
            }
            std::future::pending::<()>().await;
        };
        tokio::select! {
            () = dripping => {}
            answer = read_answer(&mut reader) => a.answers.add(answer),
        }
    };
    join_all((0..24).map(|_| client())).await;
}

async fn endless_heads(a: &Attacker<'_>) {
    drip(a, "GET / HTTP/1.1\r\nx-drip: ").await;
}

async fn endless_bodies(a: &Attacker<'_>) {
    drip(a, &(a.head(&format!("POST {UPDATE}")) + "content-length: 100000\r\n\r\n")).await;
}

async fn idle_connections(a: &Attacker<'_>) {
    let client = async || loop {
        a.answers.add(read_answer(&mut connect(a).await).await);
    };
    join_all((0..64).map(|_| client())).await;
}

/// Requests a lead of 200 KB again and again, without reading the responses.
async fn unread_answers(a: &Attacker<'_>) {
    let update = json!({"leadId": a.tenant.lead_id, "metadata": {"blob": "x".repeat(200_000)}});
    a.tenant.api.update_and_wait(update).await;
    let get = (a.head(&format!("GET /api/v1/leads/get?leadId={}", a.tenant.lead_id)) + "\r\n").repeat(100);
    let client = async || loop {
        let connection = connect(a).await;
        // The buffers are soon full. An error means that the connection was closed.
        while connection.try_write(get.as_bytes()).map_or_else(|e| e.kind() == ErrorKind::WouldBlock, |_| true) {
            sleep(Duration::from_millis(200)).await;
        }
        a.answers.add("cut");
    };
    join_all((0..4).map(|_| client())).await;
}

/// Opens more connections than an address may have, which replace each other.
async fn too_many_connections(a: &Attacker<'_>) {
    let _held = join_all((0..128).map(|_| connect(a))).await;
    let client = async || loop {
        a.answers.add(read_answer(&mut connect(a).await).await);
        sleep(Duration::from_millis(50)).await;
    };
    join_all((0..24).map(|_| client())).await;
}

async fn oversized_heads(a: &Attacker<'_>) {
    let heads =
        ["x: y\r\n".repeat(101), format!("x: {}\r\n", "y".repeat(32_000)), format!("x: {}\r\n", "y".repeat(200_000))];
    for head in heads.iter().cycle() {
        let mut connection = connect(a).await;
        let _ = connection.write_all(format!("GET / HTTP/1.1\r\n{head}\r\n").as_bytes()).await;
        // If the server closes the connection with unread bytes, the response may be lost.
        a.answers.add(read_answer(&mut connection).await);
        sleep(Duration::from_millis(50)).await;
    }
}
