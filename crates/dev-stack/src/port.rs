//! Local TCP ports.

use std::{
    io,
    net::{TcpListener, UdpSocket},
    ops::Range,
    sync::{Mutex, PoisonError},
};

/// Below Linux's ephemeral ports and above the usual ports of servers.
const RANGE: Range<u16> = 10_240..32_768;
/// Ports that a process claims at once. Larger blocks allow fewer processes, smaller ones need more sockets.
const BLOCK: u16 = 64;

#[derive(Debug, Default)]
struct Claimed {
    /// The unused ports of the last block.
    left: Range<u16>,
    /// Blocks tried so far.
    blocks: u16,
    /// One socket per claimed block, open until the process ends.
    marks: Vec<UdpSocket>,
}

/// A free port of 127.0.0.1 that no other call returns: never again in this process, and in other processes not before
/// this one ends. So a server can be stopped and started again on its port.
///
/// # Errors
/// No port is left.
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
    /// Claims another block by binding a UDP socket to its first port: only one process can do that, and the system
    /// releases it when the process ends. No program here uses UDP.
    fn claim(&mut self) -> io::Result<()> {
        let blocks = RANGE.len() as u16 / BLOCK;
        // Each process starts at another block.
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

/// Whether the port of 127.0.0.1 is free at this moment.
pub fn is_free(port: u16) -> bool {
    TcpListener::bind(("127.0.0.1", port)).is_ok()
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn no_port_is_returned_twice() {
        let ports = (0..4).map(|_| std::thread::spawn(|| (0..100).map(|_| free().unwrap()).collect::<Vec<_>>()));
        let ports: Vec<_> = ports.collect::<Vec<_>>().into_iter().flat_map(|thread| thread.join().unwrap()).collect();
        assert_eq!(ports.iter().collect::<HashSet<_>>().len(), 400);
        assert!(ports.iter().all(|port| RANGE.contains(port)));
    }

    #[test]
    fn blocks_of_other_processes_are_skipped() {
        let (mut ours, mut theirs) = (Claimed::default(), Claimed::default());
        ours.claim().unwrap();
        theirs.claim().unwrap();
        assert_ne!(ours.left, theirs.left);
        drop(ours);
    }
}
