//! A program that a test has started.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use rustix::process::{Pid, Signal, kill_process};

use crate::threads;

/// A program, what it says, and how it ends. It is killed when this is dropped.
#[derive(Debug)]
pub struct Process {
    pid: Pid,
    sender: Sender<Event>,
    events: Receiver<Event>,
    lines: Vec<Line>,
    read: usize,
    /// The beginning of a line of what the test [follows](Process::follow).
    unfinished: String,
    /// The program's own end.
    gone: Option<Exit>,
    /// The same, when nobody can write where it did any more.
    exit: Option<Exit>,
    log: File,
}

/// A line that a program has written.
#[derive(Clone, Debug)]
pub struct Line {
    /// When it was complete.
    pub at: Instant,
    /// Where it was written to.
    pub stream: Stream,
    /// The line without its end.
    pub text: String,
}

/// Where a program writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// Standard output.
    Output,
    /// Standard error.
    Error,
    /// Something that the test [follows](Process::follow).
    Followed,
}

/// The end of a program.
#[derive(Clone, Copy, Debug)]
pub struct Exit {
    /// When it ended.
    pub at: Instant,
    /// How it ended.
    pub status: ExitStatus,
}

#[derive(Debug)]
enum Event {
    Line(Line),
    /// The beginning of a line, where there is no more for now.
    Unfinished(String),
    Gone(Exit),
    Exit(Exit),
}

impl Process {
    /// Starts a program. Its input is empty and its output is collected, unless the command says otherwise; all its
    /// lines are written to the file `log` too.
    ///
    /// # Errors
    /// When the program cannot be started.
    pub fn start(command: &mut Command, log: &Path) -> Result<Self> {
        let mut log = File::create(log).with_context(|| format!("creating {}", log.display()))?;
        writeln!(log, "+ {command:?}")?;
        let (sender, events) = mpsc::channel();
        let mut child = command
            .spawn()
            .with_context(|| format!("starting {}", command.get_program().display()))?;
        let pid = Pid::from_child(&child);
        let mut readers = Vec::new();
        if let Some(output) = child.stdout.take() {
            readers.push(collect(output, Stream::Output, sender.clone()));
        }
        if let Some(errors) = child.stderr.take() {
            readers.push(collect(errors, Stream::Error, sender.clone()));
        }
        let exits = sender.clone();
        thread::spawn(move || {
            let Ok(status) = child.wait() else { return };
            let at = Instant::now();
            let _ = exits.send(Event::Gone(Exit { at, status }));
            // Whoever hears of the exit has heard everything before it.
            readers.into_iter().for_each(|reader| drop(reader.join()));
            let _ = exits.send(Event::Exit(Exit { at, status }));
        });
        Ok(Self {
            pid,
            sender,
            events,
            lines: Vec::new(),
            read: 0,
            unfinished: String::new(),
            gone: None,
            exit: None,
            log,
        })
    }

    /// A command whose input is empty and whose output is collected.
    pub fn command(program: &Path) -> Command {
        let mut command = Command::new(program);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// Collects the lines of something else to which the program writes.
    pub fn follow(&self, source: impl Read + Send + 'static) {
        collect(source, Stream::Followed, self.sender.clone());
    }

    /// Waits for a line that contains `text`, beginning after the line that was waited for last.
    ///
    /// # Errors
    /// When the deadline passes or the program ends before there is such a line.
    pub fn wait_for(&mut self, text: &str, patience: Duration) -> Result<Line> {
        self.wait_until(text, patience, |process| process.next_line(text))
    }

    /// Waits for a prompt that contains `text`: a line, of what the test [follows](Process::follow), that need not be
    /// complete.
    ///
    /// # Errors
    /// When the deadline passes or the program ends before there is one.
    pub fn wait_for_prompt(&mut self, text: &str, patience: Duration) -> Result<()> {
        self.wait_until(text, patience, |process| {
            let is_there = process.next_line(text).is_some() || process.unfinished.contains(text);
            is_there.then_some(())
        })
    }

    fn wait_until<T>(
        &mut self,
        text: &str,
        patience: Duration,
        mut found: impl FnMut(&mut Self) -> Option<T>,
    ) -> Result<T> {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(it) = found(self) {
                return Ok(it);
            }
            match self.exit {
                Some(exit) => bail!("no {text:?} before it ended with {}", exit.status),
                None => self
                    .next(deadline)
                    .with_context(|| format!("no {text:?}"))?,
            }
        }
    }

