//! What cases ask of a VMM by its API.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tests::api::{self, Answer};
use tests::lab::{Case, Host, Process, SOON};

/// The API of a VMM.
#[derive(Debug)]
pub(crate) struct Api(PathBuf);

impl Api {
    /// The one that a VMM is going to serve at this path.
    pub(crate) fn at(path: PathBuf) -> Self {
        Self(path)
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// Starts a VMM that serves it, and has no VM, here or on another host.
    pub(crate) fn start(&self, case: &Case<'_>, host: Option<&Host>) -> Result<Process> {
        let mut command = case.outrigger();
        command.args(["--no-shutdown", "--api-socket"]).arg(&self.0);
        if let Some(host) = host {
            command = host.command(&command);
        }
        let vmm = case.start(&mut command)?;
        let deadline = Instant::now() + SOON;
        while let Err(error) = UnixStream::connect(&self.0) {
            ensure!(Instant::now() < deadline, "no API: {error}");
            thread::sleep(Duration::from_millis(2));
        }
        Ok(vmm)
    }

    /// Asks for something.
    pub(crate) fn get(&self, endpoint: &str) -> Result<Value> {
        let Answer { status, body } = api::request(&self.0, "GET", endpoint, "")?;
        ensure!(status == 200, "{endpoint}: {status}: {body}");
        Ok(body)
    }

    /// Has something done.
    pub(crate) fn put(&self, endpoint: &str, body: &Value) -> Result<()> {
        let text = match body {
            Value::Null => String::new(),
            body => body.to_string(),
        };
        let Answer { status, body } = api::request(&self.0, "PUT", endpoint, &text)?;
        ensure!(status == 204, "{endpoint}: {status}: {body}");
        Ok(())
    }

    /// Pauses the VM and writes its state into a directory. Returns when it stood still.
    pub(crate) fn save(&self, url: &str) -> Result<Instant> {
        self.put("vm.pause", &Value::Null)?;
        let deadline = Instant::now() + SOON;
        while self.get("vm.info")?["state"] != "Paused" {
            ensure!(Instant::now() < deadline, "it does not stand still");
        }
        let paused = Instant::now();
        self.put("vm.snapshot", &json!({"destination_url": url}))
            .context("saving")?;
        Ok(paused)
    }

    /// Waits until the guest has powered off, and ends the VMM, which has stayed.
    pub(crate) fn end_after_power_off(&self, vmm: &mut Process) -> Result<()> {
        let deadline = Instant::now() + SOON;
        while self.get("vm.info")?["state"] == "Running" {
            ensure!(Instant::now() < deadline, "it does not power off");
        }
        self.end(vmm)
    }

    /// Ends the VMM.
    pub(crate) fn end(&self, vmm: &mut Process) -> Result<()> {
        self.put("vmm.shutdown", &Value::Null)?;
        let exit = vmm.wait(SOON)?;
        ensure!(exit.status.success(), "after vmm.shutdown: {}", exit.status);
        Ok(())
    }

    /// Ends a VMM whose servers have gone with its VM, and still write where it did.
    pub(crate) fn end_without_servers(&self, vmm: &mut Process) -> Result<()> {
        self.put("vmm.shutdown", &Value::Null)?;
        let exit = vmm.wait_alone(SOON)?;
        ensure!(exit.status.success(), "after vmm.shutdown: {}", exit.status);
        Ok(())
    }
}
