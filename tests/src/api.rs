//! A VMM that serves its API, and a client of the API that says exactly what it is told to.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::lab::Process;
use crate::{outrigger, threads};

/// How long a client waits for an answer: longer than Outrigger waits for anybody.
const PATIENCE: Duration = Duration::from_secs(60);

/// How often it asks for what it waits for. The CPUs are for those who do it.
const POLL: Duration = Duration::from_millis(2);

/// An `outrigger --api-socket`.
#[derive(Debug)]
pub struct Vmm {
    /// The process.
    pub process: Process,
    /// The socket of its API.
    pub socket: PathBuf,
    _folder: TempDir,
}

/// What a VMM answers.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// The status, as a number.
    pub status: u16,
    /// The body; null if there is none.
    pub body: Value,
}

/// What a VMM answers that has done what it was asked to do, and has no more to say.
pub const DONE: Answer = Answer {
    status: 204,
    body: Value::Null,
};

impl Answer {
    /// Whether it was refused or has failed, in words that have all of `parts` in them.
    pub fn is_error(&self, parts: &[&str]) -> bool {
        let said = self.body.to_string();
        self.status >= 400 && parts.iter().all(|part| said.contains(part))
    }
}

impl Vmm {
    /// Starts a VMM with these arguments, too, and waits until it answers.
    ///
    /// # Errors
    /// When it cannot be started, or does not answer.
    pub fn start(arguments: &[&str]) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let socket = folder.path().join("api.sock");
        let mut command = Process::command(outrigger::binary());
        command.arg("--api-socket").arg(&socket).args(arguments);
        let process = Process::start(&mut command, Path::new("/dev/null"))?;
        let deadline = Instant::now() + PATIENCE;
        while UnixStream::connect(&socket).is_err() {
            if Instant::now() > deadline {
                bail!("nobody listens on {}", socket.display());
            }
            thread::sleep(POLL);
        }
        Ok(Self {
            process,
            socket,
            _folder: folder,
        })
    }

    /// Asks for something.
    ///
    /// # Errors
    /// When there is no answer, or none that can be understood.
    pub fn get(&self, endpoint: &str) -> Result<Answer> {
        request(&self.socket, "GET", endpoint, "")
    }

    /// Has something done.
    ///
    /// # Errors
    /// As of [`get`](Self::get).
    pub fn put(&self, endpoint: &str, body: &str) -> Result<Answer> {
        request(&self.socket, "PUT", endpoint, body)
    }

    /// What the VM does.
    ///
    /// # Errors
    /// When there is none.
    pub fn state(&self) -> Result<String> {
        let answer = self.get("vm.info")?;
        let state = answer.body["state"].as_str();
        Ok(state.context("no state")?.to_owned())
    }

    /// Waits for the VM to be in a state.
    ///
    /// # Errors
    /// When it does not come to be.
    pub fn wait_state(&self, state: &str) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while self.state()? != state {
            if Instant::now() > deadline {
                bail!("the VM is {}, and not {state}", self.state()?);
            }
            thread::sleep(POLL);
        }
        Ok(())
    }

    /// Pauses the VM, and waits until it stands still.
    ///
    /// # Errors
    /// When it is refused, or the VM does not stand still.
    pub fn pause(&self) -> Result<()> {
        let answer = self.put("vm.pause", "")?;
        ensure!(answer.status == 204, "{answer:?}");
        self.wait_state("Paused")
    }

    /// Asks for a snapshot.
    ///
    /// # Errors
    /// As of [`get`](Self::get).
    pub fn snapshot(&self, directory: &Path) -> Result<Answer> {
        let body = json!({"destination_url": url(directory)});
        self.put("vm.snapshot", &body.to_string())
    }

    /// Asks for a snapshot to be restored, with the devices of these ids behind other sockets.
    ///
    /// # Errors
    /// As of [`get`](Self::get).
    pub fn restore(
        &self,
        directory: &Path,
        resume: bool,
        devices: &[(&str, &Path)],
    ) -> Result<Answer> {
        let places = devices.iter();
        let places: Vec<_> = places
            .map(|(id, socket)| json!({"id": id, "socket": socket}))
            .collect();
        let body = json!({"source_url": url(directory), "resume": resume, "devices": places});
        self.put("vm.restore", &body.to_string())
    }

    /// Has something done that takes a while: waits for the answer on a thread.
    pub fn begin(&self, endpoint: &str, body: &Value) -> JoinHandle<Result<Answer>> {
        let (socket, endpoint) = (self.socket.clone(), endpoint.to_owned());
        let body = body.to_string();
        thread::spawn(move || request(&socket, "PUT", &endpoint, &body))
    }

    /// Waits for the operation that goes on to come to a phase.
    ///
    /// # Errors
    /// When it does not.
    pub fn wait_phase(&self, phase: &str) -> Result<Value> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let progress = self.get("vm.migration")?.body;
            if progress["phase"] == phase {
                return Ok(progress);
            }
            if Instant::now() > deadline {
                threads::print();
                bail!("the operation does not come to the phase {phase}: {progress:#}");
            }
            thread::sleep(POLL);
        }
    }

    /// Runs `outrigger remote`.
    ///
    /// # Errors
    /// When it cannot be started, or does not end.
    pub fn remote(&self, arguments: &[&str]) -> io::Result<Output> {
        let socket = self.socket.to_string_lossy();
        outrigger::run(&[&["remote", "--api-socket", &socket], arguments].concat())
    }
}

fn url(directory: &Path) -> String {
    format!("file://{}", directory.display())
}

/// Sends a request, and reads the answer.
///
/// # Errors
/// As of [`Vmm::get`].
pub fn request(socket: &Path, method: &str, endpoint: &str, body: &str) -> Result<Answer> {
    let length = body.len();
    let request = format!(
        "{method} /api/v1/{endpoint} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}"
    );
    parse(&exchange(socket, request.as_bytes())?)
}

/// Sends bytes and nothing more, and reads what comes until the other end has nothing more to say either.
///
/// # Errors
/// When there is nobody, or it does not come to an end.
pub fn exchange(socket: &Path, bytes: &[u8]) -> io::Result<String> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    // Who is cut off in the middle may still read why.
    let sent = stream.write_all(bytes);
    let _ = stream.shutdown(Shutdown::Write);
    let mut answer = Vec::new();
    let read = stream.read_to_end(&mut answer);
    if let Err(error) = &read
        && error.kind() == io::ErrorKind::WouldBlock
    {
        threads::print();
    }
    if answer.is_empty() {
        sent?;
        read?;
    }
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

/// Takes an answer apart.
///
/// # Errors
/// When it is not HTTP with a body of JSON, or without one.
pub fn parse(answer: &str) -> Result<Answer> {
    let (head, body) = answer
        .split_once("\r\n\r\n")
        .with_context(|| format!("not HTTP: {answer:?}"))?;
    let status = head
        .strip_prefix("HTTP/1.1 ")
        // As Cloud Hypervisor's client does.
        .and_then(|rest| rest.lines().next()?.trim().parse().ok())
        .with_context(|| format!("no status: {head:?}"))?;
    let body = if body.is_empty() {
        Value::Null
    } else {
        serde_json::from_str(body).with_context(|| format!("not JSON: {body:?}"))?
    };
    Ok(Answer { status, body })
}
