//! Local TCP ports.

use std::{
    io,
    net::{TcpListener, UdpSocket},
    ops::Range,
    sync::{Mutex, PoisonError},
};

/// Where ports are handed out from: below those that Linux gives to whoever connects or asks for any port, and above
/// the usual ones of servers.
const RANGE: Range<u16> = 10_240..32_768;
/// How many of them a process claims at once. More leave room for fewer processes, fewer cost more sockets.
const BLOCK: u16 = 64;

/// What this process claimed.
#[derive(Debug, Default)]
struct Claimed {
    /// The ports of the last block that were not handed out yet.
    left: Range<u16>,
    /// How many blocks were looked at.
    blocks: u16,
    /// The claims, for as long as the process runs.
    marks: Vec<UdpSocket>,
}

/// A port of 127.0.0.1 that nobody listens on, and that no other call of this returns: in this process never again, in
/// others not before this one ended. So a server may be stopped and started on it, and whoever asked for any port has another.
///
/// # Errors
/// When none is left.
pub fn free() -> io::Result<u16> {
    static CLAIMED: Mutex<Claimed> = Mutex::new(Claimed { left: 0..0, blocks: 0, marks: Vec::new() });
    let mut claimed = CLAIMED.lock().unwrap_or_else(PoisonError::into_inner);
    loop {
        if let Some(port) = claimed.left.find(|port| is_free(*port)) {
            return Ok(port);
        }
        claimed.claim()?;
    }
}

impl Claimed {
    /// Claims another block. The claim is a UDP socket on its first port, for the system gives that to one process alone
    /// and takes it back at its end; no program here speaks UDP.
    fn claim(&mut self) -> io::Result<()> {
        let blocks = RANGE.len() as u16 / BLOCK;
        // Each process begins elsewhere.
        let first = std::process::id() as u16 % blocks;
        while self.blocks < blocks {
            let start = RANGE.start + (first + self.blocks) % blocks * BLOCK;
            self.blocks += 1;
            if let Ok(mark) = UdpSocket::bind(("127.0.0.1", start)) {
                self.left = start..start + BLOCK;
                self.marks.push(mark);
                return Ok(());
            }
        }
        Err(io::Error::new(io::ErrorKind::AddrInUse, "no local port is left"))
    }
}

/// Whether nobody listens on the port of 127.0.0.1 at this moment.
#[must_use]
pub fn is_free(port: u16) -> bool {
    TcpListener::bind(("127.0.0.1", port)).is_ok()
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn no_port_is_given_twice() {
        let ports = (0..4).map(|_| std::thread::spawn(|| (0..100).map(|_| free().unwrap()).collect::<Vec<_>>()));
        let ports: Vec<_> = ports.collect::<Vec<_>>().into_iter().flat_map(|thread| thread.join().unwrap()).collect();
        assert_eq!(ports.iter().collect::<HashSet<_>>().len(), 400);
        assert!(ports.iter().all(|port| RANGE.contains(port)));
    }

    #[test]
    fn what_another_process_claimed_is_passed_over() {
        let (mut ours, mut theirs) = (Claimed::default(), Claimed::default());
        ours.claim().unwrap();
        theirs.claim().unwrap();
        assert_ne!(ours.left, theirs.left);
        drop(ours);
    }
}
