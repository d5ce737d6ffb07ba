//! Memory that is written all the time, and of which each page says what it has to hold.
//!
//! `MEMORY WRITTEN` says now and then how many pages were found to be as they had been left, and were written again;
//! `MEMORY FAILED why` if one was not. At the end all of them are looked at, before `MEMORY DONE`.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use guest::ledger::Chance;

/// How many pages there are: 16 MiB, more than is written while a page of them is copied elsewhere.
const PAGES: usize = 4096;

/// Words in a page.
const WORDS: usize = 512;

/// Keeps memory busy until that is over.
pub(super) fn keep_busy(is_over: &AtomicBool) -> Result<()> {
    work(is_over).inspect_err(|error| println!("MEMORY FAILED {error:#}"))
}

fn work(is_over: &AtomicBool) -> Result<()> {
    /// At a time, between pauses: what is written must not be more than can be copied.
    const AT_A_TIME: u64 = 8;
    const PAUSE: Duration = Duration::from_millis(10);
    const BETWEEN_LINES: u64 = 256;
    let mut words = vec![0; PAGES * WORDS];
    let mut generations = vec![0_u64; PAGES];
    for (page, words) in words.chunks_exact_mut(WORDS).enumerate() {
        fill(words, page, 0);
    }
    let mut chance = Chance::new(1);
    let mut written = 0;
    while !is_over.load(Ordering::Relaxed) {
        for _ in 0..AT_A_TIME {
            let page = usize::try_from(chance.below(PAGES as u64))?;
            let generation = generations.get_mut(page).context("no such page")?;
            let words = words.chunks_exact_mut(WORDS).nth(page);
            let words = words.context("no such page")?;
            verify(words, page, *generation)?;
            *generation += 1;
            fill(words, page, *generation);
        }
        written += AT_A_TIME;
        if written % BETWEEN_LINES == 0 {
            println!("MEMORY {written}");
        }
        thread::sleep(PAUSE);
    }
    for ((page, words), generation) in words.chunks_exact(WORDS).enumerate().zip(generations) {
        verify(words, page, generation)?;
    }
    println!("MEMORY DONE");
    Ok(())
}

fn contents(page: usize, generation: u64) -> impl Iterator<Item = u64> {
    let mut chance = Chance::new((page as u64) << 40 | generation);
    (0..WORDS).map(move |_| chance.next())
}

fn fill(words: &mut [u64], page: usize, generation: u64) {
    for (word, value) in words.iter_mut().zip(contents(page, generation)) {
        *word = value;
    }
}

fn verify(words: &[u64], page: usize, generation: u64) -> Result<()> {
    ensure!(words.len() == WORDS, "half a page");
    if words.iter().copied().eq(contents(page, generation)) {
        return Ok(());
    }
    // An older one is what a page is that was not copied when it had to be.
    for older in (0..generation).rev() {
        if words.iter().copied().eq(contents(page, older)) {
            bail!("page {page} is of generation {older}, and not {generation}");
        }
    }
    bail!("page {page} is not of generation {generation}, nor of an older one");
}
