//! Two hosts on one network, in the lab: network namespaces, each with a bridge into which taps are plugged.

use std::path::Path;
use std::process::Command;

use anyhow::Result;

use super::Process;
use super::host::{load, run};

/// The network, with a bridge in the middle that remembers for long where it has seen an address. The lab itself is on it,
/// as 198.18.0.1: the other end of a guest's first card.
#[derive(Debug)]
pub struct Lan {
    /// The two hosts. They have a cable of their own between them, too.
    pub hosts: [Host; 2],
}

/// The bridge in the middle.
const BRIDGE: &str = "lan";

impl Lan {
    /// Makes the network.
    ///
    /// # Errors
    /// When the kernel does not.
    pub fn make() -> Result<Self> {
        for module in ["bridge", "veth", "tun"] {
            load(module)?;
        }
        // In hundredths of a second.
        ip("link add lan type bridge ageing_time 100000")?;
        // From here on, what there is goes when this is dropped.
        let hosts = ["east", "west"].map(|name| Host { name });
        let lan = Self { hosts };
        ip("address add 198.18.0.1/24 dev lan")?;
        ip("link set lan up")?;
        for host in &lan.hosts {
            host.join()?;
        }
        ip("link add cable netns east type veth peer name cable netns west")?;
        for host in &lan.hosts {
            host.ip(&format!("address add {}/24 dev cable", host.address()))?;
            host.ip("link set cable up")?;
        }
        Ok(lan)
    }
}

impl Drop for Lan {
    fn drop(&mut self) {
        // Nothing is left to do about an error: the lab ends soon.
        for host in &self.hosts {
            let _ = ip(&format!("netns delete {}", host.name));
        }
        let _ = ip(&format!("link delete {BRIDGE}"));
    }
}

/// A host.
#[derive(Debug)]
pub struct Host {
    name: &'static str,
}

impl Host {
    /// What it is called.
    pub fn name(&self) -> &str {
        self.name
    }

    /// Its address on the cable to the other one.
    pub fn address(&self) -> &str {
        match self.name {
            "east" => "192.0.2.1",
            _ => "192.0.2.2",
        }
    }

    /// The tap there, whose other end is in the bridge.
    pub fn tap(&self) -> String {
        format!("tap-{}", self.name)
    }

    /// A command, there.
    pub fn command(&self, command: &Command) -> Command {
        // Unlike `ip netns exec`, this leaves all mounts as they are.
        let mut inside = Process::command(Path::new("nsenter"));
        inside.arg(format!("--net=/run/netns/{}", self.name));
        inside.arg(command.get_program()).args(command.get_args());
        inside
    }

    fn join(&self) -> Result<()> {
        let (name, tap) = (self.name, self.tap());
        ip(&format!("netns add {name}"))?;
        self.ip("link set lo up")?;
        self.ip("link add inside type bridge")?;
        ip(&format!(
            "link add to-{name} type veth peer name uplink netns {name}"
        ))?;
        ip(&format!("link set to-{name} master {BRIDGE} up"))?;
        self.ip(&format!("tuntap add dev {tap} mode tap"))?;
        for port in ["uplink", &tap] {
            self.ip(&format!("link set {port} master inside up"))?;
        }
        self.ip("link set inside up")
    }

    fn ip(&self, words: &str) -> Result<()> {
        ip(&format!("-n {} {words}", self.name))
    }
}

fn ip(words: &str) -> Result<()> {
    run("ip", &words.split_whitespace().collect::<Vec<_>>())
}
