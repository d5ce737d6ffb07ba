//! A VM that goes from host to host, with a disk, a demo device and memory at work, and a guest that notices whatever goes
//! wrong with them.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use tempfile::{NamedTempFile, TempDir};

use crate::api::{Answer, Vmm};
use crate::lab::{Process, SOON, Stream};
use crate::outrigger::serve_demo;
use crate::tiny::demo::{WRONG, worker};
use crate::tiny::disk::{BEGIN, END, FAILED, Job};

/// Bytes of the image of the disk.
const IMAGE: u64 = 1 << 17;
/// Bytes of a request.
const PIECE: u32 = 4096;

/// What does not travel: the kernel, and the image, which all hosts share.
#[derive(Debug)]
pub struct Luggage {
    kernel: NamedTempFile,
    image: PathBuf,
    _folder: TempDir,
}

impl Luggage {
    /// Packs it.
    ///
    /// # Errors
    /// When there is no room for it.
    pub fn pack() -> Result<Self> {
        let writes = Job {
            writes: true,
            length: PIECE,
            depth: 8,
            requests: 32,
            random: false,
            checked: true,
            size: IMAGE,
        };
        let reads = Job {
            writes: false,
            ..writes
        };
        let folder = tempfile::tempdir()?;
        let image = folder.path().join("image");
        File::create(&image)?.set_len(IMAGE)?;
        Ok(Self {
            kernel: worker(&[writes, reads])?,
            image,
            _folder: folder,
        })
    }

    /// What a VMM is started with for the VM to begin, with the demo device behind this socket.
    pub fn arguments(&self, demo: &Path) -> Vec<String> {
        vec![
            "--kernel".into(),
            self.kernel.path().display().to_string(),
            "--memory".into(),
            "size=64M".into(),
            "--cpus".into(),
            "2".into(),
            "--disk".into(),
            format!("path={}", self.image.display()),
            "--user-device".into(),
            format!("id=demo,socket={}", demo.display()),
        ]
    }

    /// The image of the disk.
    pub fn image(&self) -> &Path {
        &self.image
    }

    /// Checks that the image has what the guest has written.
    ///
    /// # Errors
    /// When it has not.
    pub fn check_image(&self) -> Result<()> {
        let image = fs::read(&self.image)?;
        let size = usize::try_from(PIECE)?;
        let middle = |piece: &[u8]| piece.get(4..size - 4).map(<[u8]>::to_vec);
        let expected = middle(&image);
        for (piece, at) in image.chunks_exact(size).zip((0..).step_by(size)) {
            let sector = u32::to_le_bytes(at / 512);
            let is_right =
                piece.starts_with(&sector) && piece.ends_with(&sector) && middle(piece) == expected;
            ensure!(is_right, "what is at {at} of the image");
        }
        Ok(())
    }
}

/// A host: a VMM, and a server of the demo device for the VM that is there or may come.
#[derive(Debug)]
pub struct Host {
    /// The VMM.
    pub vmm: Vmm,
    /// The server.
    pub server: Process,
    folder: TempDir,
}

impl Host {
    /// A host on which the VM begins.
    ///
    /// # Errors
    /// When it does not.
    pub fn first(luggage: &Luggage) -> Result<Self> {
        let mut host = Self::with(|socket| luggage.arguments(socket))?;
        host.expect_work()?;
        Ok(host)
    }

    /// A host without a VM.
    ///
    /// # Errors
    /// When it does not start.
    pub fn empty() -> Result<Self> {
        Self::with(|_| Vec::new())
    }

