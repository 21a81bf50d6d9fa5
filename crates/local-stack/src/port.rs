//! Local TCP ports.

use std::{io, net::TcpListener};

/// A port of 127.0.0.1 that nobody listens on at this moment.
///
/// Somebody else may take it before the caller does, so whoever must have one tries again.
///
/// # Errors
/// When the system has no port left.
pub fn free() -> io::Result<u16> {
    Ok(TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port())
}

/// Whether nobody listens on the port of 127.0.0.1 at this moment.
#[must_use]
pub fn is_free(port: u16) -> bool {
    TcpListener::bind(("127.0.0.1", port)).is_ok()
}