    /// The next line that contains `text`, of those that have not been looked at.
    fn next_line(&mut self, text: &str) -> Option<Line> {
        while let Some(line) = self.lines.get(self.read) {
            self.read += 1;
            if line.text.contains(text) {
                return Some(line.clone());
            }
        }
        None
    }

    /// Waits for the program to end, when others go on that it has started and that write where it did.
    ///
    /// # Errors
    /// When the deadline passes before.
    pub fn wait_alone(&mut self, patience: Duration) -> Result<Exit> {
        let deadline = Instant::now() + patience;
        loop {
            match self.gone {
                Some(exit) => return Ok(exit),
                None => self.next(deadline).context("it did not end")?,
            }
        }
    }

    /// Waits for the program to end, and for the last that was written where it writes.
    ///
    /// # Errors
    /// When the deadline passes before.
    pub fn wait(&mut self, patience: Duration) -> Result<Exit> {
        let deadline = Instant::now() + patience;
        loop {
            match self.exit {
                Some(exit) => return Ok(exit),
                None => self.next(deadline).context("it did not end")?,
            }
        }
    }

    /// The number by which the kernel knows it.
    pub fn id(&self) -> i32 {
        self.pid.as_raw_pid()
    }

    /// The lines so far.
    pub fn lines(&self) -> &[Line] {
        &self.lines
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// When the program has ended already.
    pub fn signal(&mut self, signal: Signal) -> Result<()> {
        self.drain();
        if let Some(exit) = self.gone {
            bail!("it has ended with {}", exit.status);
        }
        kill_process(self.pid, signal).context("sending a signal")
    }

    /// The files that it has open.
    ///
    /// # Errors
    /// When it has ended.
    pub fn open_files(&self) -> Result<Vec<PathBuf>> {
        let folder = format!("/proc/{}/fd", self.pid.as_raw_pid());
        // It may close some meanwhile.
        let links = fs::read_dir(folder)?
            .flatten()
            .map(|entry| fs::read_link(entry.path()));
        Ok(links.flatten().collect())
    }

    fn next(&mut self, deadline: Instant) -> Result<()> {
        let patience = deadline.saturating_duration_since(Instant::now());
        match self.events.recv_timeout(patience) {
            Ok(event) => {
                self.take(event);
                Ok(())
            }
            Err(RecvTimeoutError::Timeout) => {
                if !patience.is_zero() {
                    threads::print();
                }
                Err(anyhow!("the deadline has passed"))
            }
            Err(RecvTimeoutError::Disconnected) => Err(anyhow!("nobody listens to it")),
        }
    }

    fn drain(&mut self) {
        while let Ok(event) = self.events.try_recv() {
            self.take(event);
        }
    }

    fn take(&mut self, event: Event) {
        match event {
            Event::Exit(exit) => {
                let _ = writeln!(self.log, "= {}", exit.status);
                self.exit = Some(exit);
            }
            Event::Gone(exit) => self.gone = Some(exit),
            Event::Unfinished(text) => self.unfinished = text,
            Event::Line(line) => {
                let mark = match line.stream {
                    Stream::Output | Stream::Followed => "",
                    Stream::Error => "! ",
                };
                let _ = writeln!(self.log, "{mark}{}", line.text);
                self.lines.push(line);
            }
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.drain();
        if self.gone.is_none() {
            let _ = kill_process(self.pid, Signal::KILL);
        }
    }
}

fn collect(
    mut source: impl Read + Send + 'static,
    stream: Stream,
    events: Sender<Event>,
) -> JoinHandle<()> {
    thread::spawn(move || {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let line = |bytes: &[u8]| {
            let text = text(bytes).trim_end_matches(['\r', '\n']).to_owned();
            let at = Instant::now();
            events.send(Event::Line(Line { at, stream, text }))
        };
        let mut buffer = [0; 4096];
        let mut bytes = Vec::new();
        // An error is an end as well: it is what a terminal says when its other side is closed.
        while let Ok(length @ 1..) = source.read(&mut buffer) {
            bytes.extend_from_slice(&buffer[..length]);
            while let Some(end) = bytes.iter().position(|byte| *byte == b'\n') {
                if line(&bytes[..=end]).is_err() {
                    return;
                }
                bytes.drain(..=end);
            }
            if stream == Stream::Followed && events.send(Event::Unfinished(text(&bytes))).is_err() {
                return;
            }
        }
        if !bytes.is_empty() {
            let _ = line(&bytes);
        }
    })
}