    fn with(arguments: impl FnOnce(&Path) -> Vec<String>) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let socket = folder.path().join("demo");
        let server = serve_demo(&socket)?;
        let arguments = arguments(&socket);
        let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
        Ok(Self {
            vmm: Vmm::start(&arguments)?,
            server,
            folder,
        })
    }

    /// The socket of the server.
    pub fn server_socket(&self) -> PathBuf {
        self.folder.path().join("demo")
    }

    /// A Unix socket of this host for VMs to come by.
    pub fn door(&self) -> PathBuf {
        self.folder.path().join("door")
    }

    /// Waits at `url` for the VM to come, on a thread, and returns when it may be sent.
    ///
    /// # Errors
    /// When it cannot.
    pub fn receive(&self, url: &str) -> Result<JoinHandle<Result<Answer>>> {
        let socket = self.server_socket();
        let body = json!({"receiver_url": url, "devices": [{"id": "demo", "socket": socket}]});
        let receiving = self.vmm.begin("vm.receive-migration", &body);
        self.vmm.wait_phase("Listening")?;
        Ok(receiving)
    }

    /// As [`receive`](Self::receive), by its [`door`](Self::door).
    ///
    /// # Errors
    /// When it cannot.
    pub fn open_door(&self) -> Result<JoinHandle<Result<Answer>>> {
        self.receive(&format!("unix:{}", self.door().display()))
    }

    /// Sends the VM, on a thread.
    pub fn send(&self, url: &str, connections: u8) -> JoinHandle<Result<Answer>> {
        let body = json!({"destination_url": url, "connections": connections});
        self.vmm.begin("vm.send-migration", &body)
    }

    /// All that the guest has said here. (Nothing is known yet of what has come since the process was last waited for.)
    pub fn said(&self) -> String {
        let lines = self.vmm.process.lines().iter();
        let output = lines.filter(|line| line.stream == Stream::Output);
        output.map(|line| line.text.trim_end()).collect()
    }

    fn texts(&self) -> Vec<&str> {
        let lines = self.vmm.process.lines().iter();
        lines.map(|line| line.text.as_str()).collect()
    }

    /// Waits until both the disk and the second CPU have done more.
    ///
    /// # Errors
    /// When they do not.
    pub fn expect_work(&mut self) -> Result<()> {
        self.expect_disk_work()?;
        self.expect_more(|byte| byte.is_ascii_lowercase())
    }

    /// Waits until the disk has done more.
    ///
    /// # Errors
    /// When it does not.
    pub fn expect_disk_work(&mut self) -> Result<()> {
        self.expect_more(|byte| [BEGIN, END].contains(&byte))
    }

    /// Waits until the guest has said some of what is wanted.
    fn expect_more(&mut self, wanted: impl Fn(u8) -> bool) -> Result<()> {
        // What was said before is not the point.
        while self.vmm.process.wait_for("", Duration::ZERO).is_ok() {}
        let count = |host: &Self| host.said().bytes().filter(|byte| wanted(*byte)).count();
        let before = count(self);
        let deadline = Instant::now() + SOON;
        while count(self) < before + 2 {
            let left = deadline.saturating_duration_since(Instant::now());
            let line = self.vmm.process.wait_for("", left);
            line.with_context(|| format!("there is only this: {:?}", self.texts()))?;
        }
        Ok(())
    }

    /// What the VM does; nothing if there is none.
    ///
    /// # Errors
    /// When the VMM does not say.
    pub fn state(&self) -> Result<Option<String>> {
        let answer = self.vmm.get("vm.info")?;
        match answer.status {
            404 => Ok(None),
            _ => Ok(answer.body["state"].as_str().map(str::to_owned)),
        }
    }

    /// How far the migration has come, or how it ended.
    ///
    /// # Errors
    /// When the VMM does not say.
    pub fn phase(&self) -> Result<String> {
        let progress = self.vmm.get("vm.migration")?.body;
        let Value::String(phase) = &progress["phase"] else {
            bail!("no phase: {progress}");
        };
        Ok(phase.clone())
    }
}

/// All that a guest has said, wherever it was.
#[derive(Debug, Default)]
pub struct Diary(String);

impl Diary {
    /// Adds what the guest has said on a host that it has left, or whose VMM has ended.
    pub fn add(&mut self, host: &Host) {
        self.0.push_str(&host.said());
    }

    /// Expects that everything came once, in the right order, and well, also on the host where the guest is now.
    ///
    /// # Errors
    /// When it did not.
    pub fn check(&self, here: &Host) -> Result<()> {
        let said = self.0.clone() + &here.said();
        let is_well = !said.bytes().any(|byte| [WRONG, FAILED].contains(&byte));
        let letters = || said.chars().filter(char::is_ascii_lowercase);
        let is_in_order = ('a'..='z').cycle().zip(letters()).all(|(a, b)| a == b);
        let jobs = || said.bytes().filter(|byte| [BEGIN, END].contains(byte));
        let jobs_in_order = [BEGIN, END]
            .into_iter()
            .cycle()
            .zip(jobs())
            .all(|(a, b)| a == b);
        ensure!(
            is_well && is_in_order && jobs_in_order,
            "the guest said {said:?}"
        );
        Ok(())
    }
}

/// A port that nobody has, of an address of this host.
///
/// # Errors
/// When there is none.
pub fn free_port(address: &str) -> Result<String> {
    let listener = std::net::TcpListener::bind((address, 0))?;
    Ok(format!("tcp:{}", listener.local_addr()?))
}
