//! Jobs of a disk: `read`, `write`, `randread` and `randwrite`, each with the bytes of a request and how many there are at
//! a time behind it, as in `randread-4096-32`.

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::time::Instant;

use anyhow::Result;
use guest::ledger::Chance;

use super::requests::{Requests, keep};

/// Requests of one kind.
#[derive(Clone, Copy, Debug)]
pub(super) struct Job {
    requests: Requests,
    /// Whether they go anywhere, or one behind the other.
    is_random: bool,
}

impl Job {
    pub(super) fn parse(name: &str) -> Option<Self> {
        let mut words = name.split('-');
        let kind = words.next()?;
        let mut number = || words.next()?.parse().ok();
        Some(Self {
            requests: Requests {
                writes: kind.ends_with("write"),
                length: number()?,
                depth: number()?,
            },
            is_random: kind.starts_with("rand"),
        })
    }

    /// Goes on until it is time to end. Returns how many requests that was.
    pub(super) fn carry_out(&self, mut disk: &File, end: Instant) -> Result<u64> {
        let length = u64::from(self.requests.length);
        let places = disk.seek(SeekFrom::End(0))? / length.max(1);
        let mut chance = Chance::new(1);
        let mut next = 0..;
        keep(disk, self.requests, end, || {
            let place = match self.is_random {
                true => chance.below(places),
                false => next.next().unwrap_or_default() % places.max(1),
            };
            place * length
        })
    }
}
