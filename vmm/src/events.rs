//! `--event-monitor`: what happens to the VMM and its VM, as a line of JSON each, for whoever follows a file or a pipe.
//!
//! Whoever has something to tell hands it to a thread of its own, which writes. If the reader or the disk does not keep
//! up, events are dropped, and the next that is written says how many.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{FileTypeExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::Serialize;

/// How many events wait for the writer at most.
const WAITING: usize = 1024;

/// Why events cannot be written.
#[derive(Debug, thiserror::Error)]
#[error("--event-monitor path={}: cannot write to it", path.display())]
pub struct EventsError {
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// Where events are told. Cheap to clone; without a file, telling does nothing.
#[derive(Debug, Clone, Default)]
pub struct Events(Option<Arc<Monitor>>);

#[derive(Debug)]
struct Monitor {
    start: Instant,
    writer: SyncSender<Job>,
    dropped: Arc<AtomicU64>,
}

#[derive(Debug)]
enum Job {
    Write(Record),
    /// Tells when all before it has been written.
    Flush(SyncSender<()>),
}

/// One event, in the form of Cloud Hypervisor's and with the time of day besides.
#[derive(Debug, Serialize)]
struct Record {
    /// Since the monitor was opened, by a clock that nobody sets.
    timestamp: Duration,
    /// Since 1970, UTC.
    time: Duration,
    source: &'static str,
    event: &'static str,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    properties: BTreeMap<&'static str, String>,
    /// How many events before this one could not be written.
    #[serde(skip_serializing_if = "Option::is_none")]
    dropped: Option<u64>,
}

impl Events {
    /// Appends events to a file, or writes them into a pipe, which needs no reader yet.
    pub fn open(path: &Path) -> Result<Self, EventsError> {
        let error = |source| EventsError {
            path: path.to_owned(),
            source,
        };
        let file = open(path).map_err(error)?;
        let (writer, jobs) = sync_channel(WAITING);
        let dropped = Arc::new(AtomicU64::new(0));
        thread::Builder::new()
            .name("events".into())
            .spawn({
                let dropped = dropped.clone();
                move || write_all(file, &jobs, &dropped)
            })
            .map_err(error)?;
        Ok(Self(Some(Arc::new(Monitor {
            start: Instant::now(),
            writer,
            dropped,
        }))))
    }

    /// Tells an event of `source`: of the VMM, the VM, a device. It never waits.
    pub(crate) fn tell(
        &self,
        source: &'static str,
        event: &'static str,
        properties: &[(&'static str, &dyn fmt::Display)],
    ) {
        let Some(monitor) = &self.0 else {
            return;
        };
        let properties = properties
            .iter()
            .map(|(key, value)| (*key, value.to_string()));
        let record = Record {
            timestamp: monitor.start.elapsed(),
            time: SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .unwrap_or_default(),
            source,
            event,
            properties: properties.collect(),
            dropped: None,
        };
        if monitor.writer.try_send(Job::Write(record)).is_err() {
            monitor.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Waits until what was told has been written, for `limit` at most.
    pub fn flush(&self, limit: Duration) {
        let Some(monitor) = &self.0 else {
            return;
        };
        let (done, written) = sync_channel(1);
        if monitor.writer.try_send(Job::Flush(done)).is_ok() {
            // If it takes longer, the process ends without it.
            let _ = written.recv_timeout(limit);
        }
    }
}

fn open(path: &Path) -> io::Result<File> {
    let is_pipe = path
        .metadata()
        .is_ok_and(|metadata| metadata.file_type().is_fifo());
    let mut options = OpenOptions::new();
    if is_pipe {
        // With a reader of our own, opening it does not wait for another.
        options.read(true).write(true).open(path)
    } else {
        options.append(true).create(true).mode(0o644).open(path)
    }
}

fn write_all(mut file: File, jobs: &Receiver<Job>, dropped: &AtomicU64) {
    let mut failed = false;
    for job in jobs {
        let mut record = match job {
            Job::Write(record) => record,
            Job::Flush(done) => {
                let _ = done.send(());
                continue;
            }
        };
        let before = dropped.swap(0, Ordering::Relaxed);
        record.dropped = (before > 0).then_some(before);
        let written = serde_json::to_vec(&record)
            .map_err(io::Error::other)
            .and_then(|mut line| {
                line.push(b'\n');
                file.write_all(&line)
            });
        if let Err(error) = written {
            dropped.fetch_add(before + 1, Ordering::Relaxed);
            if !std::mem::replace(&mut failed, true) {
                log::warn!("--event-monitor: events are lost: {error}");
            }
        } else {
            failed = false;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead as _, BufReader};

    use rustix::fs::{CWD, Mode, mknodat};
    use serde_json::Value;

    use super::*;

    #[test]
    fn events_are_lines_of_json() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("events");
        std::fs::write(&path, "what was there\n").unwrap();
        let events = Events::open(&path).unwrap();
        events.tell("vm", "booted", &[]);
        events.tell("device", "lost", &[("id", &"disk0"), ("reason", &"\"\n")]);
        events.flush(Duration::from_secs(10));
        let text = std::fs::read_to_string(&path).unwrap();
        let lines: Vec<_> = text.lines().collect();
        assert_eq!((lines.len(), lines[0]), (3, "what was there"));
        let [first, second]: [Value; 2] =
            [lines[1], lines[2]].map(|line| serde_json::from_str(line).unwrap());
        assert_eq!(
            (&first["source"], &first["event"]),
            (&"vm".into(), &"booted".into())
        );
        assert_eq!(first.get("properties"), None);
        assert_eq!(second["properties"]["reason"], "\"\n");
        let time = |event: &Value| {
            let part = |name: &str, part: &str| event[name][part].as_u64().unwrap();
            assert!(part("time", "secs") > 1_700_000_000);
            (part("timestamp", "secs"), part("timestamp", "nanos"))
        };
        assert!(time(&first) <= time(&second));
    }

    #[test]
    fn full_pipe_costs_events_and_no_time() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pipe");
        mknodat(CWD, &path, rustix::fs::FileType::Fifo, Mode::RWXU, 0).unwrap();
        let events = Events::open(&path).unwrap();
        let told = 10 * WAITING as u64;
        let started = Instant::now();
        for _ in 0..told {
            events.tell("vm", "paused", &[]);
        }
        assert!(started.elapsed() < Duration::from_secs(10));
        // They have filled the pipe and then the queue, and since then they are counted.
        let reader = thread::spawn(move || {
            let lines = BufReader::new(File::open(&path).unwrap()).lines();
            let events = lines.map(|line| serde_json::from_str(&line.unwrap()).unwrap());
            let counts = events.map(|event: Value| (1, event["dropped"].as_u64().unwrap_or(0)));
            counts.fold((0, 0), |all, one| (all.0 + one.0, all.1 + one.1))
        });
        let dropped = events.0.as_ref().unwrap().dropped.clone();
        let deadline = Instant::now() + Duration::from_secs(30);
        while dropped.load(Ordering::Relaxed) > 0 && Instant::now() < deadline {
            thread::yield_now();
        }
        drop(events);
        let (written, dropped) = reader.join().unwrap();
        assert!(dropped > 0);
        assert_eq!(written + dropped, told);
    }

    #[test]
    fn file_that_cannot_be_written_is_named() {
        let error = Events::open(Path::new("/no/such/folder/events")).unwrap_err();
        assert!(
            error
                .to_string()
                .contains("--event-monitor path=/no/such/folder/events")
        );
    }
}
