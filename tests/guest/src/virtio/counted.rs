//! I/O of one kind after the other, for a test that counts what each costs.
//!
//! `READY KIND` says that a kind comes next, when a line has been typed. `COUNTED KIND NUMBER` says that it is done, and
//! how many requests or packets it was, or pieces of 64 KiB. Behind the last is the kind `end`, when it ends.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::thread;

use anyhow::{Context, Result, ensure};
use guest::ledger::Chance;
use guest::stream::{Order, PORT};

use super::block::{Aligned, Block};
use super::cards::Card;
use super::{CARD, DISK};
use crate::pci::Device;

/// How many requests there are of each kind.
const REQUESTS: u32 = 2048;
/// How many packets are echoed.
const PACKETS: u32 = 512;
/// Bytes that are sent in each direction.
const BULK: u64 = 8 << 20;
/// What they are counted in.
const PIECE: u64 = 64 << 10;

/// Does all of it with the first disk and the first card.
pub(crate) fn all() -> Result<()> {
    let [disk, card] =
        [DISK, CARD].map(|ids| Device::with_ids(ids).map(|mut all| all.drain(..).next()));
    let disk = Block::of(&disk?.context("no disk")?)?.open(true)?;
    let card = Card::of(&card?.context("no card")?)?;
    // Whoever asks for whose address it is has been answered.
    card.echo(8)?;
    for depth in [1, 32] {
        for is_write in [false, true] {
            let kind = if is_write { "write" } else { "read" };
            counted(&format!("{kind}-{depth}"), || {
                random(&disk, depth, is_write)
            })?;
        }
    }
    counted("echo", || card.echo(PACKETS).map(|()| PACKETS.into()))?;
    for (kind, is_upload) in [("upload", true), ("download", false)] {
        counted(kind, || {
            let order = Order {
                seed: 1,
                length: BULK,
                is_upload,
            };
            order.carry_out(card.connect(PORT)?).map(|()| BULK / PIECE)
        })?;
    }
    ready("end")
}

/// Waits for a line.
fn ready(kind: &str) -> Result<()> {
    println!("READY {kind}");
    let mut line = String::new();
    ensure!(io::stdin().read_line(&mut line)? > 0, "nobody types");
    Ok(())
}

fn counted(kind: &str, act: impl FnOnce() -> Result<u64>) -> Result<()> {
    ready(kind)?;
    let count = act().with_context(|| kind.to_owned())?;
    println!("COUNTED {kind} {count}");
    Ok(())
}

/// Reads or writes 4 KiB at places by chance, so many at a time.
fn random(disk: &File, depth: u32, is_write: bool) -> Result<u64> {
    const BLOCK: usize = 4096;
    const BLOCKS: u64 = 4096;
    thread::scope(|scope| {
        let worker = |number: u32| {
            scope.spawn(move || -> io::Result<()> {
                let mut memory = Aligned::new(BLOCK);
                let mut chance = Chance::new(number.into());
                for _ in 0..REQUESTS / depth {
                    let place = chance.below(BLOCKS) * BLOCK as u64;
                    if is_write {
                        disk.write_all_at(memory.bytes(), place)?;
                    } else {
                        disk.read_exact_at(memory.bytes_mut(), place)?;
                    }
                }
                Ok(())
            })
        };
        let workers: Vec<_> = (0..depth).map(worker).collect();
        workers.into_iter().try_for_each(|thread| {
            let result = thread.join().ok().context("a thread panicked")?;
            Ok::<_, anyhow::Error>(result?)
        })
    })?;
    Ok(REQUESTS.into())
}
