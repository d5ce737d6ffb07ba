//! `outrigger remote migrate`: sends a VM, and shows how far it has come.

use std::fmt;
use std::path::Path;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use hyper::StatusCode;
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use vmm::api::body::SendMigrationData;
use vmm::control::{MigrationProgress, OperationKind, Phase};

use super::client::{Client, RemoteError};

/// How often the progress is looked at.
const INTERVAL: Duration = Duration::from_millis(100);

/// Sends the VM, and returns when it has gone, or has not.
pub(super) fn migrate(socket: &Path, data: &SendMigrationData) -> anyhow::Result<()> {
    // One connection waits for the end, the other asks meanwhile.
    let mut asking = Client::connect(socket)?;
    let mut watching = Watch::new(socket)?;
    let bar = progress_bar();
    let (end, ended) = channel();
    let (outcome, last) = thread::scope(|scope| {
        scope.spawn(move || {
            let _ = end.send(asking.put_json("vm.send-migration", data));
        });
        let mut last = None;
        loop {
            match ended.recv_timeout(INTERVAL) {
                Ok(outcome) => return (outcome, last),
                Err(RecvTimeoutError::Disconnected) => return (Ok(()), last),
                Err(RecvTimeoutError::Timeout) => {}
            }
            if let Some(progress) = watching.progress() {
                show(&bar, &progress);
                last = Some(progress);
            }
        }
    });
    bar.finish_and_clear();
    // The VMM may have ended with the VM.
    let last = watching.progress().or(last);
    match outcome {
        Ok(()) => {
            // What was seen last, before the end, says nothing of the end.
            match last.filter(|progress| progress.phase.is_end()) {
                Some(progress) => println!("{}", Summary(&progress)),
                None => println!("the VM has moved"),
            }
            Ok(())
        }
        Err(error) => Err(end_of(error, last)),
    }
}

/// Asks how far the migration has come.
struct Watch<'s> {
    socket: &'s Path,
    /// None when it has not answered the last time.
    client: Option<Client>,
}

impl<'s> Watch<'s> {
    fn new(socket: &'s Path) -> anyhow::Result<Self> {
        let client = Some(Client::connect(socket)?);
        Ok(Self { socket, client })
    }

    /// The migration's progress, if there is one.
    fn progress(&mut self) -> Option<MigrationProgress> {
        let client = self.client.take();
        let mut client = client.or_else(|| Client::connect(self.socket).ok())?;
        let body = client.get("vm.migration").ok()?;
        self.client = Some(client);
        let progress: MigrationProgress = serde_json::from_slice(&body).ok()?;
        (progress.operation == OperationKind::Send).then_some(progress)
    }
}

/// What the failure of the request means for the VM.
fn end_of(error: anyhow::Error, last: Option<MigrationProgress>) -> anyhow::Error {
    let last = last.filter(|progress| progress.phase.is_end() || progress.phase == Phase::InDoubt);
    match (error.downcast::<RemoteError>(), last) {
        (
            Ok(RemoteError::Refused {
                status: StatusCode::INTERNAL_SERVER_ERROR,
                messages,
                ..
            }),
            Some(progress),
        ) => RemoteError::NotMigrated {
            phase: progress.phase,
            messages,
        }
        .into(),
        (Ok(error), _) => error.into(),
        (Err(error), _) => error,
    }
}

fn progress_bar() -> ProgressBar {
    let bar = ProgressBar::new(0);
    // The template is a constant, and right.
    if let Ok(style) = ProgressStyle::with_template("{bar:30} {percent:>3} %  {wide_msg}") {
        bar.set_style(style);
    }
    bar
}

fn show(bar: &ProgressBar, progress: &MigrationProgress) {
    bar.set_length(progress.memory_bytes);
    bar.set_position(
        progress
            .memory_bytes
            .saturating_sub(progress.remaining_bytes),
    );
    bar.set_message(Line(progress).to_string());
}

