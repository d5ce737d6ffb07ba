//! Taps, and who is at the lab's end of them.

use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use anyhow::{Context, Result, ensure};
use guest::stream::{Order, PORT};

use super::host::{load, run};

/// A tap that a network card of a guest is plugged into.
#[derive(Debug)]
pub struct Tap {
    name: String,
    is_ours: bool,
}

impl Tap {
    /// Makes a tap that stays until this is dropped, with the first address of network `number` of the guest's cards.
    ///
    /// # Errors
    /// When the kernel does not.
    pub fn make(name: &str, number: usize, flags: &[&str]) -> Result<Self> {
        if !Path::new("/dev/net/tun").exists() {
            load("tun")?;
        }
        run(
            "ip",
            &[&["tuntap", "add", "dev", name, "mode", "tap"], flags].concat(),
        )?;
        let tap = Self {
            name: name.to_owned(),
            is_ours: true,
        };
        tap.join(number)?;
        tap.set_up(true)?;
        Ok(tap)
    }

    /// A tap that somebody else has made, with such an address.
    ///
    /// # Errors
    /// When there is none of this name.
    pub fn find(name: &str, number: usize) -> Result<Self> {
        let tap = Self {
            name: name.to_owned(),
            is_ours: false,
        };
        tap.join(number)?;
        Ok(tap)
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Pulls the cable out, or plugs it in.
    ///
    /// # Errors
    /// When the kernel does not.
    pub fn set_up(&self, is_up: bool) -> Result<()> {
        let state = if is_up { "up" } else { "down" };
        run("ip", &["link", "set", &self.name, state])
    }

    /// Says what is the longest packet.
    ///
    /// # Errors
    /// When the kernel does not take it.
    pub fn set_mtu(&self, mtu: u16) -> Result<()> {
        run("ip", &["link", "set", &self.name, "mtu", &mtu.to_string()])
    }

    fn join(&self, number: usize) -> Result<()> {
        let address = format!("198.18.{number}.1/24");
        run("ip", &["address", "replace", &address, "dev", &self.name])
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        if self.is_ours {
            // Nothing is left to do about an error: the lab ends soon.
            let _ = run("ip", &["link", "delete", &self.name]);
        }
    }
}

/// Who answers the guest's packets and streams, on all taps, as long as this process runs.
#[derive(Clone, Debug)]
pub struct Peer {
    failures: Arc<Mutex<Vec<String>>>,
}

impl Peer {
    /// Begins to answer, if nobody does yet.
    ///
    /// # Errors
    /// When the port is somebody else's.
    pub fn start() -> Result<Self> {
        static PEER: Mutex<Option<Peer>> = Mutex::new(None);
        let mut peer = PEER.lock().unwrap_or_else(PoisonError::into_inner);
        if peer.is_none() {
            *peer = Some(Self::listen()?);
        }
        peer.clone().context("nobody answers")
    }

    fn listen() -> Result<Self> {
        let any = (Ipv4Addr::UNSPECIFIED, PORT);
        let (streams, packets) = (TcpListener::bind(any)?, UdpSocket::bind(any)?);
        let failures = Arc::new(Mutex::new(Vec::new()));
        let peer = Self {
            failures: Arc::clone(&failures),
        };
        thread::spawn(move || {
            for stream in streams.incoming().flatten() {
                let failures = Arc::clone(&failures);
                thread::spawn(move || {
                    if let Err(error) = Order::serve(stream) {
                        let mut failures = failures.lock().unwrap_or_else(PoisonError::into_inner);
                        failures.push(format!("{error:#}"));
                    }
                });
            }
        });
        thread::spawn(move || {
            let mut packet = [0; 2048];
            while let Ok((length, from)) = packets.recv_from(&mut packet) {
                // One that is lost is sent again.
                let _ = packets.send_to(packet.get(..length).unwrap_or_default(), from);
            }
        });
        Ok(peer)
    }

    /// Whether all that has arrived so far was what was sent.
    ///
    /// # Errors
    /// When not, with what was wrong.
    pub fn is_well(&self) -> Result<()> {
        let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        let failures = std::mem::take(&mut *failures);
        ensure!(failures.is_empty(), "{}", failures.join("; "));
        Ok(())
    }
}
