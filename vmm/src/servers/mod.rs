//! The servers of the VM's built-in devices. Each is a process of its own, of the same program as this one, and at the
//! other end of a connection that has no name in the file system.
//!
//! A server takes a while to start. So all are started before there is a machine, and awaited when it needs them.

mod built_in;
mod process;

use std::io::{self, PipeReader, Read as _, pipe};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use devices::{Backend as _, Handover as _, Remote};
use vfio_user_client::Counters;

use self::built_in::BuiltIn;
use self::process::is_readable;
pub(crate) use self::process::{Exit, Process};
use crate::config::VmConfig;

/// What a server writes to its standard output when it has a device to serve. Anything else is why it has none.
pub const SERVER_READY: &[u8] = b"ready\n";

/// How long a server may take to start. It may have to wait for storage of the host's, or for whoever had its image before.
const START: Duration = Duration::from_secs(30);

/// When a server that has not started is worth a word.
const SLOW: Duration = Duration::from_secs(2);

/// How long servers may take to finish when their VM has ended. They may have to wait for the host's disks.
const PATIENCE: Duration = Duration::from_secs(10);

/// Most bytes that a server says about why it does not serve.
const MAX_REPORT: usize = 4096;

/// Why a built-in device has no server.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// There is no process.
    #[error("{flag}: cannot start the server of this device")]
    Spawn {
        /// The flag that asks for the device.
        flag: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The server says why it does not serve.
    #[error("{flag}: {reason}")]
    Refused {
        /// The flag that asks for the device.
        flag: String,
        /// What the server says.
        reason: String,
    },
    /// The server neither serves nor says why.
    #[error(
        "{flag}: the server of this device has not started within {} seconds; does the storage or the network that it \
         is on answer?",
        START.as_secs()
    )]
    TimedOut {
        /// The flag that asks for the device.
        flag: String,
    },
    /// The server ended without a word.
    #[error("{flag}: the server of this device has failed: {end}")]
    Died {
        /// The flag that asks for the device.
        flag: String,
        /// How it ended.
        end: String,
    },
}

/// A server that has been started, and may not have come far.
#[derive(Debug)]
pub(crate) struct Starting {
    device: BuiltIn,
    since: Instant,
    connection: UnixStream,
    report: PipeReader,
    process: Process,
}

/// A device that waits for its client.
#[derive(Debug)]
pub(crate) struct Device {
    /// What it is called.
    pub(crate) id: String,
    /// The flag that asks for it.
    pub(crate) flag: String,
    /// The way to its server.
    pub(crate) connection: UnixStream,
}

/// Starts the servers of all built-in devices, in the order of their places on the bus. If the VM is `incoming`, another
/// VMM's servers have its disks until it runs here.
pub(crate) fn start(config: &VmConfig, incoming: bool) -> Result<Vec<Starting>, ServerError> {
    let disk = |disk| BuiltIn::of_disk(disk, incoming);
    let disks = config.disks.iter().map(disk);
    let nets = config.nets.iter().map(BuiltIn::from);
    disks.chain(nets).map(Starting::new).collect()
}

impl Starting {
    fn new(device: BuiltIn) -> Result<Self, ServerError> {
        let start = || {
            let (connection, theirs) = UnixStream::pair()?;
            let (report, to_report) = pipe()?;
            let process = Process::spawn(&device, theirs, to_report)?;
            Ok((connection, report, process))
        };
        match start() {
            Ok((connection, report, process)) => Ok(Self {
                device,
                since: Instant::now(),
                connection,
                report,
                process,
            }),
            Err(source) => Err(ServerError::Spawn {
                flag: device.flag,
                source,
            }),
        }
    }

