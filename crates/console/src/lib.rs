//! The operator console: pages about leads, updates, deliveries and callbacks, rendered on the server.
//!
//! The console has no database. It sends the services' queries over NATS and renders the replies; actions go through
//! the gateway with the visitor's API key. A page is a handler, which sends the queries, and a pure function, which
//! renders their replies.

mod app;
mod assets;
mod config;
mod dead_letters;
mod fault;
mod gateway;
mod live;
mod login_link;
mod page_stream;
mod pages;
mod portal_link;
mod respond;
mod router;
mod server;
mod session;
mod view;
mod visit;
mod visit_rate;

pub use crate::{
    config::Config,
    login_link::{LoginRole, create_login, login_url},
    portal_link::{NewPortalLink, PortalLinkError, create_portal_link, list_portal_links, revoke_portal_link},
    server::{run, run_on},
};
