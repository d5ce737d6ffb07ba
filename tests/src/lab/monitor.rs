//! The monitor of a QEMU, such as the lab's, through which a test does to hardware what software cannot.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::OwnedFd;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

/// A conversation by QMP over a port of the lab.
#[derive(Debug)]
pub struct Monitor {
    port: BufReader<File>,
}

impl Monitor {
    /// Begins to speak.
    ///
    /// # Errors
    /// When nobody answers.
    pub fn open() -> Result<Self> {
        let path = (0..10).map(|number| format!("/dev/vport{number}p2"));
        let port = path
            .filter_map(|path| OpenOptions::new().read(true).write(true).open(path).ok())
            .next()
            .context("the lab has no monitor")?;
        Self::on(OwnedFd::from(port))
    }

    /// Begins to speak over a connection.
    ///
    /// # Errors
    /// When nobody answers.
    pub fn on(connection: impl Into<OwnedFd>) -> Result<Self> {
        let mut monitor = Self {
            port: BufReader::new(File::from(connection.into())),
        };
        monitor.ask(&json!({ "execute": "qmp_capabilities" }))?;
        Ok(monitor)
    }

    /// Reports a fatal error of the PCI Express port with this name in `tests/lab/devices.cfg`: all that is behind it is
    /// going to be reset.
    ///
    /// # Errors
    /// When QEMU does not.
    pub fn inject_fatal_error(&mut self, port: &str) -> Result<()> {
        // A Data Link Protocol error. The devices themselves have no bit to enable reports of errors.
        let line = format!("pcie_aer_inject_error {port} DLP");
        let reply = self.ask(&json!({
            "execute": "human-monitor-command",
            "arguments": { "command-line": line },
        }))?;
        let text = reply.as_str().unwrap_or_default();
        ensure!(text.starts_with("OK"), "{line}: {reply}");
        Ok(())
    }

    /// Presses the guest's power button.
    ///
    /// # Errors
    /// When QEMU does not.
    pub fn press_power_button(&mut self) -> Result<()> {
        self.ask(&json!({ "execute": "system_powerdown" }))?;
        Ok(())
    }

    /// Sends a command and waits for what it returns. Greetings and events are skipped.
    fn ask(&mut self, command: &Value) -> Result<Value> {
        writeln!(self.port.get_mut(), "{command}")?;
        let mut line = String::new();
        loop {
            line.clear();
            ensure!(self.port.read_line(&mut line)? > 0, "QEMU has hung up");
            let mut message: Value = serde_json::from_str(&line)?;
            ensure!(message.get("error").is_none(), "{command}: {line}");
            if let Some(reply) = message.get_mut("return") {
                return Ok(reply.take());
            }
        }
    }
}
