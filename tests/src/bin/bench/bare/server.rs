//! The device of the bare VMM: answers to messages, and threads for its doorbell and its interrupt.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::Context;
use tempfile::TempDir;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::{LONG, READ, SHORT, word};
use crate::device::{MEMORY, START, answer, interrupt_often};

/// A server for one bare VMM after the other. It ends with the process.
pub(crate) struct Server {
    socket: PathBuf,
    // Removed with the socket in it on drop.
    _folder: TempDir,
}

impl Server {
    pub(crate) fn start() -> anyhow::Result<Self> {
        let folder = tempfile::tempdir()?;
        let socket = folder.path().join("bare.sock");
        let listener = UnixListener::bind(&socket)?;
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                // A VMM that is killed ends its connection somehow.
                let _ = serve(stream);
            }
        });
        Ok(Self {
            socket,
            _folder: folder,
        })
    }

    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }
}

fn serve(mut stream: UnixStream) -> anyhow::Result<()> {
    let part = FileOffset::new(receive(&stream)?, 0);
    let range = (GuestAddress(0), usize::try_from(MEMORY)?, Some(part));
    let memory = Arc::new(GuestMemoryMmap::<()>::from_ranges_with_files([range])?);
    let doorbell = receive(&stream)?;
    let interrupt = receive(&stream)?;

    let has_ended = Arc::new(AtomicBool::new(false));
    let mut bell = doorbell.try_clone()?;
    let (ended, answers) = (Arc::clone(&has_ended), Arc::clone(&memory));
    let listener = thread::spawn(move || {
        while bell.read_exact(&mut [0; 8]).is_ok() && !ended.load(Ordering::Acquire) {
            answer(&*answers);
        }
    });
    let result = answer_messages(&mut stream, &memory, &interrupt);
    has_ended.store(true, Ordering::Release);
    signal(&doorbell);
    let _ = listener.join();
    result
}

fn answer_messages(
    stream: &mut UnixStream,
    memory: &Arc<GuestMemoryMmap>,
    interrupt: &File,
) -> anyhow::Result<()> {
    let mut message = [0; LONG];
    loop {
        // One message at a time, for each waits for its answer.
        let length = stream.read(&mut message)?;
        if length == 0 {
            return Ok(());
        }
        if message.first() == Some(&READ) {
            stream.write_all(&[0; LONG])?;
            continue;
        }
        stream.write_all(&[0; SHORT])?;
        if u64::from(word(message.get(16..).unwrap_or_default())) == START {
            let count = word(message.get(SHORT..).unwrap_or_default());
            let (memory, interrupt) = (Arc::clone(memory), interrupt.try_clone()?);
            thread::spawn(move || interrupt_often(&*memory, count, || signal(&interrupt)));
        }
    }
}

fn signal(mut event: &File) {
    // An eventfd whose reader has gone takes it nevertheless.
    let _ = event.write_all(&1u64.to_ne_bytes());
}

/// The next file that the VMM shares.
fn receive(stream: &UnixStream) -> anyhow::Result<File> {
    let (_, file) = stream.recv_with_fd(&mut [0])?;
    file.context("no file came")
}
