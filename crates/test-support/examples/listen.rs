//! `listen PORT`: answers HTTP with 200 until it is stopped. The tests of `Service` run it.

use test_support::Receiver;

#[tokio::main]
async fn main() {
    let port = std::env::args().nth(1).and_then(|port| port.parse().ok()).expect("a port");
    let receiver = Receiver::start_on(port).await;
    println!("listening on {}", receiver.address());
    std::future::pending().await
}
