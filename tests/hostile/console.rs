//! Attacks on the console, each with a separate console.

use std::time::Duration;

use reqwest::{
    Method,
    header::{ACCEPT, COOKIE, ORIGIN},
};

use super::{Attack, Attacker};
use crate::console::Console;

pub(super) const ATTACKS: &[Attack] = &[
    Attack { name: "pages of the console", refusals: &["429"], run: |a| Box::pin(flood_pages(a)) },
    Attack { name: "live pages of the console", refusals: &["429", "503"], run: |a| Box::pin(live_pages(a)) },
    Attack { name: "guessed logins to the console", refusals: &["403", "429"], run: |a| Box::pin(guess_logins(a)) },
];

/// Opens the pages of the attacker's project.
async fn flood_pages(a: &Attacker<'_>) {
    let console = Console::start_at(a.stack, &a.stack.nats.url()).await;
    let cookie = console.sign_in_with(&a.tenant.api).await;
    let pages = ["", "/updates", "/leads?q=ada", "/deliveries", "/callbacks", "/keys"];
    a.repeat(64, Duration::from_millis(50), |n| {
        let url = format!("{}/p/{}{}", console.url, a.tenant.api.project_id, pages[n % pages.len()]);
        a.tenant.api.http.get(url).header(COOKIE, &cookie)
    })
    .await;
}

/// Opens streams of pages in four sessions.
async fn live_pages(a: &Attacker<'_>) {
    let console = Console::start_at(a.stack, &a.stack.nats.url()).await;
    let mut cookies = Vec::new();
    for _ in 0..4 {
        cookies.push(console.sign_in_with(&a.tenant.api).await);
    }
    let url = format!("{}/p/{}", console.url, a.tenant.api.project_id);
    a.repeat(64, Duration::from_millis(100), |n| {
        let request = a.tenant.api.http.get(format!("{url}?n={n}")).header(ACCEPT, "text/event-stream");
        request.header(COOKIE, &cookies[n % cookies.len()])
    })
    .await;
}

async fn guess_logins(a: &Attacker<'_>) {
    let console = Console::start_at(a.stack, &a.stack.nats.url()).await;
    // Waits until the console has read the API keys.
    console.sign_in_with(&a.tenant.api).await;
    a.repeat(16, Duration::from_millis(10), |n| {
        let form = if n % 2 == 0 { format!("api_key=lr_{n}") } else { format!("token=lrp_{n:0>80}") };
        let request =
            a.tenant.api.http.request(Method::POST, format!("{}/login", console.url)).header(ORIGIN, &console.url);
        request.header("content-type", "application/x-www-form-urlencoded").body(form)
    })
    .await;
}