    /// Waits until the server has its device.
    pub(crate) fn wait(self) -> Result<(Device, Arc<Process>), ServerError> {
        let flag = self.device.flag.clone();
        let mut report = Report::new(self.report);
        let mut is_whole = report.read(self.since + SLOW);
        if let Ok(false) = is_whole {
            log::warn!("{flag}: its server takes long to start");
            is_whole = report.read(self.since + START);
        }
        match is_whole.map(|is_whole| is_whole.then_some(report.said.as_slice())) {
            Err(source) => Err(ServerError::Spawn { flag, source }),
            Ok(None) => Err(ServerError::TimedOut { flag }),
            Ok(Some(SERVER_READY)) => {
                let connection = self.connection;
                let device = Device {
                    id: self.device.id,
                    flag,
                    connection,
                };
                Ok((device, Arc::new(self.process)))
            }
            Ok(Some([])) => {
                let end = self.process.end(Instant::now() + PATIENCE);
                let end = end.unwrap_or_else(|| "it still runs".to_owned());
                Err(ServerError::Died { flag, end })
            }
            Ok(Some(said)) => {
                let reason = String::from_utf8_lossy(said).trim_end().to_owned();
                let flag = self.device.flag_for(&reason);
                Err(ServerError::Refused { flag, reason })
            }
        }
    }
}

/// What a server says about its start.
struct Report {
    pipe: PipeReader,
    said: Vec<u8>,
}

impl Report {
    fn new(pipe: PipeReader) -> Self {
        let said = Vec::new();
        Self { pipe, said }
    }

    /// Reads on until the end or `deadline`, and returns whether it has come to the end.
    fn read(&mut self, deadline: Instant) -> io::Result<bool> {
        while self.said.len() < MAX_REPORT {
            if !is_readable(&self.pipe, deadline)? {
                return Ok(false);
            }
            let mut piece = [0; 512];
            let count = self.pipe.read(&mut piece)?;
            self.said.extend(piece.iter().take(count));
            if count == 0 {
                break;
            }
        }
        Ok(true)
    }
}

/// The servers of a VM, which end when this is dropped.
#[derive(Debug, Default)]
pub(crate) struct Servers(Vec<(Arc<Process>, Arc<Remote>)>);

impl Servers {
    /// Adds a server, and what is connected to it.
    pub(crate) fn add(&mut self, process: Arc<Process>, remote: Arc<Remote>) {
        self.0.push((process, remote));
    }

    /// Their processes.
    pub(crate) fn processes(&self) -> Vec<Arc<Process>> {
        self.0.iter().map(|(process, _)| process.clone()).collect()
    }
}

impl Drop for Servers {
    /// When a VM has ended, nobody has its images any more: the next may start with them at once.
    fn drop(&mut self) {
        // Those that another process goes on with are its own concern.
        let (left, ours): (Vec<_>, Vec<_>) =
            self.0.iter().partition(|(_, remote)| remote.is_away());
        left.iter().for_each(|(process, _)| process.leave());
        for (process, remote) in &ours {
            remote.close();
            let Counters {
                calls,
                posts,
                served,
                ..
            } = remote.counters();
            log::debug!(
                "{}: {} messages to its server, and {served} from it",
                process.id(),
                calls + posts
            );
        }
        let deadline = Instant::now() + PATIENCE;
        for (process, _) in &ours {
            process.finish(deadline);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn report_is_waited_for_until_the_deadline() {
        let (pipe, mut server) = pipe().unwrap();
        let mut report = Report::new(pipe);
        let soon = || Instant::now() + Duration::from_millis(20);
        assert!(!report.read(soon()).unwrap());
        server.write_all(b"rea").unwrap();
        assert!(!report.read(soon()).unwrap());
        server.write_all(b"dy\n").unwrap();
        drop(server);
        assert!(report.read(soon()).unwrap());
        assert_eq!(report.said, SERVER_READY);
    }

    #[test]
    fn server_that_ends_without_a_word_is_not_waited_for() {
        let (pipe, server) = pipe().unwrap();
        drop(server);
        let deadline = Instant::now() + START;
        let mut report = Report::new(pipe);
        assert!(report.read(deadline).unwrap() && report.said.is_empty());
        assert!(Instant::now() < deadline);
    }
}