/// An operation's progress in a line.
struct Line<'a>(&'a MigrationProgress);

impl fmt::Display for Line<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let progress = self.0;
        write!(
            f,
            "{:?}, round {}, {}/s, {} left",
            progress.phase,
            progress.rounds,
            HumanBytes(progress.bytes_per_second),
            HumanBytes(progress.remaining_bytes)
        )?;
        match progress.estimated_downtime_us {
            Some(downtime) => write!(f, ", downtime about {}", Milliseconds(downtime)),
            None => Ok(()),
        }
    }
}

/// What is said at the end.
struct Summary<'a>(&'a MigrationProgress);

impl fmt::Display for Summary<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let progress = self.0;
        write!(
            f,
            "the VM has moved: {} ms, {} rounds, {}",
            progress.elapsed_ms,
            progress.rounds,
            HumanBytes(progress.copied_bytes)
        )?;
        let Some(downtime) = progress.downtime_us else {
            return Ok(());
        };
        write!(f, "; the guest stood still for {}", Milliseconds(downtime))?;
        let mut separator = " (";
        for (part, time) in &progress.downtime_parts_us {
            write!(
                f,
                "{separator}{} {}",
                part.replace('_', " "),
                Milliseconds(*time)
            )?;
            separator = ", ";
        }
        if separator == ", " {
            f.write_str(")")?;
        }
        Ok(())
    }
}

/// Microseconds, in milliseconds.
struct Milliseconds(u64);

impl fmt::Display for Milliseconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{} ms", self.0 / 1000, self.0 % 1000 / 100)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn progress() -> MigrationProgress {
        serde_json::from_str(
            r#"{"operation": "Send", "phase": "Precopy", "elapsed_ms": 1500, "rounds": 3,
                "memory_bytes": 1073741824, "copied_bytes": 2147483648, "remaining_bytes": 1048576,
                "bytes_per_second": 104857600, "dirty_bytes_per_second": 0,
                "estimated_downtime_us": 12345}"#,
        )
        .unwrap()
    }

    #[test]
    fn progress_is_a_line() {
        let line = Line(&progress()).to_string();
        assert_eq!(
            line,
            "Precopy, round 3, 100.00 MiB/s, 1.00 MiB left, downtime about 12.3 ms"
        );
        let mut end = progress();
        let text = Summary(&end).to_string();
        assert_eq!(text, "the VM has moved: 1500 ms, 3 rounds, 2.00 GiB");
        end.downtime_us = Some(4321);
        end.downtime_parts_us = [("dirty_log".to_owned(), 321), ("pause".to_owned(), 4000)].into();
        let text = Summary(&end).to_string();
        let expected = "; the guest stood still for 4.3 ms (dirty log 0.3 ms, pause 4.0 ms)";
        assert!(text.ends_with(expected), "{text}");
    }

    #[test]
    fn exit_status_tells_where_the_vm_is() {
        let refused = |status| RemoteError::Refused {
            endpoint: "vm.send-migration",
            status,
            messages: Vec::new(),
        };
        let status = |status, phase: Option<&str>| {
            let last = phase.map(|phase| {
                let mut progress = progress();
                progress.phase = serde_json::from_value(phase.into()).unwrap();
                progress
            });
            let error = end_of(refused(status).into(), last);
            error.downcast::<RemoteError>().unwrap().exit_status()
        };
        let failed = StatusCode::INTERNAL_SERVER_ERROR;
        assert_eq!(status(failed, Some("Failed")), 1);
        assert_eq!(status(failed, Some("Cancelled")), 6);
        assert_eq!(status(failed, Some("InDoubt")), 7);
        // Of a request that was refused, what came before says nothing.
        assert_eq!(status(StatusCode::TOO_MANY_REQUESTS, Some("Cancelled")), 1);
        assert_eq!(status(failed, None), 1);
    }
}
